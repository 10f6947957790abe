"""The rows of a CSV or TSV file, read when they are asked for."""

from __future__ import annotations

import codecs
import csv
import difflib
from array import array
from collections.abc import Container, Iterator, Mapping
from copy import copy
from typing import Any

import xxhash

from mmclip_shards.rawpath import RawPath, seekable

Row = tuple[int, Mapping[str, str]]
"""The row's number as a spreadsheet shows it (the header is row 1) and its cells by column."""


class Rows:
    """The rows of a table: their places in the file and a hash of each, in 32 bytes. They are read when they are asked for.

    wanted: columns that must be there. delimiter: between cells; by default a comma, and in .tsv and .tab files a tab. ValueError
    for a file that cannot be read as a table.
    """

    def __init__(
        self, table: RawPath, wanted: list[str], *, delimiter: str | None = None, encoding: str = "utf-8"
    ) -> None:
        if delimiter is not None and len(delimiter) != 1:
            raise ValueError(f"delimiter {delimiter!r} is not one character: use for example ';'")
        self.table, self._encoding = table, _checked(encoding)
        self._numbers, self._starts, self._lengths, self._hashes = array("Q"), array("Q"), array("Q"), array("Q")
        self._delimiter = delimiter or ("\t" if table.suffix.lower() in (".tsv", ".tab") else ",")
        self._columns: list[str] = []
        try:
            self._file = seekable(table)
        except FileNotFoundError as error:
            raise ValueError(f"there is no table {table}") from error
        self._scan(wanted)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def last(self) -> int:
        """The number of the last row; there must be one."""
        return self._numbers[-1]

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def without(self, numbers: Container[int]) -> Rows:
        """All rows but those of these numbers."""
        rest = copy(self)
        kept = [place for place, number in enumerate(self._numbers) if number not in numbers]
        for name in ("_numbers", "_starts", "_lengths", "_hashes"):
            setattr(rest, name, array("Q", [getattr(self, name)[place] for place in kept]))
        return rest

    def _scan(self, wanted: list[str]) -> None:
        lines: list[bytes] = []  # of the row that is being read
        start = 0
        reader = csv.reader(self._lines(lines), delimiter=self._delimiter, strict=True)
        try:
            self._columns = [name.strip() for name in next(reader, [])]
            self._check_delimiter(wanted)
            check_columns(self._columns, wanted, self.table)
            start += _take(lines)[0]
            for number, cells in enumerate(reader, 2):
                length, digest = _take(lines)
                if cells:  # else a blank line
                    if len(cells) != len(self._columns):
                        raise ValueError(
                            f"{self.table}: row {number} has {len(cells)} cells, the header {len(self._columns)}: "
                            "put cells that hold the separator or a line break in quotes"
                        )
                    for column, value in zip(
                        (self._numbers, self._starts, self._lengths, self._hashes),
                        (number, start, length, digest),
                        strict=True,
                    ):
                        column.append(value)
                start += length
        except csv.Error as error:
            raise ValueError(f"{self.table}: line {reader.line_num} cannot be read as a table: {error}") from error

    def _lines(self, lines: list[bytes]) -> Iterator[str]:
        """The lines of the table as text; `lines` gets their bytes."""
        position = 0
        for raw in self._file:
            if position == 0 and raw.startswith(b"\x1f\x8b"):
                raise ValueError(f"{self.table} is a gzip file: unpack it (gunzip)")
            mark = codecs.BOM_UTF8 if position == 0 and self._encoding == "utf-8" else b""
            text_bytes = raw.removeprefix(mark)
            if len(text_bytes) < len(raw):
                lines.append(mark)
                position = len(mark)
            for line in text_bytes.splitlines(keepends=True):  # a lone carriage return ends a line, too
                try:
                    text = line.decode(self._encoding)
                except UnicodeDecodeError as error:
                    found = f"{self.table} is not {self._encoding.upper()} (byte {position + error.start})"
                    raise ValueError(
                        f"{found}: name its encoding, such as --encoding windows-1252, or save or convert (iconv) it as UTF-8"
                    ) from None
                position += len(line)
                lines.append(line)
                yield text

    def _check_delimiter(self, wanted: list[str]) -> None:
        """ValueError if another character parts the header's names."""
        (header, *others) = self._columns or [""]
        counts = {each: header.count(each) for each in ",;\t|" if each != self._delimiter}
        other = max(counts, key=counts.__getitem__)
        if not others and counts[other] and header not in wanted:
            raise ValueError(
                f"{self.table}: its header has no {self._delimiter!r} and {counts[other]} {other!r}: "
                f"name the separator of cells, --delimiter {'$' * (other == chr(9))}{other!r}"
            )

    def __getitem__(self, place: int) -> Row:
        file: Any = self._file.raw  # without the buffer: it would hide that the file was changed
        file.seek(self._starts[place])
        raw = file.read(self._lengths[place]) or b""
        if xxhash.xxh3_64_intdigest(raw) != self._hashes[place]:
            raise ValueError(f"{self.table} was changed while it was read: start again")
        (cells,) = csv.reader([raw.decode(self._encoding)], delimiter=self._delimiter, strict=True)
        return self._numbers[place], {name: cell.strip() for name, cell in zip(self._columns, cells, strict=True)}


def _take(lines: list[bytes]) -> tuple[int, int]:
    """Length and hash of the lines, which are removed."""
    raw = b"".join(lines)
    lines.clear()
    return len(raw), xxhash.xxh3_64_intdigest(raw)


def _checked(encoding: str) -> str:
    """Python's name of an encoding in which lines end as in ASCII. ValueError for others."""
    try:
        name = codecs.lookup(encoding).name
        ends = "\r\n".encode(name.removesuffix("-sig"))
    except (LookupError, TypeError):  # TypeError: bytes to bytes, as base64
        raise ValueError(f"encoding {encoding!r} is unknown to Python: use for example windows-1252") from None
    if ends != b"\r\n":
        raise ValueError(f"encoding {encoding!r} has no lines of bytes: convert the table to UTF-8 (iconv)")
    return name.removesuffix("-sig")


def check_columns(columns: list[str], wanted: list[str], table: RawPath) -> None:
    """ValueError unless each of the wanted columns is there once."""
    for name in wanted:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=len(columns) or 1, cutoff=0.0)
            raise ValueError(f"{table} has no column {name!r}; its columns, nearest first: {', '.join(near) or 'none'}")
        if columns.count(name) > 1:
            raise ValueError(f"{table} has two columns {name!r}: rename one")
