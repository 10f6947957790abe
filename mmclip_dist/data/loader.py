"""The loader: endless batches from a given step on. No state is kept; the order says which samples a step has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmclip_dist.config import Data
from mmclip_dist.data.batch import Batch, Example, collate
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.data.order import Order

_MAX_RETRIES = 16  # replacements tried for one undecodable sample before its block is given up


def label_names(sets: Sequence[JoinedSet]) -> tuple[str, ...]:
    """The diseases that any of the sets has labels for, in order of first appearance."""
    return tuple(dict.fromkeys(name for joined in sets for name in joined.manifest.labels))


def build_order(sets: Sequence[JoinedSet], data: Data, seed: int) -> Order:
    return Order(
        [joined.counts for joined in sets], [source.weight for source in data.sources],
        seed=seed, streams=data.streams, block=data.shuffle_block,
    )  # fmt: skip


class StreamShare(IterableDataset):
    """Examples of one rank's streams, step by step. A loader worker takes a contiguous part of the rank's streams and
    yields that part of every batch, so each stream is read by one process."""

    def __init__(
        self, sets: Sequence[JoinedSet], order: Order, maker: ExampleMaker, streams: range, per_stream: int, start: int
    ) -> None:
        self.sets, self.order, self.maker = sets, order, maker
        self.streams, self.per_stream, self.start = streams, per_stream, start

    def __iter__(self) -> Iterator[list[Example]]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        width = len(self.streams) // parts
        mine = self.streams[part * width : (part + 1) * width]
        for step in count(self.start):
            first = step * self.per_stream
            yield [
                self._example(stream, position) for stream in mine for position in range(first, first + self.per_stream)
            ]

    def _example(self, stream: int, position: int) -> Example:
        """The example at a position, or the next of its block that can be decoded, with the failures listed."""
        failed = []
        for retry in range(_MAX_RETRIES):
            place = self.order.locate(stream, position, retry)
            joined = self.sets[place.set]
            key = joined.key(place.shard, place.row)
            members = joined.read(place.shard, key)  # damaged or missing bytes are no decoding fault: they stop the run
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
        sets, order, maker, range(rank * width, (rank + 1) * width), global_batch // data.streams, start
    )
    parts = max(1, data.workers)
    loader = DataLoader(
        share, batch_size=None, num_workers=data.workers, prefetch_factor=data.prefetch if data.workers else None,
        pin_memory=False,
    )  # fmt: skip
    # The DataLoader takes its workers in turn, so `parts` items in a row are the parts of one step, in stream order.
    items = iter(loader)
    for step in count(start):
        examples = [example for _ in range(parts) for example in next(items)]
        batch = collate(examples, step, maker.tokenizer.pad_token_id)
        if torch.cuda.is_available():
            batch = Batch(**{k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()})  # type: ignore[typeddict-item]
        yield batch
