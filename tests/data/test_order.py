"""The order of samples is a pure function: every sample once an epoch, whoever reads it, wherever a run starts."""

import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmclip_shards.chunks import Tally

from mmclip_dist.data import loader
from mmclip_dist.data.batch import even_share
from mmclip_dist.data.loader import BatchRows
from mmclip_dist.data.order import Order, mix, permutation

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def order_of(sets: list[list[int]], weights: list[float], streams: int, block: int = 7, seed: int = 3) -> Order:
    return Order(sets, weights, seed=seed, streams=streams, block=block)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(1, 8), st.integers(1, 50), st.integers(0, 3))
def test_every_sample_once_an_epoch(counts: list[int], streams: int, block: int, epoch: int) -> None:
    total = sum(counts)
    assume(total >= streams)
    order = order_of([counts], [1], streams, block)
    length = total // streams
    seen = Counter(order.locate(v, p) for v in range(streams) for p in range(epoch * length, (epoch + 1) * length))
    assert max(seen.values()) == 1
    assert {place.epoch for place in seen} == {epoch}
    assert len(seen) == total - order.sets[0].remainder and order.sets[0].remainder < streams
    assert all(0 <= place.row < counts[place.shard] for place in seen)


class NumberedSet:
    """A set whose keys say where each sample is, so that a share of it can be read without shards."""

    def __init__(self, number: int) -> None:
        self.number, self.readers, self.chunks = number, [], self

    def key(self, shard: int, row: int) -> str:
        return f"{self.number}/{shard}/{row}"

    def read(self, shard: int, key: str) -> dict[str, bytes]:
        return {"key": key.encode()}

    def take_tally(self) -> Tally:
        return Tally()


def keys_of_batch(
    monkeypatch: pytest.MonkeyPatch, order: Order, step: int, per_stream: int, *, ranks: int, workers: int
) -> list[str]:
    """The keys of a global batch, as the workers of all ranks read their parts of it, put together again."""
    keys, batch = [], range(order.streams * per_stream)
    sets = [NumberedSet(number) for number in range(len(order.sets))]
    for rank in range(ranks):
        rows = even_share(batch, rank, ranks)
        share = BatchRows(
            sets, order, lambda key, *_: {"key": key}, None, rows=rows, per_stream=per_stream, start=step, ahead=1
        )  # fmt: skip
        for worker in range(workers):
            monkeypatch.setattr(loader, "get_worker_info", lambda at=worker: SimpleNamespace(id=at, num_workers=workers))
            examples, tally = next(iter(share))
            assert tally.samples == len(examples)
            keys += [example["key"] for example in examples]
    return keys


@pytest.mark.parametrize(("ranks", "workers"), [(1, 3), (2, 1), (2, 4), (4, 2), (8, 3), (5, 1), (7, 2), (48, 1)])
@pytest.mark.parametrize(("counts", "weights"), [([[200, 150]], [1]), ([[80, 120], [90]], [2, 1])])
def test_batches_do_not_depend_on_ranks_and_workers(
    monkeypatch: pytest.MonkeyPatch, counts: list[list[int]], weights: list[float], ranks: int, workers: int
) -> None:
    """The real shares of real streams: 48 rows of 24 streams, over ranks and workers that do or do not divide them."""
    for step in (0, 1, 40):  # 40: some epochs on
        alone = keys_of_batch(monkeypatch, order_of(counts, weights, 24), step, 2, ranks=1, workers=1)
        found = keys_of_batch(monkeypatch, order_of(counts, weights, 24), step, 2, ranks=ranks, workers=workers)
        assert found == alone and len(alone) == 48
        order = order_of(counts, weights, 24)
        places = [order.locate(stream, position) for stream in range(24) for position in (2 * step, 2 * step + 1)]
        assert alone == [f"{place.set}/{place.shard}/{place.row}" for place in places]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 400))
def test_seeking_equals_running_there(counts: list[int], streams: int, start: int) -> None:
    """One order that served all positions before, and a fresh one that starts in the middle of an epoch."""
    assume(sum(counts) >= streams)
    ran, sought = order_of([counts, counts], [1, 3], streams), order_of([counts, counts], [1, 3], streams)
    before = [ran.locate(0, position) for position in range(start + 20)]
    assert [sought.locate(0, position) for position in range(start, start + 20)] == before[start:]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=4), st.integers(1, 16), st.integers(1, 400))
