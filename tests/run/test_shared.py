"""A run folder that one rank alone does not share is told at the start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from mmclip_dist import fit
from mmclip_dist.engine.collective import AgreedError
from mmclip_dist.run import shared
from mmclip_dist.run.shared import check_shared
from tests import faulty_train
from tests.ranks import run_ranks


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_shared_folder_is_left_as_it_was(one_rank: None, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    check_shared(str(tmp_path / "run"), "run_dir")
    assert not list((tmp_path / "run").iterdir())


def test_a_token_that_does_not_come_is_told_in_one_line(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_SEEN_S", 0.0)
    monkeypatch.setattr(shared, "_leave_token", lambda folder: (".shared-x", "rank 0 on other"))
    with pytest.raises(AgreedError, match=r"^run_dir=.* is not the folder of rank 0 on other .* share, or, .* a checkpoint.url$"):
        check_shared(str(tmp_path), "run_dir")


@pytest.mark.slow
def test_the_rank_that_sees_another_folder_is_named_before_anything_is_trained(sets, tmp_path: Path) -> None:
    assert fit.check_shared is check_shared
    run, host = tmp_path / "run", socket.gethostname()
    arguments = ["another folder", "quickstart", *sets.overrides(run), "optim.steps=4"]
    code, outputs = run_ranks(faulty_train.main, arguments, ranks=2, folder=tmp_path / "ranks")
    (line,) = [line for output in outputs for line in output.splitlines() if line.startswith(("error:", "failed:"))]
    assert code == 2, outputs
    assert line.startswith(f"error: rank 1 on {host}: run_dir={run}-elsewhere is not the folder of rank 0 on {host} ")
    assert not (run / "metrics.jsonl").exists() and not list(run.glob(".shared-*"))
