"""Draw the normal chest of a synthetic study: wall, lungs with vessels, mediastinum, heart, bones."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from mmclip_shards.datasets.synthetic.canvas import Canvas, Plane, add, add_ellipse, anatomy_coordinates, box_of, step
from mmclip_shards.datasets.synthetic.studies import SEVERITIES, Severity, Study
from mmclip_shards.schema import Box

LUNG_CENTRE_Y = 0.10
LUNG_CENTRE_OFFSET = 0.015
DOME_TOP = 0.46
VESSEL_TREES = 64
HEART_RATIO: dict[Severity, float] = {"mild": 0.555, "moderate": 0.61, "severe": 0.68}
"""Cardiothoracic ratio of an enlarged heart; up to 0.5 is normal."""


def empty_chest(study: Study, size: int) -> Canvas:
    """A canvas with chest wall, abdomen and the shape of the lungs, before anything is shaded."""
    anatomy, pose = study.anatomy, study.pose
    x, y = anatomy_coordinates(pose, size)
    across = np.abs(x)
    body = step(np.float32(0.90 + 0.5 * anatomy.wall) + np.clip(-0.3 - y, 0, 0.5) * np.float32(0.6) - across, 14)
    body *= step(y - (np.clip((across - np.float32(0.24)) * 2.2, 0, 0.42) + across * np.float32(0.12) - 1.32), 12)
    image = body * np.float32(0.50 + 0.6 * anatomy.wall)
    depth = 1 - ((across - (anatomy.lung_width + LUNG_CENTRE_OFFSET)) * np.float32(1 / anatomy.lung_width)) ** 2
    depth -= ((y - np.float32(LUNG_CENTRE_Y)) * np.float32(1 / anatomy.lung_height)) ** 2
    dome = _dome(study, x, across)
    lung = step(depth * np.float32(1.0), 7)
    lung *= step(dome - y, 26)
    return Canvas(size, study, x, y, across, image, lung, depth, dome, _vessels(study, size))


def _dome(study: Study, x: Plane, across: Plane) -> Plane:
    """y of the diaphragm in each column. The right dome is higher by `dome_step`."""
    right = DOME_TOP + study.pose.inspiration
    left = right + study.anatomy.dome_step
    for finding in study.findings:
        if finding.kind == "volume loss":
            lift = 0.15 + 0.06 * SEVERITIES.index(finding.severity)
            right, left = (right - lift, left) if finding.side == "right" else (right, left - lift)
    bowl = (across - np.float32(0.33)) * np.float32(1 / 0.42)
    bowl *= bowl
    bowl *= np.float32(0.27)
    return np.where(x < 0, np.float32(right), np.float32(left)) + bowl


def shade_lungs(canvas: Canvas) -> None:
    """Shade the lungs (denser towards bases and hila) with vessels and breast shadows; below them, liver and stomach."""
    anatomy, image, y = canvas.study.anatomy, canvas.image, canvas.y
    air = np.float32(0.13 + 0.45 * anatomy.wall) + y * np.float32(0.05) - canvas.across * np.float32(0.06)
    # A soft shadow over both lower lungs. The value is negative for a patient without one.
    if anatomy.breast > 0:
        breast = 1 - ((canvas.across - np.float32(0.45)) * 2.6) ** 2 - ((y - np.float32(0.30)) * 2.6) ** 2
        air += np.clip(breast * 2, 0, 1) * np.float32(anatomy.breast)
    air += canvas.vessels
    air -= image
    air *= canvas.lung
    image += air
    below = canvas.within(-1.6, 1.6, 0.1, 1.6)
    below.image += step(below.y - below.dome, 26) * (below.image > 0.2) * np.float32(0.16)
    stomach = canvas.within(0.18, 0.54, 0.3, 1.0)
    bubble = 1 - ((stomach.x - np.float32(0.36)) * 6) ** 2
    bubble -= ((stomach.y - stomach.dome - np.float32(0.14)) * 11) ** 2
    stomach.image -= np.clip(bubble, 0, 1) * np.float32(0.22)


def _vessels(study: Study, size: int) -> Plane:
    """Lung markings, 0 to 0.26: the patient's own vessel tree, in the pose of the film."""
    anatomy, pose = study.anatomy, study.pose
    half = size / 2
    cos, sin = np.cos(pose.rotation) / pose.scale, np.sin(pose.rotation) / pose.scale
    wide = anatomy.lung_width / 0.37
    # Pillow needs the map from the picture back to the sheet, in pixels: that of `anatomy_coordinates`.
    u, v = 1 + pose.shift_x, 1 + pose.shift_y
    to_x = (cos / wide, sin / wide, half * (1 - (cos * u + sin * v) / wide))
    to_y = (-sin, cos, half * (1 - (cos * v - sin * u)))
    sheet = _vessel_sheet(int(anatomy.vessel_tree * VESSEL_TREES), size)
    posed = sheet.transform((size, size), Image.Transform.AFFINE, (*to_x, *to_y), Image.Resampling.BILINEAR)
    return np.asarray(posed, dtype=np.float32) * np.float32(0.30 / 255)


