"""Which ranges a chunk reader asks for, and what it keeps."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait

import pytest
from mmclip_shards import storage
from mmclip_shards.chunks import ChunkReader, Reading, RemoteShard
from mmclip_shards.faults import Lateness, Tries

SIZE = 1000
DATA = random.Random(5).randbytes(SIZE)
STEP = 100


class Store:
    """In place of a remote store: its one shard is DATA. asked: (offset, length) of every request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int, int]] = []
        monkeypatch.setattr(storage, "read_range", self.read_range)

    def read_range(self, url: str, offset: int, length: int, tries: Tries | None = None, client: str = "s3fs") -> bytes:
        self.asked.append((offset, length))
        assert offset >= 0 and length > 0 and offset + length <= SIZE
        return DATA[offset : offset + length]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


def shard_of(chunk_bytes: int | None = STEP) -> RemoteShard:
    return RemoteShard("s3://set/a.tar", "0" * 64, SIZE, chunk_bytes)


def reader_of(chunk_bytes: int | None = STEP, **reading: int) -> Callable[[int, int], bytes]:
    chunks = ChunkReader(Reading(**reading))  # type: ignore[arg-type]
    return lambda offset, length: bytes(chunks.read(shard_of(chunk_bytes), offset, length))


@pytest.mark.parametrize(
    ("offset", "length", "chunks"),
    [
        (0, 100, [0]),
        (100, 100, [1]),
        (99, 1, [0]),
        (99, 2, [0, 1]),
        (150, 250, [1, 2, 3]),
        (900, 100, [9]),
        (0, 1000, list(range(10))),
    ],
)
def test_a_range_fetches_the_chunks_that_hold_it_and_no_other(
    store: Store, offset: int, length: int, chunks: list[int]
) -> None:
    assert reader_of()(offset, length) == DATA[offset : offset + length]
    assert sorted(store.asked) == [(STEP * number, STEP) for number in chunks]


def test_the_last_chunk_ends_with_the_shard(store: Store) -> None:
    assert reader_of(chunk_bytes=300)(950, 50) == DATA[950:]
    assert store.asked == [(900, 100)]


def test_without_chunks_a_sample_is_fetched_alone_and_not_kept(store: Store) -> None:
    read = reader_of(chunk_bytes=None)
    assert read(37, 11) == read(37, 11) == DATA[37:48]
    assert store.asked == [(37, 11)] * 2


def test_without_chunks_what_was_fetched_ahead_is_not_kept_either(store: Store) -> None:
    chunks, shard = ChunkReader(), shard_of(None)
    for _ in range(2):
        chunks.prefetch(shard, [(37, 11)])
        fetched_ahead(chunks)
        assert bytes(chunks.read(shard, 37, 11)) == DATA[37:48]
    assert store.asked == [(37, 11)] * 2


