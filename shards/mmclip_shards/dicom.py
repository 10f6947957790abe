"""Decode a DICOM radiograph. Needs pydicom (`pip install "mmclip-dist[dicom]"`)."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmclip_shards.images import check_pixels, decode_image

if TYPE_CHECKING:
    from pydicom import Dataset


# What pydicom was seen to raise on damaged files, beside its own errors; NotImplementedError is a RuntimeError.
_DAMAGE = (
    OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, struct.error,
)  # fmt: skip


def is_dicom(data: Path | bytes) -> bool:
    """Whether a file or its bytes carry DICOM's mark. False for a file that cannot be read."""
    if isinstance(data, bytes):
        return data[128:132] == b"DICM"
    try:
        with data.open("rb") as handle:
            return handle.read(132)[128:] == b"DICM"
    except OSError:
        return False


def decode_dicom(data: Path | bytes | Dataset) -> Image.Image:
    """A DICOM radiograph -> an 8-bit image of mode "L", air dark and bone bright. It carries no metadata.

    The stored values go through the modality's and the first window's transformation and are scaled to 0 ... 255; MONOCHROME1 is
    inverted. ValueError for colour, for several frames, for a compression that pydicom lacks a decoder of, and without pydicom.
    """
    pydicom = _pydicom()
    try:
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        found = source if isinstance(source, pydicom.Dataset) else pydicom.dcmread(source)
        if int(found.get("NumberOfFrames") or 1) != 1 or found.get("SamplesPerPixel", 1) != 1:
            raise ValueError("it holds colours or several frames; one grey frame is needed")
        check_pixels((int(found.get("Columns") or 0), int(found.get("Rows") or 0)))  # before they are decompressed
        values = pydicom.pixels.apply_modality_lut(found.pixel_array, found)
        values = np.asarray(pydicom.pixels.apply_voi_lut(values, found), dtype=np.float64)
    except (pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException, *_DAMAGE) as error:
        name = str(data) if isinstance(data, Path) else "DICOM data"
        raise ValueError(f"{name} is not a usable DICOM radiograph: {' '.join(str(error).split())}") from error
    inverted = found.get("PhotometricInterpretation") == "MONOCHROME1"
    return decode_image(-values if inverted else values)


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ValueError('DICOM files need pydicom: pip install "mmclip-dist[dicom]"') from error
    return pydicom
