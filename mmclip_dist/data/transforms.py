"""Image and attention grid, cropped, flipped and resized together: the one home of their geometry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmclip_dist.config import Augment

PIXEL_MEAN, PIXEL_DEVIATION = (
    0.5,
    0.25,
)  # of radiographs scaled to [0, 1], roughly; fixed, so that a model needs no statistics


@dataclass(frozen=True)
class Crop:
    """A rectangle in shares of the image's width and height, and whether it is mirrored afterwards."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    mirrored: bool = False


WHOLE = Crop()


def random_crop(random: np.random.Generator, augment: Augment) -> Crop:
    """A crop of `augment.crop_area` of the area, nearly square, mirrored with probability `augment.flip`."""
    area = random.uniform(*augment.crop_area)
    aspect = np.exp(random.uniform(-np.log(4 / 3), np.log(4 / 3)) * (1 - area))  # a crop of the whole image cannot vary
    width, height = min(1.0, (area * aspect) ** 0.5), min(1.0, (area / aspect) ** 0.5)
    left, top = random.uniform(0, 1 - width), random.uniform(0, 1 - height)
    return Crop(left, top, left + width, top + height, bool(random.random() < augment.flip))


def crop_image(image: Image.Image, crop: Crop, size: int) -> np.ndarray:
    """The crop of an image, resized to size x size and normalised. -> [1, size, size] float32."""
    pixels = np.asarray(_resample(image, crop, size), dtype=np.float32) / 255
    return ((pixels - PIXEL_MEAN) / PIXEL_DEVIATION)[None]


def crop_grid(grid: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The same crop of an attention grid [rows, cols] of the whole image. -> [size, size] float32."""
    return np.array(_resample(Image.fromarray(grid.astype(np.float32)), crop, size))


def _resample(image: Image.Image, crop: Crop, size: int) -> Image.Image:
    box = (crop.left * image.width, crop.top * image.height, crop.right * image.width, crop.bottom * image.height)
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.mirrored else resized
