"""Run folders on disks of the hosts' own: two forked ranks, each with a folder of its own and a store between them.

tests/cluster does the same on two hosts with the launcher.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmclip_dist.checkpoint.folder import checkpoints_of, fault
from mmclip_dist.run.metrics import read_metrics
from tests import faulty_train
from tests.conftest import LONG, Sets
from tests.launched import Finished, final_weights
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def train(sets: Sets, run: Path, *more: str, url: str) -> Finished:
    words = [*sets.overrides(run), *LONG, "checkpoint.host_local=true", f"checkpoint.url={url}", *more]
    code, outputs = run_ranks(faulty_train.main, ["own disks", "quickstart", *words], ranks=2, folder=run.parent / "ranks")
    return Finished(code, "".join(outputs))


def test_a_lost_disk_is_filled_from_the_store_and_the_weights_are_those_of_one_folder(
    sets: Sets, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    run, other, store = tmp_path / "run", tmp_path / "run-elsewhere", tmp_path / "store"
    first = train(sets, run, "optim.stop_at=8", "zero_stage=3", url=str(store))
    assert first.returncode == 0, first.output[-4000:]
    assert [path.name for path in checkpoints_of(other)] == ["step-00000004", "step-00000008"]
    parts = [{path.name for path in (folder / "checkpoints/step-00000008").iterdir()} for folder in (run, other)]
    assert "random-00001.pt" in parts[1] - parts[0] and "model.safetensors" in parts[0] - parts[1]
    assert fault(checkpoints_of(run)[-1]) and fault(checkpoints_of(other)[-1]) and fault(store / "step-00000008") is None

    shutil.rmtree(run)  # the first host's
    shutil.rmtree(store / "step-00000008")  # as if the last upload had not been finished
    again = train(sets, run, "optim.stop_at=12", "zero_stage=3", url=str(store))
    assert again.returncode == 0, again.output[-4000:]
    assert f"{other}/checkpoints/step-00000008, which is not whole at {store}" in again.output
    assert all(fault(folder / "checkpoints/step-00000004") is None for folder in (run, other))
    assert [row["step"] for row in read_metrics(run)] == list(range(5, 13))  # the rows of a lost disk are lost
    assert final_weights(run, 12) == final_weights(unbroken(3), 12)


def test_a_folder_that_machines_share_is_refused_at_the_start(sets: Sets, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run-elsewhere").symlink_to(tmp_path / "run")
    refused = train(sets, tmp_path / "run", url=str(tmp_path / "store"))
    assert refused.returncode == 2 and "is a folder of several machines: leave out checkpoint.host_local" in refused.errors[0]
    assert len(refused.errors) == 1 and not list((tmp_path / "run").glob(".own-*"))


def test_no_whole_checkpoint_at_the_end_is_a_failure(sets: Sets, tmp_path: Path) -> None:
    """The store refuses what is written last: with folders that hosts share, this costs a warning only."""
    store = tmp_path / "store"
    (store / "step-00000012" / "model.safetensors").mkdir(parents=True)
    ended = train(sets, tmp_path / "run", "optim.stop_at=12", url=str(store))
    assert ended.returncode == 1 and f"the checkpoint of step 12 did not reach {store}/step-00000012" in ended.errors[0]
