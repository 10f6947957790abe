"""Chunks of remote shards: a few threads fetch them ahead; bounded memory and, on request, a bounded folder keep them.

A chunk is a range of bytes of one build of one shard. Kept chunks are not trusted: the reader checks the hash of every
sample and has the chunk fetched again when it differs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from mmclip_shards import storage
from mmclip_shards.faults import Patience, Tries

MIB = 1 << 20


@dataclass(frozen=True)
class Reading:
    """How remote shards are read by one process.

    chunk_bytes: bytes of one request; None reads each sample alone, for samples that lie too far apart to keep whole chunks.
    memory_bytes: for kept chunks. connections: requests at the same time.
    folder, folder_bytes: also keep chunks in this folder, shared by all processes of a machine.
    """

    chunk_bytes: int | None = 8 * MIB
    memory_bytes: int = 256 * MIB
    connections: int = 8
    folder: str | None = None
    folder_bytes: int = 0
    patience: Patience = storage.PATIENCE


@dataclass
class Tally:
    """What reading cost since the last `take_tally`: counts, and `waited_s`, the seconds spent waiting for samples."""

    samples: int = 0
    bytes: int = 0  # of samples
    requests: int = 0
    fetched: int = 0  # bytes that came from the store
    retries: int = 0
    cache_hits: int = 0  # chunks found in the folder
    waited_s: float = 0.0

    def add(self, other: Tally) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class Chunk(NamedTuple):
    """Bytes [start, stop) of the shard at `url` whose tar has this sha256."""

    url: str
    sha256: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class ChunkReader:
    """Reads ranges of remote shards, through chunks. Threads may share it; a forked process starts with an empty one."""

    def __init__(self, reading: Reading = Reading()) -> None:
        if reading.chunk_bytes is not None and reading.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes is {reading.chunk_bytes}; it must be at least 1")
        self.reading = reading
        self._folder = ChunkFolder(Path(reading.folder), reading.folder_bytes) if reading.folder else None
        self._start_here()

    def _start_here(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self.reading.connections, "mmclip-chunks")
        self._kept: OrderedDict[Chunk, Future[bytes]] = OrderedDict()
        self._kept_bytes = 0
        self._closed = threading.Event()
        self.tally = Tally()

    def __reduce__(self) -> tuple[object, ...]:
        return ChunkReader, (self.reading,)

    def read(self, url: str, sha256: str, size: int, offset: int, length: int) -> bytes | memoryview:
        """`length` bytes from `offset` on of a shard of `size` bytes. A view, not a copy, if one chunk holds them all.

        CutFile when the shard ends before, OSError when the store fails.
        """
        chunks = self._cover(url, sha256, size, offset, length)
        wanted = [(chunk, self._begin(chunk)) for chunk in chunks]  # start all of them, then wait for the first
        parts = []
        for chunk, future in wanted:
            try:
                data = future.result()
            except BaseException:
                self._drop(chunk)
                raise
            first, stop = max(offset, chunk.start), min(offset + length, chunk.stop)
            parts.append(memoryview(data)[first - chunk.start : stop - chunk.start])
        if self.reading.chunk_bytes is None:
            self._drop(*chunks)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def prefetch(self, url: str, sha256: str, size: int, spans: Iterable[tuple[int, int]]) -> None:
        """Start fetching ranges (offset, length). An error shows when a range is read."""
        for chunk in dict.fromkeys(chunk for span in spans for chunk in self._cover(url, sha256, size, *span)):
            self._begin(chunk)

    def forget(self, url: str, sha256: str, size: int, offset: int, length: int) -> None:
        """Drop the chunks of a range that proved damaged, so that the next read fetches them again."""
        chunks = self._cover(url, sha256, size, offset, length)
        self._drop(*chunks)
        if self._folder:
            for chunk in chunks:
                self._folder.remove(chunk)
        self.count(retries=1)

    def count(self, **counts: float) -> None:
        """Add to the tally."""
        self._here()
        with self._lock:
            for name, value in counts.items():
                setattr(self.tally, name, getattr(self.tally, name) + value)

    def submit(self, task: object, *arguments: object) -> None:
        """Run a task on the reader's threads. Its errors are dropped: reading the same bytes raises them again."""
        self._here()
        self._pool.submit(task, *arguments)  # type: ignore[arg-type]

    def take_tally(self) -> Tally:
        """The tally since the last call; starts a new one."""
        self._here()
        with self._lock:
            taken, self.tally = self.tally, Tally()
        return taken

    def close(self) -> None:
        """Stop retries and threads. A later read starts them again."""
        if self._process == os.getpid():
            self._closed.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._start_here()

    # -- Inside ---------------------------------------------------------------------------------------------------

    def _here(self) -> None:
        if self._process != os.getpid():
            self._start_here()

    def _cover(self, url: str, sha256: str, size: int, offset: int, length: int) -> list[Chunk]:
        step = self.reading.chunk_bytes
        if step is None:
            return [Chunk(url, sha256, offset, offset + length)]
        first, last = offset // step, (offset + max(length, 1) - 1) // step
        return [Chunk(url, sha256, n * step, min((n + 1) * step, size)) for n in range(first, last + 1)]

    def _begin(self, chunk: Chunk) -> Future[bytes]:
        self._here()
        with self._lock:
            future = self._kept.get(chunk)
            if future is not None and future.done() and future.exception():  # a prefetch failed: try again now
                del self._kept[chunk]
                self._kept_bytes -= chunk.size
                future = None
            if future is None:
                future = self._kept[chunk] = self._pool.submit(self._fetch, chunk)
                self._kept_bytes += chunk.size
                self._shrink()
            else:
                self._kept.move_to_end(chunk)
            return future

    def _shrink(self) -> None:
        """Drop the least recently used chunks until the rest fit. Chunks that are still being fetched stay."""
        if self._kept_bytes <= self.reading.memory_bytes:
            return
        for chunk in [chunk for chunk, future in self._kept.items() if future.done()]:
            if self._kept_bytes <= self.reading.memory_bytes:
                return
            del self._kept[chunk]
            self._kept_bytes -= chunk.size

    def _drop(self, *chunks: Chunk) -> None:
        with self._lock:
            for chunk in chunks:
                if self._kept.pop(chunk, None) is not None:
                    self._kept_bytes -= chunk.size

    def _fetch(self, chunk: Chunk) -> bytes:
        if self._folder and (found := self._folder.find(chunk)) is not None:
            self.count(cache_hits=1)
            return found
        tries = Tries(self.reading.patience, self._closed)
        try:
            data = storage.read_range(chunk.url, chunk.start, chunk.size, tries)
        finally:
            self.count(requests=1 + tries.count, retries=tries.count)
        self.count(fetched=len(data))
        if self._folder:
            with suppress(OSError):  # a full disk costs the cache, not the training
                self._folder.keep(chunk, data)
        return data


