"""Draw a synthetic `Study` as a frontal radiograph, with a box around each finding.

The order is: chest wall, lungs, vessels, mediastinum and heart, bones, then findings, devices, exposure and noise. Removing
a finding from the study changes nothing else.

A frontal film is viewed face to face: the patient's right is at image left.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from mmclip_shards.datasets.synthetic import chest
from mmclip_shards.datasets.synthetic.canvas import Canvas, smooth_noise, to_pixel
from mmclip_shards.datasets.synthetic.lesions import paint
from mmclip_shards.datasets.synthetic.studies import Study
from mmclip_shards.schema import Box

CURVE_STEPS = 1023
"""Entries of the exposure table. Computing the power for each pixel would cost as much as drawing the lungs."""


def draw(study: Study, size: int) -> tuple[np.ndarray, tuple[Box, ...]]:
    """The radiograph of a study, uint8 [size, size], and the boxes of its findings in pixels (two for a bilateral one)."""
    canvas = chest.empty_chest(study, size)
    chest.shade_lungs(canvas)
    chest.add_mediastinum(canvas)
    boxes = chest.add_heart(canvas)
    chest.add_bones(canvas)
    for finding in study.findings:
        boxes += paint(canvas, finding)
    for device in study.devices:
        _add_device(canvas, device)
    return _expose(canvas), tuple(boxes)


def _add_device(canvas: Canvas, device: str) -> None:
    """Add metal and plastic over the chest, sharper and brighter than any finding."""
    size, pose = canvas.size, canvas.study.pose
    rng = np.random.default_rng((canvas.study.noise_seed, len(device)))
    sheet = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(sheet)
    thin = max(1, round(size / 64))
    side = float(rng.choice((-1.0, 1.0)))
    jitter = rng.uniform(-0.05, 0.05, (4, 2))

    def points(*xy: tuple[float, float]) -> list[tuple[float, float]]:
        return [to_pixel(pose, 2 * size, x, y) for x, y in xy]

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
    """Apply exposure curve, scatter and quantum noise -> uint8 [size, size]."""
    pose, size = canvas.study.pose, canvas.size
    rng = np.random.default_rng(canvas.study.noise_seed)
    image = canvas.image
    image += smooth_noise(rng, 7, image.shape) * np.float32(0.018) * (image > 0.04)
    # The mean of 2 x 2 uniform draws is nearly normal. Neighbours correlate, because light spreads in the screen.
    grain = rng.random((size + 1, size + 1), dtype=np.float32)
    grain = grain[1:] + grain[:-1]
    grain = grain[:, 1:] + grain[:, :-1]
    grain -= 2
    image += grain * np.float32(pose.noise * 1.73)
    curve = np.linspace(0, 1, CURVE_STEPS + 1) ** pose.gamma * pose.gain + pose.offset
    table = np.clip(curve * 255, 0, 255).astype(np.uint8)
    image *= CURVE_STEPS
    return table[np.clip(image, 0, CURVE_STEPS).astype(np.uint16)]
