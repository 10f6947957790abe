"""Contrast-limited adaptive histogram equalisation (Zuiderveld, Graphics Gems IV, 1994)."""

from __future__ import annotations

import numpy as np

TILES = 8
"""Along each side."""

CLIP_LIMIT = 2.0
"""No value counts more than this many times as often in a tile as if all were equally frequent."""

_LEVELS = 256


def equalise(pixels: np.ndarray) -> np.ndarray:
    """Equalise the histogram of each tile, limit its contrast, and interpolate between tiles. pixels [height, width] uint8 -> the
    same shape and type, and the same values as OpenCV's `createCLAHE(2.0, (8, 8))`."""
    height, width = pixels.shape
    padded = pixels
    if height % TILES or width % TILES:  # OpenCV adds a whole row of pixels a tile to a side that fits
        padded = np.pad(pixels, ((0, TILES - height % TILES), (0, TILES - width % TILES)), mode="reflect")
    tall, wide = padded.shape[0] // TILES, padded.shape[1] // TILES
    tiles = padded.reshape(TILES, tall, TILES, wide).swapaxes(1, 2).reshape(TILES * TILES, tall * wide)
    curves = np.stack([_curve(tile) for tile in tiles]).reshape(TILES, TILES, _LEVELS)
    top, bottom, down = _between(height, tall)
    left, right, across = _between(width, wide)
    down = down[:, None]

    def row(tile: np.ndarray) -> np.ndarray:
        one, other = curves[tile[:, None], left, pixels], curves[tile[:, None], right, pixels]
        return one * (np.float32(1) - across) + other * across

    return np.rint(row(top) * (np.float32(1) - down) + row(bottom) * down).astype(np.uint8)


def _curve(values: np.ndarray) -> np.ndarray:
    """The new value of each grey level in a tile [256]: its cumulative histogram after what is above the limit is shared out."""
    counts = np.bincount(values, minlength=_LEVELS)
    limit = max(1, int(CLIP_LIMIT * values.size / _LEVELS))
    above = int(np.maximum(counts - limit, 0).sum())
    counts = np.minimum(counts, limit) + above // _LEVELS
    if rest := above % _LEVELS:
        counts[:: max(_LEVELS // rest, 1)][:rest] += 1
    scale = np.float32((_LEVELS - 1) / values.size)
    return np.rint(np.cumsum(counts).astype(np.float32) * scale).clip(0, _LEVELS - 1).astype(np.float32)


def _between(length: int, tile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pixel along a side: the tiles before and after it, and how near it is to the later one, 0 to 1."""
    place = np.arange(length, dtype=np.float32) * np.float32(1 / tile) - np.float32(0.5)
    before = np.floor(place).astype(np.int64)
    return before.clip(0, TILES - 1), (before + 1).clip(0, TILES - 1), place - before.astype(np.float32)
