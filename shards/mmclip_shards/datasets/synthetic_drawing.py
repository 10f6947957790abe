"""Draws a synthetic `Study` as a frontal radiograph, with a box around each finding.

The picture is built in the order in which tissue lies in the beam: chest wall, lungs, vessels, mediastinum and heart,
bones, then the findings, then exposure and noise. Values are attenuation in 0 (air) to 1 (bone, metal), float32
[size, size]. Shapes are ramps of about one pixel at 128 pixels, in anatomy units, so that any size shows the same study.

A frontal film is viewed face to face: the patient's right is at image left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from mmclip_shards.datasets.synthetic_studies import Finding, Pose, Severity, Side, Study
from mmclip_shards.schema import Box

Plane = np.ndarray
"""float32 [size, size]."""

LUNG_CENTRE_Y = 0.10
LUNG_CENTRE_OFFSET = 0.015
DOME_TOP = 0.46
BOX_LEVEL = 0.35
"""A box holds the pixels that a finding changed by at least this share of its largest change."""
VESSEL_TREES = 64
CURVE_STEPS = 4095
"""Attenuation is looked up in a table of this many steps: a power costs as much as all the lungs."""

HEART_RATIO: dict[Severity, float] = {"mild": 0.555, "moderate": 0.61, "severe": 0.68}
SEVERITY_STEP: dict[Severity, int] = {"mild": 0, "moderate": 1, "severe": 2}


@dataclass
class Canvas:
    """One picture in the making. x, y: anatomy coordinates of each pixel; `lung` in 0 to 1; `image` changes in place."""

    size: int
    study: Study
    x: Plane
    y: Plane
    across: Plane
    image: Plane
    lung: Plane
    depth: Plane
    dome: Plane


def draw(study: Study, size: int) -> tuple[np.ndarray, tuple[Box, ...]]:
    """Radiograph of a study: uint8 [size, size], and the boxes of its findings in pixels (two where bilateral)."""
    canvas = _empty_chest(study, size)
    boxes: list[Box] = []
    vessels = _vessels(canvas) * canvas.lung
    _shade_lungs(canvas, vessels)
    _mediastinum(canvas)
    boxes += _heart(canvas)
    _bones(canvas)
    for finding in study.findings:
        if finding.name in PAINTERS:
            for side in _sides(finding):
                change = PAINTERS[finding.name](canvas, finding, side, vessels)
                boxes.append(_box(finding.name, change, np.abs(change).max() * BOX_LEVEL))
    for device in study.devices:
        _device(canvas, device)
    return _expose(canvas), tuple(boxes)


# ---------------------------------------------------------------------------------------------------------- geometry


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Plane, Plane]:
    """Pixel centres from -1 to 1: x [1, size], y [size, 1]."""
    centres = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    return centres[None, :], centres[:, None]


def _anatomy_coordinates(pose: Pose, size: int) -> tuple[Plane, Plane]:
    px, py = _grid(size)
    cos, sin = np.cos(pose.rotation) / pose.scale, np.sin(pose.rotation) / pose.scale
    u, v = px - np.float32(pose.shift_x), py - np.float32(pose.shift_y)
    c, s = np.float32(cos), np.float32(sin)
    return u * c + v * s, v * c - u * s


def _to_pixels(pose: Pose, size: int, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `_anatomy_coordinates` for points [n]."""
    cos, sin = np.cos(pose.rotation) * pose.scale, np.sin(pose.rotation) * pose.scale
    px, py = x * cos - y * sin + pose.shift_x, x * sin + y * cos + pose.shift_y
    return (px + 1) * (size / 2), (py + 1) * (size / 2)


def _step(distance: Plane, sharpness: float) -> Plane:
    """0 outside, 1 inside, a ramp 1/sharpness wide where the signed distance is 0. Overwrites `distance`."""
    distance *= np.float32(sharpness)
    distance += np.float32(0.5)
    return np.clip(distance, 0, 1, out=distance)


