"""The drawing surface of the synthetic radiographs: coordinates, windows, soft shapes, boxes.

Values are attenuation from 0 (air) to 1 (bone, metal), float32. Shapes are given in anatomy units (see `studies`), with
edges of about one pixel at 128 pixels, so every size shows the same study.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from mmclip_shards.datasets.synthetic.studies import Pose, Study
from mmclip_shards.schema import Box

Plane = np.ndarray
"""float32 [rows, columns]: a picture or a window of it."""

BOX_LEVEL = 0.25
"""A box holds the pixels that a finding changed by at least this share of its largest change."""


@dataclass
class Canvas:
    """One picture that is being drawn, or a window of it (see `within`). `image` changes in place.

    x, y: anatomy coordinates of each pixel; across: |x|; lung: 0 to 1; depth: how far inside the lung's outline, 0 at
    its edge; dome: y of the diaphragm in this column; vessels: lung markings; left, top: the window's corner in pixels.
    """

    size: int
    study: Study
    x: Plane
    y: Plane
    across: Plane
    image: Plane
    lung: Plane
    depth: Plane
    dome: Plane
    vessels: Plane
    left: int = 0
    top: int = 0

    def within(self, x0: float, x1: float, y0: float, y1: float) -> Canvas:
        """The window around a rectangle in anatomy units, as views. Drawing in it costs only the pixels that it covers."""
        corners = [to_pixel(self.study.pose, self.size, x, y) for x in (x0, x1) for y in (y0, y1)]
        columns, rows = zip(*corners, strict=True)
        left, top = (min(max(int(min(ends)), 0), self.size - 1) for ends in (columns, rows))
        window = np.s_[top : max(int(max(rows)) + 2, top + 1), left : max(int(max(columns)) + 2, left + 1)]
        names = ("x", "y", "across", "image", "lung", "depth", "dome", "vessels")
        views = {name: getattr(self, name)[window] for name in names}
        return Canvas(self.size, self.study, **views, left=left, top=top)


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Plane, Plane]:
    """Pixel centres from -1 to 1: x [1, size], y [size, 1]."""
    centres = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    return centres[None, :], centres[:, None]


def anatomy_coordinates(pose: Pose, size: int) -> tuple[Plane, Plane]:
    px, py = _grid(size)
    cos, sin = np.cos(pose.rotation) / pose.scale, np.sin(pose.rotation) / pose.scale
    u, v = px - np.float32(pose.shift_x), py - np.float32(pose.shift_y)
    c, s = np.float32(cos), np.float32(sin)
    return u * c + v * s, v * c - u * s


def to_pixel(pose: Pose, size: int, x: float, y: float) -> tuple[float, float]:
    """Column and row of a point: the inverse of `anatomy_coordinates`."""
    cos, sin = math.cos(pose.rotation), math.sin(pose.rotation)
    px, py = (x * cos - y * sin) * pose.scale + pose.shift_x, (x * sin + y * cos) * pose.scale + pose.shift_y
    return (px + 1) * (size / 2), (py + 1) * (size / 2)


def step(distance: Plane, sharpness: float) -> Plane:
    """0 outside, 1 inside, and a ramp of width 1/sharpness where the signed distance is 0. Overwrites `distance`."""
    distance *= np.float32(sharpness)
    distance += np.float32(0.5)
    return np.clip(distance, 0, 1, out=distance)


def add(image: Plane, opacity: Plane, target: float = 0.95) -> Plane:
    """Move `image` towards `target` by `opacity` and return the change. Dense regions change less, as on a film."""
    change = opacity * (np.float32(target) - image)
    image += change
    return change


def box_of(label: str, canvas: Canvas, change: Plane) -> Box:
    """The tight box, in pixels of the whole image, around pixels that changed by at least `BOX_LEVEL` of the largest change."""
    strength = np.abs(change)
    strong = strength >= strength.max() * BOX_LEVEL
    columns, rows = np.flatnonzero(strong.any(axis=0)), np.flatnonzero(strong.any(axis=1))
    left, top = int(columns[0]), int(rows[0])
    return Box(label, canvas.left + left, canvas.top + top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)


def smooth_noise(rng: np.random.Generator, cells: int, shape: tuple[int, ...]) -> Plane:
    """Cloudy noise of about unit variance. It enlarges a small random grid with splines, which is far cheaper than a filter."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)) * np.float32(1.4)


def add_ellipse(
    canvas: Canvas, centre: tuple[float, float], axes: tuple[float, float], *, opacity: float, target: float = 0.95
) -> tuple[Canvas, Plane]:
    """Add a soft-edged ellipse with the given semi-axes. Returns its window and the change there."""
    (x, y), (width, height) = centre, axes
    part = canvas.within(x - width, x + width, y - height, y + height)
    inside = 1 - ((part.x - np.float32(x)) * np.float32(1 / width)) ** 2
    inside -= ((part.y - np.float32(y)) * np.float32(1 / height)) ** 2
    return part, add(part.image, np.clip(inside * 2, 0, 1) * np.float32(opacity), target)
