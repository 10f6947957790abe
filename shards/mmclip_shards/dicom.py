"""Decode a DICOM radiograph. Needs pydicom (`pip install "mmclip-dist[dicom]"`)."""

from __future__ import annotations

import io
import struct
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
    """A DICOM radiograph -> an 8-bit image of mode "L", air dark and bone bright. It carries no metadata.

    The stored values go through the modality's and the first window's transformation and are scaled to 0 ... 255; MONOCHROME1 is
    inverted. window: percentiles to scale from, in place of minimum and maximum. ValueError that says why for what is no grey
    image of one frame, for a compression that no installed plugin decodes (it names the one to install), and without pydicom.
    """
    pydicom = _pydicom()
    try:
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        found = source if isinstance(source, pydicom.Dataset) else pydicom.dcmread(source)
        _check_kind(found)
        check_pixels((int(found.get("Columns") or 0), int(found.get("Rows") or 0)))  # before they are decompressed
        values = pydicom.pixels.apply_modality_lut(_stored_values(found), found)
        values = np.asarray(pydicom.pixels.apply_voi_lut(values, found), dtype=np.float64)
        return grey_array(-values if found.get("PhotometricInterpretation") == "MONOCHROME1" else values, window)
    except (pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException, *_DAMAGE) as error:
        name = str(data) if isinstance(data, Path) else "image data"
        raise ValueError(f"{name} is not a usable DICOM radiograph: {' '.join(str(error).split())}") from error


def _check_kind(found: Dataset) -> None:
    """ValueError that names what an object is, unless it is one grey image."""
    kind = getattr(found.get("SOPClassUID"), "name", "") or found.get("Modality") or "no class"
    if not any(name in found for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ValueError(f"it holds no pixels ({kind})")
    if (frames := int(found.get("NumberOfFrames") or 1)) != 1:
        raise ValueError(f"it holds {frames} frames ({kind}); one grey frame is needed")
    meaning = found.get("PhotometricInterpretation") or "MONOCHROME2"
    if found.get("SamplesPerPixel", 1) != 1 or meaning not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"it holds colours ({meaning}); one grey frame is needed")
    if found.get("Modality") in _NO_PICTURES:
        raise ValueError(f"its pixels are no picture ({kind})")


def _stored_values(found: Dataset) -> np.ndarray:
    try:
        values: np.ndarray = found.pixel_array
    except (RuntimeError, NotImplementedError) as error:
        syntax = found.file_meta.TransferSyntaxUID
        plugin = _PLUGINS.get(syntax.removeprefix(_COMPRESSED))
        if plugin is None:
            raise
        raise ValueError(
            f"no installed plugin decodes this {syntax.name} ({syntax}): pip install {plugin}; "
            "if that is there, the file is damaged"
        ) from error
    return values


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ValueError('DICOM files need pydicom: pip install "mmclip-dist[dicom]"') from error
    return pydicom
