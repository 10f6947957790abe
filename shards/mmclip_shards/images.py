"""Decode a study image to 8 bits and a single channel, and prepare it for a shard."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmclip_shards.grey import grey_image, rescale_to_8_bit
from mmclip_shards.schema import Box

MAX_PIXELS = 100_000_000
"""Larger images are refused by the size in their header (decompression bombs). The largest radiographs have about 25
million pixels."""

JPEG_QUALITY = 95

_DECODE_ERRORS = (
    OSError,
    SyntaxError,  # Pillow raises it for a broken PNG
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class PreparedImage(NamedTuple):
    """An image as a shard holds it. data: JPEG or PNG, 8-bit single channel; suffix: "jpg" or "png"; width, height, boxes: in
    its pixels."""

    data: bytes
    suffix: str
    width: int
    height: int
    boxes: tuple[Box, ...] = ()


class ImageFacts(NamedTuple):
    """Facts about an encoded image. suffix: "jpg" or "png"; mode: Pillow's, "L" for 8-bit single channel."""

    suffix: str
    mode: str
    width: int
    height: int


def decode_image(data: bytes | Path | Image.Image | np.ndarray) -> Image.Image:
    """A JPEG or PNG, as a file or its bytes, a Pillow image or an array [height, width] -> an 8-bit image of mode "L", upright.
    Everything that reads pixels uses this.

    EXIF orientation is applied, colour becomes luma, transparent pixels become black, and anything deeper than 8 bits
    is rescaled (`rescale_to_8_bit`). The image carries no metadata: it can name the patient. ValueError that names the
    file when it cannot be used.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(_array_to_8_bit(data))
    if isinstance(data, Image.Image):
        try:
            check_pixels(data.size)
            return _grey(data)
        except _DECODE_ERRORS as error:
            raise ValueError(f"the Pillow image cannot be used: {_reason(error)}") from error
    return _decode(data)[0]


def prepare_image(image: Path | bytes | np.ndarray, short_side: int, boxes: Sequence[Box] = ()) -> PreparedImage:
    """Decode an image (`decode_image`), reduce its shorter side to at most `short_side` pixels, encode it, scale its boxes.

    JPEG stays JPEG (quality 95); PNG, DICOM and arrays [height, width] become PNG. No image is enlarged. No metadata is kept: it
    can name the patient. ValueError that names the file when it cannot be used.
    """
    from mmclip_shards.dicom import decode_dicom, is_dicom  # it imports this module

    if isinstance(image, np.ndarray):
        pixels, suffix = Image.fromarray(_array_to_8_bit(image)), "png"
    elif is_dicom(image):
        pixels, suffix = decode_dicom(image), "png"
    else:
        pixels, suffix = _decode(image)
    before = pixels.size
    pixels = _reduce(pixels, short_side)
    scale_x, scale_y = pixels.width / before[0], pixels.height / before[1]
    return PreparedImage(
        data=_encode(pixels, suffix),
        suffix=suffix,
        width=pixels.width,
        height=pixels.height,
        boxes=tuple(_scale_box(box, scale_x, scale_y) for box in boxes),
    )


def image_facts(data: bytes, *, decode: bool) -> ImageFacts:
    """Facts from an image's header. decode: also decode all of it. ValueError when that fails."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as source:
            check_pixels(source.size)
            if decode:
                source.load()
            return ImageFacts(_suffix(source), source.mode, source.width, source.height)
    except _DECODE_ERRORS as error:
        raise ValueError(f"not a usable JPEG or PNG: {_reason(error)}") from error


def _decode(data: Path | bytes) -> tuple[Image.Image, str]:
    """The upright 8-bit image, and the suffix to store it under."""
    try:
        # Pillow knows some 40 formats, and some of them start other programs: allow only these two.
        source = Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=("JPEG", "PNG"))
        with source:
            check_pixels(source.size)
            suffix = _suffix(source)
            return _grey(source), suffix
    except _DECODE_ERRORS as error:
        raise ValueError(f"{_name(data)} is not a usable JPEG or PNG: {_reason(error)}") from error


def _grey(source: Image.Image) -> Image.Image:
    """The upright 8-bit image, without metadata."""
    image = grey_image(source)
    image.info = {}  # Pillow would write the comments and profiles in it into every saved copy
    return image


def _name(image: object) -> str:
    return str(image) if isinstance(image, Path) else "image data"


def _suffix(source: Image.Image) -> str:
    return "jpg" if source.format in ("JPEG", "MPO") else "png"


def _array_to_8_bit(array: np.ndarray) -> np.ndarray:
    name = _name(array)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; a single-channel image [height, width] is needed")
    if array.dtype.kind not in "uif":
        raise ValueError(f"{name} has pixels of type {array.dtype}; whole or floating-point numbers are needed")
    try:
        check_pixels((array.shape[1], array.shape[0]))
        return array if array.dtype == np.uint8 else rescale_to_8_bit(array)
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}") from error


def check_pixels(size: tuple[int, int]) -> None:
    """ValueError for an image of (width, height) that would fill the memory when it is decoded."""
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels are more than {MAX_PIXELS:,}")


def _reduce(image: Image.Image, short_side: int) -> Image.Image:
    if short_side < 1:
        raise ValueError(f"short_side is {short_side}; it must be at least 1 pixel")
    shorter = min(image.size)
    if shorter <= short_side:
        return image
    width, height = (max(1, round(side * short_side / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _encode(image: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == "jpg":
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _scale_box(box: Box, scale_x: float, scale_y: float) -> Box:
    return replace(box, x=box.x * scale_x, y=box.y * scale_y, width=box.width * scale_x, height=box.height * scale_y)


def _reason(error: BaseException) -> str:
    # Pillow's message for an unknown format holds the address of a buffer, which changes from run to run.
    if isinstance(error, Image.UnidentifiedImageError):
        return "it has another format"
    # An operating system's own message repeats the path, which may name the patient.
    return (isinstance(error, OSError) and error.strerror) or str(error)
