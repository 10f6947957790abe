"""Read a data set that is a CSV or TSV table with one row per image, and a folder of images."""

from __future__ import annotations

import csv
import difflib
import hashlib
import inspect
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from mmclip_shards.schema import Record, canonical_json, make_key
from mmclip_shards.split import check_patients_stay

logger = logging.getLogger(__name__)

EmptyReports = Literal["error", "drop", "unpaired"]

NORMAL_LABELS = frozenset({"no finding", "no findings", "normal"})
"""Cells of the labels column that mean every disease is absent."""

Row = tuple[int, Mapping[str, str]]
"""The row's number as a spreadsheet shows it (the header is row 1) and its cells by column."""


def read_table(
    table: Path | str,
    images: Path | str,
    *,
    image_column: str,
    patient_column: str,
    text_column: str | None = None,
    labels_column: str | None = None,
    labels_separator: str = "|",
    view_column: str | None = None,
    split_column: str | None = None,
    key_column: str | None = None,
    empty_reports: EmptyReports = "error",
) -> list[Record]:
    """One record per row of `table` (UTF-8; tabs when it ends in .tsv or .tab), images below the folder `images`.

    image_column: path below `images`; it may start with that folder's own name. labels_column: names of the present
    diseases. A disease that is not listed is absent; `No Finding` or `Normal` makes all absent; an empty cell leaves all
    unknown. key_column: text for the key; by default the image's file name, or its whole path if two file names are equal.
    empty_reports: for a row without text, "error" stops, "drop" leaves it out, "unpaired" keeps its image without a report.
    A missing image is only warned of, unless all are missing: `pack` decides how many may be left out.

    ValueError in one line that names rows, never a report or a patient.
    """
    table, images = Path(table), Path(images)
    if empty_reports not in get_args(EmptyReports):
        raise ValueError(f"empty_reports is {empty_reports!r}; use one of {', '.join(get_args(EmptyReports))}")
    wanted = [image_column, patient_column, text_column, labels_column, view_column, split_column, key_column]
    rows = list(_read_rows(table, [column for column in wanted if column is not None]))
    if text_column is not None:
        rows = _settle_empty_reports(rows, text_column, empty_reports, table)
    if not rows:
        raise ValueError(f"{table} has no rows to pack")
    for column in (image_column, patient_column, split_column, key_column):
        if column is not None:
            _check_filled(rows, column, table)
    sources = [_relative_path(number, row[image_column], table) for number, row in rows]
    keys = _keys(rows, sources, key_column, table)
    paths = _find_images(rows, sources, images, table)
    labels = _labels(rows, labels_column, labels_separator, table)
    records = [
        Record(
            key=key,
            image=path,
            patient=row[patient_column],
            source=str(source),
            report=row[text_column] if text_column is not None else "",
            labels=row_labels,
            view=(row[view_column] or None) if view_column is not None else None,
            split=row[split_column] if split_column is not None else None,
        )
        for (_, row), key, path, source, row_labels in zip(rows, keys, paths, sources, labels, strict=True)
    ]
    if split_column is not None:
        check_patients_stay((f"row {number}", row[patient_column], row[split_column]) for number, row in rows)
    return records


def table_hash(table: Path | str, **options: object) -> str:
    """The config_hash of `read_table(table, images, **options)`: sha256 over the table's bytes and all options.

    It does not read the images. If you change an image but not the table, pack into a new folder.
    """
    bound = inspect.signature(read_table).bind(table, "", **options)
    bound.apply_defaults()
    settings = {name: value for name, value in bound.arguments.items() if name not in ("table", "images")}
    return hashlib.sha256(canonical_json(settings) + _read_bytes(Path(table))).hexdigest()


def splits_of(records: list[Record]) -> dict[str, str]:
    """Key -> the record's own split, for `pack(split_of_record=...)`. ValueError when a record has none."""
    splits = {record.key: record.split for record in records if record.split is not None}
    if len(splits) != len(records):
        raise ValueError(f"{len(records) - len(splits)} of {len(records)} records have no split: name a split column")
    return splits


def _read_bytes(table: Path) -> bytes:
    try:
        return table.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"there is no table {table}") from error


