"""Any image to 8 bits and a single channel. Needs Pillow and NumPy alone: exported models carry a copy of this file."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
"""The formats that are read. Pillow knows some 40, and some of them start other programs."""

MAX_PIXELS = 100_000_000
"""Larger images are refused by the size in their header (decompression bombs). The largest radiographs have about 25
million pixels."""

Window = tuple[float, float]
"""Two percentiles of a picture's values: those below the first become black, those above the second white."""

_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def grey_image(image: Image.Image, window: Window | None = None) -> Image.Image:
    """A Pillow image of any mode -> a new one of mode "L", upright by its EXIF orientation.

    Colour becomes luma, transparent pixels become black, and anything deeper than 8 bits is rescaled (with a window, 8 bits too).
    """
    check_pixels(image.size)
    return _to_8_bit(ImageOps.exif_transpose(image), window)


def grey_array(values: np.ndarray, window: Window | None = None) -> Image.Image:
    """Grey values [height, width] -> an image of mode "L". 8 bits stay as they are without a window, all else is rescaled."""
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"it has shape {values.shape}; a single-channel image [height, width] is needed")
    if values.dtype.kind not in "uif":
        raise ValueError(f"it has pixels of type {values.dtype}; whole or floating-point numbers are needed")
    check_pixels((values.shape[1], values.shape[0]))
    return Image.fromarray(values if values.dtype == np.uint8 and window is None else rescale_to_8_bit(values, window))


def check_pixels(size: tuple[int, int]) -> None:
    """ValueError for an image of (width, height) that would fill the memory when it is decoded."""
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]} x {size[1]} pixels are more than {MAX_PIXELS:,}")


def _to_8_bit(image: Image.Image, window: Window | None) -> Image.Image:
    """A loaded image in mode "L". Returns the same object if it has that mode already."""
    if image.mode in _DEEP_MODES:
        return Image.fromarray(rescale_to_8_bit(np.asarray(image), window))
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "black")  # the background of a radiograph
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    if image.mode != "L":
        if image.mode != "1":
            image = image.convert("RGB")  # Pillow does not convert palettes and CMYK to luma directly
        image = image.convert("L")
    return image if window is None else Image.fromarray(rescale_to_8_bit(np.asarray(image), window))


def rescale_to_8_bit(values: np.ndarray, window: Window | None = None) -> np.ndarray:
    """Scale linearly, minimum to 0 and maximum to 255; a constant image becomes 0. values [height, width] -> uint8.

    window: these percentiles in place of minimum and maximum; ValueError if they are equal, and the image is not constant.
    Pillow's `.convert("L")` clips at 255 instead, which turns a 16-bit radiograph white.
    """
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it holds pixels that are not finite numbers")
    if low == high:
        return np.zeros(values.shape, np.uint8)
    if window is not None:
        low, high = (float(value) for value in np.percentile(values, window))
        if low == high:
            raise ValueError(f"its percentiles {window[0]:g} and {window[1]:g} are equal: choose a wider window")
        values = np.clip(values, low, high)
    return np.rint((values.astype(np.float64) - low) * (255.0 / (high - low))).astype(np.uint8)
