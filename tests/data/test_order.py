"""The order of samples is a pure function: every sample once an epoch, whoever reads it, wherever a run starts."""

import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmclip_dist.data.order import Order, Place, mix, permutation

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def order_of(sets: list[list[int]], weights: list[float], streams: int, block: int = 7, seed: int = 3) -> Order:
    return Order(sets, weights, seed=seed, streams=streams, block=block)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(1, 8), st.integers(1, 50), st.integers(0, 3))
def test_every_sample_once_an_epoch(counts: list[int], streams: int, block: int, epoch: int) -> None:
    total = sum(counts)
    if total < streams:
        return
    order = order_of([counts], [1], streams, block)
    length = total // streams
    seen = Counter(order.locate(v, p) for v in range(streams) for p in range(epoch * length, (epoch + 1) * length))
    assert max(seen.values()) == 1
    assert {place.epoch for place in seen} == {epoch}
    assert len(seen) == total - order.sets[0].remainder and order.sets[0].remainder < streams
    assert all(0 <= place.row < counts[place.shard] for place in seen)


def batch(order: Order, step: int, global_batch: int, ranks: int, workers: int) -> list[Place]:
    """A global batch as ranks and their workers would read it, put together again."""
    per_stream, places = global_batch // order.streams, []
    for reader in range(ranks * workers):
        width = order.streams // (ranks * workers)
        for stream in range(reader * width, (reader + 1) * width):
            places += [order.locate(stream, p) for p in range(step * per_stream, (step + 1) * per_stream)]
    return places


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(8, 40), min_size=1, max_size=5), min_size=1, max_size=3),
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 3, 4]), st.integers(0, 500), st.integers(1, 3),
)  # fmt: skip
def test_batches_do_not_depend_on_ranks_and_workers(
    sets: list[list[int]], ranks: int, workers: int, step: int, per_stream: int
) -> None:
    """24 streams: 1, 2, 4 and 8 ranks of 1 to 4 workers all divide them, but for 8 ranks of 2 or 4 workers (16, 32)."""
    streams = 24 if 24 % (ranks * workers) == 0 else 32
    sets = [[count * 8 for count in counts] for counts in sets]
    weights = [1.0 + number for number in range(len(sets))]
    alone = batch(order_of(sets, weights, streams), step, per_stream * streams, 1, 1)
    if streams % (ranks * workers) == 0:
        assert batch(order_of(sets, weights, streams), step, per_stream * streams, ranks, workers) == alone


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 400))
def test_seeking_equals_running_there(counts: list[int], streams: int, start: int) -> None:
    """One order that served all positions before, and a fresh one that starts in the middle of an epoch."""
    if sum(counts) < streams:
        return
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
    assert mix(1, 2, 3) == mix(1, 2, 3) != mix(3, 2, 1)
    assert permutation(8, 0, 1).tolist() == GOLDEN_PERMUTATION
    order = Order([[5, 7], [9]], [1, 1], seed=1, streams=2, block=4)
    assert [tuple(order.locate(1, p)) for p in range(4)] == GOLDEN_PLACES


GOLDEN_PERMUTATION = [1, 0, 7, 5, 4, 3, 2, 6]
GOLDEN_PLACES = [(0, 0, 0, 0), (1, 0, 0, 5), (0, 0, 1, 6), (1, 0, 0, 4)]
