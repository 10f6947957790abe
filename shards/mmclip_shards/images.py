"""Decode a study image to 8 bits and a single channel, and prepare it for a shard."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from mmclip_shards.clahe import equalise
from mmclip_shards.grey import FORMATS, Window, check_pixels, grey_array, grey_image
from mmclip_shards.schema import Box

_WEBP_SIDE = 16_383
_ORIENTATION = 0x0112
_GZIP = b"\x1f\x8b"
_LARGEST_FILE = 1 << 29  # a radiograph of 16 bits has 10 to 40 MB
_FINER = 2  # a JPEG's decoder leaves this many times the wanted pixels, and the filter that takes the rest decides the quality

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

Format = Literal["source", "jpg", "png", "webp-lossless"]

_DECODE_ERRORS = (
    OSError,
    SyntaxError,  # Pillow raises it for a broken PNG
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Rendering:
    """How a packed image is made, beside its size.

    format: "source" (JPEG stays JPEG, all else becomes PNG), or one for all images. quality: of JPEG, 1 to 100. window:
    percentiles of an image's values that become black and white; None: 8 bits stay as they are, deeper ones are scaled from
    minimum to maximum. clahe: contrast-limited adaptive histogram equalisation (`clahe.equalise`). ValueError for what cannot be.
    """

    format: Format = "source"
    quality: int = 95
    window: Window | None = None
    clahe: bool = False

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ValueError(f"format {self.format!r} is unknown; it must be one of {', '.join(get_args(Format))}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it must be between 1 and 100")
        if self.window is not None and not 0 <= self.window[0] < self.window[1] <= 100:
            low, high = self.window
            raise ValueError(f"window is {low:g},{high:g}; two rising percentiles between 0 and 100 are needed")


AS_PUBLISHED = Rendering()


class PreparedImage(NamedTuple):
    """An image as a shard holds it. data: 8-bit single channel; suffix: "jpg", "png" or "webp"; width, height, boxes: in its
    pixels."""

    data: bytes
    suffix: str
    width: int
    height: int
    boxes: tuple[Box, ...] = ()


class ImageFacts(NamedTuple):
    """Facts about an encoded image. suffix: "jpg", "png" or "webp"; mode: Pillow's, "L" for 8-bit single channel (WebP has
    none and stores it as "RGB")."""

    suffix: str
    mode: str
    width: int
    height: int


class _Picture(NamedTuple):
    """A decoded image. pixels: mode "L", upright; suffix: to store it under; size: (width, height) of the whole image; extent:
    its (width, height) in `pixels`, which may be fewer."""

    pixels: Image.Image
    suffix: str
    size: tuple[int, int]
    extent: tuple[float, float]


def decode_image(data: bytes | Path | Image.Image | np.ndarray) -> Image.Image:
    """A JPEG, PNG or WebP (a file or its bytes), a Pillow image or an array [height, width] -> an 8-bit image of mode "L",
    upright. Everything that reads pixels uses this.

    EXIF orientation is applied, colour becomes luma, transparent pixels become black, and anything deeper than 8 bits
    is rescaled (`rescale_to_8_bit`). The image carries no metadata: it can name the patient. ValueError that names the
    file when it cannot be used.
    """
    return _decode(data).pixels


def prepare_image(
    image: Path | bytes | np.ndarray, short_side: int, boxes: Sequence[Box] = (), rendering: Rendering = AS_PUBLISHED
) -> PreparedImage:
    """Decode an image (`decode_image`), reduce its shorter side to at most `short_side` pixels, encode it, scale its boxes.

    JPEG stays JPEG (quality 95); PNG, DICOM and arrays [height, width] become PNG, unless `rendering` says else. No image is
    enlarged. No metadata is kept: it can name the patient. ValueError that names the file when it cannot be used.
    """
    from mmclip_shards.dicom import is_dicom, read_dicom  # needed for DICOM alone

    if short_side < 1:
        raise ValueError(f"short_side is {short_side}; it must be at least 1 pixel")
    if isinstance(image, bytes) and image.startswith(_GZIP):
        image = _unpacked(image)
    if not isinstance(image, np.ndarray) and is_dicom(image):
        decoded, given = read_dicom(image, rendering.window)
        found = _whole(decoded, "png")
    else:
        found = _decode(image, short_side, rendering.window)
        given = found.size
    pixels = _reduce(found, short_side)
    if rendering.clahe:
        pixels = Image.fromarray(equalise(np.asarray(pixels)))
    suffix = found.suffix if rendering.format == "source" else rendering.format.removesuffix("-lossless")
    if suffix == "webp" and max(pixels.size) > _WEBP_SIDE:
        raise ValueError(
            f"{_name(image)} is {max(pixels.size)} pixels long, and WebP ends at {_WEBP_SIDE:,}: pack as png"
        )
    scale_x, scale_y = pixels.width / given[0], pixels.height / given[1]
    return PreparedImage(
        data=_encode(pixels, suffix, rendering.quality),
        suffix=suffix,
        width=pixels.width,
        height=pixels.height,
        boxes=tuple(_scale_box(box, scale_x, scale_y) for box in boxes),
    )


def _unpacked(data: bytes) -> bytes:
    """The content of a gzip file: older releases of MIMIC-CXR hold .dcm.gz."""
    opened = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        content = opened.decompress(data, _LARGEST_FILE)
    except zlib.error as error:
        raise ValueError(f"image data is a damaged gzip file: {error}") from error
    if not opened.eof:
        raise ValueError(f"image data is a gzip file that is cut, or longer than {_LARGEST_FILE >> 20} MiB")
    return content


def image_facts(data: bytes, *, decode: bool) -> ImageFacts:
    """Facts from an image's header. decode: also decode all of it. ValueError when that fails."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as source:
            check_pixels(source.size)
            if decode:
                source.load()
            return ImageFacts(_SUFFIXES[source.format or ""], source.mode, source.width, source.height)
    except _DECODE_ERRORS as error:
        raise ValueError(f"not a usable JPEG, PNG or WebP: {_reason(error)}") from error


