"""A strict walk over a tar, which reads it once, from first byte to last, in bounded memory.

`tarfile` treats a bad or cut header after offset 0 as the end of the archive, so a damaged shard seems to hold fewer
samples. Here anything but a whole archive raises `TarFault`.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple

from mmclip_shards import storage
from mmclip_shards.storage import Url

BLOCK = 512
PIECE = 8 << 20  # bytes of one read; a multiple of BLOCK, so that a header never lies in two pieces

_EXTENSION_LIMIT = 1 << 20  # bytes of a long name or of pax records; the size in the header is untrusted
_NO_BLOCK = bytes(BLOCK)
_OCTAL = re.compile(rb"[0-7]+")

EntryKind = Literal["file", "folder", "link", "device", "other"]
# By the type field. Folders, links and devices hold no data, whatever their size says; unknown types (`other`) may.
_KINDS: dict[bytes, EntryKind] = {
    b"0": "file", b"\0": "file", b"7": "file", b"5": "folder", b"1": "link", b"2": "link",
    b"3": "device", b"4": "device", b"6": "device",
}  # fmt: skip


class TarFault(ValueError):
    """A tar is damaged. offset: where, in bytes."""

    def __init__(self, offset: int, problem: str) -> None:
        super().__init__(f"offset {offset}: {problem}")
        self.offset = offset


class Entry(NamedTuple):
    """One entry of a tar. offset: of its data, in bytes."""

    name: str
    kind: EntryKind
    offset: int
    length: int


class TarWalk:
    """Walks over the entries of the tar at `url`, in order. Read the data of an entry before you ask for the next entry.

    size: of the file, in bytes; position: bytes consumed so far. FileNotFoundError when there is no file.
    """

    def __init__(self, url: Url, piece: int = PIECE) -> None:
        assert piece % BLOCK == 0
        self.size, self.position = storage.file_size(url), 0
        self._url, self._piece_size = url, piece
        self._piece, self._used, self._read = b"", 0, 0
        self._sha256 = hashlib.sha256()
        self._data_left, self._entry_end = 0, 0
        self._for_all: dict[str, str] = {}  # global pax records

    def entries(self) -> Iterator[Entry]:
        """Every entry up to the end of the archive. TarFault where it is damaged; use `seek` to go on after the damage."""
        records: dict[str, str] = {}
        pending = False  # a long name or pax records came, and their entry must follow
        while True:
            self._skip_to(self._entry_end)
            at = self.position
            block = self._header_block()
            if block == _NO_BLOCK:
                if pending:
                    raise TarFault(at, "the archive ends after the long name of an entry that does not follow")
                self._check_end(at)
                return
            kind, length = block[156:157], _checked_size(block, at)
            if kind in b"xXgLK":
                data = self._extension(at, length)
                if kind in b"xX":
                    records.update(_pax_records(data, at))
                elif kind == b"g":
                    self._for_all.update(_pax_records(data, at))
                elif kind == b"L":
                    records.setdefault("path", _text(data))
                pending = kind != b"g" or pending
                continue
            yield self._begin(at, block, length, {**self._for_all, **records})
            records, pending = {}, False

    def data(self) -> bytes:
        """The data of the current entry, or what is left of it."""
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """The same as `data`, piece by piece."""
        while self._data_left:
            piece = self._some(self._data_left)
            self._data_left -= len(piece)
            yield piece

    def seek(self, offset: int, length: int) -> None:
        """Go forward to data that is known to lie there; `data` and `entries` then go on from it."""
        assert self.position <= offset and offset + length <= self.size
        self._skip_to(offset)
        self._data_left, self._entry_end = length, min(offset + _padded(length), self.size)

    def sha256(self) -> str:
        """Hash of the whole file. Reads the rest of it."""
        self._skip_to(self.size)
        return self._sha256.hexdigest()

    # -- Inside ---------------------------------------------------------------------------------------------------

    def _begin(self, at: int, block: bytes, length: int, records: dict[str, str]) -> Entry:
        name, letter = records.get("path") or _header_name(block), block[156:157]
        if letter == b"S" or any(record.startswith("GNU.sparse") for record in records):
            raise TarFault(at, f"{name!r} is stored as a sparse file: make the tar again without --sparse")
        kind = _KINDS.get(letter, "other")
        if kind == "file" and letter != b"7" and name.endswith("/"):
            kind = "folder"  # tars older than ustar mark a folder by the slash
        if "size" in records:
            if not re.fullmatch(r"[0-9]{1,18}", records["size"]):
                raise TarFault(at, f"the size of {name!r} is not a number")
            length = int(records["size"])
        if kind in ("folder", "link", "device"):
            length = 0
        if self.position + length > self.size:
            raise TarFault(
                at, f"{name!r} should end at {self.position + length}, but the file ends at {self.size}: it was cut"
            )
        entry = Entry(name, kind, self.position, length)
        self._data_left, self._entry_end = length, min(self.position + _padded(length), self.size)
        return entry

    def _header_block(self) -> bytes:
        left = self.size - self.position
        if not left:
            raise TarFault(self.position, "the file ends without the two zero blocks of a tar's end: it was cut")
        if left < BLOCK:
            raise TarFault(self.position, f"the file ends at {self.size}, inside a header: it was cut")
        return self._some(BLOCK)

    def _extension(self, at: int, length: int) -> bytes:
        if length > _EXTENSION_LIMIT or self.position + length > self.size:
            raise TarFault(
                at, f"a long name or pax record of {length} bytes: the header is damaged, or the file was cut"
            )
        data = self._take(length)
        self._skip_to(min(self.position + _padded(length) - length, self.size))
        self._entry_end = self.position
        return data

    def _check_end(self, at: int) -> None:
        """TarFault unless a second zero block follows the first one, and then only zeros."""
        if self.size - self.position < BLOCK:
            raise TarFault(at, "the file ends after one of the two zero blocks of a tar's end: it was cut")
        self._fill()
        if self._piece[self._used : self._used + BLOCK] != _NO_BLOCK:
            raise TarFault(at, "zeros where a header should be")
        while self.position < self.size:
            start = self.position
            piece = self._some(self.size - start)
            if rest := piece.lstrip(b"\0"):
                raise TarFault(start + len(piece) - len(rest), "there are bytes after the end of the archive")

    def _skip_to(self, offset: int) -> None:
        while self.position < offset:
            self._some(offset - self.position)
        self._data_left = 0

    def _take(self, length: int) -> bytes:
        parts = []
        while length:
            parts.append(self._some(length))
            length -= len(parts[-1])
        return b"".join(parts)

    def _some(self, most: int) -> bytes:
        """The next bytes: at least one, at most `most`. The file must have some left."""
        self._fill()
        part = self._piece[self._used : self._used + most]
        self._used += len(part)
        self.position += len(part)
        return part

    def _fill(self) -> None:
        if self._used == len(self._piece):
            self._piece = bytes(storage.read_range(self._url, self._read, min(self._piece_size, self.size - self._read)))
            self._sha256.update(self._piece)
            self._read += len(self._piece)
            self._used = 0


def _padded(length: int) -> int:
    return length + -length % BLOCK


def _checked_size(block: bytes, at: int) -> int:
    """The size field of a header. TarFault when the header's checksum is wrong."""
    rest = block[:148] + b" " * 8 + block[156:]
    # Some old programs wrote the sum of signed bytes.
    if _number(block[148:156], at) not in (sum(rest), sum(struct.unpack("512b", rest))):
        raise TarFault(at, "the checksum of a header is wrong: it is damaged")
    return _number(block[124:136], at)


def _number(field: bytes, at: int) -> int:
    """A number field of a header: octal digits, or binary if the first byte is 0x80 (files of 8 GiB and more)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits and not _OCTAL.fullmatch(digits):
        raise TarFault(at, "a header holds no number where one should be: it is damaged, or this is no tar")
    return int(digits or b"0", 8)


def _header_name(block: bytes) -> str:
    name = _text(block[:100])
    # Only in ustar is this field a prefix: GNU's format stores times in it.
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(data: bytes, at: int) -> dict[str, str]:
    """The records `LENGTH NAME=VALUE\\n` of a pax header, by name; an empty value removes an earlier record."""
    records = {}
    position = 0
    while position < len(data) and data[position]:
        digits = data[position : position + 8].partition(b" ")[0]
        end = position + int(digits) if digits.isdigit() else 0
        name, equals, value = data[position + len(digits) + 1 : max(end - 1, 0)].partition(b"=")
        if not (position < end <= len(data) and equals and data[end - 1 : end] == b"\n"):
            raise TarFault(at, "the pax records are damaged")
        records[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = end
    return records
