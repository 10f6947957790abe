"""Draw the findings of a synthetic study over the normal chest, each with its box.

`chest` draws an enlarged heart and a raised diaphragm: they are anatomy of another size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mmclip_shards.datasets.synthetic.canvas import Canvas, add, add_ellipse, box_of, smooth_noise, step
from mmclip_shards.datasets.synthetic.chest import DOME_TOP, LUNG_CENTRE_OFFSET, LUNG_CENTRE_Y
from mmclip_shards.datasets.synthetic.studies import SEVERITIES, Finding, Side
from mmclip_shards.schema import Box


def paint(canvas: Canvas, finding: Finding) -> list[Box]:
    """Draw one finding -> one box for each side. Does nothing for an enlarged heart, which `chest` draws."""
    if finding.name not in PAINTERS:
        return []
    sides: tuple[Side, ...] = ("right", "left") if finding.side == "bilateral" else (finding.side,)
    return [PAINTERS[finding.name](canvas, finding, side) for side in sides]


def _sign(side: Side) -> float:
    return -1.0 if side == "right" else 1.0


def _half(canvas: Canvas, side: Side, y0: float = -1.5, y1: float = 1.5) -> Canvas:
    """The window of one half of the chest."""
    return canvas.within(-1.5, 0.0, y0, y1) if side == "right" else canvas.within(0.0, 1.5, y0, y1)


def _zone_centre(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> tuple[float, float]:
    """A point (x, y) of the finding's zone, inside the lung and away from its edges."""
    anatomy, sign = canvas.study.anatomy, _sign(finding.side)
    if finding.zone == "retrocardiac":
        return sign * rng.uniform(0.24, 0.32), DOME_TOP + canvas.study.pose.inspiration - rng.uniform(0.16, 0.24)
    apex = LUNG_CENTRE_Y - anatomy.lung_height
    base = DOME_TOP + canvas.study.pose.inspiration
    middle = {"upper": 0.32, "mid": 0.56, "lower": 0.80}[finding.zone] + rng.uniform(-0.05, 0.05)
    y = apex + middle * (base - apex)
    # The heart covers the medial half of the left lower zone.
    medial, lateral = (0.46, 0.54) if finding.zone == "lower" else (0.33, 0.50)
    return sign * rng.uniform(medial, lateral) * anatomy.lung_width / 0.37, y


def _consolidation(canvas: Canvas, finding: Finding, side: Side) -> Box:
    """A patchy soft opacity: an ellipse with a rim that cloudy noise breaks up."""
    rng = np.random.default_rng(finding.seed)
    grade = SEVERITIES.index(finding.severity)
    x, y = _zone_centre(canvas, finding, rng)
    width = (0.15, 0.19, 0.24)[grade] * rng.uniform(0.9, 1.15)
    height = width * rng.uniform(0.9, 1.35)
    if finding.zone == "retrocardiac":
        width, height = width * 0.75, height * 0.85
    part = canvas.within(x - 1.8 * width, x + 1.8 * width, y - 1.8 * height, y + 1.8 * height)
    patch = np.float32(1.1) - ((part.x - np.float32(x)) * np.float32(1 / width)) ** 2
    patch -= ((part.y - np.float32(y)) * np.float32(1 / height)) ** 2
    patch += smooth_noise(rng, 9, part.image.shape) * np.float32(0.33)
    opacity = np.clip(patch, 0, 1) * part.lung
    opacity *= part.x * np.float32(_sign(side)) > 0
    return box_of(finding.name, part, add(part.image, opacity * np.float32((0.26, 0.36, 0.50)[grade])))


def _effusion(canvas: Canvas, finding: Finding, side: Side) -> Box:
    """Fluid below a meniscus that rises along the chest wall. A small effusion fills only the costophrenic angle."""
    rng = np.random.default_rng((finding.seed, side == "left"))
    grade = SEVERITIES.index(finding.severity)
    level = DOME_TOP + canvas.study.pose.inspiration + (0.13, -0.02, -0.30)[grade] + rng.uniform(-0.04, 0.04)
    level += canvas.study.anatomy.dome_step if side == "left" else 0.0
    part = _half(canvas, side, level - 0.6)
    climb = np.clip(part.across - np.float32(0.30), 0, None)
    opacity = step(part.y - np.float32(level) + climb * climb * np.float32(rng.uniform(0.7, 1.3)), 14)
    # Fluid fills the pleural space, which extends a little beyond the air.
    opacity *= np.clip(part.lung * 2, 0, 1)
    opacity *= part.x * np.float32(_sign(side)) > 0
    return box_of(finding.name, part, add(part.image, opacity * np.float32((0.62, 0.70, 0.76)[grade]), 0.78))


