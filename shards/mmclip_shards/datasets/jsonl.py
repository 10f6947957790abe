from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from mmclip_shards.datasets.prepared import split_name
from mmclip_shards.datasets.recipe import recipe
from mmclip_shards.datasets.sections import SECTIONS
from mmclip_shards.datasets.upstream import read_age
from mmclip_shards.document import legal_labels
from mmclip_shards.rawpath import RawPath, matching
from mmclip_shards.schema import Box, Record


@recipe(licence=None, access=None, source="your own files")
def jsonl(raw: RawPath) -> Iterator[Record]:
    """JSON lines: every RAW/*.jsonl holds one object a line, with the fields of a record.

    `image` (a path below RAW) and `patient` must be there; `report`, `labels` (`{"Edema": 1}`: 1 present, 0 absent, -1
    uncertain, null not mentioned), `view`, `boxes` (`[{"label", "x", "y", "width", "height"}]` in pixels of the image),
    `sections` (`{"findings": ...}`), `age` (years: `58`, `58.0`, `"058Y"`), `key` and `split` may be. `--split official`
    takes the `split` field. Other fields are refused: a misspelt one would be lost.
    """
    files = matching(raw, "*.jsonl")
    if not files:
        raise ValueError(f"{raw} holds no *.jsonl")
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError):
                        raise ValueError(f"{where}, is no JSON: write one object a line, in UTF-8") from None
                    yield record_of(row, raw, where)


FIELDS = frozenset({"image", "patient", "report", "labels", "view", "boxes", "sections", "key", "split", "age"})


def record_of(row: Any, raw: RawPath, where: str) -> Record:
    """The record of an object with these fields. ValueError that begins with `where` and names the field, never its content."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}, is no object: write {{\"image\": ..., \"patient\": ...}}")
    if extra := sorted(set(row) - FIELDS):
        raise ValueError(f"{where}, has an unknown field {extra[0]!r}; the fields are {', '.join(sorted(FIELDS))}")
    for name in ("image", "patient", "report", "view", "key", "split"):
        if not isinstance(row.get(name, ""), str | None) or (name in ("image", "patient") and not row.get(name)):
            raise ValueError(f"{where}: {name!r} must be a text" + (" and be there" if name in ("image", "patient") else ""))
    source = PurePosixPath(row["image"])
    if source.is_absolute() or ".." in source.parts:
        raise ValueError(f"{where} names an image outside {raw}: use paths below it")
    labels, sections, boxes = row.get("labels") or {}, row.get("sections") or {}, row.get("boxes") or []
    if (legal := legal_labels(labels)) is None:
        raise ValueError(f"{where}: 'labels' must be like {{\"Edema\": 1}}, with 1, 0, -1 or null")
    if not isinstance(sections, dict) or not all(isinstance(text, str) for text in sections.values()):
        raise ValueError(f"{where}: 'sections' must be like {{\"findings\": \"...\"}}")
    if unknown := sorted(set(sections) - set(SECTIONS)):
        raise ValueError(f"{where}: there is no section {unknown[0]!r}; the sections are {', '.join(SECTIONS)}")
    try:
        found = tuple(Box(str(b["label"]), *(float(b[side]) for side in ("x", "y", "width", "height"))) for b in boxes)
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{where}: 'boxes' must be a list of label, x, y, width, height") from None
    return Record(
        key=row.get("key") or str(source),
        image=raw / source,
        patient=row["patient"],
        source=str(source),
        report=row.get("report") or "",
        labels=legal,
        view=row.get("view"),
        boxes=found,
        split=split_name(row["split"]) if row.get("split") else None,
        sections=sections,
        age=_age(row.get("age"), where),
    )


def _age(value: Any, where: str) -> int | None:
    """NaN, which pandas writes for an empty cell, is no age, as null is."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    age = read_age(str(value)) if isinstance(value, int | float | str) else None
    if age is None:
        raise ValueError(f"{where}: 'age' must be years, 0 to 120, as 58, 58.0 or \"058Y\"")
    return age