def _add(image: Plane, opacity: Plane, target: float = 0.95) -> Plane:
    """Move `image` towards `target` by `opacity`; returns the change. Dense regions change less, as on a film."""
    change = opacity * (np.float32(target) - image)
    image += change
    return change


def _sign(side: Side) -> float:
    return -1.0 if side == "right" else 1.0


def _sides(finding: Finding) -> tuple[Side, ...]:
    return ("right", "left") if finding.side == "bilateral" else (finding.side,)


def _box(label: str, change: Plane, level: float) -> Box:
    """Tight box around the pixels where |change| is at least `level`."""
    strong = np.abs(change) >= level
    columns, rows = np.flatnonzero(strong.any(axis=0)), np.flatnonzero(strong.any(axis=1))
    left, top = int(columns[0]), int(rows[0])
    return Box(label, left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)


def _smooth_noise(rng: np.random.Generator, cells: int, size: int) -> Plane:
    """Cloudy noise of about unit variance: a small grid of draws enlarged with splines, far cheaper than a filter."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) * np.float32(1.4)


# ------------------------------------------------------------------------------------------------------------- chest


def _empty_chest(study: Study, size: int) -> Canvas:
    """Chest wall and abdomen with the lung fields' shape, before anything is shaded."""
    anatomy, pose = study.anatomy, study.pose
    x, y = _anatomy_coordinates(pose, size)
    across = np.abs(x)
    body = _step(np.float32(0.90 + 0.5 * anatomy.wall) + np.clip(-0.3 - y, 0, 0.5) * np.float32(0.6) - across, 14)
    body *= _step(y - (np.clip((across - np.float32(0.24)) * 2.2, 0, 0.42) + across * np.float32(0.12) - 1.32), 12)
    image = body * np.float32(0.50 + 0.6 * anatomy.wall)
    depth = 1 - ((across - (anatomy.lung_width + LUNG_CENTRE_OFFSET)) * np.float32(1 / anatomy.lung_width)) ** 2
    depth -= ((y - np.float32(LUNG_CENTRE_Y)) * np.float32(1 / anatomy.lung_height)) ** 2
    dome = _dome(study, x, across)
    lung = _step(depth * np.float32(1.0), 7)
    lung *= _step(dome - y, 26)
    return Canvas(size, study, x, y, across, image, lung, depth, dome)


def _dome(study: Study, x: Plane, across: Plane) -> Plane:
    """Height (y) of the diaphragm below each column: the right dome is higher by `dome_step`."""
    right = DOME_TOP + study.pose.inspiration
    left = right + study.anatomy.dome_step
    for finding in study.findings:
        if finding.kind == "volume loss":
            lift = 0.15 + 0.06 * SEVERITY_STEP[finding.severity]
            right, left = (right - lift, left) if finding.side == "right" else (right, left - lift)
    bowl = (across - np.float32(0.33)) * np.float32(1 / 0.42)
    bowl *= bowl
    bowl *= np.float32(0.27)
    return np.where(x < 0, np.float32(right), np.float32(left)) + bowl


def _shade_lungs(canvas: Canvas, vessels: Plane) -> None:
    """Air, denser towards the bases and the hila, with vessels; breast or chest muscle above; liver and stomach below."""
    anatomy, image, x, y = canvas.study.anatomy, canvas.image, canvas.x, canvas.y
    air = np.float32(0.13 + 0.45 * anatomy.wall) + y * np.float32(0.05) - canvas.across * np.float32(0.06)
    # A smooth-edged soft-tissue shadow over both lower lungs; negative values stand for none.
    breast = 1 - ((canvas.across - np.float32(0.45)) * 2.6) ** 2 - ((y - np.float32(0.30)) * 2.6) ** 2
    air += np.clip(breast * 2, 0, 1) * np.float32(max(anatomy.breast, 0.0))
    air += vessels
    image += canvas.lung * (air - image)
    below = _step(y - canvas.dome, 26)
    image += below * (image > 0.2) * np.float32(0.16)
    bubble = 1 - ((x - np.float32(0.36)) * 6) ** 2 - ((y - canvas.dome - np.float32(0.14)) * 11) ** 2
    image -= np.clip(bubble, 0, 1) * np.float32(0.22)


