"""Pictures that lie in a page: data URIs, heat maps, boxes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from mmclip_shards.schema import Box
from PIL import Image

# Viridis: purple to yellow with rising lightness, readable for the colour-blind; every 51st of its 256 colours.
_VIRIDIS = np.array([(68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)])
_OPACITY = (0.15, 0.65)  # of the lowest and of the highest score: the image stays visible where attention is low


def box_of(values: Mapping[str, Any]) -> Box:
    x, y, width, height = (float(values[name]) for name in ("x", "y", "width", "height"))
    return Box(str(values["label"]), x, y, width, height)


def heat_map(grid: np.ndarray) -> Image.Image:
    """Scores [rows, cols] -> RGBA picture of that many pixels, from the lowest score (dark, clear) to the highest."""
    spread = float(grid.max() - grid.min())
    share = (grid - grid.min()) / spread if spread > 0 else np.zeros_like(grid)
    opacity = 255 * (_OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * share)
    return Image.fromarray(np.dstack([viridis(share), opacity]).round().astype(np.uint8), "RGBA")


def viridis(share: np.ndarray) -> np.ndarray:
    """Shares in [0, 1] -> colours [..., 3] in 0 to 255."""
    places = np.linspace(0, 1, len(_VIRIDIS))
    return np.stack([np.interp(share, places, channel) for channel in _VIRIDIS.T], axis=-1)


def jpeg(image: Image.Image, side: int) -> str:
    """The image as a data URI, its longer side at most `side` pixels."""
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    return data_uri(image, "JPEG", quality=88)


def data_uri(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
