"""Read the files of a published data set as they are: gzip, odd headers, study tables, folders of folders."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from mmclip_shards import storage
from mmclip_shards.datasets.rows import check_columns
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Box, check_box, check_source

_CELLS: dict[str, int | None] = {
    "": None, "nan": None, "NaN": None, "1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1,
}  # fmt: skip
_LONGEST_CELL = 1 << 24  # CheXpert Plus has reports beyond the csv module's 131,072 characters


def find_file(raw: RawPath, *names: str) -> RawPath:
    """The first of these files that is below `raw`, as it is or with .gz. ValueError that names all when there is none."""
    found = find_optional(raw, *names)
    if found is None:
        raise ValueError(f"{raw} holds no {' or '.join(names)}: name the folder that was downloaded, unpacked")
    return found


def find_optional(raw: RawPath, *names: str) -> RawPath | None:
    """As `find_file`, or None."""
    paths = (raw / (name + suffix) for name in names for suffix in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


class Row(dict[str, str]):
    """The cells of a row by column. place: the file and the row, for messages."""

    __slots__ = ("_number", "_path")

    def __init__(self, cells: Mapping[str, str], path: RawPath, number: int) -> None:
        super().__init__(cells)
        self._path, self._number = path, number

    @property
    def place(self) -> str:
        return f"{self._path}, row {self._number}"


def read_lines(path: RawPath) -> Iterator[str]:
    """The lines of a text file, plain or gzip, with their ends. ValueError that names the file when it is not UTF-8, or when its
    gzip is cut or damaged."""
    try:
        with ExitStack() as opened:
            file: Any = opened.enter_context(path.open("rb"))
            if path.suffix == ".gz":
                file = opened.enter_context(gzip.open(file))
            yield from io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} of a block): download it again, or convert it (iconv)"
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): download it again") from error


def read_csv(
    path: RawPath, *wanted: str, header: Sequence[str] | None = None, delimiter: str = ",", ragged: bool = False
) -> Iterator[Row]:
    """The rows of a CSV file, plain or gzip, by column; header names and cells are stripped.

    wanted: columns that must be there. header: the names, for a file without a header. ragged: empty cells may follow in some
    rows, as spreadsheets leave them. ValueError that names the file and the row for a row with another number of cells, for
    text that is not UTF-8, and for a file that is no CSV.
    """
    csv.field_size_limit(_LONGEST_CELL)
    try:
        reader = csv.reader(read_lines(path), delimiter=delimiter, skipinitialspace=delimiter == " ")
        names = list(header) if header is not None else [name.strip() for name in next(reader, [])]
        check_columns(names, list(wanted), path)
        for number, cells in enumerate(reader, 1 if header is not None else 2):
            if not cells:
                continue
            if ragged:
                while len(cells) > len(names) and not cells[-1].strip():
                    cells.pop()
            if len(cells) != len(names):
                raise ValueError(f"{path}: row {number} has {len(cells)} cells, the header {len(names)}: download it again")
            yield Row(dict(zip(names, map(str.strip, cells), strict=True)), path, number)
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a table ({error}): download it again") from error


def label_value(row: Row, name: str) -> int | None:
    """A cell of CheXpert's and MIMIC's tables: 1.0 present, 0.0 absent, -1.0 uncertain, empty not mentioned. ValueError for any
    other, with its place."""
    if row[name] not in _CELLS:
        raise ValueError(
            f"{row.place}: {name} is {row[name]!r}; 1.0, 0.0, -1.0 or an empty cell is needed: download the table again"
        )
    return _CELLS[row[name]]


def is_present(row: Row, name: str) -> bool:
    """Whether a cell is 1 and not 0. ValueError for any other, with its place."""
    value = _CELLS.get(row[name])
    if value not in (0, 1):
        raise ValueError(f"{row.place}: {name} is {row[name]!r}; 1 or 0 is needed: download the table again")
    return value == 1


def read_path(row: Row, name: str, folders: int = 0) -> PurePosixPath:
    """The path in a cell, which must lie below the tree, in at least that many folders. ValueError for any other, with its
    place and without the path, which may name a patient."""
    path = PurePosixPath(row[name])
    try:
        check_source(row[name])
    except ValueError as error:
        raise ValueError(f"{row.place}: {name}: {error}") from None
    if len(path.parts) <= folders:
        raise ValueError(f"{row.place}: {name} must be a path of {folders} folders and a file: download the table again")
    return path


def read_age(cell: str) -> int | None:
    """Whole years in a cell such as `58`, `58.0`, `58,5` or `058Y` (DICOM); None for an empty cell and what is no age (414)."""
    found = _AGE.fullmatch(cell)
    years = float(found[1].replace(",", ".")) / _PER_YEAR[found[2].upper()] if found else math.inf
    return int(years) if years <= _OLDEST_EVER else None


def read_numbers(row: Row, *names: str) -> tuple[float, ...]:
    """The numbers in these cells. ValueError that names the columns."""
    try:
        return tuple(float(row[name]) for name in names)
    except ValueError:
        raise ValueError(f"{row.place}: {', '.join(names)} are not all numbers: download the table again") from None


def make_box(row: Row, label: str, x: float, y: float, width: float, height: float) -> Box:
    """A box of this row. ValueError with its place for one that cannot be stored."""
    box = Box(label, x, y, width, height)
    try:
        check_box(box)
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}: download the table again") from None
    return box


class StudyLabels:
    """Labels by study or image, in 15 bytes and a key each: sets have 220,000 of them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._values: dict[str, bytes] = {}

    def add(self, study: str, labels: Mapping[str, int | None]) -> None:
        """labels: of all names or some."""
        self._values[study] = bytes(_CODES[labels.get(name)] for name in self.names)

    def __getitem__(self, study: str) -> dict[str, int | None]:
        """Empty for a study without labels."""
        return dict(zip(self.names, map(_VALUES.__getitem__, self._values.get(study, b"")), strict=False))

    def __contains__(self, study: str) -> bool:
        return study in self._values

    def __len__(self) -> int:
        return len(self._values)


