"""Read a data set that is a CSV or TSV table with one row per image, and a folder of images."""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol, TypeVar, get_args, overload

from mmclip_shards.datasets.rows import Row, Rows
from mmclip_shards.datasets.sections import join_sections
from mmclip_shards.datasets.upstream import read_age
from mmclip_shards.rawpath import LOOKED_FOR, RawPath, evenly, raw_path
from mmclip_shards.schema import Record, canonical_json, make_key
from mmclip_shards.storage import Url

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

EmptyReports = Literal["error", "drop", "unpaired"]

NORMAL_LABELS = frozenset({"no finding", "no findings", "normal"})
"""Cells of the labels column that mean every disease is absent."""


_LATER = frozenset({"findings_column", "impression_column", "age_column", "delimiter", "encoding", "normal_label"})


def read_table(
    table: Url,
    images: Url,
    *,
    image_column: str,
    patient_column: str,
    text_column: str | None = None,
    labels_column: str | None = None,
    labels_separator: str = "|",
    findings_column: str | None = None,
    impression_column: str | None = None,
    view_column: str | None = None,
    age_column: str | None = None,
    split_column: str | None = None,
    key_column: str | None = None,
    empty_reports: EmptyReports = "error",
    delimiter: str | None = None,
    encoding: str = "utf-8",
    normal_label: str | None = None,
) -> Sequence[Record]:
    """One record per row of `table` (commas, or tabs when it ends in .tsv or .tab), images below the folder `images`.

    Both may be URLs. A row is read when its record is asked for, so reports are not held; ValueError if the table was changed
    meanwhile (of a remote one, a copy in TMPDIR is read).

    image_column: path below `images`; it may start with that folder's own name. findings_column, impression_column: sections that
    are joined to the report, in place of text_column. labels_column: names of the present diseases. A disease that is not listed
    is absent; `No Finding`, `Normal` or normal_label makes all absent; an empty cell leaves all unknown. age_column: years, by
    `upstream.read_age`; cells that are no age are warned of. key_column: text for the key; by default the image's file name, or
    its whole path if two file names are equal. empty_reports: for a row without text, "error" stops, "drop" leaves it out,
    "unpaired" keeps its image without a report.
    A missing image is only warned of, unless all are missing: `pack` decides how many may be left out. Of remote images 20 are
    looked for.

    ValueError in one line that names rows, never a report or a patient.
    """
    table, images = raw_path(table), raw_path(images)
    if empty_reports not in get_args(EmptyReports):
        raise ValueError(f"empty_reports is {empty_reports!r}; use one of {', '.join(get_args(EmptyReports))}")
    sections = {"findings": findings_column, "impression": impression_column}
    section_columns = {name: column for name, column in sections.items() if column is not None}
    if text_column is not None and section_columns:
        raise ValueError("the report is a text column, or findings and impression columns that are joined: name one or the other")
    texts = [text_column] if text_column is not None else list(section_columns.values())
    wanted = [image_column, patient_column, *texts, labels_column, view_column, age_column, split_column, key_column]
    rows = Rows(table, [column for column in wanted if column is not None], delimiter=delimiter, encoding=encoding)
    if texts:
        rows = _settle_empty_reports(rows, texts, empty_reports)
    if not rows:
        raise ValueError(f"{table} has no rows to pack")
    _check_cells(rows, [column for column in (image_column, patient_column, split_column, key_column) if column], image_column)
    key_of = _keys(rows, image_column, key_column)
    path_of = _find_images(rows, image_column, images)
    normal = NORMAL_LABELS | ({normal_label.strip().casefold()} if normal_label is not None else set())
    absent: dict[str, int | None] = dict.fromkeys(_label_names(rows, labels_column, labels_separator, normal), 0)
    if age_column is not None:
        _check_ages(rows, age_column)

    def record(numbered: Row) -> Record:
        number, row = numbered
        found = {name: row[column] for name, column in section_columns.items() if row[column]}
        return Record(
            key=key_of(row),
            image=path_of(number, row),
            patient=row[patient_column],
            source=str(PurePosixPath(row[image_column])),
            report=row[text_column] if text_column is not None else join_sections(found),
            findings=found.get("findings"),
            impression=found.get("impression"),
            labels=_labels(row[labels_column], absent, labels_separator) if labels_column is not None else {},
            view=(row[view_column] or None) if view_column is not None else None,
            split=row[split_column] if split_column is not None else None,
            age=read_age(row[age_column]) if age_column is not None else None,
        )

    return Records(rows, record)


