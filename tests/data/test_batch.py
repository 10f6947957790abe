"""Batches are cut into parts and moved without losing or doubling a sample."""

from __future__ import annotations

import pytest
import torch

from mmclip_dist.data.batch import Batch, split_batch, to_device
from tests.batches import mixed_batch


@pytest.mark.parametrize(("count", "sizes"), [(1, [8]), (2, [4, 4]), (3, [2, 3, 3]), (5, [1, 2, 1, 2, 2]), (8, [1] * 8)])
def test_parts_put_together_are_the_batch(sets, tokenizer, count: int, sizes: list[int]) -> None:
    batch = mixed_batch(sets, tokenizer)
    batch["replaced"] = [("bad", "reason")] * 8
    parts = split_batch(batch, count)
    assert [len(part["keys"]) for part in parts] == sizes
    for name, value in batch.items():
        values = [part[name] for part in parts]
        if isinstance(value, torch.Tensor):
            assert torch.equal(torch.cat(values), value), name
        elif isinstance(value, list):
            assert sum(values, []) == value, name
        else:
            assert all(part is value for part in values), name


def test_a_moved_batch_holds_the_same(sets, tokenizer) -> None:
    batch = mixed_batch(sets, tokenizer)
    moved = to_device(batch, torch.device("meta"))
    assert moved.keys() == batch.keys() == Batch.__annotations__.keys()
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert moved[name].device.type == "meta" and moved[name].shape == value.shape, name
        else:
            assert moved[name] is value, name