def _vessels(canvas: Canvas) -> Plane:
    """Lung markings in 0 to 0.26: the patient's own tree, posed like the rest of him."""
    size, anatomy, pose = canvas.size, canvas.study.anatomy, canvas.study.pose
    half = size / 2
    cos, sin = np.cos(pose.rotation) / pose.scale, np.sin(pose.rotation) / pose.scale
    wide = anatomy.lung_width / 0.37
    # The map of `_anatomy_coordinates` in pixels, from the picture back to the sheet, as Pillow asks for it.
    u, v = 1 + pose.shift_x, 1 + pose.shift_y
    to_x = (cos / wide, sin / wide, half * (1 - (cos * u + sin * v) / wide))
    to_y = (-sin, cos, half * (1 - (cos * v - sin * u)))
    sheet = _vessel_sheet(int(anatomy.vessel_tree * VESSEL_TREES), size)
    posed = sheet.transform((size, size), Image.Transform.AFFINE, (*to_x, *to_y), Image.Resampling.BILINEAR)
    return np.asarray(posed, dtype=np.float32) * np.float32(0.30 / 255)


@lru_cache(maxsize=VESSEL_TREES)
def _vessel_sheet(tree: int, size: int) -> Image.Image:
    """Branching lines that leave each hilum and thin out towards the chest wall: 8 bit [size, size], anatomy upright.

    Drawn at twice the size and reduced, which is how Pillow's lines become smooth. A line costs more than anything
    else here, so there is a fixed stock of trees.
    """
    sheet = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(sheet)
    segments, weight = _vessel_tree(tree)
    for line, heft in zip(((segments + 1) * size).tolist(), weight.tolist(), strict=True):
        pen.line(line, fill=int(70 + 150 * heft), width=max(1, round(size / 128 * (1 + 5 * heft))))
    return sheet.reduce(2)