def table_hash(table: Url, **options: object) -> str:
    """The config_hash of `read_table(table, images, **options)`: sha256 over the table's bytes and all options.

    It does not read the images: if you change one but not the table, pack into a new folder. Options that came later count only
    where they are given, so that older sets keep their hash.
    """
    bound = inspect.signature(read_table).bind(table, "", **options)
    bound.apply_defaults()
    settings = {
        name: value
        for name, value in bound.arguments.items()
        if name not in ("table", "images")
        and not (name in _LATER and value == bound.signature.parameters[name].default)
    }
    return hashlib.sha256(canonical_json(settings) + _read_bytes(raw_path(table))).hexdigest()


def splits_of(records: Sequence[Record]) -> dict[str, str]:
    """Key -> the record's own split, for `pack(split_of_record=...)`. ValueError when a record has none."""
    splits: dict[str, str] = {}
    missing = 0
    for record in records:
        if record.split is None:
            missing += 1
        else:
            splits.setdefault(record.key, sys.intern(record.split))  # of a key that comes twice, the first record is packed
    if missing:
        raise ValueError(f"{missing} of {len(records)} records have no split: name a split column")
    return splits


class Source(Protocol[T_co]):
    """What records are made of: it can be counted, gone through, and asked for one."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[T_co]: ...
    def __getitem__(self, place: int, /) -> T_co: ...


class Records(Sequence[Record]):
    """Records that are made of the items of `source` when they are asked for."""

    def __init__(self, source: Source[T], make: Callable[[T], Record]) -> None:
        self._source, self._make = source, make
        self._places = range(len(source))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Record]:
        return map(self._make, self._source)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return [self._make(self._source[one]) for one in self._places[place]]
        return self._make(self._source[self._places[place]])


def _read_bytes(table: RawPath) -> bytes:
    try:
        return table.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"there is no table {table}") from error


def _settle_empty_reports(rows: Rows, columns: list[str], empty_reports: EmptyReports) -> Rows:
    empty = [number for number, row in rows if not any(map(row.__getitem__, columns))]
    if not empty:
        return rows
    named = " and ".join(map(repr, columns))
    found = f"{len(empty)} of {len(rows)} rows of {rows.table} have an empty {named}, the first is row {empty[0]}"
    if empty_reports == "error":
        raise ValueError(f"{found}: fill them in, or choose --empty-reports drop or --empty-reports unpaired")
    if empty_reports == "drop":
        logger.warning("%s: left out", found)
        return rows.without(set(empty))
    logger.warning("%s: kept as images without a report", found)
    return rows


def _check_cells(rows: Rows, filled: list[str], image_column: str) -> None:
    """ValueError for an empty cell in the columns `filled`, or an image that is not below the image folder."""
    empty: dict[str, list[int]] = {column: [] for column in filled}
    outside: list[int] = []
    for number, row in rows:
        for column in filled:
            if not row[column]:
                empty[column].append(number)
        value = row[image_column]
        if value.startswith("/") or "\0" in value or (".." in value and ".." in PurePosixPath(value).parts):
            outside.append(number)
    for column, numbers in empty.items():
        if numbers:
            raise ValueError(
                f"{len(numbers)} rows of {rows.table} have no {column!r}, the first is row {numbers[0]}: fill it in"
            )
    if outside:
        raise ValueError(f"{rows.table}: row {outside[0]} names an image outside the image folder: use paths below it")


def _check_ages(rows: Rows, column: str) -> None:
    """ValueError if no cell of the column is an age; a warning for those that are none."""
    filled = [(number, read_age(row[column]) is None) for number, row in rows if row[column]]
    wrong = [number for number, no_age in filled if no_age]
    if filled and len(wrong) == len(filled):
        raise ValueError(f"{rows.table}: no row of {column!r} holds an age in years (58, 58.5, 58,5 or 058Y): check --age-column")
    if wrong:
        logger.warning("%d of %d cells of %r in %s are no age, the first is of row %d: packed without one",
            len(wrong), len(filled), column, rows.table, wrong[0],
        )  # fmt: skip


def _find_images(rows: Rows, column: str, images: RawPath) -> Callable[[int, Mapping[str, str]], RawPath]:
    """(number, row) -> the path of its image."""
    if not images.is_dir():
        raise ValueError(f"there is no image folder {images}")
    local = isinstance(images, Path)
    own_name = images.resolve().name if isinstance(images, Path) else images.name
    shortened = bytearray(rows.last + 1)  # by number, whether the row's path starts with the folder's own name
    missing: list[int] = []
    # Each look at a store is a request: there a few rows tell how all name their images.
    looked = rows if local else [rows[place] for place in evenly(len(rows), LOOKED_FOR)]
    for number, row in looked:
        source = PurePosixPath(row[column])
        if (images / source).is_file():
            continue
        if len(source.parts) > 1 and source.parts[0] == own_name and images.joinpath(*source.parts[1:]).is_file():
            shortened[number] = True
        else:
            missing.append(number)
    if len(missing) == len(looked):
        raise ValueError(
            f"none of the {len(looked)} images of {rows.table} {'' if local else 'that were looked for '}are in {images}: "
            "check the image column and the image folder"
        )
    if missing:
        logger.warning(
            "%d of %d images of %s are not in %s, the first is of row %d",
            len(missing), len(looked), rows.table, images, missing[0],
        )  # fmt: skip
    if not local and any(shortened):
        for number, row in rows:
            shortened[number] = row[column].startswith(f"{own_name}/")
    return lambda number, row: images.joinpath(*PurePosixPath(row[column]).parts[shortened[number] :])


def _keys(rows: Rows, image_column: str, key_column: str | None) -> Callable[[Mapping[str, str]], str]:
    """row -> its key: the key column, or else the image's file name, or its whole path if two images have one name. Two rows may
    have one key: `pack` counts them."""

    def of_cell(row: Mapping[str, str]) -> str:
        return make_key(row[str(key_column)])

    def of_stem(row: Mapping[str, str]) -> str:
        return make_key(PurePosixPath(row[image_column]).stem)

    def of_path(row: Mapping[str, str]) -> str:
        return make_key(str(PurePosixPath(row[image_column])))

    if key_column is not None:
        return of_cell
    first: dict[str, str] = {}
    one_name_each = all(first.setdefault(of_stem(row), row[image_column]) == row[image_column] for _, row in rows)
    return of_stem if one_name_each else of_path


def _label_names(rows: Rows, column: str | None, separator: str, normal: Set[str]) -> list[str]:
    """The names of diseases that any row lists, sorted. normal: names in lower case that are no disease."""
    if column is None:
        return []
    if not separator:
        raise ValueError("labels_separator is empty; use for example '|'")
    names = {name for _, row in rows for name in _listed(row[column], separator)}
    diseases = sorted(name for name in names if name.casefold() not in normal)
    if not diseases:
        raise ValueError(f"{rows.table}: no row of {column!r} names a disease: check --labels-column")
    return diseases


def _labels(cell: str, absent: Mapping[str, int | None], separator: str) -> dict[str, int | None]:
    """A row's labels: a value for each name that any row lists. absent: all of them, 0."""
    present = _listed(cell, separator)
    if not present:
        return dict.fromkeys(absent)
    return {**absent, **dict.fromkeys(present & absent.keys(), 1)}


def _listed(cell: str, separator: str) -> set[str]:
    return {name.strip() for name in cell.split(separator) if name.strip()}
