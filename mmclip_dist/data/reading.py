"""Opening the training sets, and how their remote shards are read: bytes of a request, memory, samples fetched ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmclip_shards.chunks import MIB, ChunkReader
from mmclip_shards.chunks import Reading as ChunkReading
from mmclip_shards.faults import Patience
from mmclip_shards.manifest import Manifest
from mmclip_shards.storage import check_client, local_path

from mmclip_dist.config import Data, Reading, Source
from mmclip_dist.data.join import JoinedSet

# Bytes of one request, least and most: smaller ones wait for latency, larger ones gain nothing.
_CHUNKS = MIB // 4, 8 * MIB


@dataclass(frozen=True)
class Load:
    """What one remote reader has to load. block, shard, whole: bytes of a shuffle block, of the largest shard, of the set."""

    block: int
    shard: int
    whole: int

    @classmethod
    def of(cls, manifest: Manifest, data: Data) -> Load:
        sizes = [shard.bytes for shard in manifest.shards]
        return cls(_block_samples(manifest, data) * sum(sizes) // manifest.samples, max(sizes), sum(sizes))

    def chunk_bytes(self, most: int) -> int:
        """Half a block, at most `most`: half of what is fetched at a block's two ends belongs to its neighbours."""
        return min(max(self.block // 2, _CHUNKS[0]), most)

    def memory(self, streams: int, chunk: int) -> int:
        """Bytes of the chunks that hold two blocks in a row of each stream: one is read while the next is fetched."""
        return min(streams * 2 * (self.block + min(chunk, self.shard)), self.whole)


@dataclass(frozen=True)
class ReadingPlan:
    """chunks: bytes of one request, for each remote reader. whole_blocks: memory holds two blocks of each stream."""

    chunks: tuple[int, ...]
    whole_blocks: bool


def open_sets(sources: Sequence[Source], data: Data, world: int) -> list[JoinedSet]:
    """The training sets with their sidecars. All read through one memory and one cache.

    ValueError if the memory for remote sets is too small.
    """
    streams = streams_of_a_reader(data.streams, world * max(1, data.workers))
    sets = [JoinedSet(source, 16 + 2 * streams) for source in sources]  # a stream usually lies in two shards
    remote = [reader for joined in sets for reader in joined.readers if local_path(reader.url) is None]
    for reader in remote:
        check_client(data.reading.client, reader.url)
    plan = plan_reading(data, [Load.of(reader.manifest, data) for reader in remote], streams)
    for reader, chunk in zip(remote, plan.chunks, strict=True):
        reader.chunk_bytes = chunk
    chunks = ChunkReader(_chunk_reading(data.reading))
    for joined in sets:
        joined.read_through(chunks)
        joined.ahead = _block_ahead(sets, sources, data) if plan.whole_blocks else 0
    return sets


def streams_of_a_reader(streams: int, readers: int) -> int:
    """The most streams that one of `readers` processes reads: equal shares of a batch may begin and end within a stream."""
    return streams // readers + (2 if streams % readers else 0)


def plan_reading(data: Data, loads: Sequence[Load], streams: int) -> ReadingPlan:
    """How a process reads `streams` streams of each remote set.

    The samples of a block lie together but come in random order, so it is read in chunks that are kept until it is used up.
    Chunks are as large as the memory allows, up to `_CHUNKS[1]`. ValueError where even the smallest leave no room for two blocks
    of each stream, and no folder keeps the chunks: they would be fetched over and over.
    """
    reading = data.reading
    most = _CHUNKS[1]
    while (needed := _needed(loads, streams, most)) > reading.memory_mib * MIB and most > _CHUNKS[0]:
        most //= 2
    fits = needed <= reading.memory_mib * MIB
    if not fits and reading.cache is None:
        raise ValueError(
            f"data.reading.memory_mib={reading.memory_mib} is too small: a loader process reads {streams} streams, and two "
            f"shuffle blocks of each take {math.ceil(needed / MIB)} MiB: raise it to that, or set data.reading.cache to a folder "
            f"on a local disk, or lower data.shuffle_block={data.shuffle_block}, or raise data.workers={data.workers}"
        )
    return ReadingPlan(tuple(load.chunk_bytes(most if fits else _CHUNKS[1]) for load in loads), fits)


def _needed(loads: Sequence[Load], streams: int, most: int) -> int:
    return sum(load.memory(streams, load.chunk_bytes(most)) for load in loads)


def _block_ahead(sets: Sequence[JoinedSet], sources: Sequence[Source], data: Data) -> int:
    """Positions of a stream among which no set has more than one of its blocks."""
    total = sum(source.weight for source in sources)
    return min(
        int(_block_samples(joined.manifest, data) * total / source.weight)
        for joined, source in zip(sets, sources, strict=True)
    )


def _block_samples(manifest: Manifest, data: Data) -> int:
    return min(data.shuffle_block, manifest.samples // data.streams)


def _chunk_reading(reading: Reading) -> ChunkReading:
    return ChunkReading(
        memory_bytes=reading.memory_mib * MIB, connections=reading.connections, client=reading.client,
        folder=reading.cache, folder_bytes=int(reading.cache_gib * 1024 * MIB) if reading.cache else 0,
        patience=Patience(budget_s=reading.budget_s, stall_s=reading.stall_s),
    )  # fmt: skip
