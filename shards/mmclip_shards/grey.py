"""Any image to 8 bits and a single channel. Needs Pillow and NumPy alone: exported models carry a copy of this file."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def grey_image(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode -> a new one of mode "L", upright by its EXIF orientation."""
    return _to_8_bit(ImageOps.exif_transpose(image))


def _to_8_bit(image: Image.Image) -> Image.Image:
    """A loaded image in mode "L". Returns the same object if it has that mode already."""
    if image.mode in _DEEP_MODES:
        return Image.fromarray(rescale_to_8_bit(np.asarray(image)))
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "black")  # the background of a radiograph
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    if image.mode == "L":
        return image
    if image.mode != "1":
        image = image.convert("RGB")  # Pillow does not convert palettes and CMYK to luma directly
    return image.convert("L")


def rescale_to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale linearly, minimum to 0 and maximum to 255; a constant image becomes 0. values [height, width] -> uint8.

    Pillow's `.convert("L")` clips at 255 instead, which turns a 16-bit radiograph white.
    """
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it holds pixels that are not finite numbers")
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return np.rint((values.astype(np.float64) - low) * (255.0 / (high - low))).astype(np.uint8)