class ChunkFolder:
    """Chunks on a local disk, at most `limit` bytes; the least recently used are deleted first.

    A chunk's name comes from the whole URL and the shard's sha256, so two sets never share one. Any number of processes may
    use a folder: chunks appear whole (by a rename), and a lock guards the total size.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"the cache {folder} may hold {limit} bytes; allow it at least a few chunks of 8 MiB")
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            pass  # fail now if we may not use the folder; `keep` would hide that

    def find(self, chunk: Chunk) -> bytes | None:
        """A chunk's bytes; None when it is not there or incomplete."""
        path = self._path(chunk)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if len(data) != chunk.size:
            self.remove(chunk)
            return None
        with suppress(OSError):  # another process deleted it, or another user owns it
            os.utime(path)
        return data

    def keep(self, chunk: Chunk, data: bytes) -> None:
        """Store a chunk, unless it is larger than the whole folder may be. Deletes old chunks to make room."""
        path = self._path(chunk)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        if len(data) > self.limit:
            return
        with self._locked() as total:
            if path.exists():
                return
            if total.value + len(data) > self.limit:
                total.value = self._make_room(len(data))
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            total.value += len(data)

    def remove(self, chunk: Chunk) -> None:
        with self._locked() as total, suppress(FileNotFoundError):
            path = self._path(chunk)
            size = path.stat().st_size
            path.unlink()
            total.value -= size

    def _path(self, chunk: Chunk) -> Path:
        name = hashlib.sha256(f"{chunk.url}\n{chunk.sha256}\n{chunk.start}\n{chunk.stop}".encode()).hexdigest()
        return self.folder / f"{name[:40]}.chunk"

    def _make_room(self, wanted: int) -> int:
        """Delete the least recently used chunks, down to nine tenths of the limit -> bytes that are left."""
        found = []
        for path in self.folder.iterdir():
            if path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)  # left by a killed process: nobody writes while we hold the lock
            elif path.suffix == ".chunk":
                state = path.stat()
                found.append((state.st_mtime_ns, path, state.st_size))
        total = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if total + wanted <= self.limit * 9 // 10:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _locked(self) -> Iterator[_Total]:
        descriptor = os.open(self.folder / ".total", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 32, 0)
            total = _Total(int(text) if text.strip().isdigit() else self._make_room(0))
            yield total
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(max(0, total.value)).encode(), 0)
        finally:
            os.close(descriptor)


@dataclass
class _Total:
    value: int
