"""Chunks of remote shards: a few threads fetch them ahead; bounded memory and, on request, a bounded folder keep them.

A chunk is a range of bytes of one build of one shard. Kept chunks are not trusted: the reader checks the hash of every
sample and has the chunk fetched again when it differs.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from mmclip_shards import storage
from mmclip_shards.chunk_folder import Chunk, ChunkFolder
from mmclip_shards.faults import Lateness, Patience, Stalled, Tries

MIB = 1 << 20
CHUNK_BYTES = 8 * MIB
ANY_TIME = -1
"""In place of the turn that reads a range, where reads are not planned."""


@dataclass(frozen=True)
class Reading:
    """How remote shards are read by one process.

    memory_bytes: for kept chunks. connections: requests at the same time, besides a few second ones for those that are late.
    client: reads ranges on S3. folder, folder_bytes: also keep chunks in this folder, shared by all processes of a machine.
    """

    memory_bytes: int = 256 * MIB
    connections: int = 8
    client: storage.Client = "s3fs"
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
    hedges: int = 0  # second requests for a read that was late
    cache_hits: int = 0  # chunks found in the folder
    waited_s: float = 0.0

    def add(self, other: Tally) -> None:
        for count in fields(self):
            setattr(self, count.name, getattr(self, count.name) + getattr(other, count.name))


class RemoteShard(NamedTuple):
    """A shard of `size` bytes. chunk_bytes: of one request; None fetches each range alone and keeps nothing, for samples that
    lie too far apart."""

    url: str
    sha256: str
    size: int
    chunk_bytes: int | None = CHUNK_BYTES

    def chunks(self, *spans: tuple[int, int]) -> list[Chunk]:
        """The chunks that hold these ranges (offset, length), each once, in the order of the ranges."""
        step = self.chunk_bytes
        if step is None:
            return [Chunk(self.url, self.sha256, offset, offset + length) for offset, length in dict.fromkeys(spans)]
        numbers = dict.fromkeys(
            n for offset, length in spans for n in range(offset // step, (offset + max(length, 1) - 1) // step + 1)
        )
        return [Chunk(self.url, self.sha256, n * step, min((n + 1) * step, self.size)) for n in numbers]


@dataclass
class _Fetch:
    """A chunk that is kept or on its way. due: the last turn that reads it. running: requests that have not ended; the first to
    bring the bytes wins, and `over` ends the retries of the other. began: when the first request was made. data: what the future
    brings, without its lock."""

    due: int
    future: Future[bytes | memoryview] = field(default_factory=Future)
    data: bytes | memoryview | None = None
    over: threading.Event = field(default_factory=threading.Event)
    began: float | None = None
    running: int = 1


class ChunkReader:
    """Reads ranges of remote shards, through chunks. Threads may share it; a forked process starts with an empty one.

    Turns, such as steps of training, tell it which chunks are used up: those whose last turn is over are dropped first, and
    nothing is fetched ahead in place of a chunk that a later turn needs.
    """

    def __init__(self, reading: Reading = Reading()) -> None:
        self.reading = reading
        self._folder = ChunkFolder(Path(reading.folder), reading.folder_bytes) if reading.folder else None
        self._start_here()

    def _start_here(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(self.reading.connections, "mmclip-chunks")
        self._hedge_pool = ThreadPoolExecutor(max(1, self.reading.connections // 4), "mmclip-hedges")
        self._kept: OrderedDict[Chunk, _Fetch] = OrderedDict()
        self._kept_bytes = 0
        self._planned: OrderedDict[Chunk, int] = OrderedDict()  # chunk -> due; for these memory had no room yet
        self._over = ANY_TIME
        self._lateness = Lateness()
        self.tally = Tally()

    def __reduce__(self) -> tuple[object, ...]:
        return ChunkReader, (self.reading,)

    def read(self, shard: RemoteShard, offset: int, length: int) -> bytes | memoryview:
        """`length` bytes from `offset` on. A view, not a copy, if one chunk holds them all.

        CutFile when the shard ends before, OSError when the store fails.
        """
        chunks = shard.chunks((offset, length))
        alone = len(chunks) == 1 and shard.chunk_bytes is not None
        if alone and (data := self._at_hand(chunks[0])) is not None:  # nearly every sample
            return memoryview(data)[offset - chunks[0].start : offset - chunks[0].start + length]
        began = time.monotonic()
        wanted = [(chunk, self._begin(chunk)) for chunk in chunks]  # start all of them, then wait for the first
        parts = []
        for chunk, fetch in wanted:
            try:
                data = self._result(chunk, fetch)
            except BaseException:
                self._drop(chunk)
                raise
            first, stop = max(offset, chunk.start), min(offset + length, chunk.stop)
            parts.append(memoryview(data)[first - chunk.start : stop - chunk.start])
        if shard.chunk_bytes is None:
            self._drop(*chunks)
        self.count(waited_s=time.monotonic() - began)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def prefetch(self, shard: RemoteShard, spans: Iterable[tuple[int, int]], due: int = ANY_TIME) -> None:
        """Fetch ranges (offset, length) in this order, as soon as memory has room. An error shows when a range is read.

        due: the turn that will read them.
        """
        self._here()
        with self._lock:
            for chunk in shard.chunks(*spans):
                fetch = self._kept.get(chunk)
                if fetch is None:
                    self._planned[chunk] = max(due, self._planned.get(chunk, due))
                else:
                    fetch.due = max(due, fetch.due)
                    self._kept.move_to_end(chunk)
            self._fetch_ahead()

    def end_turn(self, turn: int) -> None:
        """All reads of the turns up to this one are over."""
        self._here()
        with self._lock:
            self._over = turn
            self._fetch_ahead()

    def forget(self, shard: RemoteShard, offset: int, length: int) -> None:
        """Drop the chunks of a range that proved damaged, so that the next read fetches them again."""
        chunks = shard.chunks((offset, length))
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
            with self._lock:
                self._planned.clear()
                for fetch in self._kept.values():
                    fetch.over.set()
                    fetch.future.cancel()
            for pool in (self._pool, self._hedge_pool):
                pool.shutdown(wait=False, cancel_futures=True)
        self._start_here()

    # -- Inside ---------------------------------------------------------------------------------------------------

    def _here(self) -> None:
        if self._process != os.getpid():
            self._start_here()

    def _at_hand(self, chunk: Chunk) -> bytes | memoryview | None:
        """The bytes of a chunk that has come."""
        self._here()
        with self._lock:
            fetch = self._kept.get(chunk)
            if fetch is None or fetch.data is None:
                return None
            self._kept.move_to_end(chunk)
            return fetch.data

    def _begin(self, chunk: Chunk) -> _Fetch:
        """The chunk's fetch, for a read: it is started even if memory is full."""
        self._here()
        with self._lock:
            fetch = self._kept.get(chunk)
            if fetch is not None and fetch.future.done() and fetch.future.exception():
                self._drop(chunk)  # it was fetched ahead in vain: try again now
                fetch = None
            if fetch is None:
                fetch = self._start(chunk, self._planned.pop(chunk, self._over))
                self._shrink()
            else:
                self._kept.move_to_end(chunk)
            return fetch

    def _start(self, chunk: Chunk, due: int) -> _Fetch:
        fetch = self._kept[chunk] = _Fetch(due)
        self._kept_bytes += chunk.size
        self._pool.submit(self._fetch, chunk, fetch)
        return fetch

    def _fetch_ahead(self) -> None:
        """Start planned chunks, as long as memory has room or holds chunks that are used up."""
        while self._planned:
            chunk, due = next(iter(self._planned.items()))
            if due > self._over or due == ANY_TIME:  # else its turn has passed without it
                for used in [] if self._fits(chunk) else self._used_up():
                    self._drop(used)
                    if self._fits(chunk):
                        break
                if not self._fits(chunk):
                    return
                self._start(chunk, due)
            del self._planned[chunk]

    def _fits(self, chunk: Chunk) -> bool:
        return not self._kept or self._kept_bytes + chunk.size <= self.reading.memory_bytes

    def _used_up(self) -> list[Chunk]:
        """Chunks that no planned turn needs, the least recently used first. Those that are still being fetched stay."""
        return [chunk for chunk, fetch in self._kept.items() if fetch.future.done() and fetch.due <= self._over]

    def _shrink(self) -> None:
        """Drop chunks until the rest fit: those that are used up, then those that are needed last."""
        if self._kept_bytes <= self.reading.memory_bytes:
            return
        needed = [chunk for chunk, fetch in self._kept.items() if fetch.future.done() and fetch.due > self._over]
        for chunk in [*self._used_up(), *sorted(needed, key=lambda chunk: -self._kept[chunk].due)]:
            if self._kept_bytes <= self.reading.memory_bytes:
                return
            self._drop(chunk)

    def _drop(self, *chunks: Chunk) -> None:
        with self._lock:
            for chunk in chunks:
                if self._kept.pop(chunk, None) is not None:
                    self._kept_bytes -= chunk.size

    # -- Requests -------------------------------------------------------------------------------------------------

    def _result(self, chunk: Chunk, fetch: _Fetch) -> bytes | memoryview:
        """The chunk's bytes. A fetch that is late is made a second time."""
        while not fetch.future.done() and fetch.running == 1 and (late_s := self._lateness.after_s()) is not None:
            spent = 0.0 if fetch.began is None else time.monotonic() - fetch.began  # it may still wait for a thread
            if wait([fetch.future], max(0.0, late_s - spent)).done:
                break
            if fetch.began is not None and time.monotonic() - fetch.began >= late_s:
                with self._lock:
                    if fetch.running != 1 or not self._lateness.may_hedge():
                        break
                    fetch.running += 1
                self.count(hedges=1)
                self._hedge_pool.submit(self._fetch, chunk, fetch)
        return fetch.future.result()

    def _fetch(self, chunk: Chunk, fetch: _Fetch) -> None:
        """Make one request of a fetch. Its error counts only if no other request is under way."""
        if fetch.began is None:
            fetch.began = time.monotonic()
        data: bytes | memoryview = b""
        error: BaseException | None = None
        try:
            data = self._bytes_of(chunk, fetch.over)
        except BaseException as raised:
            error = raised
        with self._lock:
            fetch.running -= 1
            if not fetch.future.done():  # else the other request was faster, or the reader was closed
                if error is None:
                    fetch.over.set()
                    fetch.data = data
                    fetch.future.set_result(data)
                elif not fetch.running:
                    fetch.future.set_exception(error)
            self._fetch_ahead()

    def _bytes_of(self, chunk: Chunk, over: threading.Event) -> bytes | memoryview:
        if self._folder and (found := self._folder.find(chunk)) is not None:
            self.count(cache_hits=1)
            return found
        tries, began = Tries(self.reading.patience, over), time.monotonic()
        try:
            data = storage.read_range(chunk.url, chunk.start, chunk.size, tries, self.reading.client)
        except OSError as error:
            if not isinstance(error.__cause__, Stalled):
                raise
            limit = f"{self.reading.patience.stall_s:g} s (stall_s; in training data.reading.stall_s)"
            raise OSError(f"{error}; if the store is up but takes longer than {limit} to answer, raise that limit") from error
        finally:
            self.count(requests=1 + tries.count, retries=tries.count)
        self.count(fetched=len(data))
        if not tries.count:
            self._lateness.add(time.monotonic() - began)
        if self._folder:
            with suppress(OSError):  # a full disk costs the cache, not the training
                self._folder.keep(chunk, data)
        return data
