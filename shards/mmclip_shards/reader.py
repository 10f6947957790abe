"""Read any sample of a set by shard and key, every byte checked against the shard's offset index."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from tarfile import BLOCKSIZE

import xxhash

from mmclip_shards import storage
from mmclip_shards.manifest import Manifest, Shard, ShardIndex, load_index, load_manifest
from mmclip_shards.schema import member_name
from mmclip_shards.storage import Url


class ShardReader:
    """Random access to the samples of the set in folder `url`.

    open_indexes, open_files: how many loaded indexes and open local shards are kept (the last used ones).
    Threads may share a reader; a copy sent to another process opens its own files there.
    """

    def __init__(self, url: Url, manifest: Manifest, *, open_indexes: int = 16, open_files: int = 64) -> None:
        self.url = url
        self.manifest = manifest
        self._limits = (open_indexes, open_files)
        self._index = lru_cache(open_indexes)(self._load_index)
        self._file = lru_cache(open_files)(self._open_file)

    def __reduce__(self) -> tuple[object, ...]:
        open_indexes, open_files = self._limits
        return _rebuild, (self.url, self.manifest, open_indexes, open_files)

    def keys(self, shard_number: int) -> list[str]:
        """The keys of a shard, in order. Do not change the list: it is shared."""
        return self._index(shard_number).keys

    def read(self, shard_number: int, key: str) -> dict[str, bytes]:
        """A sample's members: suffix -> bytes. ValueError naming shard, key, offset and cause when a byte is wrong."""
        shard = self.manifest.shards[shard_number]
        members = self._index(shard_number).members.get(key)
        where = f"shard {storage.join(self.url, shard.path)}, key {key}"
        if members is None:
            raise ValueError(f"{where}: no such sample in this shard")
        # One read from the first header to the last byte: one request on object storage, and the headers come along.
        start = min(member.offset for member in members.values()) - BLOCKSIZE
        end = max(member.offset + member.length for member in members.values())
        try:
            span = memoryview(self._read_span(shard_number, shard, start, end - start))
        except OSError as error:
            raise ValueError(f"{where}, offset {start}: cannot be read: {error}") from error
        sample: dict[str, bytes] = {}
        for suffix, member in members.items():
            at = member.offset - start
            data = bytes(span[at : at + member.length])
            if bytes(span[at - BLOCKSIZE : at - BLOCKSIZE + 100]).rstrip(b"\0") != member_name(key, suffix).encode():
                raise ValueError(f"{where}, offset {member.offset}: the tar has another file there than {key}.{suffix}")
            if xxhash.xxh3_64_hexdigest(data) != member.xxh3:
                raise ValueError(
                    f"{where}, offset {member.offset}: the {member.length} bytes of {key}.{suffix} are damaged "
                    "(hash differs from the index): copy the shard again"
                )
            sample[suffix] = data
        return sample

    def _read_span(self, shard_number: int, shard: Shard, offset: int, length: int) -> bytes:
        if storage.local_path(self.url) is None:
            return storage.read_range(storage.join(self.url, shard.path), offset, length)
        return self._file(shard_number).read(offset, length)

    def _load_index(self, shard_number: int) -> ShardIndex:
        return load_index(self.url, self.manifest.shards[shard_number])

    def _open_file(self, shard_number: int) -> _LocalFile:
        shard = self.manifest.shards[shard_number]
        path = storage.local_path(storage.join(self.url, shard.path))
        assert path is not None
        return _LocalFile(path, shard.bytes)


def iterate(url: Url) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every (key, members) of the set in folder `url`, in order, checked like `ShardReader.read`."""
    reader = ShardReader(url, load_manifest(url))
    for number in range(len(reader.manifest.shards)):
        for key in reader.keys(number):
            yield key, reader.read(number, key)


class _LocalFile:
    """An open shard. It closes when its last user lets go, so eviction cannot pull it from under a reading thread."""

    def __init__(self, path: Path, size: int) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self._descriptor).st_size
        if found != size:
            raise OSError(f"the file has {found} bytes, its manifest promises {size}: copy the shard again")

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        if len(data) != length:
            raise OSError(f"{length} bytes wanted at offset {offset}, {len(data)} came")
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _rebuild(url: Url, manifest: Manifest, open_indexes: int, open_files: int) -> ShardReader:
    return ShardReader(url, manifest, open_indexes=open_indexes, open_files=open_files)
