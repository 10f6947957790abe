"""Batches some steps ahead, each with its plan."""

from __future__ import annotations

from itertools import count

import torch

from mmclip_dist.engine.feed import AHEAD, Feed
from tests.model.synthetic_batch import batch_of, config_of, load_of

CPU = torch.device("cpu")


def test_batches_come_in_order_and_plans_are_known_before() -> None:
    config = config_of(batch=4)
    made = []

    def batches():
        for step in count():
            batch = batch_of(config, load_of(config)) | {"step": step}
            batch["report_id"][: step % 4] = -1
            made.append(step)
            yield batch

    feed = Feed(batches(), width=64, passes=2, shares=(1.0, 1.0), device=CPU)
    assert [len(feed.ahead(steps).paired) for steps in (1, 2)] == [4, 3] and made == [0, 1]
    for step in range(6):
        batch = next(feed)
        assert batch["step"] == step and made[-1] == step + AHEAD
        assert batch["plan"].counts[:2] == [4 - step % 4, step % 4] and len(batch["plan"].parts) == 2
        parts = batch["plan"].parts
        assert len(batch["plan"].tensors) == 15 * (1 + len(parts)) and parts[1].packing.slot is batch["plan"].tensors[38]
        assert feed.ahead(2).counts[:2] == [4 - (step + 2) % 4, (step + 2) % 4]
        assert feed.ahead(1).counts[:2] == [4 - (step + 1) % 4, (step + 1) % 4]
