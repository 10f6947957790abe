"""Runs that are killed, preempted and resumed, on the same and on other numbers of ranks: they end as an unbroken one.

MMCLIP_FAULTS=all tries every fault at every ZeRO stage; the quick round tries each fault once, and each stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mmclip_dist.checkpoint.folder import checkpoint_path, checkpoints_of, fault
from mmclip_dist.run.stop import STOPPED
from tests.conftest import LONG, STEPS
from tests.launched import final_weights, last_step, losses, run_training
from tests.struck import ALL, break_run

pytestmark = pytest.mark.slow

QUICK = {1: ("stop SIGTERM", "kill in save"), 2: ("kill rank", "stop in evaluation"), 3: ("kill launcher",)}
EVERY = ("stop SIGTERM", "kill in save", "kill rank", "stop in evaluation", "kill launcher", "stop file", "stop SIGUSR1")


@pytest.fixture(params=[1, 2, 3])
def whole(request: pytest.FixtureRequest, unbroken: Callable[[int], Path]) -> tuple[int, Path]:
    """A ZeRO stage, and an unbroken run."""
    return request.param, unbroken(request.param)


@pytest.mark.timeout(1200)
def test_a_broken_run_ends_in_the_weights_of_an_unbroken_one(sets, whole: tuple[int, Path], tmp_path: Path) -> None:
    stage, reference = whole
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    saving = {1: "checkpoint.keep=2", 2: "checkpoint.asynchronous=true", 3: f"checkpoint.url={mirror}"}[stage]
    evaluation = f"evaluation={{sets: [{sets.test}], every: 10}}"  # which changes no weight
    overrides = [*sets.overrides(run), *LONG, f"zero_stage={stage}", saving, evaluation]
    for fault_kind in EVERY if ALL else QUICK[stage]:
        if last_step(run) > STEPS - 10:
            shutil.rmtree(run)
            shutil.rmtree(mirror, ignore_errors=True)
        break_run(fault_kind, run, overrides)
    newest = checkpoints_of(run)[-1]
    if stage == 3:  # the machine is gone, and its disk with it
        shutil.rmtree(run)
    told = run_training(overrides, tmp_path / "ranks").output
    assert "torn" not in told and (stage != 3 or f"going on from a copy of {mirror}: {newest}" in told)
    assert final_weights(run, STEPS) == final_weights(reference, STEPS)
    ours = losses(run)
    assert ours == losses(reference)[-len(ours) :] and (stage == 3 or len(ours) == STEPS)
    assert all(fault(path) is None for path in checkpoints_of(run))
    assert not (run / STOPPED).exists()


@pytest.mark.timeout(600)
def test_2_ranks_then_1_then_4(sets, whole: tuple[int, Path], tmp_path: Path) -> None:
    """The newest checkpoint is torn, besides, and passed over."""
    stage, reference = whole
    if stage == 1 and not ALL:
        pytest.skip("as stage 2; MMCLIP_FAULTS=all tries it")
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    overrides = [*sets.overrides(run), *LONG, f"zero_stage={stage}", "data.workers=1"]
    done: list[dict] = []
    for ranks, before, at in ((1, 2, STEPS - 12), (4, 1, STEPS - 8)):
        for path in checkpoints_of(run):
            if path > checkpoint_path(run, at + 4):
                shutil.rmtree(path)
        with (checkpoint_path(run, at + 4) / "meta.json").open("a") as handle:
            handle.write(" ")
        told = run_training(overrides, tmp_path / "ranks", ranks=ranks).output
        assert f"passing over {checkpoint_path(run, at + 4)}, which is torn: meta.json has" in told
        assert f"{checkpoint_path(run, at)} was written by {before} ranks" in told
        if ranks == 1:  # what was done before stays as it was, bit for bit
            assert losses(run)[:at] == losses(reference)[:at]
        else:  # and so does what one rank did
            assert losses(run)[:at] == done
        done = losses(run)[: at + 4]
    for ours, theirs in zip(losses(run), losses(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4), (ours, theirs)
    there = load_file(checkpoint_path(reference, STEPS) / "model.safetensors")
    for name, value in load_file(checkpoint_path(run, STEPS) / "model.safetensors").items():
        assert value.numpy() == pytest.approx(there[name].numpy(), rel=1e-3, abs=2e-4), name