def test_weights_are_honoured_to_one_batch(weights: list[float], streams: int, position: int) -> None:
    order = order_of([[streams * 5]] * len(weights), weights, streams)
    before = np.array([order.counts_before(v, position) for v in range(streams)])
    assert (before.sum(1) == position).all()
    wanted = np.array(weights) / sum(weights) * streams * position
    assert np.abs(before.sum(0) - wanted).max() <= max(1.5, streams)  # the smallest batch: one sample of each stream
    if len(weights) == 2:
        assert np.abs(before.sum(0) - wanted).max() <= 0.5 + 1e-6 * position * streams


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 5), min_size=2, max_size=4), st.integers(0, 7))
def test_every_position_takes_one_sample_of_one_set(weights: list[float], stream: int) -> None:
    order = order_of([[64]] * len(weights), weights, 8)
    counts = np.array([order.counts_before(stream, p) for p in range(200)])
    steps = np.diff(counts, axis=0)
    assert ((steps == 0) | (steps == 1)).all() and (steps.sum(1) == 1).all()


def test_epochs_differ_and_seeds_differ() -> None:
    length = 100 // 4
    first = [order_of([[40, 60]], [1], 4).locate(0, p) for p in range(length)]
    second = [order_of([[40, 60]], [1], 4).locate(0, p) for p in range(length, 2 * length)]
    other = [order_of([[40, 60]], [1], 4, seed=4).locate(0, p) for p in range(length)]
    pairs = [[(place.shard, place.row) for place in places] for places in (first, second, other)]
    assert pairs[0] != pairs[1] and pairs[0] != pairs[2]


def test_every_epoch_puts_the_shards_in_another_order() -> None:
    """A stream of a tenth of the set takes other shards each time."""
    order = order_of([[10] * 40], [1], 10)
    taken = [frozenset(order.locate(0, p).shard for p in range(40 * epoch, 40 * epoch + 40)) for epoch in range(4)]
    assert len(set(taken)) == 4


def test_replacements_stay_in_the_block_and_are_other_samples() -> None:
    order = order_of([[64]], [1], 4, block=8)
    places = [order.locate(0, 3, retry) for retry in range(8)]
    assert len(set(places)) == 8
    assert set(places) == {order.locate(0, p) for p in range(8)}
    short = {order.locate(1, 3, retry) for retry in range(8)}  # the first block of stream 1 is a fourth shorter
    assert short == {order.locate(1, p) for p in range(6)}


def test_too_few_samples_are_named() -> None:
    with pytest.raises(ValueError, match=r"5 samples cannot fill data\.streams=8"):
        order_of([[5]], [1], 8)


def test_seek_in_a_huge_set_is_fast_and_small() -> None:
    """20,000 shards, 100 M samples, one of 1,000 ranks: seeking is arithmetic, and nothing grows with the samples."""
    counts = [5000] * 20_000
    tracemalloc.start()
    started = time.perf_counter()
    order = Order([counts], [1.0], seed=0, streams=2000, block=256)
    for stream in (1234, 1235):
        for position in range(123_456, 123_456 + 64):
            order.locate(stream, position)
    seconds = time.perf_counter() - started
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5  # 0.02 s without tracing; a replay would take hours
    assert held < 2_000_000


def test_known_values_never_change() -> None:
    """Golden values: a change here changes the order of every run that is under way."""
    assert mix(1, 2, 3) == GOLDEN_HASH
    assert permutation(8, 0, 1).tolist() == GOLDEN_PERMUTATION
    order = Order([[5, 7], [9]], [1, 1], seed=1, streams=2, block=4)
    assert [tuple(order.locate(1, p)) for p in range(4)] == GOLDEN_PLACES
    order = Order([[5, 7], [9]], [3, 1], seed=1, streams=2, block=4)
    assert [tuple(order.locate(0, p)) for p in range(100, 104)] == GOLDEN_LATER_PLACES


GOLDEN_HASH = 15020427595393229491
GOLDEN_PERMUTATION = [1, 0, 7, 5, 4, 3, 2, 6]
GOLDEN_PLACES = [(0, 0, 0, 0), (1, 0, 0, 5), (0, 0, 1, 6), (1, 0, 0, 4)]
GOLDEN_LATER_PLACES = [(0, 12, 1, 3), (1, 6, 0, 1), (0, 12, 1, 4), (0, 12, 1, 5)]
