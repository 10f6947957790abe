"""Example panels: a held-out image, the checkpoint's attention to its diseases, and its scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from mmclip_shards.document import json_fields, read_document
from mmclip_shards.images import decode_image
from mmclip_shards.schema import Box, image_of

from mmclip_dist.evaluate.report.held_out import HeldOut, NotShown
from mmclip_dist.evaluate.report.pictures import box_of, data_uri, heat_map, jpeg

_PANELS = 4
_LONG_SIDE = 320  # pixels of an embedded picture: sharp at its width on the page, about 15 kB as JPEG
_SCORES = 10  # rows of a panel's table at most


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


def attention_panels(held: HeldOut) -> tuple[Panel, ...] | NotShown:
    """Panels of the first samples that have a positive label."""
    if not held.classes:
        return NotShown(f"{', '.join(held.datasets)} has no labels")
    rows = np.flatnonzero((held.labels == 1).any(1))[:_PANELS]
    if not len(rows):
        return NotShown(f"no image in {', '.join(held.datasets)} has a positive label")
    members = [held.members(row) for row in rows]
    with torch.inference_mode():
        grids = held.model.attention_grid(held.batch([_without_report(one) for one in members])).numpy()
    return tuple(
        _panel(one, grid, dict(zip(held.classes, held.scores[row].tolist(), strict=True)))
        for row, one, grid in zip(rows, members, grids, strict=True)
    )


def _without_report(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """The sample without its report, so that the disease prompts guide the attention."""
    document = {"report": None, "labels": read_document(members).labels}
    return {name: data for name, data in members.items() if name != "txt"} | {"json": json.dumps(document).encode()}


def _panel(members: Mapping[str, bytes], grid: np.ndarray, scores: Mapping[str, float]) -> Panel:
    labels = read_document(members).labels
    boxes = json_fields(members["json"]).get("boxes", ()) if "json" in members else ()
    picture = decode_image(image_of(members) or b"")
    width, height = picture.size
    rows = _scores(labels, scores)
    shown = rows[: max(_SCORES, sum(row.label == 1 for row in rows))]
    return Panel(
        jpeg(picture, _LONG_SIDE), data_uri(heat_map(grid), "PNG"), width, height,
        tuple(box_of(box) for box in boxes), tuple(shown), len(rows) - len(shown),
    )  # fmt: skip


def _scores(labels: Mapping[str, int | None], scores: Mapping[str, float]) -> list[Score]:
    """Present classes first, then the others; both by falling score."""
    known = {name: label for name, label in labels.items() if label in (0, 1)}
    rows = [Score(name, known.get(name), value) for name, value in scores.items()]
    return sorted(rows, key=lambda row: (row.label != 1, -row.value))
