"""Samples that cannot be decoded: counted, listed, and too many of them end the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from mmclip_dist.run.quarantine import Quarantine


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch_with(bad: int) -> dict:
    return {"replaced": [(f"k{i}", "cut") for i in range(bad)], "keys": [str(i) for i in range(100)]}


def test_too_many_undecodable_samples_stop_the_run(tmp_path: Path, one_rank: None) -> None:
    quarantine = Quarantine(tmp_path, 0.01)

    def count(bad: int, step: int) -> None:
        quarantine.count(batch_with(bad), step, replaced=bad, seen=100)

    count(2, 1)  # two in the first batch are no measure
    count(0, 2)
    count(0, 3)
    count(2, 4)  # 4 of 400 is the limit
    with pytest.raises(ValueError, match=r"6 of 500 .*/quarantine-"):
        count(2, 5)
    listed = [json.loads(line) for line in (tmp_path / "quarantine-0.jsonl").read_text().splitlines()]
    assert len(listed) == 6 and listed[0] == {"step": 1, "key": "k0", "reason": "cut"}


def test_none_allowed_means_none(tmp_path: Path, one_rank: None) -> None:
    with pytest.raises(ValueError, match="1 of 100"):
        Quarantine(tmp_path, 0.0).count(batch_with(1), 1, replaced=1, seen=100)