def _read_rows(table: Path, wanted: list[str]) -> Iterator[Row]:
    try:
        text = _read_bytes(table).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not UTF-8 (byte {error.start}): save or convert (iconv) it as UTF-8") from None
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if table.suffix.lower() in (".tsv", ".tab") else ",", strict=True
    )
    try:
        columns = [name.strip() for name in next(reader, [])]
        _check_columns(columns, wanted, table)
        for number, cells in enumerate(reader, 2):
            if not cells:
                continue  # a blank line
            if len(cells) != len(columns):
                raise ValueError(
                    f"{table}: row {number} has {len(cells)} cells, the header {len(columns)}: "
                    "put cells that hold the separator or a line break in quotes"
                )
            yield number, {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(f"{table}: line {reader.line_num} cannot be read as a table: {error}") from error


def _check_columns(columns: list[str], wanted: list[str], table: Path) -> None:
    for name in wanted:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=len(columns) or 1, cutoff=0.0)
            raise ValueError(f"{table} has no column {name!r}; its columns, nearest first: {', '.join(near) or 'none'}")
        if columns.count(name) > 1:
            raise ValueError(f"{table} has two columns {name!r}: rename one")


def _settle_empty_reports(rows: list[Row], column: str, empty_reports: EmptyReports, table: Path) -> list[Row]:
    empty = [number for number, row in rows if not row[column]]
    if not empty:
        return rows
    found = f"{len(empty)} of {len(rows)} rows of {table} have an empty {column!r}, the first is row {empty[0]}"
    if empty_reports == "error":
        raise ValueError(f"{found}: fill them in, or choose --empty-reports drop or --empty-reports unpaired")
    if empty_reports == "drop":
        logger.warning("%s: left out", found)
        return [(number, row) for number, row in rows if row[column]]
    logger.warning("%s: kept as images without a report", found)
    return rows


def _check_filled(rows: list[Row], column: str, table: Path) -> None:
    empty = [number for number, row in rows if not row[column]]
    if empty:
        raise ValueError(f"{len(empty)} rows of {table} have no {column!r}, the first is row {empty[0]}: fill it in")


def _relative_path(number: int, value: str, table: Path) -> PurePosixPath:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or "\0" in value:
        raise ValueError(f"{table}: row {number} names an image outside the image folder: use paths below it")
    return path


def _find_images(rows: list[Row], sources: list[PurePosixPath], images: Path, table: Path) -> list[Path]:
    if not images.is_dir():
        raise ValueError(f"there is no image folder {images}")
    own_name = images.resolve().name
    paths: list[Path] = []
    missing: list[int] = []
    for (number, _), source in zip(rows, sources, strict=True):
        inner = PurePosixPath(*source.parts[1:]) if len(source.parts) > 1 and source.parts[0] == own_name else source
        path = next((images / name for name in (source, inner) if (images / name).is_file()), None)
        if path is None:
            missing.append(number)
        paths.append(path or images / source)
    if len(missing) == len(rows):
        raise ValueError(
            f"none of the {len(rows)} images of {table} are in {images}: check the image column and the image folder"
        )
    if missing:
        logger.warning(
            "%d of %d images of %s are not in %s, the first is of row %d", len(missing), len(rows), table, images, missing[0]
        )
    return paths


def _keys(rows: list[Row], sources: list[PurePosixPath], key_column: str | None, table: Path) -> list[str]:
    if key_column is not None:
        keys = [make_key(row[key_column]) for _, row in rows]
    else:
        keys = [make_key(source.stem) for source in sources]
        if len(set(keys)) < len(keys):
            keys = [make_key(str(source)) for source in sources]
    first: dict[str, int] = {}
    for (number, _), key in zip(rows, keys, strict=True):
        if first.setdefault(key, number) != number:
            what = f"the same {key_column!r}" if key_column is not None else "the same image"
            raise ValueError(f"rows {first[key]} and {number} of {table} have {what}: a table needs one row per image")
    return keys


def _labels(rows: list[Row], column: str | None, separator: str, table: Path) -> list[dict[str, int | None]]:
    """The labels of every row. Each row has a value for each name that any row lists."""
    if column is None:
        return [{} for _ in rows]
    if not separator:
        raise ValueError("labels_separator is empty; use for example '|'")
    cells = [[name.strip() for name in row[column].split(separator) if name.strip()] for _, row in rows]
    listed = [{name for name in cell if name.casefold() not in NORMAL_LABELS} for cell in cells]
    names = sorted(set().union(*listed))
    if not names:
        raise ValueError(f"{table}: no row of {column!r} names a disease: check --labels-column")
    unknown: dict[str, int | None] = dict.fromkeys(names)
    return [
        {name: int(name in present) for name in names} if cell else dict(unknown)
        for cell, present in zip(cells, listed, strict=True)
    ]