def _pneumothorax(canvas: Canvas, finding: Finding, side: Side) -> Box:
    """Air over the apex and the side of a collapsed lung: dark, without markings, with the thin visceral pleura as its edge."""
    rng = np.random.default_rng(finding.seed)
    anatomy = canvas.study.anatomy
    gap = (0.16, 0.24, 0.36)[SEVERITIES.index(finding.severity)] * rng.uniform(0.9, 1.1)
    width, height = anatomy.lung_width - 0.20 * gap, anatomy.lung_height - 0.50 * gap
    bottom = -0.55 + 2.2 * gap
    part = _half(canvas, side, -1.2, bottom + 0.1)
    collapsed = 1 - ((part.across - np.float32(width + LUNG_CENTRE_OFFSET)) * np.float32(1 / width)) ** 2
    collapsed -= ((part.y - np.float32(LUNG_CENTRE_Y + 0.50 * gap)) * np.float32(1 / height)) ** 2
    inside = part.lung * (part.x * np.float32(_sign(side)) > 0)
    # The gap closes towards the base. Medially, the lung stays at the mediastinum.
    inside *= step(np.float32(bottom) - part.y, 8)
    line = np.clip(np.float32(1.6) - np.abs(collapsed) * np.float32(9), 0, 1) * inside
    air = step(-collapsed, 9)
    air *= inside
    dense = np.clip(part.image - np.float32(0.22), 0, 0.2)
    part.image -= air * (part.vessels + np.float32(0.14) + np.float32(0.60) * dense)
    part.image += line * np.float32(0.18)
    return box_of(finding.name, part, air)


def _nodule(canvas: Canvas, finding: Finding, side: Side) -> Box:
    """A round, well-defined opacity."""
    rng = np.random.default_rng(finding.seed)
    grade = SEVERITIES.index(finding.severity)
    x, y = _zone_centre(canvas, finding, rng)
    x += rng.uniform(-0.06, 0.04) * _sign(side)
    radius = (0.066, 0.097, 0.125)[grade] * rng.uniform(0.92, 1.08)
    return box_of(finding.name, *add_ellipse(canvas, (x, y), (radius, radius), opacity=(0.42, 0.54, 0.64)[grade]))


def _atelectasis(canvas: Canvas, finding: Finding, side: Side) -> Box:
    """A plate-like band; or volume loss, with denser lung above a raised diaphragm (`chest` raises it)."""
    rng = np.random.default_rng(finding.seed)
    grade = SEVERITIES.index(finding.severity)
    if finding.kind == "volume loss":
        part = _half(canvas, side, -0.4)
        above = 1 - np.abs(part.dome - part.y) * np.float32(1 / (0.13, 0.17, 0.21)[grade])
        opacity = np.clip(above, 0, 0.7) * np.clip(part.depth * 4, 0, 1)
        strength = (0.40, 0.50, 0.58)[grade]
    else:
        x, y = _zone_centre(canvas, finding, rng)
        x *= 0.95
        thick, half = (0.026, 0.036, 0.048)[grade], (0.17, 0.21, 0.25)[grade] * rng.uniform(0.9, 1.1)
        part = canvas.within(x - half, x + half, y - half, y + half)
        tilt = rng.uniform(-0.35, 0.35)
        cos, sin = np.float32(math.cos(tilt)), np.float32(math.sin(tilt))
        u, v = part.x - np.float32(x), part.y - np.float32(y)
        opacity = np.clip(np.float32(1.5) - np.abs(v * cos - u * sin) * np.float32(1 / thick), 0, 1)
        opacity *= np.clip((np.float32(half) - np.abs(u * cos + v * sin)) * 12, 0, 1)
        strength = (0.46, 0.56, 0.64)[grade]
    opacity *= part.lung
    opacity *= part.x * np.float32(_sign(side)) > 0
    return box_of(finding.name, part, add(part.image, opacity * np.float32(strength)))


PAINTERS: dict[str, Callable[[Canvas, Finding, Side], Box]] = {
    "Atelectasis": _atelectasis,
    "Consolidation": _consolidation,
    "Nodule": _nodule,
    "Pleural Effusion": _effusion,
    "Pneumothorax": _pneumothorax,
}
