"""Try a recipe on a few samples, and draw them on a contact sheet."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw

from mmclip_shards.datasets.prepared import nothing_found, read_records
from mmclip_shards.datasets.recipe import Recipe
from mmclip_shards.images import AS_PUBLISHED, PreparedImage, Rendering
from mmclip_shards.phi import phi_like
from mmclip_shards.preparation import prepare_one
from mmclip_shards.rawpath import RawPath, evenly
from mmclip_shards.schema import Record, check_record

SAMPLES, _FIRST = 20, 2000
_COLUMNS, _TILE, _CAPTION = 5, 224, 14


def check_recipe(
    recipe: Recipe, raw: RawPath, *, split: str | None, sections: Sequence[str] | None, short_side: int,
    rendering: Rendering = AS_PUBLISHED,
) -> tuple[list[str], bytes]:
    """`check_records` of a recipe's records."""
    skipped: Counter[str] = Counter()
    records = read_records(recipe, raw, split=split, sections=sections, skipped=skipped)
    first = list(islice(records, _FIRST))
    if not first:
        raise nothing_found(raw, skipped)
    return check_records(first, short_side, skipped, rendering=rendering)


def check_records(
    records: Iterable[Record], short_side: int, skipped: Counter[str] | None = None, *, rendering: Rendering = AS_PUBLISHED
) -> tuple[list[str], bytes]:
    """Prepare 20 of the first 2,000 records -> lines that say what was seen, and a contact sheet (PNG).

    skipped: what was left out before, by reason. The lines hold counts, sizes, names of labels, views and splits, but no ids and
    no text of a report; the sheet shows the images with their boxes. ValueError for a record that cannot be stored.
    """
    first = list(islice(records, _FIRST))
    for number, record in enumerate(first, 1):
        try:
            check_record(record)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
    chosen = [first[place] for place in evenly(len(first), SAMPLES)]
    images = [prepare_one(record, short_side, rendering)[1] for record in chosen]
    return list(_lines(first, chosen, images, skipped or Counter())), _sheet(images)


def _lines(
    first: list[Record], chosen: list[Record], images: list[PreparedImage | str], skipped: Counter[str]
) -> Iterator[str]:
    yield f"looked at {len(first)} records of {len({record.patient for record in first})} patients, and at {len(chosen)} images"
    for number, (record, image) in enumerate(zip(chosen, images, strict=True), 1):
        if isinstance(image, str):
            yield f"{number:3}: cannot be used: {image}"
            continue
        present = [name for name, value in record.labels.items() if value == 1]
        yield (
            f"{number:3}: {image.width} x {image.height} {image.suffix}, view {record.view or 'unknown'}, "
            f"{len(record.report.split())} words, present: {', '.join(present) or 'nothing'}"
            + (f", {len(image.boxes)} boxes" if image.boxes else "")
        )
    yield "splits: " + _counts(Counter(record.split or "by shares of the patients" for record in first))
    yield "views: " + _counts(Counter(record.view or "unknown" for record in first))
    labels = Counter(name for record in first for name, value in record.labels.items() if value == 1)
    yield "present labels: " + (_counts(labels) or "none")
    empty = sum(not record.report.strip() for record in first)
    yield f"without a report: {empty}; without labels: {sum(not record.labels for record in first)}"
    found = Counter(kind for record in first for kind in phi_like(record.report))
    yield "reports that seem to identify people: " + (_counts(found) or "none")
    if skipped:
        yield "left out: " + _counts(skipped)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def _sheet(images: list[PreparedImage | str]) -> bytes:
    """Five tiles a row, numbered as the lines are; a cross where an image cannot be used."""
    rows = -(-len(images) // _COLUMNS)
    sheet = Image.fromarray(np.zeros((rows * (_TILE + _CAPTION), _COLUMNS * _TILE, 3), np.uint8))
    draw = ImageDraw.Draw(sheet)
    for place, image in enumerate(images):
        left, top = place % _COLUMNS * _TILE, place // _COLUMNS * (_TILE + _CAPTION)
        draw.text((left + 2, top + 1), str(place + 1), fill="white")
        top += _CAPTION
        if isinstance(image, str):
            draw.line((left, top, left + _TILE, top + _TILE), fill="red")
            draw.line((left + _TILE, top, left, top + _TILE), fill="red")
            continue
        with Image.open(io.BytesIO(image.data)) as pixels:
            pixels.thumbnail((_TILE, _TILE))
            sheet.paste(pixels.convert("RGB"), (left, top))
            scale_x, scale_y = pixels.width / image.width, pixels.height / image.height
        for box in image.boxes:
            draw.rectangle(
                (left + box.x * scale_x, top + box.y * scale_y,
                 left + (box.x + box.width) * scale_x, top + (box.y + box.height) * scale_y),
                outline="yellow",
            )  # fmt: skip
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
