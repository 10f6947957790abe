"""Read any sample of a set by shard and key. Every byte is checked against the shard's offset index."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import xxhash

from mmclip_shards import storage
from mmclip_shards.chunks import ANY_TIME, CHUNK_BYTES, ChunkReader, RemoteShard
from mmclip_shards.faults import CutFile, Tries, renamed
from mmclip_shards.manifest import Manifest, ShardIndex, load_index, load_manifest
from mmclip_shards.storage import Url

_AHEAD = 32  # samples that sequential reading fetches ahead


class ShardReader:
    """Random access to the samples of the set in folder `url`.

    open_shards: how many indexes and open local files to keep; the least recently used are closed first. Keep at least as
    many as you read side by side. chunks: reads remote shards; several readers may share one, and its memory.
    chunk_bytes: bytes of one request to a store; None fetches each sample alone, for samples that lie far apart.
    Threads may share a reader. A reader sent to another process opens its own files there.
    """

    def __init__(
        self, url: Url, manifest: Manifest, *, open_shards: int = 16, chunks: ChunkReader | None = None,
        chunk_bytes: int | None = CHUNK_BYTES,
    ) -> None:  # fmt: skip
        if chunk_bytes is not None and chunk_bytes < 1:
            raise ValueError(f"chunk_bytes is {chunk_bytes}; it must be at least 1")
        self.url = url
        self.manifest = manifest
        self.chunks = chunks or ChunkReader()
        self.chunk_bytes = chunk_bytes
        self._open_shards = open_shards
        self._local = storage.local_path(url) is not None
        self._index = lru_cache(open_shards)(self._load_index)
        self._file = lru_cache(open_shards)(self._open_file)
        self._where = lru_cache(open_shards)(self._url_of)  # asked for by every sample

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.url, self.manifest, self._open_shards, self.chunks, self.chunk_bytes)

    def keys(self, shard_number: int) -> list[str]:
        """The keys of a shard, in order. Do not change the list: it is shared."""
        return self._index(shard_number).keys

    def read(self, shard_number: int, key: str, suffixes: Collection[str] | None = None) -> dict[str, bytes]:
        """A sample's members: suffix -> bytes. Errors name shard, key, offset and cause. suffixes: of these members alone; what
        lies before the first and behind the last of them is not read.

        ValueError when the shard or its index is damaged or has no such key; FileNotFoundError or PermissionError when
        the shard is missing or access is refused; OSError when the store or the disk failed.
        """
        index = self._index(shard_number)
        row = index.rows.get(key)
        if row is None:
            raise ValueError(f"shard {self._where(shard_number)}, key {key}: no such sample in this shard")
        wanted = [member for member in index.sample(row) if suffixes is None or member[0] in suffixes]
        if not wanted:
            return {}
        start, (_, last, size, _) = wanted[0][1], wanted[-1]
        length = last + size - start
        tries: Tries | None = None
        while True:
            # Read all members at once: that is one request on object storage.
            span = self._read_span(shard_number, key, start, length)
            sample, damaged = {}, None
            for suffix, offset, size, xxh3 in wanted:
                data = bytes(span[offset - start : offset - start + size])
                if xxhash.xxh3_64_intdigest(data) != xxh3:
                    damaged = suffix, offset, size
                sample[suffix] = data
            if damaged is None:
                return sample
            suffix, offset, size = damaged
            fault = ValueError(
                f"shard {self._where(shard_number)}, key {key}, offset {offset}: the {size} bytes of {key}.{suffix} are damaged "
                "(hash differs from the index): copy the shard again"
            )
            if self._local:
                raise fault
            self.chunks.forget(self._remote(shard_number), start, length)
            tries = tries or Tries(self.chunks.reading.patience)
            tries.wait("", fault)

    def prefetch(self, shard_number: int, rows: Sequence[int], due: int = ANY_TIME) -> None:
        """Start fetching samples from object storage and return at once. Does nothing for local files.

        due: the turn that reads them, as in `ChunkReader`.
        """
        if not self._local:
            self.chunks.submit(self._prefetch, shard_number, rows, due)

    def samples(self, shard_number: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Every (key, members) of a shard, in order. Remote samples are fetched ahead."""
        keys = self.keys(shard_number)
        for row, key in enumerate(keys):
            if not self._local and row % _AHEAD == 0:
                self._prefetch(shard_number, range(row, min(row + 2 * _AHEAD, len(keys))))
            yield key, self.read(shard_number, key)

    # -- Inside ---------------------------------------------------------------------------------------------------

    def _url_of(self, shard_number: int) -> str:
        return storage.join(self.url, self.manifest.shards[shard_number].path)

    def _remote(self, shard_number: int) -> RemoteShard:
        shard = self.manifest.shards[shard_number]
        return RemoteShard(self._where(shard_number), shard.sha256, shard.bytes, self.chunk_bytes)

    def _prefetch(self, shard_number: int, rows: Sequence[int], due: int = ANY_TIME) -> None:
        index = self._index(shard_number)
        self.chunks.prefetch(self._remote(shard_number), [index.span(row, row + 1) for row in rows], due)

    def _read_span(self, shard_number: int, key: str, offset: int, length: int) -> bytes | memoryview:
        try:
            if self._local:
                return self._file(shard_number).read(offset, length)
            return self.chunks.read(self._remote(shard_number), offset, length)
        except OSError as error:
            where = f"shard {self._where(shard_number)}, key {key}, offset {offset}"
            raise renamed(error, f"{where}: cannot be read: {error}") from error

    def _load_index(self, shard_number: int) -> ShardIndex:
        tries = Tries(self.chunks.reading.patience)
        try:
            return load_index(self.url, self.manifest.shards[shard_number], tries)
        except OSError as error:
            raise renamed(error, f"shard {self._where(shard_number)}: its index cannot be read: {error}") from error
        finally:
            if tries.count:
                self.chunks.count(retries=tries.count)

    def _open_file(self, shard_number: int) -> _LocalFile:
        shard = self.manifest.shards[shard_number]
        path = storage.local_path(self._where(shard_number))
        assert path is not None
        return _LocalFile(path, shard.bytes)


def iterate(url: Url) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every (key, members) of the set in folder `url`, in order. Checks and errors are those of `ShardReader.read`."""
    reader = ShardReader(url, load_manifest(url))
    for number in range(len(reader.manifest.shards)):
        yield from reader.samples(number)


class _LocalFile:
    """An open shard. It closes when nothing refers to it any more, so a thread can finish reading one that was evicted."""

    def __init__(self, path: Path, size: int) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self._descriptor).st_size
        if found != size:
            raise CutFile(f"the file has {found} bytes, its manifest promises {size}: copy the shard again")

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        if len(data) != length:
            raise CutFile(f"{length} bytes wanted at offset {offset}, {len(data)} came")
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _rebuild(
    url: Url, manifest: Manifest, open_shards: int, chunks: ChunkReader, chunk_bytes: int | None
) -> ShardReader:
    return ShardReader(url, manifest, open_shards=open_shards, chunks=chunks, chunk_bytes=chunk_bytes)