_AGE = re.compile(r"(\d+(?:[.,]\d+)?)([YMWDymwd]?)")
_PER_YEAR = {"": 1, "Y": 1, "M": 12, "W": 52, "D": 365}
_OLDEST_EVER = 120  # NIH's table of 2017 has ages of 414

_VALUES = (1, 0, -1, None)
_CODES = {value: code for code, value in enumerate(_VALUES)}


class ImageIndex:
    """Where the images of a tree are, by file name: some copies are flat, some have a folder for each archive.

    folders: patterns of the folders that may hold images, relative to the tree, or "." for the tree itself. An image that is
    in none is taken to be in the first folder, so that `pack` counts it as missing.
    """

    def __init__(self, raw: RawPath, *folders: str) -> None:
        found = (path for pattern in folders for path in ([raw] if pattern == "." else raw.glob(pattern)))
        self._folders = sorted({path for path in found if path.is_dir()})
        if not self._folders:
            raise ValueError(f"{raw} holds no folder {' or '.join(folders)}: name the folder that was downloaded, unpacked")

    @cached_property
    def _place(self) -> dict[str, int]:
        places: dict[str, int] = {}
        for place, folder in enumerate(self._folders):
            for entry in folder.iterdir():
                places.setdefault(entry.name, place)
        return places

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def __getitem__(self, name: str) -> RawPath:
        # Where there is one folder, nobody needs to list it.
        return self._folders[self._place.get(name, 0) if len(self._folders) > 1 else 0] / name


class FilesBelow:
    """Which files are below a folder. A local disk is asked for each; a store is asked once for all: each would be a request."""

    def __init__(self, folder: RawPath) -> None:
        self.folder = folder

    @cached_property
    def _names(self) -> set[str]:
        return {name for name, _ in storage.scan_remote(self.folder, deep=True)}

    def __contains__(self, path: PurePath) -> bool:
        return (self.folder / path).is_file() if isinstance(self.folder, Path) else str(path) in self._names