def _vessel_tree(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments (x0, y0, x1, y1) [n, 4] of both lungs in anatomy units, and their weights [n] in 0 to 1."""
    rng = np.random.default_rng(seed)
    stems = 9
    side = np.repeat(np.array([-1.0, 1.0]), stems)
    # Directions fan from straight up (-pi/2) over lateral (0) to down.
    angle = np.tile(np.linspace(-1.45, 1.25, stems), 2) + rng.normal(0, 0.10, 2 * stems)
    x, y = side * 0.17, -0.04 + 0.10 * np.sin(angle)
    parts = []
    weight = np.ones(2 * stems)
    length = 0.17
    for _ in range(4):
        reach = length * rng.uniform(0.75, 1.25, len(angle))
        # The lung is taller than wide.
        x1, y1 = x + side * np.cos(angle) * reach * 0.85, y + np.sin(angle) * reach * 1.15
        parts.append(np.stack([x, y, x1, y1, weight], axis=1))
        turn = rng.uniform(0.12, 0.42, len(angle))
        angle = np.concatenate([angle + turn, angle - turn])
        x, y, side, weight = (np.tile(values, 2) for values in (x1, y1, side, weight * 0.5))
        length *= 0.88
    tree = np.concatenate(parts)
    return tree[:, :4], tree[:, 4]


def _mediastinum(canvas: Canvas) -> None:
    anatomy, image, y = canvas.study.anatomy, canvas.image, canvas.y
    x = canvas.x - np.float32(canvas.study.pose.oblique)
    across = np.abs(x)
    width = np.float32(anatomy.mediastinum) + np.clip(y, -0.1, 0.4) * np.float32(0.12)
    mass = _step(width - across, 16)
    mass *= _step(y + np.float32(1.2), 4)
    _add(image, mass * np.float32(0.80), 0.60)
    knob = np.float32(anatomy.aortic_knob)
    arch = 1 - ((x - np.float32(anatomy.mediastinum)) / knob) ** 2 - ((y + np.float32(0.30)) / (knob * 1.3)) ** 2
    _add(image, np.clip(arch * 2, 0, 1) * np.float32(0.8), 0.60)
    for side in (-1, 1):
        hilum = 1 - ((x - np.float32(0.16 * side)) * 11) ** 2 - ((y - np.float32(0.03 - 0.05 * side)) * 8) ** 2
        _add(image, np.clip(hilum, 0, 1) * np.float32(0.35))
    trachea = _step(np.float32(0.042) - across, 30)
    trachea *= _step(np.float32(-0.18) - y, 10)
    image -= trachea * np.float32(0.11)


def _heart(canvas: Canvas) -> list[Box]:
    """The heart, apex towards the patient's left; a box around it when it is enlarged.

    The cardiothoracic ratio is the heart's width over the lungs' inner width at the diaphragm.
    """
    anatomy, study = canvas.study.anatomy, canvas.study
    enlarged = [finding for finding in study.findings if finding.name == "Cardiomegaly"]
    ratio = anatomy.heart_ratio
    if enlarged:
        ratio = HEART_RATIO[enlarged[0].severity] + (np.random.default_rng(enlarged[0].seed).random() - 0.5) * 0.03
    half_width = ratio * 2 * (anatomy.lung_width + LUNG_CENTRE_OFFSET / 2)
    tilt = anatomy.heart_tilt
    short = anatomy.heart_height * (half_width / 0.32) ** 0.5
    # Of a tilted ellipse with semi-axes (long, short): half width^2 = long^2 cos^2 + short^2 sin^2.
    long = np.sqrt(max(half_width**2 - (short * np.sin(tilt)) ** 2, 0.01)) / np.cos(tilt)
    x = canvas.x - np.float32(anatomy.heart_centre * half_width / 0.32 + study.pose.oblique)
    y = canvas.y - np.float32(DOME_TOP + study.pose.inspiration - 0.20)
    c, s = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    shape = 1 - ((x * c + y * s) / np.float32(long)) ** 2 - ((y * c - x * s) / np.float32(short)) ** 2
    heart = _step(shape, 5)
    _add(canvas.image, heart * np.float32(0.85), 0.64)
    return [_box("Cardiomegaly", heart, 0.5)] if enlarged else []


def _bones(canvas: Canvas) -> None:
    """Spine with its discs, posterior and anterior ribs as waves in bent coordinates, clavicles."""
    anatomy, image, across, y = canvas.study.anatomy, canvas.image, canvas.across, canvas.y
    contrast = np.float32(anatomy.rib_contrast)
    spine = _step(np.float32(0.085) - np.abs(canvas.x - np.float32(anatomy.spine_bend) * y), 25)
    spine *= np.float32(0.07) + np.float32(0.03) * np.sin(y * np.float32(2 * np.pi / 0.16))
    image += spine * (image > 0.15)
    # Bone adds less where the film is nearly white: over the heart, and least below the diaphragm.
    cage = _step(canvas.depth + np.float32(0.22), 6)
    cage *= np.clip(np.float32(1.35) - image * np.float32(1.7), 0.12, 1) * contrast
    turns = np.float32(2 * np.pi / anatomy.rib_spacing)
    # Posterior ribs rise a little from the spine, then fall towards the side, the lower ones more steeply.
    bend = across - np.float32(0.20)
    wave = y - bend * bend * (np.float32(0.85) + y * np.float32(0.45))
    posterior = np.cos(wave * turns + np.float32(2 * np.pi * anatomy.rib_phase))
    image += np.clip(posterior * 2 - np.float32(0.3), 0, 1) * cage
    # Anterior ribs fall towards the midline and end in cartilage, which is not seen.
    bend = np.float32(0.80) - across
    anterior = np.cos((y - bend * np.float32(0.75) + bend * bend * np.float32(0.3)) * (turns * np.float32(0.8)))
    cage *= np.clip(np.float32(2.6) - bend * np.float32(6), 0, 0.6)
    image += np.clip(anterior * 2 - np.float32(0.5), 0, 1) * cage
    along = across - np.float32(0.10)
    level = np.float32(-0.60) - along * np.float32(0.42) + along * along * np.float32(0.40)
    clavicle = np.clip(np.float32(2.0) - np.abs(y - level) * np.float32(60), 0, 1)
    clavicle *= (along > 0) & (across < 0.82)
    image += clavicle * np.float32(0.14)


# ---------------------------------------------------------------------------------------------------------- findings


def _zone_centre(canvas: Canvas, finding: Finding, rng: np.random.Generator) -> tuple[float, float]:
    """A point (x, y) of the finding's zone, inside the lung and away from its edges."""
    anatomy, sign = canvas.study.anatomy, _sign(finding.side)
    if finding.zone == "retrocardiac":
        return sign * rng.uniform(0.24, 0.32), DOME_TOP + canvas.study.pose.inspiration - rng.uniform(0.16, 0.24)
    apex = LUNG_CENTRE_Y - anatomy.lung_height
    base = DOME_TOP + canvas.study.pose.inspiration
    middle = {"upper": 0.32, "mid": 0.56, "lower": 0.80}[finding.zone] + rng.uniform(-0.05, 0.05)
    y = apex + middle * (base - apex)
    # In the left lower zone the heart covers the medial half.
    medial, lateral = (0.46, 0.54) if finding.zone == "lower" else (0.33, 0.50)
    return sign * rng.uniform(medial, lateral) * anatomy.lung_width / 0.37, y


def _consolidation(canvas: Canvas, finding: Finding, side: Side, vessels: Plane) -> Plane:
    """Patchy soft opacity: an ellipse whose rim is broken up by cloudy noise."""
    rng = np.random.default_rng(finding.seed)
    step = SEVERITY_STEP[finding.severity]
    x, y = _zone_centre(canvas, finding, rng)
    width = (0.15, 0.19, 0.24)[step] * rng.uniform(0.9, 1.15)
    height = width * rng.uniform(0.9, 1.35)
    if finding.zone == "retrocardiac":
        width, height = width * 0.75, height * 0.85
    patch = np.float32(1.1) - ((canvas.x - np.float32(x)) / np.float32(width)) ** 2
    patch -= ((canvas.y - np.float32(y)) / np.float32(height)) ** 2
    patch += _smooth_noise(rng, 22, canvas.size) * np.float32(0.35)
    opacity = np.clip(patch, 0, 1) * canvas.lung
    opacity *= canvas.x * np.float32(_sign(side)) > 0
    return _add(canvas.image, opacity * np.float32((0.26, 0.36, 0.50)[step]))


def _effusion(canvas: Canvas, finding: Finding, side: Side, vessels: Plane) -> Plane:
    """Fluid below a meniscus that climbs the chest wall; the least fills only the costophrenic angle."""
    rng = np.random.default_rng((finding.seed, side == "left"))
    step = SEVERITY_STEP[finding.severity]
    level = DOME_TOP + canvas.study.pose.inspiration + (0.13, -0.02, -0.30)[step] + rng.uniform(-0.04, 0.04)
    level += canvas.study.anatomy.dome_step if side == "left" else 0.0
    climb = np.clip(canvas.across - np.float32(0.30), 0, None)
    opacity = _step(canvas.y - np.float32(level) + climb * climb * np.float32(rng.uniform(0.7, 1.3)), 14)
    opacity *= canvas.lung
    opacity *= canvas.x * np.float32(_sign(side)) > 0
    return _add(canvas.image, opacity * np.float32((0.62, 0.70, 0.76)[step]), 0.78)


def _pneumothorax(canvas: Canvas, finding: Finding, side: Side, vessels: Plane) -> Plane:
    """Air over the apex and the side of a smaller lung: dark, without markings, edged by the thin visceral pleura."""
    rng = np.random.default_rng(finding.seed)
    anatomy = canvas.study.anatomy
    gap = (0.16, 0.24, 0.36)[SEVERITY_STEP[finding.severity]] * rng.uniform(0.9, 1.1)
    width, height = anatomy.lung_width - 0.20 * gap, anatomy.lung_height - 0.50 * gap
    collapsed = 1 - ((canvas.across - np.float32(width + LUNG_CENTRE_OFFSET)) / np.float32(width)) ** 2
    collapsed -= ((canvas.y - np.float32(LUNG_CENTRE_Y + 0.50 * gap)) / np.float32(height)) ** 2
    inside = canvas.lung * (canvas.x * np.float32(_sign(side)) > 0)
    # The gap closes towards the base, and medially the lung stays against the mediastinum.
    inside *= _step(np.float32(-0.55 + 2.2 * gap) - canvas.y, 8)
    line = np.clip(np.float32(1.6) - np.abs(collapsed) * np.float32(9), 0, 1) * inside
    air = _step(-collapsed, 9)
    air *= inside
    change = -air * (vessels + np.float32(0.07) + np.float32(0.35) * np.clip(canvas.image - np.float32(0.22), 0, 0.2))
    canvas.image += change
    canvas.image += line * np.float32(0.13)
    # The lung below has lost air.
    _add(canvas.image, np.clip(collapsed * 3, 0, 1) * inside * np.float32(0.05))
    return air * np.float32(0.1)


def _nodule(canvas: Canvas, finding: Finding, side: Side, vessels: Plane) -> Plane:
    """A round, well-defined opacity."""
    rng = np.random.default_rng(finding.seed)
    step = SEVERITY_STEP[finding.severity]
    x, y = _zone_centre(canvas, finding, rng)
    x += rng.uniform(-0.06, 0.04) * _sign(side)
    radius = (0.062, 0.085, 0.115)[step] * rng.uniform(0.92, 1.08)
    ball = 1 - ((canvas.x - np.float32(x)) ** 2 + (canvas.y - np.float32(y)) ** 2) / np.float32(radius**2)
    opacity = np.clip(ball * np.float32(2.2), 0, 1)
    return _add(canvas.image, opacity * np.float32((0.34, 0.44, 0.54)[step]))


def _atelectasis(canvas: Canvas, finding: Finding, side: Side, vessels: Plane) -> Plane:
    """A plate-like band, or volume loss: crowded, denser lung above a raised diaphragm (raised in `_dome`)."""
    rng = np.random.default_rng(finding.seed)
    step = SEVERITY_STEP[finding.severity]
    on_side = canvas.x * np.float32(_sign(side)) > 0
    if finding.kind == "volume loss":
        height = (0.13, 0.17, 0.21)[step]
        above = 1 - np.abs(canvas.dome - canvas.y) * np.float32(1 / height)
        opacity = np.clip(above, 0, 0.7) * canvas.lung * on_side * np.clip(canvas.depth * 4, 0, 1)
        return _add(canvas.image, opacity * np.float32((0.32, 0.42, 0.52)[step]))
    x, y = _zone_centre(canvas, finding, rng)
    tilt = rng.uniform(-0.35, 0.35)
    u, v = canvas.x - np.float32(x * 0.95), canvas.y - np.float32(y)
    along = u * np.float32(np.cos(tilt)) + v * np.float32(np.sin(tilt))
    off = v * np.float32(np.cos(tilt)) - u * np.float32(np.sin(tilt))
    thick, half = (0.020, 0.027, 0.036)[step], (0.17, 0.21, 0.25)[step] * rng.uniform(0.9, 1.1)
    band = np.clip(np.float32(1.5) - np.abs(off) * np.float32(1 / thick), 0, 1)
    band *= np.clip((np.float32(half) - np.abs(along)) * 12, 0, 1)
    band *= canvas.lung
    band *= on_side
    return _add(canvas.image, band * np.float32((0.38, 0.48, 0.56)[step]))


PAINTERS: dict[str, Callable[[Canvas, Finding, Side, Plane], Plane]] = {
    "Atelectasis": _atelectasis,
    "Consolidation": _consolidation,
    "Nodule": _nodule,
    "Pleural Effusion": _effusion,
    "Pneumothorax": _pneumothorax,
}


# --------------------------------------------------------------------------------------------------- devices and film


def _device(canvas: Canvas, device: str) -> None:
    """Metal and plastic over the chest: sharper and brighter than any finding."""
    size, pose = canvas.size, canvas.study.pose
    rng = np.random.default_rng((canvas.study.noise_seed, len(device)))
    sheet = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(sheet)
    thin = max(1, round(size / 64))
    side = float(rng.choice((-1.0, 1.0)))
    jitter = rng.uniform(-0.05, 0.05, (4, 2))

    def points(*xy: tuple[float, float]) -> list[tuple[float, float]]:
        xs, ys = np.array(xy).T
        px, py = _to_pixels(pose, 2 * size, xs, ys)
        return list(zip(px.tolist(), py.tolist(), strict=True))

    def disc(xy: tuple[float, float], radius: float, fill: int) -> None:
        ((cx, cy),) = points(xy)
        r = radius * size
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)

    if device == "electrodes":
        for (x, y), (dx, dy) in zip(((-0.6, -0.45), (0.6, -0.45), (0.62, 0.45)), jitter[:3], strict=True):
            pen.line(points((x + dx, y + dy), (x * 0.5, y + 0.35), (0.2 * side, 1.1)), fill=150, width=thin)
            disc((x + dx, y + dy), 0.035, 230)
    elif device == "tracheal tube":
        pen.line(points((0.01, -1.1), (0.0, -0.30)), fill=140, width=thin)
    elif device == "port":
        x, y = side * 0.52 + jitter[0, 0], -0.42 + jitter[0, 1]
        pen.line(points((x, y), (x * 0.55, -0.68), (side * 0.12, -0.55), (-0.10, -0.10)), fill=150, width=thin)
        disc((x, y), 0.055, 190)
    elif device == "pacemaker":
        x, y = 0.60 + jitter[0, 0], -0.50 + jitter[0, 1]
        pen.line(points((x, y), (0.30, -0.64), (-0.05, -0.45), (-0.08, 0.1), (0.20, 0.35)), fill=150, width=thin)
        disc((x, y), 0.095, 235)
    canvas.image += np.asarray(sheet.reduce(2), dtype=np.float32) * np.float32(0.45 / 255)


def _expose(canvas: Canvas) -> np.ndarray:
    """Exposure curve, scatter and quantum noise: uint8 [size, size]."""
    pose, size = canvas.study.pose, canvas.size
    rng = np.random.default_rng(canvas.study.noise_seed)
    image = canvas.image
    image += _smooth_noise(rng, 7, size) * np.float32(0.018) * (image > 0.04)
    # The mean of 2 x 2 uniform draws: nearly normal, and not white, as light spreads in the screen.
    grain = rng.random((size + 1, size + 1), dtype=np.float32)
    grain = grain[1:] + grain[:-1]
    grain = grain[:, 1:] + grain[:, :-1]
    grain -= 2
    image += grain * np.float32(pose.noise * 1.73)
    curve = np.linspace(0, 1, CURVE_STEPS + 1) ** pose.gamma * pose.gain + pose.offset
    table = np.clip(curve * 255, 0, 255).astype(np.uint8)
    image *= CURVE_STEPS
    return table[np.clip(image, 0, CURVE_STEPS).astype(np.uint16)]
