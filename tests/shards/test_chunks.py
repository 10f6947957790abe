"""Which ranges a chunk reader asks for, and what it keeps."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from mmclip_shards import storage
from mmclip_shards.chunks import ChunkReader, Reading
from mmclip_shards.faults import Tries

SIZE = 1000
DATA = random.Random(5).randbytes(SIZE)
STEP = 100


class Store:
    """In place of a remote store: its one shard is DATA. asked: (offset, length) of every request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[int, int]] = []
        monkeypatch.setattr(storage, "read_range", self.read_range)

    def read_range(self, url: str, offset: int, length: int, tries: Tries | None = None) -> bytes:
        self.asked.append((offset, length))
        assert offset >= 0 and length > 0 and offset + length <= SIZE
        return DATA[offset : offset + length]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(monkeypatch)


def reader_of(**reading: int | None) -> Callable[[int, int], bytes]:
    chunks = ChunkReader(Reading(**{"chunk_bytes": STEP, **reading}))  # type: ignore[arg-type]
    return lambda offset, length: bytes(chunks.read("s3://set/a.tar", "0" * 64, SIZE, offset, length))


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
    chunks = ChunkReader(Reading(chunk_bytes=STEP))
    place = "s3://set/a.tar", "0" * 64, SIZE
    chunks.prefetch(*place, [(10, 20), (30, 20), (250, 100)])
    assert bytes(chunks.read(*place, 10, 340)) == DATA[10:350]
    assert sorted(store.asked) == [(STEP * number, STEP) for number in (0, 1, 2, 3)]
    tally = chunks.take_tally()
    assert (tally.requests, tally.fetched, tally.retries) == (4, 4 * STEP, 0)
    chunks.forget(*place, 250, 1)
    assert bytes(chunks.read(*place, 250, 1)) == DATA[250:251]
    assert store.asked[4:] == [(200, 100)]
    chunks.close()


def test_a_chunk_of_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_bytes is 0"):
        ChunkReader(Reading(chunk_bytes=0))
