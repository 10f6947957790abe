"""Decode a DICOM radiograph. Needs pydicom (`pip install "mmclip-dist[dicom]"`)."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmclip_shards.grey import Window, check_pixels, grey_array

if TYPE_CHECKING:
    from pydicom import Dataset

    from mmclip_shards.rawpath import RawPath


# What pydicom was seen to raise on damaged files, beside its own errors; NotImplementedError is a RuntimeError.
_DAMAGE = (
    OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, struct.error,
)  # fmt: skip

_NO_PICTURES = ("RTDOSE", "SEG")

_COLOURS = (
    "ARGB", "CMYK", "HSV", "PALETTE COLOR", "RGB", "XYB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_PARTIAL_420",
    "YBR_PARTIAL_422", "YBR_RCT",
)  # fmt: skip

_QUOTED = re.compile(r"""(?<!\w)b?(['"]).*?\1(?!\w)""", re.DOTALL)
_LONGEST = 300  # characters of a reason

_COMPRESSED = "1.2.840.10008.1.2.4."
_PLUGINS = {
    **dict.fromkeys(("50", "51", "57", "70"), "pylibjpeg pylibjpeg-libjpeg"),
    **dict.fromkeys(("80", "81"), "pyjpegls"),
    **dict.fromkeys(("90", "91", "201", "202", "203"), "pylibjpeg pylibjpeg-openjpeg"),
}
"""Transfer syntax after `_COMPRESSED` -> the packages of the plugin that decodes all of it. Pillow decodes some files."""


def is_dicom(data: RawPath | bytes) -> bool:
    """Whether a file or its bytes carry DICOM's mark. False for a file that cannot be read."""
    if isinstance(data, bytes):
        return data[128:132] == b"DICM"
    try:
        with data.open("rb", 132) as handle:
            return handle.read(132)[128:] == b"DICM"
    except OSError:
        return False


def decode_dicom(data: Path | bytes | Dataset, window: Window | None = None) -> Image.Image:
    """A DICOM radiograph -> an 8-bit image of mode "L" with square pixels, air dark and bone bright. It carries no metadata.

    The stored values go through the modality's and the first window's transformation and are scaled to 0 ... 255; MONOCHROME1 is
    inverted, padding is black. window: percentiles to scale from, in place of minimum and maximum. ValueError that says why for
    what is no grey image of one frame, for a compression that no installed plugin decodes (it names the one to install), and
    without pydicom.
    """
    return read_dicom(data, window)[0]


def read_dicom(data: Path | bytes | Dataset, window: Window | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """`decode_dicom`, and (columns, rows) as they are stored, which boxes are given in. Errors as there."""
    pydicom = _pydicom()
    try:
        with pydicom.config.disable_value_validation():  # its warnings quote what a damaged header holds, names too
            source = io.BytesIO(data) if isinstance(data, bytes) else data
            found = source if isinstance(source, pydicom.Dataset) else pydicom.dcmread(source)
            return _read(found, window)
    except (pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException, *_DAMAGE) as error:
        name = str(data) if isinstance(data, Path) else "image data"
        raise ValueError(f"{name} is not a usable DICOM radiograph: {_reason(error)}") from error


def _read(found: Dataset, window: Window | None) -> tuple[Image.Image, tuple[int, int]]:
    _check_kind(found)
    size = int(found.get("Columns") or 0), int(found.get("Rows") or 0)
    check_pixels(size)  # before they are decompressed
    stored = _stored_values(found)
    values = _shown_values(stored, found)
    if found.get("PhotometricInterpretation") == "MONOCHROME1":
        values = -values
    padding = _padding(stored, found)
    values[padding] = 0 if padding.all() else values[~padding].min()
    return _square(grey_array(values, window), found), size


class _Refused(ValueError):
    """Its text is ours, and quotes nothing of the file but names of the standard."""


def _reason(error: Exception) -> str:
    """What is wrong, in one line. What pydicom and Python quote is cut out: it may be any part of a damaged header."""
    told = " ".join(str(error).split())
    if not isinstance(error, _Refused):
        told = _QUOTED.sub("'...'", told)[:_LONGEST]
    return told or type(error).__name__


def _check_kind(found: Dataset) -> None:
    """_Refused, which names what an object is, unless it is one grey image."""
    uid = found.get("SOPClassUID")
    kind = "no class" if not uid else uid.name if uid.name != uid else "an unknown class"
    if not any(name in found for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise _Refused(f"it holds no pixels ({kind})")
    if (frames := int(found.get("NumberOfFrames") or 1)) != 1:
        raise _Refused(f"it holds {frames} frames ({kind}); one grey frame is needed")
    meaning = found.get("PhotometricInterpretation") or "MONOCHROME2"
    if found.get("SamplesPerPixel", 1) != 1 or meaning not in ("MONOCHROME1", "MONOCHROME2"):
        raise _Refused(f"it holds colours ({meaning if meaning in _COLOURS else 'unknown'}); one grey frame is needed")
    if found.get("Modality") in _NO_PICTURES:
        raise _Refused(f"its pixels are no picture ({kind})")


def _stored_values(found: Dataset) -> np.ndarray:
    """Whole numbers [rows, columns]; of floating-point pixels, these."""
    below, bits = _bits_below(found), found.get("BitsStored")
    try:
        if below:
            found.BitsStored = bits + below  # pydicom takes the lowest bits, whatever HighBit says
        values: np.ndarray = found.pixel_array
    except (RuntimeError, NotImplementedError) as error:
        syntax = found.file_meta.TransferSyntaxUID
        plugin = _PLUGINS.get(syntax.removeprefix(_COMPRESSED))
        if plugin is None and isinstance(error, NotImplementedError) and syntax.name != syntax:
            raise _Refused(f"no plugin decodes its {syntax.name} ({syntax})") from error
        if plugin is None:
            raise
        raise _Refused(
            f"no installed plugin decodes this {syntax.name} ({syntax}): pip install {plugin}; "
            "if that is there, the file is damaged"
        ) from error
    finally:
        if below:
            found.BitsStored = bits  # the dataset may be the caller's
    return values >> below if below else values


def _bits_below(found: Dataset) -> int:
    """Bits of each stored word that are empty below the value."""
    high, bits = found.get("HighBit"), found.get("BitsStored")
    syntax = found.file_meta.get("TransferSyntaxUID") if hasattr(found, "file_meta") else None
    if high is None or bits is None or syntax is None or syntax.is_encapsulated:
        return 0
    return max(0, int(high) + 1 - int(bits))


# pydicom's `apply_modality_lut` and `apply_voi_lut` are not used: with a falling slope they turn a window upside down, and they
# count places in a table in the type of its entries, which 8 bits of 4,096 overflow.


def _shown_values(stored: np.ndarray, found: Dataset) -> np.ndarray:
    """Stored values -> those to show, the low ones dark: modality LUT or slope, then the first VOI LUT or window (PS3.3, C.11.1,
    C.11.2). float64 of the same shape."""
    values = stored.astype(np.float64)
    if tables := found.get("ModalityLUTSequence"):
        values = _looked_up(values, tables[0], found, "modality LUT")
    elif found.get("RescaleSlope") is not None and found.get("RescaleIntercept") is not None:
        values = values * float(found.RescaleSlope) + float(found.RescaleIntercept)
    if (tables := found.get("VOILUTSequence")) and tables[0].get("LUTData") is not None:
        return _looked_up(values, tables[0], found, "VOI LUT")
    if found.get("WindowCenter") is not None and found.get("WindowWidth") is not None:
        center, width = _first(found.WindowCenter), _first(found.WindowWidth)
        return _windowed(values, center, width, (found.get("VOILUTFunction") or "LINEAR").upper())
    return values


def _looked_up(values: np.ndarray, item: Dataset, found: Dataset, name: str) -> np.ndarray:
    """Values through the table of a LUT sequence's item. Those before and behind it get its first and last entry."""
    entries, start, bits = item.LUTDescriptor
    entries = entries or 1 << 16
    if found.get("PixelRepresentation") == 1 and start >= 1 << 15:
        start -= 1 << 16  # signed, and written as if it was not
    data = item.LUTData
    little = not isinstance(data, bytes) or found.file_meta.TransferSyntaxUID.is_little_endian
    words = (
        np.frombuffer(data, "<u2" if little else ">u2")
        if isinstance(data, bytes)
        else np.atleast_1d(data).astype("<u2")
    )
    table = words.astype("<u2").view(np.uint8) if bits == 8 and len(words) == -(-entries // 2) else words
    if len(table) < entries:
        raise _Refused(f"its {name} holds {len(table)} entries, and {entries} are said to be there")
    places = np.clip(np.rint(values - start), 0, entries - 1).astype(np.int64)
    return table[places].astype(np.float64)


def _windowed(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Values through a window -> 0 to 1."""
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise _Refused("its window has an unknown function")
    if width <= 0 or (function == "LINEAR" and width < 1):
        raise _Refused(f"its window is {width:g} wide")
    if function == "SIGMOID":
        return 0.5 + 0.5 * np.tanh(2 * (values - center) / width)  # 1 / (1 + exp(-4 (x - c) / w)), and no overflow
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return np.clip((values - center) / width + 0.5, 0, 1) if width else (values > center).astype(np.float64)


def _padding(stored: np.ndarray, found: Dataset) -> np.ndarray:
    """Where an image was filled up to a rectangle: stored values from Pixel Padding Value to Range Limit (PS3.3, C.7.5.1.1.2)."""
    if found.get("PixelPaddingValue") is None or "PixelData" not in found:
        return np.zeros(stored.shape, bool)
    kind = np.int16 if found.get("PixelRepresentation") == 1 else np.uint16  # some files have it in the other
    ends = [found.PixelPaddingValue, found.get("PixelPaddingRangeLimit")]
    low, *_, high = sorted(int(np.array(end).astype(kind)) for end in ends if end is not None) * 2
    return (stored >= low) & (stored <= high)


def _square(image: Image.Image, found: Dataset) -> Image.Image:
    """The image with pixels as tall as wide; what differs by less than 1 % is a rounded digit."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        if found.get(name) is not None and min(sides := [float(side) for side in found[name].value]) > 0:
            ratio = sides[0] / sides[1]
            break
    else:
        return image
    if abs(ratio - 1) < 0.01:
        return image
    width, height = round(image.width * max(1, 1 / ratio)), round(image.height * max(1, ratio))
    check_pixels((width, height))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _first(values: float | Sequence[float]) -> float:
    """The first of one or several; pydicom gives a text for what is no number, which is refused."""
    return float(values[0] if isinstance(values, Sequence) and not isinstance(values, str) else values)


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ValueError('DICOM files need pydicom: pip install "mmclip-dist[dicom]"') from error
    return pydicom
