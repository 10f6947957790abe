"""How remote sets are read: bytes of a request, memory, and what is fetched before it is due."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from functools import lru_cache

import pytest
from mmclip_shards import storage
from mmclip_shards.chunks import MIB

from mmclip_dist.config import Data, Reading
from mmclip_dist.data.loader import BatchRows, build_order
from mmclip_dist.data.order import SetOrder
from mmclip_dist.data.reading import Load, open_sets, plan_reading, streams_of_a_reader

IMAGES = Load(block=16 * MIB, shard=100 * MIB, whole=10_000 * MIB)
ENTITIES = Load(block=MIB // 2, shard=4 * MIB, whole=400 * MIB)


def data(memory_mib: int = 1024, **reading: object) -> Data:
    return Data(streams=1024, reading=Reading(memory_mib=memory_mib, **reading))


def test_each_reader_has_requests_of_its_own_size_and_is_charged_for_them() -> None:
    """Images with both sidecars over 16 streams: charged the images' chunks, all three would need 1,328 MiB."""
    plan = plan_reading(data(), [IMAGES, ENTITIES, ENTITIES], 16)
    assert plan.chunks == (8 * MIB, MIB // 4, MIB // 4) and plan.whole_blocks
    assert (
        sum(load.memory(16, chunk) for load, chunk in zip([IMAGES, ENTITIES, ENTITIES], plan.chunks, strict=True))
        == 816 * MIB
    )


def test_requests_are_smaller_where_memory_is_short() -> None:
    assert plan_reading(data(768), [IMAGES], 16).chunks == (8 * MIB,)
    assert plan_reading(data(767), [IMAGES], 16).chunks == (4 * MIB,)
    assert plan_reading(data(520), [IMAGES], 16).chunks == (MIB // 4,)


def test_memory_that_cannot_hold_two_blocks_of_a_stream_is_refused_with_the_size_that_can() -> None:
    with pytest.raises(
        ValueError, match=r"memory_mib=519 .* 16 streams.* take 520 MiB.*data\.reading\.cache.*shuffle_block=256"
    ):
        plan_reading(data(519), [IMAGES], 16)
    kept = plan_reading(data(519, cache="/c"), [IMAGES], 16)
    assert kept.chunks == (8 * MIB,) and not kept.whole_blocks


def test_a_set_takes_no_more_than_its_own_size_and_a_chunk_no_more_than_a_shard() -> None:
    assert Load(block=MIB, shard=3 * MIB, whole=3 * MIB).memory(64, MIB) == 3 * MIB
    assert Load(block=MIB, shard=1000, whole=400 * MIB).memory(2, MIB) == 4 * (MIB + 1000)
    assert plan_reading(data(1), [], 16).whole_blocks


@pytest.mark.parametrize(("streams", "readers", "most"), [(1024, 64, 16), (1024, 1024, 1), (1024, 1016, 3), (8, 16, 2)])
def test_a_reader_whose_share_begins_within_a_stream_reads_more_streams(streams: int, readers: int, most: int) -> None:
    assert streams_of_a_reader(streams, readers) == most


# -- Fetched ahead ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_the_next_block_is_asked_for_before_its_first_sample_is_due(sets, monkeypatch, whole: bool) -> None:
    """A few steps more at each step, until a whole block is under way; only the steps asked for where memory is short."""
    url = f"memory://{uuid.uuid4().hex}"
    for name in storage.list_folder(sets.paired):
        if "." in name:
            storage.write_atomic(storage.join(url, name), storage.read_bytes(storage.join(sets.paired, name)))
    config = sets.config(f"data.sources={json.dumps([{'url': url}])}", "data.shuffle_block=12", "data.streams=2")
    joined = open_sets(config.data.sources, config.data, 1)
    assert joined[0].ahead == 12
    if not whole:
        joined[0].ahead = 0
    asked: list[tuple[int, int]] = []  # (step that reads it, step that is being read)
    reading = -1
    monkeypatch.setattr(joined[0], "prefetch", lambda shard, rows, due: asked.append((due, reading)))

    def ended(turn: int) -> None:
        nonlocal reading
        reading = turn + 1

    monkeypatch.setattr(joined[0].chunks, "end_turn", ended)
    rows = BatchRows(
        joined, build_order(joined, config.data, 0), lambda key, members, epoch: {"key": key}, None,
        rows=range(4), per_stream=2, start=3, ahead=2,
    )  # fmt: skip
    for step, _ in zip(range(3, 12), rows, strict=False):
        assert reading == step
    first = {due: min(now for later, now in asked if later == due) for due in sorted({due for due, _ in asked})}
    assert list(first) == list(range(3, 12 + (6 if whole else 2)))
    lead = [due - now for due, now in first.items()]
    assert lead == [0, 1, 2, 2, 3, 4, 4, 5, 6, *[6] * 6] if whole else lead == [0, 1, *[2] * 9]
    joined[0].chunks.close()


def test_the_places_of_a_block_are_computed_once() -> None:
    """Read in step with a block ahead, as the loader does."""
    order, computed = SetOrder([2000], number=0, seed=0, streams=8, block=16), Counter[tuple[int, int, int]]()
    compute = order._places_of_block

    def counted(epoch: int, stream: int, block: int) -> tuple[list[int], list[int]]:
        computed[epoch, stream, block] += 1
        return compute(epoch, stream, block)

    order._block = lru_cache(order._block.cache_info().maxsize)(counted)
    for position in range(200):
        for ahead in (16, 0):
            for stream in range(8):
                order.locate(stream, position + ahead)
    assert set(computed.values()) == {1}