def _decode(
    data: Path | bytes | Image.Image | np.ndarray, short_side: int | None = None, window: Window | None = None
) -> _Picture:
    """short_side: pixels that the shorter side will be reduced to, so that finer detail need not be decoded."""
    try:
        if isinstance(data, bytes) and not data:
            raise ValueError("the file is empty")
        if isinstance(data, np.ndarray):
            return _whole(grey_array(data, window), "png")
        if isinstance(data, Image.Image):
            return _whole(_without_metadata(grey_image(data, window)), "png")
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=FORMATS) as source:
            check_pixels(source.size)
            # A raw WebP may be stored with losses or without: PNG is always right.
            suffix = "jpg" if source.format in ("JPEG", "MPO") else "png"
            size = source.size
            extent = None if short_side is None else _decode_coarsely(source, _FINER * short_side)
            pixels = _without_metadata(grey_image(source, window))
            return _whole(pixels, suffix) if extent is None else _Picture(pixels, suffix, size, extent)
    except _DECODE_ERRORS as error:
        wrong = "cannot be used" if isinstance(data, Image.Image | np.ndarray) else "is not a usable JPEG, PNG or WebP"
        raise ValueError(f"{_name(data)} {wrong}: {_reason(error)}") from error


def _decode_coarsely(source: Image.Image, short_side: int) -> tuple[float, float] | None:
    """Have a JPEG decoded at a half, a quarter or an eighth that leaves `short_side` pixels -> its extent then; None: the whole.

    The decoder averages in the frequency domain, so this is an antialiased reduction, at a fraction of the time.
    """
    times = min(source.size) // short_side
    # Turned images are left whole: their uneven last row would come first.
    if times < 2 or source.format not in ("JPEG", "MPO") or source.getexif().get(_ORIENTATION, 1) != 1:
        return None
    found = source.draft(None, (source.width // times, source.height // times))
    return None if found is None else found[1][2:]


def _whole(pixels: Image.Image, suffix: str) -> _Picture:
    return _Picture(pixels, suffix, pixels.size, pixels.size)


def _without_metadata(image: Image.Image) -> Image.Image:
    image.info = {}  # Pillow would write the comments and profiles in it into every saved copy
    return image


def _name(image: object) -> str:
    if isinstance(image, Image.Image):
        return "the Pillow image"
    return str(image) if isinstance(image, Path) else "image data"


def _reduce(found: _Picture, short_side: int) -> Image.Image:
    shorter = min(found.size)
    if shorter <= short_side:
        return found.pixels
    width, height = (max(1, round(side * short_side / shorter)) for side in found.size)
    turned = Image.Transpose.TRANSPOSE
    if found.extent == found.size:  # the sides in the order of Pillow's own `resize`, which gives these very bytes
        narrow = _shorten(found.pixels.transpose(turned), width, found.extent[0]).transpose(turned)
        return _shorten(narrow, height, found.extent[1])
    low = _shorten(found.pixels, height, found.extent[1])  # less is turned, and the bytes are new in any case
    return _shorten(low.transpose(turned), width, found.extent[0]).transpose(turned)


def _shorten(image: Image.Image, height: int, extent: float) -> Image.Image:
    """The first `extent` rows of an image of mode "L" -> `height` rows, by Lanczos' filter.

    Pillow filters a pixel of four bands in little more time than one of a single band, and fastest along columns: four
    neighbours in a row pass for one pixel.
    """
    fours = -(-image.width // 4)
    padded = image if image.width == 4 * fours else image.crop((0, 0, 4 * fours, image.height))
    pixels = _view(padded, "CMYK", fours).resize((fours, height), Image.Resampling.LANCZOS, box=(0, 0, fours, extent))
    found = _view(pixels, "L", 4 * fours)
    return found if padded is image else found.crop((0, 0, image.width, height))


def _view(image: Image.Image, mode: str, width: int) -> Image.Image:
    """The bytes of an image as one of another mode and width."""
    return Image.frombuffer(mode, (width, image.height), image.tobytes(), "raw", mode, 0, 1)


def _encode(image: Image.Image, suffix: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    if suffix == "jpg":
        image.save(buffer, "JPEG", quality=quality)
    elif suffix == "webp":
        image.save(buffer, "WEBP", lossless=True)
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
