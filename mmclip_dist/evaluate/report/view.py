"""Samples of a packed set as one HTML file: image, boxes, attention, report with its entities, labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from mmclip_shards.document import check_spans, json_fields, parse_json, read_document
from mmclip_shards.images import decode_image
from mmclip_shards.schema import ATTENTION_SUFFIX, ENTITIES_SUFFIX, Box, decode_npy, image_of
from mmclip_shards.storage import write_atomic

from mmclip_dist.config import Source
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.evaluate.report.pictures import box_of, data_uri, heat_map, jpeg

_LONG_SIDE = 640  # pixels of an embedded picture: about 60 kB as JPEG
_VALUES = {1: "present", 0: "absent", -1: "uncertain", None: "not mentioned"}


@dataclass(frozen=True)
class Piece:
    """Some text of a report. kind: of the entity that it is, or None; mark: why it is no evidence, or ""; note: what its tooltip
    says."""

    text: str
    kind: str | None = None
    mark: str = ""
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One sample. picture, heat: data URIs, or None; width, height: of the stored image, in pixels; fault: why there is no
    more."""

    key: str
    picture: str | None = None
    heat: str | None = None
    grid: str = ""
    width: int = 1
    height: int = 1
    boxes: tuple[Box, ...] = ()
    report: tuple[Piece, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    view: str | None = None
    fault: str | None = None


def build_view(source: Source, out: Path, *, count: int, keys: Sequence[str] = (), label: str | None = None) -> list[str]:
    """Write a page of samples of a set and of its sidecars, atomically -> their keys. The same input gives the same bytes.

    keys: these samples; label: the first `count` in which it is present; else `count` that lie evenly over the set.
    ValueError for a key or a label that the set does not hold, and where the set or a sidecar cannot be read.
    """
    joined = JoinedSet(source)
    if label is not None and label not in joined.manifest.labels:
        known = ", ".join(joined.manifest.labels) or "none"
        raise ValueError(f"{source.url} has no label {label!r}; it has: {known}")
    places = _named(joined, keys) if keys else _labelled(joined, label) if label is not None else spread(joined, count)
    samples = [read_sample(joined, shard, key) for (shard, key), _ in zip(places, range(len(keys) or count), strict=False)]
    kinds = sorted({piece.kind for sample in samples for piece in sample.report if piece.kind})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmclip_dist.evaluate.report", "."), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    page = environment.get_template("view.html").render(
        name=f"{joined.manifest.dataset}/{joined.manifest.split}", manifest=joined.manifest, samples=samples, kinds=kinds,
        label=label, has_heat=any(sample.heat for sample in samples), has_boxes=any(sample.boxes for sample in samples),
    )  # fmt: skip
    write_atomic(str(out), page.encode())
    return [sample.key for sample in samples]


# -- Which samples ----------------------------------------------------------------------------------------------------


def _named(joined: JoinedSet, keys: Sequence[str]) -> list[tuple[int, str]]:
    wanted = dict.fromkeys(keys)
    found = {
        key: shard
        for shard, count in enumerate(joined.counts)
        for row in range(count)
        if (key := joined.key(shard, row)) in wanted
    }
    if missing := [key for key in wanted if key not in found]:
        raise ValueError(f"{joined.url} has no sample {', '.join(map(repr, missing))}")
    return [(found[key], key) for key in wanted]


def _labelled(joined: JoinedSet, label: str | None) -> Iterator[tuple[int, str]]:
    for shard, count in enumerate(joined.counts):
        for key in (joined.key(shard, row) for row in range(count)):
            try:
                present = read_document(joined.read(shard, key)).labels.get(str(label)) == 1
            except ValueError:
                continue  # an unreadable document says nothing of its labels
            if present:
                yield shard, key


def spread(joined: JoinedSet, count: int) -> Iterator[tuple[int, str]]:
    """Samples in the middle of `count` equal parts of the set."""
    ends = np.cumsum(joined.counts)
    total = int(ends[-1])
    for place in ((2 * part + 1) * total // (2 * min(count, total)) for part in range(min(count, total))):
        shard = int(np.searchsorted(ends, place, side="right"))
        yield shard, joined.key(shard, place - int(ends[shard] - joined.counts[shard]))


# -- What they hold ---------------------------------------------------------------------------------------------------


def read_sample(joined: JoinedSet, shard: int, key: str) -> Sample:
    """A sample with what can be read of it: a page of samples is where one looks for the broken ones."""
    members = joined.read(shard, key)
    try:
        document = read_document(members)
        spans = parse_json(members[ENTITIES_SUFFIX]) if ENTITIES_SUFFIX in members else []
        check_spans(spans)
        boxes = json_fields(members["json"]).get("boxes", ()) if "json" in members else ()
        image = image_of(members)
        if image is None:
            raise ValueError("it has no image")
        picture = decode_image(image)
    except ValueError as error:
        return Sample(key, fault=str(error))
    width, height = picture.size
    grid = decode_npy(members[ATTENTION_SUFFIX]) if ATTENTION_SUFFIX in members else None
    return Sample(
        key, jpeg(picture, _LONG_SIDE),
        None if grid is None else data_uri(heat_map(grid.astype(np.float64)), "PNG"),
        "" if grid is None else " × ".join(map(str, grid.shape)), width, height, tuple(box_of(box) for box in boxes),
        tuple(pieces(document.report, spans)),
        tuple((name, _VALUES[value]) for name, value in sorted(document.labels.items(), key=lambda item: item[1] != 1)),
        document.view,
    )  # fmt: skip


def pieces(report: str, spans: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
    """The report cut at its entities, in order. Of entities that overlap the first one is shown."""
    at = 0
    for span in sorted(spans, key=lambda span: (span["start"], -span["end"])):
        if span["start"] < at:
            continue
        if report[at : span["start"]]:
            yield Piece(report[at : span["start"]])
        at = span["end"]
        mark = next((name for name in ("negated", "background", "uncertain") if span.get(name)), "")
        note = ", ".join(word for word in (span["label"], mark, span.get("cui", "")) if word)
        yield Piece(report[span["start"] : at], span["label"], mark, note)
    if report[at:]:
        yield Piece(report[at:])
