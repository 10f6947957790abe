"""Shared refusals and sums, on one process. (Two ranks: tests/run/test_trouble.py.)"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmclip_dist.engine.collective import (
    AgreedError,
    AgreedFailure,
    Refusal,
    broken,
    first_rank_does,
    raise_shared,
    sums,
)
from mmclip_dist.errors import FAILED, USER

CPU = torch.device("cpu")


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_numbers_and_tensors_are_summed_under_their_names(one_rank: None) -> None:
    found = sums(CPU, stop=True, loss=torch.tensor(2.5), writing=False, seen=12)
    assert found == {"stop": 1.0, "loss": 2.5, "writing": 0.0, "seen": 12.0}


def test_a_loss_that_is_not_finite_spoils_no_other_sum(one_rank: None) -> None:
    found = sums(CPU, seen=3, loss=torch.tensor(torch.nan), replaced=1)
    assert math.isnan(found["loss"]) and (found["seen"], found["replaced"]) == (3.0, 1.0)


def test_nothing_refused_raises_nothing() -> None:
    raise_shared([("rank 0", None), ("rank 1", None)])


def test_one_failure_among_refusals_makes_a_failure() -> None:
    """A scheduler tries again after a failure, not after a mistake."""
    disk, recipe = Refusal("no space", FAILED), Refusal("unknown key", USER)
    with pytest.raises(AgreedFailure, match=r"^rank 0: no space; rank 1: unknown key$"):
        raise_shared([("rank 0", disk), ("rank 1", recipe)])
    with pytest.raises(AgreedError, match=r"^rank 1: unknown key$"):
        raise_shared([("rank 0", None), ("rank 1", recipe)])
    with pytest.raises(AgreedError, match=r"^unknown key$"):
        raise_shared([("rank 0", recipe), ("rank 1", recipe)])


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_on_rank_0_ends_the_wait_of_all(one_rank: None, capfd: pytest.CaptureFixture[str]) -> None:
    def buggy() -> None:
        raise KeyError("gone")

    with pytest.raises(AgreedFailure, match=r"rank 0 on .*: KeyError\('gone'\)"):
        first_rank_does(buggy, "failing")
    assert first_rank_does(lambda: "found", "looking") == "found"


def test_only_errors_of_the_backend_are_another_ranks_fault() -> None:
    assert broken(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert broken(RuntimeError("NCCL error: remote process exited"))
    assert not broken(RuntimeError("shape mismatch")) and not broken(ValueError("gloo"))
