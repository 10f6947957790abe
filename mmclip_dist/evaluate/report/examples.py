"""Example panels: an evaluation image, the checkpoint's attention to its diseases, and its scores.

Only pixels, label names, boxes and scores leave this module: no report, no patient, no key.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmclip_shards.document import json_fields, read_document
from mmclip_shards.images import decode_image
from mmclip_shards.manifest import Manifest, load_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import Box, image_of
from PIL import Image

from mmclip_dist.checkpoint.folder import weights_hash
from mmclip_dist.checkpoint.model_files import load_model
from mmclip_dist.data.batch import collate
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.prompts import load_prompts, tokenize_prompts
from mmclip_dist.evaluate.zeroshot import class_directions

_PANELS = 4
_LONG_SIDE = 320  # pixels of an embedded picture: sharp at its width on the page, about 15 kB as JPEG
_SCORES = 10  # rows of a panel's table at most

# Viridis: purple to yellow with rising lightness, readable for the colour-blind; every 51st of its 256 colours.
_VIRIDIS = np.array([(68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)])
_OPACITY = (0.15, 0.65)  # of the lowest and of the highest score: the image stays visible where attention is low


@dataclass(frozen=True)
class Score:
    """label: 1 present, 0 absent, None unknown; value: similarity to the positive minus to the negative prompts."""

    name: str
    label: int | None
    value: float


@dataclass(frozen=True)
class Panel:
    """One example. picture, heat: data URIs; width, height: of the stored image, in pixels; unseen: scores left out."""

    picture: str
    heat: str
    width: int
    height: int
    boxes: tuple[Box, ...]
    scores: tuple[Score, ...]
    unseen: int

    @property
    def guides(self) -> tuple[str, ...]:
        """The classes whose prompts guide the attention."""
        return tuple(score.name for score in self.scores if score.label == 1)


@dataclass(frozen=True)
class Gallery:
    """Panels of one checkpoint. grid: patches along a side; checkpoint: sha256 of its weights; datasets: NAME/SPLIT."""

    panels: tuple[Panel, ...]
    step: int
    grid: int
    checkpoint: str
    datasets: tuple[str, ...]


def build_gallery(checkpoint: Path, urls: Sequence[str]) -> Gallery:
    """Panels of the first samples in packed sets `urls` that have a positive label.

    ValueError if a set cannot be read or has no labels, or if one of the chosen images cannot be decoded.
    """
    manifests = [load_manifest(url) for url in urls]
    classes = tuple(dict.fromkeys(name for manifest in manifests for name in manifest.labels))
    if not classes:
        raise ValueError(f"{', '.join(urls)}: no labels to show examples of; name a set that was packed with labels")
    samples = list(islice(_positive_samples(urls, manifests), _PANELS))
    model, tokenizer, config, meta = load_model(checkpoint)
    tokens, mask = tokenize_prompts(load_prompts(classes, config.prompts.file), tokenizer, config.model.text.max_tokens)
    # The model has the prompts of the classes it was trained on; an evaluation set may have others.
    model.set_prompts(tokens, mask)
    maker = ExampleMaker(
        tokenizer, classes, config.model.image.size, config.model.image.grid, config.model.text.max_tokens,
        config.entmlm, augment=None,
    )  # fmt: skip
    panels: tuple[Panel, ...] = ()
    if samples:
        examples = [maker(str(number), _without_report(members), epoch=0) for number, members in enumerate(samples)]
        batch = collate(examples, 0, tokenizer.pad_token_id)
        with torch.inference_mode():
            grids = model.attention_grid(batch).numpy()
            scores = (model.embed_images(batch["image"]) @ class_directions(model, tokens, mask).T).numpy()
        panels = tuple(
            _panel(members, grid, dict(zip(classes, row.tolist(), strict=True)))
            for members, grid, row in zip(samples, grids, scores, strict=True)
        )
    datasets = tuple(dict.fromkeys(f"{manifest.dataset}/{manifest.split}" for manifest in manifests))
    return Gallery(panels, meta.step, config.model.image.grid, weights_hash(checkpoint), datasets)


def _positive_samples(urls: Sequence[str], manifests: Sequence[Manifest]) -> Iterator[dict[str, bytes]]:
    for url, manifest in zip(urls, manifests, strict=True):
        reader = ShardReader(url, manifest)
        for number in range(len(manifest.shards)):
            for _, members in reader.samples(number):
                if 1 in read_document(members).labels.values():
                    yield members


def _without_report(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """The sample without its report, so that the disease prompts guide the attention."""
    document = {"report": None, "labels": read_document(members).labels}
    return {name: data for name, data in members.items() if name != "txt"} | {"json": json.dumps(document).encode()}


def _panel(members: Mapping[str, bytes], grid: np.ndarray, scores: Mapping[str, float]) -> Panel:
    labels = read_document(members).labels
    boxes = json_fields(members["json"]).get("boxes", ()) if "json" in members else ()
    picture = decode_image(image_of(members) or b"")
    width, height = picture.size
    picture.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.BICUBIC)
    rows = _scores(labels, scores)
    shown = rows[: max(_SCORES, sum(row.label == 1 for row in rows))]
    return Panel(
        data_uri(picture, "JPEG", quality=88), data_uri(heat_map(grid), "PNG"), width, height,
        tuple(box_of(box) for box in boxes), tuple(shown), len(rows) - len(shown),
    )  # fmt: skip


def box_of(values: Mapping[str, Any]) -> Box:
    x, y, width, height = (float(values[name]) for name in ("x", "y", "width", "height"))
    return Box(str(values["label"]), x, y, width, height)


def _scores(labels: Mapping[str, int | None], scores: Mapping[str, float]) -> list[Score]:
    """Present classes first, then the others; both by falling score."""
    known = {name: label for name, label in labels.items() if label in (0, 1)}
    rows = [Score(name, known.get(name), value) for name, value in scores.items()]
    return sorted(rows, key=lambda row: (row.label != 1, -row.value))


def heat_map(grid: np.ndarray) -> Image.Image:
    """Scores [rows, cols] -> RGBA picture of that many pixels, from the lowest score (dark, clear) to the highest."""
    spread = float(grid.max() - grid.min())
    share = (grid - grid.min()) / spread if spread > 0 else np.zeros_like(grid)
    places = np.linspace(0, 1, len(_VIRIDIS))
    colours = [np.interp(share, places, channel) for channel in _VIRIDIS.T]
    opacity = 255 * (_OPACITY[0] + (_OPACITY[1] - _OPACITY[0]) * share)
    return Image.fromarray(np.stack([*colours, opacity], axis=-1).round().astype(np.uint8), "RGBA")


def data_uri(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
