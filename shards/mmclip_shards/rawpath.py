"""Where a raw data set lies: a path of the local disk, or a URL with the methods of `pathlib.Path` that recipes use."""

from __future__ import annotations

import fnmatch
import io
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, TypeVar

from mmclip_shards import storage

T = TypeVar("T")
U = TypeVar("U")

_BLOCK = 4 << 20  # bytes of a request when a table is read from first to last
LOOKED_FOR = 20
"""How many remote images are looked for before a pack starts: a wrong folder is told at once, and each look is a request."""

_AT_ONCE = 16  # small files of a store that are asked for at a time: each waits for the network, not for the processor


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of a store. Reads have the retries and the credentials of `storage`; it pickles as its text alone.

    As of a `Path`: errors are `OSError`s, a missing file is a FileNotFoundError, and entries are found in no order.
    """

    scheme: str
    place: PurePosixPath

    def __fspath__(self) -> str:
        return f"{self.scheme}://{self.place}"

    __str__ = __fspath__

    def __truediv__(self, other: str | PurePath) -> RemotePath:
        return self.joinpath(other)

    def __lt__(self, other: Any) -> bool:
        return self.place < other.place if isinstance(other, RemotePath) else NotImplemented

    def joinpath(self, *others: str | PurePath) -> RemotePath:
        return RemotePath(self.scheme, self.place.joinpath(*others))

    def with_suffix(self, suffix: str) -> RemotePath:
        return RemotePath(self.scheme, self.place.with_suffix(suffix))

    def relative_to(self, other: RawPath) -> PurePosixPath:
        assert isinstance(other, RemotePath)
        return self.place.relative_to(other.place)

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def stem(self) -> str:
        return self.place.stem

    @property
    def suffix(self) -> str:
        return self.place.suffix

    @property
    def parts(self) -> tuple[str, ...]:
        return self.place.parts

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.scheme, self.place.parent)

    def exists(self) -> bool:
        return storage.exists(self)

    def is_file(self) -> bool:
        return storage.remote_kind(self) == "file"

    def is_dir(self) -> bool:
        kind = storage.remote_kind(self)
        # A web server tells no folder from a file, but it lists one.
        return kind == "directory" or (kind is not None and self.scheme in ("http", "https") and any(storage.scan_remote(self)))

    def read_bytes(self) -> bytes:
        return storage.read_bytes(self)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        with io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding or "utf-8", errors) as text:  # as of a Path: any line end
            return text.read()

    def open(
        self, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:  # fmt: skip
        """The file, open for reading in blocks: meant for reading from first to last (else see `seekable`)."""
        if mode not in ("r", "rt", "rb"):
            raise ValueError(f"{self} is raw data, which is only read; mode {mode!r} would change it")
        data = BufferedReader(_Blocks(self), _BLOCK if buffering < 1 else buffering)
        return data if mode == "rb" else io.TextIOWrapper(data, encoding or "utf-8", errors, newline)

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name, _ in storage.scan_remote(self))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """As `Path.glob`; `**` only before the last part."""
        first, *rest = PurePosixPath(pattern).parts
        if first == "**":
            (last,) = rest
            found = ((name, False) for name, _ in storage.scan_remote(self, deep=True))
            yield from (self / name for name, _ in found if fnmatch.fnmatchcase(PurePosixPath(name).name, last))
        elif not set(first) & set("*?["):
            if rest:
                yield from (self / first).glob("/".join(rest))
            elif (self / first).exists():
                yield self / first
        else:
            for name, is_folder in storage.scan_remote(self):
                if fnmatch.fnmatchcase(name, first):
                    if not rest:
                        yield self / name
                    elif is_folder:
                        yield from (self / name).glob("/".join(rest))


RawPath = Path | RemotePath
"""A file or folder of a raw data set."""


def raw_path(url: storage.Url) -> RawPath:
    """The path behind a plain path, a URL or a RawPath."""
    path = storage.local_path(url)
    if path is not None:
        return path
    scheme, _, place = os.fspath(url).partition("://")
    return RemotePath(scheme, PurePosixPath(place))


def matching(folder: RawPath, pattern: str) -> list[RawPath]:
    """What `glob` finds, sorted."""
    found: list[RawPath] = [*folder.glob(pattern)]
    return sorted(found)


def read_optional(path: RawPath) -> bytes | None:
    """A whole file, or None if it is not there."""
    if isinstance(path, RemotePath):
        return storage.read_optional(path)
    return path.read_bytes() if path.is_file() else None


def seekable(path: RawPath) -> BufferedReader:
    """A file open for reads in any order. A remote one is copied first, into a file without a name (in TMPDIR)."""
    if isinstance(path, Path):
        return path.open("rb")
    copy: Any = tempfile.TemporaryFile(prefix="mmclip-raw-")  # noqa: SIM115 - the caller closes it
    with path.open("rb") as source:
        shutil.copyfileobj(source, copy, _BLOCK)
    copy.seek(0)
    found: BufferedReader = copy  # which Python's own types do not tell
    return found


def walk(folder: RawPath) -> Iterator[tuple[RawPath, list[str]]]:
    """(folder, sorted names of its files) of a folder and of those below it, in one order; the names of one are held. Links to
    folders are followed, but not back."""
    if isinstance(folder, Path):
        for place, folders, names in os.walk(folder, followlinks=True):
            here = Path(place)
            # A link to a folder that holds it would be followed for ever.
            folders[:] = sorted(name for name in folders if not (here / name).is_symlink() or not _holds(here / name, here))
            yield here, sorted(names)
        return
    entries = list(storage.scan_remote(folder))
    yield folder, sorted(name for name, is_folder in entries if not is_folder)
    for name in sorted(name for name, is_folder in entries if is_folder):
        yield from walk(folder / name)


def _holds(folder: Path, other: Path) -> bool:
    """Whether `other` is a folder or below it, once all links are followed."""
    return other.resolve().is_relative_to(folder.resolve())


def ahead(read: Callable[[Any], U], files: Iterable[tuple[T, Any]], at_once: int = _AT_ONCE) -> Iterator[tuple[T, U]]:
    """(tag, read(file)) of each (tag, file), in order. Remote files are read in threads while those before them are used."""
    pool = ThreadPoolExecutor(at_once)
    window: deque[tuple[T, Future[U]]] = deque()
    try:
        for tag, file in files:
            if isinstance(file, RemotePath):
                future = pool.submit(read, file)
            else:
                future = Future()
                future.set_result(read(file))
            window.append((tag, future))
            while window and (len(window) == at_once or window[0][1].done()):
                first, future = window.popleft()
                yield first, future.result()
        while window:
            first, future = window.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def evenly(count: int, most: int) -> list[int]:
    """At most that many of the places 0 ... count - 1, evenly spaced, the first among them."""
    return [number * count // min(most, count) for number in range(min(most, count))]


class _Blocks(io.RawIOBase):
    """A remote file as Python's files are: each read is one request, which goes on where it broke off."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._size, self._place = path, storage.file_size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._place))
        if count:
            buffer[:count] = storage.read_range(self._path, self._place, count)
        self._place += count
        return count
