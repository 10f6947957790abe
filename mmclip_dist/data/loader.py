"""The loader: endless batches from a given step on. No state is kept; the order says which samples a step has."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Protocol, TypeVar

import torch
from mmclip_shards.chunks import MIB, ChunkReader, Tally
from mmclip_shards.chunks import Reading as ChunkReading
from mmclip_shards.faults import Patience
from mmclip_shards.manifest import Manifest
from mmclip_shards.storage import local_path
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmclip_dist.config import Data, Reading, Source
from mmclip_dist.data.batch import Batch, Example, collate
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.data.order import Order
from mmclip_dist.errors import exit_code

T = TypeVar("T")
_MAX_RETRIES = 16  # replacements tried for one undecodable sample before the run ends
_LAST_BATCHES_S = 60  # a loader process goes on for so long after SIGTERM
_CHUNKS = MIB // 4, 8 * MIB  # bytes of one request, least and most: smaller ones wait for latency, larger ones gain nothing


def open_sets(sources: Sequence[Source], data: Data, world: int) -> list[JoinedSet]:
    """The training sets with their sidecars. All read through one memory and one cache."""
    readers = world * max(1, data.workers)
    streams = max(1, data.streams // readers)
    sets = [JoinedSet(source, 16 + 2 * streams) for source in sources]  # a stream usually lies in two shards
    blocks = [
        min(data.shuffle_block, reader.manifest.samples // data.streams) * _bytes_per_sample(reader.manifest)
        for joined in sets for reader in joined.readers if local_path(reader.url) is None
    ]  # fmt: skip
    chunks = ChunkReader(chunk_reading(data.reading, blocks, streams))
    for joined in sets:
        joined.read_through(chunks)
    return sets


def _bytes_per_sample(manifest: Manifest) -> int:
    return sum(shard.bytes for shard in manifest.shards) // manifest.samples


def chunk_reading(reading: Reading, blocks: Sequence[int], streams: int) -> ChunkReading:
    """How to read remote sets. blocks: bytes of a shuffle block of each set. streams: read side by side.

    The samples of a block lie together but come in random order, so it is read in chunks that are kept until it is used up. Where
    all blocks of all streams find no room in memory, chunks would be fetched over and over: then each sample is fetched alone,
    unless a folder keeps the chunks.
    """
    chunk = min(max(max(blocks, default=0) // 2, _CHUNKS[0]), _CHUNKS[1])
    needed = streams * sum(2 * block + 2 * chunk for block in blocks)  # one being read, the next being fetched
    memory = reading.memory_mib * MIB
    return ChunkReading(
        chunk_bytes=chunk if needed <= memory or reading.cache else None,
        memory_bytes=memory, connections=reading.connections,
        folder=reading.cache, folder_bytes=int(reading.cache_gib * 1024 * MIB) if reading.cache else 0,
        patience=Patience(budget_s=reading.budget_s, stall_s=reading.stall_s),
    )  # fmt: skip


def label_names(sets: Sequence[JoinedSet]) -> tuple[str, ...]:
    """The diseases that any of the sets has labels for, in order of first appearance."""
    return tuple(dict.fromkeys(name for joined in sets for name in joined.manifest.labels))


def build_order(sets: Sequence[JoinedSet], data: Data, seed: int) -> Order:
    return Order(
        [joined.counts for joined in sets], [source.weight for source in data.sources],
        seed=seed, streams=data.streams, block=data.shuffle_block,
    )  # fmt: skip


class Maker(Protocol):
    """Makes a sample's entries of a batch from its members: usually `ExampleMaker`."""

    def __call__(self, key: str, members: Mapping[str, bytes], epoch: int) -> Example:
        """ValueError if the sample cannot be decoded."""


def as_it_is(item: T) -> T:
    """The identity, as `collate_fn`: DataLoader's default walks through every example and finds nothing to convert."""
    return item


