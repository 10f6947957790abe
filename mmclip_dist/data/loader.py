"""The loader: endless batches from a given step on. No state is kept; the order says which samples a step has."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Protocol, TypeVar

import torch
from mmclip_shards.chunks import Tally
from mmclip_shards.storage import local_path
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmclip_dist.config import Data
from mmclip_dist.data.batch import Batch, Example, collate, even_share, join
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.data.order import Order, Place
from mmclip_dist.data.parts import Part, Slots, in_thread
from mmclip_dist.errors import exit_code

T = TypeVar("T")
_MAX_RETRIES = 16  # replacements tried for one undecodable sample before the run ends
_LAST_BATCHES_S = 60  # a loader process goes on for so long after SIGTERM


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


class BatchRows(IterableDataset):
    """Examples of some rows of every global batch, step by step. In a loader worker: its part of them, joined to one `Part`.

    Row i of a global batch is position `step * per_stream + i % per_stream` of stream `i // per_stream`, so batches do not
    depend on who reads which row. ahead: steps whose samples are fetched from object storage before they are due; more, up to
    a whole shuffle block, where memory has room for it, so that no step waits when a stream goes on to its next block.
    """

    def __init__(
        self, sets: Sequence[JoinedSet], order: Order, maker: Maker, padding: int | None,
        *, rows: range, per_stream: int, start: int, ahead: int, slots: Sequence[Slots] = (),
    ) -> None:  # fmt: skip
        """padding: the tokenizer's padding id; None: examples are not collated. slots: of each worker, to collate in."""
        self.sets, self.order, self.maker, self.padding = sets, order, maker, padding
        self.rows, self.per_stream, self.start, self.ahead, self.slots = rows, per_stream, start, ahead, slots
        self.remote = any(local_path(reader.url) is None for joined in sets for reader in joined.readers)

    def __iter__(self) -> Iterator[tuple[Any, Tally] | Exception]:
        """In a worker process, an error that is not a bug becomes the last item. Raised there, it would reach the rank as the
        text of a traceback, without its type."""
        worker = get_worker_info()
        if worker is None:
            yield from self._steps(self.rows, collate)
            return
        try:
            mine = even_share(self.rows, worker.id, worker.num_workers)
            yield from self._steps(mine, self.slots[worker.id].collate if self.slots else collate)
        except Exception as error:
            if exit_code(error) is None:
                raise
            yield error

    def _steps(self, rows: range, collated: Callable[[list[Example], int, int], Batch | Part]) -> Iterator[tuple[Any, Tally]]:
        farthest = max(self.ahead, self.sets[0].ahead // self.per_stream) if self.remote else 0
        begun = self.start
        placed: dict[int, list[Place]] = {}
        for step in count(self.start):
            if self.remote:
                self.sets[0].chunks.end_turn(step - 1)
                # A few more at each step: the first ones shall not wait behind all of the next block.
                soon = min(step + farthest, begun + self.ahead) + 1
                for later in range(begun, soon):
                    placed[later] = self._places(rows, later)
                    self._prefetch(placed[later], later)
                begun = soon
            places = placed.pop(step, None) or self._places(rows, step)
            examples = [self._example(*at) for at in zip(self._positions(rows, step), places, strict=True)]
            tally = self.sets[0].chunks.take_tally()
            tally.samples = len(examples)
            yield examples if self.padding is None else collated(examples, step, self.padding), tally

    def _positions(self, rows: range, step: int) -> Iterator[tuple[int, int]]:
        for row in rows:
            stream, place = divmod(row, self.per_stream)
            yield stream, step * self.per_stream + place

    def _places(self, rows: range, step: int) -> list[Place]:
        return [self.order.locate(stream, position) for stream, position in self._positions(rows, step)]

    def _prefetch(self, places: Sequence[Place], step: int) -> None:
        wanted = defaultdict(list)
        for place in places:
            wanted[place.set, place.shard].append(place.row)
        for (number, shard), of_shard in wanted.items():
            self.sets[number].prefetch(shard, of_shard, step)

    def _example(self, at: tuple[int, int], place: Place) -> Example:
        """The example at (stream, position), or the next of its block that can be decoded, with the failures listed."""
        failed: list[tuple[str, str]] = []
        for retry in range(1, _MAX_RETRIES + 1):
            joined = self.sets[place.set]
            key = joined.key(place.shard, place.row)
            members = joined.read(place.shard, key)  # damaged or missing bytes are not a decoding fault: they end the run
            try:
                example = self.maker(key, members, place.epoch)
            except ValueError as error:
                failed.append((key, str(error)))
                place = self.order.locate(*at, retry)
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


def in_workers(rows: BatchRows, workers: int, prefetch: int) -> DataLoader:
    """The items of `rows`, made by `workers` processes (0: by this one): consecutive items are the parts of one step, in order.

    Processes are forked: nothing of the sets, which hold an entry for each shard, is pickled.
    """
    return DataLoader(
        rows, batch_size=None, num_workers=workers, prefetch_factor=prefetch if workers else None,
        multiprocessing_context="fork" if workers else None, collate_fn=as_it_is, worker_init_fn=outlive_sigterm,
    )  # fmt: skip


def with_reading(batch: Batch, reading: Tally) -> Batch:
    batch["reading"] = reading
    return batch


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
    """This rank's batches of steps start, start + 1, ... without end. Sizes were checked by `Config.check_world`.

    With loader workers a thread joins their parts, in pinned memory if there is a card.
    """
    padding = maker.tokenizer.pad_token_id
    mine = even_share(range(global_batch), rank, world)
    workers = min(data.workers, len(mine))
    slots = [Slots(-(-len(mine) // workers), maker.bytes_per_example, data.prefetch) for _ in range(workers)]
    rows = BatchRows(
        sets, order, maker, padding, rows=mine, per_stream=global_batch // data.streams, start=start, ahead=data.prefetch,
        slots=slots,
    )  # fmt: skip
    pin = torch.cuda.is_available()
    if not workers:
        for batch, tally in raised(in_workers(rows, 0, data.prefetch)):
            yield with_reading(join([batch], padding, pin=True) if pin else batch, tally)
        return
    items = raised(iter(in_workers(rows, workers, data.prefetch)))

    def joined() -> Iterator[Batch]:
        while True:
            reading, parts = Tally(), []
            for of_worker in slots:
                part, tally = next(items)
                parts.append(of_worker.batch(part))
                reading.add(tally)
            yield with_reading(join(parts, padding, pin=pin), reading)

    with in_thread(joined(), "joining batches") as batches:
        yield from batches