def test_a_range_of_two_chunks_keeps_both_in_use(store: Store) -> None:
    read = reader_of(memory_bytes=3 * STEP, connections=1)
    for offset, length in ((0, 200), (200, 100), (50, 100), (300, 100), (0, 200)):  # the third makes chunk 2 the oldest
        assert read(offset, length) == DATA[offset : offset + length]
    assert [at // STEP for at, _ in store.asked] == [0, 1, 2, 3]


def test_kept_chunks_stay_within_their_memory_the_oldest_go_first(store: Store) -> None:
    read = reader_of(memory_bytes=3 * STEP, connections=1)
    for number in (0, 1, 2, 0, 3):  # 1 is now the one used longest ago, and one too many
        read(STEP * number, STEP)
    assert [offset // STEP for offset, _ in store.asked] == [0, 1, 2, 3]
    store.asked.clear()
    for number in (2, 0, 3):
        read(STEP * number, STEP)
    assert store.asked == []
    read(STEP, STEP)
    assert store.asked == [(STEP, STEP)]


def test_prefetched_ranges_are_not_fetched_again(store: Store) -> None:
    chunks, place = ChunkReader(), shard_of()
    chunks.prefetch(place, [(10, 20), (30, 20), (250, 100)])
    assert bytes(chunks.read(place, 10, 340)) == DATA[10:350]
    assert sorted(store.asked) == [(STEP * number, STEP) for number in (0, 1, 2, 3)]
    tally = chunks.take_tally()
    assert (tally.requests, tally.fetched, tally.retries) == (4, 4 * STEP, 0)
    chunks.forget(place, 250, 1)
    assert bytes(chunks.read(place, 250, 1)) == DATA[250:251]
    assert store.asked[4:] == [(200, 100)]
    chunks.close()


# ---- turns


def numbers(store: Store) -> list[int]:
    return [offset // STEP for offset, _ in store.asked]


def fetched_ahead(chunks: ChunkReader) -> None:
    """Wait for what is under way."""
    wait([fetch.future for fetch in chunks._kept.values()])


def test_nothing_is_fetched_ahead_in_place_of_a_chunk_that_a_later_turn_needs(store: Store) -> None:
    chunks, shard = ChunkReader(Reading(memory_bytes=3 * STEP, connections=1)), shard_of()
    for turn, number in enumerate((0, 1, 2, 3, 0)):  # chunk 0 is read at turns 0 and 4
        chunks.prefetch(shard, [(STEP * number, 10)], turn)
    fetched_ahead(chunks)
    assert numbers(store) == [0, 1, 2]
    chunks.end_turn(0)
    fetched_ahead(chunks)
    assert numbers(store) == [0, 1, 2], "chunk 0 is needed at turn 4"
    chunks.end_turn(1)
    fetched_ahead(chunks)
    assert numbers(store) == [0, 1, 2, 3]
    for number in (2, 3, 0):
        assert bytes(chunks.read(shard, STEP * number, STEP)) == DATA[STEP * number : STEP * (number + 1)]
    assert numbers(store) == [0, 1, 2, 3]
    chunks.close()


def test_a_read_is_served_even_if_memory_is_full_and_costs_the_chunk_that_is_needed_last(store: Store) -> None:
    chunks, shard = ChunkReader(Reading(memory_bytes=2 * STEP, connections=1)), shard_of()
    chunks.prefetch(shard, [(0, 10)], 5)
    chunks.prefetch(shard, [(STEP, 10)], 6)
    fetched_ahead(chunks)
    assert bytes(chunks.read(shard, 7 * STEP, 10)) == DATA[7 * STEP : 7 * STEP + 10]
    chunks.read(shard, 0, 10)
    assert numbers(store) == [0, 1, 7]
    chunks.read(shard, STEP, 10)
    assert numbers(store) == [0, 1, 7, 1]
    chunks.close()


def test_what_found_no_room_before_its_turn_is_not_fetched_after_it(store: Store) -> None:
    chunks, shard = ChunkReader(Reading(memory_bytes=STEP, connections=1)), shard_of()
    for turn, number in enumerate((0, 1, 2)):
        chunks.prefetch(shard, [(STEP * number, 10)], turn)
    fetched_ahead(chunks)
    chunks.end_turn(1)
    fetched_ahead(chunks)
    assert numbers(store) == [0, 2]
    chunks.close()


# ---- late requests


class SlowStore(Store):
    """Answers at once, but the first request for `slow` (an offset) only when `released` is set."""

    slow = -1

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.released = threading.Event()
        self.answers: dict[int, bytes | Exception] = {}

    def read_range(self, url: str, offset: int, length: int, tries: Tries | None = None, client: str = "s3fs") -> bytes:
        first = offset not in {asked for asked, _ in self.asked}
        data = super().read_range(url, offset, length, tries)
        if offset == self.slow and first:
            assert self.released.wait(20)
            if isinstance(answer := self.answers.get(offset), Exception):
                raise answer
        return data


@pytest.fixture
def slow_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowStore]:
    monkeypatch.setattr(Lateness, "_LEAST_S", 0.05)
    monkeypatch.setattr(Lateness, "_TIMES", 0.0)
    monkeypatch.setattr(Lateness, "_FEWEST", 4)
    store = SlowStore(monkeypatch)
    yield store
    store.released.set()


def test_a_late_read_is_asked_for_again_and_the_first_answer_wins(slow_store: SlowStore) -> None:
    chunks, shard = ChunkReader(), shard_of()
    for number in range(4):
        chunks.read(shard, STEP * number, STEP)
    slow_store.slow = 5 * STEP
    slow_store.answers[5 * STEP] = OSError("the first request fails in the end")
    assert bytes(chunks.read(shard, 5 * STEP, STEP)) == DATA[5 * STEP : 6 * STEP]
    tally = chunks.take_tally()
    assert (tally.hedges, numbers(slow_store).count(5)) == (1, 2)
    slow_store.released.set()
    chunks._pool.shutdown()
    assert bytes(chunks.read(shard, 5 * STEP, STEP)) == DATA[5 * STEP : 6 * STEP], "the loser's error changes nothing"
    chunks.close()


def test_an_error_does_not_count_while_the_second_request_is_under_way(
    slow_store: SlowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, shard = ChunkReader(), shard_of()
    for number in range(4):
        chunks.read(shard, STEP * number, STEP)
    second, asked, plain = threading.Event(), threading.Lock(), slow_store.read_range

    def read_range(url: str, offset: int, length: int, tries: Tries | None = None, client: str = "s3fs") -> bytes:
        if asked.acquire(blocking=False):
            assert second.wait(20)
            raise OSError("reset")
        second.set()
        (fetch,) = (fetch for fetch in chunks._kept.values() if not fetch.future.done())
        while fetch.running == 2:
            time.sleep(0.001)
        return plain(url, offset, length, tries)

    monkeypatch.setattr(storage, "read_range", read_range)
    assert bytes(chunks.read(shard, 5 * STEP, STEP)) == DATA[5 * STEP : 6 * STEP]
    chunks.close()


def test_no_more_than_one_request_in_twenty_is_made_again(slow_store: SlowStore) -> None:
    chunks, shard = ChunkReader(), shard_of()
    for number in range(4):
        chunks.read(shard, STEP * number, STEP)
    chunks._lateness.may_hedge()  # the one that is allowed after a handful of requests
    slow_store.slow = 5 * STEP
    threading.Timer(0.2, slow_store.released.set).start()
    chunks.read(shard, 5 * STEP, STEP)
    assert (chunks.take_tally().hedges, numbers(slow_store).count(5)) == (0, 1)
    chunks.close()


def test_late_is_three_times_what_nineteen_in_twenty_take() -> None:
    lateness = Lateness()
    for _ in range(15):
        lateness.add(0.01)
    assert lateness.after_s() is None, "too few are known"
    lateness.add(0.01)
    assert lateness.after_s() == 0.5
    for number in range(100):
        lateness.add(2.0 if number % 2 else 0.01)
    assert lateness.after_s() == pytest.approx(6.0), "a store that is slow for all is not asked twice"
    assert sum(lateness.may_hedge() for _ in range(100)) == 116 // 20 + 1