class StreamShare(IterableDataset):
    """Examples of one rank's streams, step by step. A loader worker takes a contiguous part of the rank's streams and
    yields that part of every batch, so each stream is read by one process.

    ahead: steps whose samples are fetched from object storage before they are due.
    """

    def __init__(
        self, sets: Sequence[JoinedSet], order: Order, maker: Maker, streams: range, per_stream: int, start: int,
        ahead: int,
    ) -> None:  # fmt: skip
        self.sets, self.order, self.maker = sets, order, maker
        self.streams, self.per_stream, self.start, self.ahead = streams, per_stream, start, ahead
        self.remote = any(local_path(reader.url) is None for joined in sets for reader in joined.readers)

    def __iter__(self) -> Iterator[tuple[list[Example], Tally] | Exception]:
        """In a worker process, an error that is not a bug becomes the last item. Raised there, it would reach the rank as the
        text of a traceback, without its type."""
        if get_worker_info() is None:
            yield from self._parts()
            return
        try:
            yield from self._parts()
        except Exception as error:
            if exit_code(error) is None:
                raise
            yield error

    def _parts(self) -> Iterator[tuple[list[Example], Tally]]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        width = len(self.streams) // parts
        mine = self.streams[part * width : (part + 1) * width]
        if self.remote:
            for step in range(self.start, self.start + self.ahead):
                self._prefetch(mine, step)
        for step in count(self.start):
            if self.remote:
                self._prefetch(mine, step + self.ahead)
            examples = [self._example(stream, position) for stream, position in self._positions(mine, step)]
            tally = self.sets[0].chunks.take_tally()
            tally.samples = len(examples)
            yield examples, tally

    def _positions(self, streams: range, step: int) -> Iterator[tuple[int, int]]:
        first = step * self.per_stream
        return ((stream, position) for stream in streams for position in range(first, first + self.per_stream))

    def _prefetch(self, streams: range, step: int) -> None:
        rows = defaultdict(list)
        for stream, position in self._positions(streams, step):
            place = self.order.locate(stream, position)
            rows[place.set, place.shard].append(place.row)
        for (number, shard), wanted in rows.items():
            self.sets[number].prefetch(shard, wanted)

    def _example(self, stream: int, position: int) -> Example:
        """The example at a position, or the next of its block that can be decoded, with the failures listed."""
        failed = []
        for retry in range(_MAX_RETRIES):
            place = self.order.locate(stream, position, retry)
            joined = self.sets[place.set]
            key = joined.key(place.shard, place.row)
            members = joined.read(place.shard, key)  # damaged or missing bytes are not a decoding fault: they end the run
            try:
                example = self.maker(key, members, place.epoch)
            except ValueError as error:
                failed.append((key, str(error)))
                continue
            return example | {"replaced": failed}
        raise ValueError(
            f"{_MAX_RETRIES} neighbouring samples of {joined.url} cannot be decoded, from {failed[0][0]} "
            f"({failed[0][1]}) to {key}: pack the set again"
        )


def raised(items: Iterable[T | Exception]) -> Iterator[T]:
    """Yield the items; raise the first one that is an error."""
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


def outlive_sigterm(worker: int) -> None:
    """Let a loader process ignore the launcher's SIGTERM: its rank needs batches until all ranks have stopped."""
    # It ends with its rank, or at the latest by this alarm.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LAST_BATCHES_S))


def build_loader(
    sets: Sequence[JoinedSet],
    order: Order,
    maker: ExampleMaker,
    *,
    data: Data,
    global_batch: int,
    rank: int,
    world: int,
    start: int,
) -> Iterator[Batch]:
    """This rank's batches of steps start, start + 1, ... without end. Sizes were checked by `Config.check_world`."""
    width = data.streams // world
    share = StreamShare(
        sets, order, maker, range(rank * width, (rank + 1) * width), global_batch // data.streams, start, data.prefetch
    )
    parts = max(1, data.workers)
    loader = DataLoader(
        share, batch_size=None, num_workers=data.workers, prefetch_factor=data.prefetch if data.workers else None,
        pin_memory=False, collate_fn=as_it_is, worker_init_fn=outlive_sigterm,
    )  # fmt: skip
    # DataLoader asks its workers in turn, so `parts` consecutive items are the parts of one step, in stream order.
    items = raised(loader)
    for step in count(start):
        examples: list[Example] = []
        reading = Tally()
        for _ in range(parts):
            some, tally = next(items)
            examples += some
            reading.add(tally)
        batch = collate(examples, step, maker.tokenizer.pad_token_id)
        if torch.cuda.is_available():
            batch = Batch(**{k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()})  # type: ignore[typeddict-item]
        batch["reading"] = reading
        yield batch