@lru_cache(maxsize=VESSEL_TREES)
def _vessel_sheet(tree: int, size: int) -> Image.Image:
    """Branching lines that leave each hilum and thin out towards the chest wall: 8 bit [size, size], anatomy upright.

    Lines are drawn at twice the size and then reduced, to smooth them. Lines cost more than anything else here, so there is
    a fixed stock of trees.
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
    # Directions spread from straight up (-pi/2) through lateral (0) to down.
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


def add_mediastinum(canvas: Canvas) -> None:
    """Add great vessels, aortic arch (patient's left), hila and the air of the trachea."""
    anatomy, oblique = canvas.study.anatomy, canvas.study.pose.oblique
    centre = canvas.within(oblique - 0.30, oblique + 0.30, -1.5, 1.5)
    across = np.abs(centre.x - np.float32(oblique))
    width = np.float32(anatomy.mediastinum) + np.clip(centre.y, -0.1, 0.4) * np.float32(0.12)
    add(centre.image, step(width - across, 16) * np.float32(0.80), 0.60)
    knob = (anatomy.aortic_knob, 1.3 * anatomy.aortic_knob)
    add_ellipse(canvas, (anatomy.mediastinum + oblique, -0.30), knob, opacity=0.8, target=0.60)
    for side in (-1, 1):
        add_ellipse(canvas, (0.16 * side + oblique, 0.03 - 0.05 * side), (0.09, 0.125), opacity=0.35)
    trachea = canvas.within(oblique - 0.08, oblique + 0.08, -1.5, -0.1)
    air = step(np.float32(0.042) - np.abs(trachea.x - np.float32(oblique)), 30)
    air *= step(np.float32(-0.18) - trachea.y, 10)
    trachea.image -= air * np.float32(0.11)


def add_heart(canvas: Canvas) -> list[Box]:
    """Add the heart, its apex towards the patient's left. Returns a box around it if it is enlarged.

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
    # A tilted ellipse with semi-axes (long, short) has half width^2 = long^2 cos^2 + short^2 sin^2.
    long = np.sqrt(max(half_width**2 - (short * np.sin(tilt)) ** 2, 0.01)) / np.cos(tilt)
    centre_x = anatomy.heart_centre * half_width / 0.32 + study.pose.oblique
    centre_y = DOME_TOP + study.pose.inspiration - 0.20
    part = canvas.within(centre_x - 1.1 * half_width, centre_x + 1.1 * half_width, centre_y - 0.6, centre_y + 0.6)
    x, y = part.x - np.float32(centre_x), part.y - np.float32(centre_y)
    c, s = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    shape = 1 - ((x * c + y * s) / np.float32(long)) ** 2 - ((y * c - x * s) / np.float32(short)) ** 2
    heart = step(shape, 5)
    add(part.image, heart * np.float32(0.85), 0.64)
    return [box_of("Cardiomegaly", part, heart)] if enlarged else []


def add_bones(canvas: Canvas) -> None:
    """Add the spine with its discs, posterior and anterior ribs (waves in bent coordinates) and clavicles."""
    anatomy = canvas.study.anatomy
    back = canvas.within(-0.18, 0.18, -1.5, 1.5)
    spine = step(np.float32(0.085) - np.abs(back.x - np.float32(anatomy.spine_bend) * back.y), 25)
    spine *= np.float32(0.07) + np.float32(0.03) * np.sin(back.y * np.float32(2 * np.pi / 0.16))
    back.image += spine * (back.image > 0.15)
    _add_ribs(canvas.within(-0.98, 0.98, -1.1, 1.0))
    collar = canvas.within(-0.9, 0.9, -0.85, -0.5)
    along = collar.across - np.float32(0.10)
    level = np.float32(-0.60) - along * np.float32(0.42) + along * along * np.float32(0.40)
    clavicle = np.clip(np.float32(2.0) - np.abs(collar.y - level) * np.float32(60), 0, 1)
    clavicle *= (along > 0) & (along < 0.72)
    collar.image += clavicle * np.float32(0.14)


def _add_ribs(cage: Canvas) -> None:
    anatomy, image, across, y = cage.study.anatomy, cage.image, cage.across, cage.y
    # Bone adds less where the film is nearly white: over the heart, and least below the diaphragm.
    contrast = step(cage.depth + np.float32(0.22), 6)
    contrast *= np.clip(np.float32(1.35) - image * np.float32(1.7), 0.12, 1)
    contrast *= np.float32(anatomy.rib_contrast)
    turns = np.float32(2 * np.pi / anatomy.rib_spacing)
    # Posterior ribs rise a little from the spine, then fall towards the side, the lower ones more steeply.
    bend = across - np.float32(0.20)
    wave = y - bend * bend * (np.float32(0.85) + y * np.float32(0.45))
    posterior = np.cos(wave * turns + np.float32(2 * np.pi * anatomy.rib_phase))
    image += np.clip(posterior * 2 - np.float32(0.3), 0, 1) * contrast
    # Anterior ribs fall towards the midline and end in cartilage, which is not visible.
    bend = np.float32(0.80) - across
    anterior = np.cos((y - bend * np.float32(0.75) + bend * bend * np.float32(0.3)) * (turns * np.float32(0.8)))
    contrast *= np.clip(np.float32(2.6) - bend * np.float32(6), 0, 0.6)
    image += np.clip(anterior * 2 - np.float32(0.5), 0, 1) * contrast
