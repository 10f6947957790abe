"""Training through the `deepspeed` launcher: resume, ranks, ZeRO stages, bad input, and a killed launcher."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from mmclip_launch.deepspeed_command import accelerator_environment, train_command
from mmclip_launch.processes import environment
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader, iterate
from mmclip_shards.writer import ShardWriter
from safetensors.torch import load_file

from mmclip_dist import train
from mmclip_dist.checkpoint.folder import checkpoint_path, read_meta
from mmclip_dist.checkpoint.model_files import load_model
from mmclip_dist.data.seen import SEEN, Seen, load_seen
from mmclip_dist.evaluate.zeroshot import zero_shot
from mmclip_dist.run.metrics import EVALUATIONS, read_metrics
from tests.conftest import LONG, STEPS, TRAIN, wait_for
from tests.launched import final_weights, last_step, launch_training, losses, run_training
from tests.ranks import Ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run; tests/test_end_to_end.py and tests/test_broken_runs.py have runs under the real launcher."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    run_training([*sets.overrides(run), *TRAIN], run.with_name("ranks"))
    return run


def test_resume_equals_no_interruption_bit_for_bit(sets, finished: Path, tmp_path: Path) -> None:
    """The run's newest checkpoints are gone, as after a crash; it goes on from an older one and ends the same."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for step in (8, 12):
        shutil.rmtree(checkpoint_path(run, step))
    (run / "checkpoints" / ".step-00000008.writing").mkdir()  # and a save was torn
    run_training([*sets.overrides(run), *TRAIN], tmp_path)
    assert final_weights(run) == final_weights(finished)
    assert losses(run) == losses(finished)


@pytest.mark.timeout(3600)
def test_killed_again_and_again_it_ends_in_the_same_weights(sets, unbroken: Callable[[int], Path], tmp_path: Path) -> None:
    """SIGKILL of all ranks at random steps; MMCLIP_KILLS sets how often (20 were tried, see RESULTS.md)."""
    kills, run, whole = int(os.environ.get("MMCLIP_KILLS", "1")), tmp_path / "run", unbroken(1)
    overrides = [*sets.overrides(run), *LONG]
    for step in sorted(random.Random(kills).sample(range(2, STEPS), kills)):
        job = Ranks(train.main, [["quickstart", *overrides]], ranks=2, folder=tmp_path / "logs")
        wait_for(lambda job=job, step=step: job.poll() is not None or last_step(run) >= step)
        job.kill()
        assert last_step(run) >= step
    run_training(overrides, tmp_path / "logs")
    assert final_weights(run, STEPS) == final_weights(whole, STEPS)
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("ranks", [1, 3])
def test_two_ranks_equal_one_and_three_with_uneven_shares(sets, finished: Path, tmp_path: Path, ranks: int) -> None:
    """Of the 8 samples of a batch three ranks take 3, 3 and 2."""
    run = tmp_path / "run"
    run_training([*sets.overrides(run), *TRAIN], tmp_path, ranks=ranks)
    for ours, theirs in zip(losses(run), losses(finished), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4), (ours, theirs)


def test_loss_curves_of_both_kernels_are_the_same(sets, finished: Path, tmp_path: Path) -> None:
    """loss.impl=triton, interpreted where there is no card: 12 steps at a high learning rate, which would amplify any error."""
    run = tmp_path / "run"
    found = run_training([*sets.overrides(run), *TRAIN, "loss.impl=triton"], tmp_path)
    assert found.output.count("kernels: triton on") == 1
    for ours, theirs in zip(losses(run), losses(finished), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3), (ours, theirs)


def test_triton_kernels_without_a_card_are_refused(sets, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    found = run_training([*sets.overrides(tmp_path), *TRAIN, "loss.impl=triton"], tmp_path, check=False, TRITON_INTERPRET="0")
    (line,) = found.errors
    assert found.returncode == 2 and "impl='triton' needs CUDA tensors" in line


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("deepspeed*"))


def test_training_on_cpus_compiles_nothing_and_leaves_no_shared_memory(sets, tmp_path: Path) -> None:
    """A lock left by a killed compilation of DeepSpeed's CPU op made every later run wait without end."""
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    before = shared_memory()
    run_training([*sets.overrides(tmp_path / "run"), *TRAIN, "optim.stop_at=4"], tmp_path, TORCH_EXTENSIONS_DIR=str(extensions))
    assert not list(extensions.iterdir())
    assert shared_memory() == before


def test_zero3_trains_alike_and_writes_the_average(sets, finished: Path, tmp_path: Path) -> None:
    """The unbroken run is of stage 1; tests/engine/test_optimizer.py has every stage against plain torch."""
    run = tmp_path / "run"
    run_training([*sets.overrides(run), *TRAIN, "zero_stage=3", "optim.ema=0.9", "optim.stop_at=4"], tmp_path)
    assert [row["step"] for row in losses(run)] == [1, 2, 4]
    for ours, theirs in zip(losses(run), losses(finished)[:3], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    (last, *_), (average, *_) = (load_model(checkpoint_path(run, 4), average=which) for which in (False, True))
    assert not torch.equal(last.image_head.weight, average.image_head.weight)
    with pytest.raises(ValueError, match=r"train with optim\.ema"):
        load_model(checkpoint_path(finished, 4), average=True)


def test_evaluation_during_training_is_that_of_the_checkpoint(sets, tmp_path: Path) -> None:
    """On two ranks of ZeRO-3, of which the second has no batch of its own, and of the averaged weights."""
    run = tmp_path / "run"
    evaluation = [f"evaluation={{sets: [{sets.test}], every: 3}}", "checkpoint.keep_best=1", "checkpoint.keep=1"]
    run_training([*sets.overrides(run), *TRAIN, *evaluation, "zero_stage=3", "optim.ema=0.5", "optim.stop_at=8"], tmp_path)
    rows = read_metrics(run, EVALUATIONS)
    assert [row["step"] for row in rows] == [3, 6, 8]
    alone = zero_shot(str(checkpoint_path(run, 8)), [sets.test], average=True)
    assert rows[-1]["auc"] == pytest.approx({"macro": alone.auc_macro, **alone.per_class}, abs=1e-9)
    assert read_meta(checkpoint_path(run, 8)).score == rows[-1]["auc"]["macro"]
    seen = load_seen(checkpoint_path(run, 8) / SEEN)  # the two ranks read a share of the shards each
    whole = Seen.of([ShardReader(url, load_manifest(url)) for url in (sets.paired, sets.unpaired)])
    assert seen.common(whole) == (len(whole.patients), len(whole.images)) == (len(seen.patients), len(seen.images))
    assert seen.datasets == ("synthetic", "synthetic-unpaired") and seen.unknown == () and len(seen.patients) > 20


def test_split_mode_trains_in_bf16(sets, tmp_path: Path) -> None:
    """It learns, and at the first steps its losses are those of float32 to the precision of bf16."""
    curves = {}
    for precision in ("bf16", "fp32"):
        run = tmp_path / precision
        options = ["attmim.mode=split", f"precision={precision}", "optim.lr=0.01", "log_every=1"]
        run_training([*sets.overrides(run), *TRAIN, *options], tmp_path / f"{precision}-logs")
        curves[precision] = losses(run)
    assert [row["step"] for row in curves["bf16"]] == list(range(1, 13))
    for ours, theirs in zip(curves["bf16"][:2], curves["fp32"][:2], strict=True):
        assert ours == pytest.approx(theirs, rel=0.03)  # a NaN is near to nothing
    last, first = curves["bf16"][-1], curves["bf16"][0]
    assert set(last) == {"step", "contrastive", "image", "entity"}
    assert sum(last.values()) - last["step"] < sum(first.values()) - first["step"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=0.2"], "another configuration (differs in optim.lr, which would change"),
        (["model.image.dept=3"], "did you mean model.image.depth"),
        (["data.streams=3"], "optim.global_batch=8 is no multiple of data.streams=3"),
        (["evaluation.sets=[TRAINED]"], "was trained on"),
        (["data.streams=512", "optim.global_batch=512"], "samples cannot fill data.streams=512"),
        (["data.sources=[{url: /nowhere, entities: /nowhere}]"], "/nowhere"),
        (["checkpoint.start_from=FINISHED"], "is of step 12, and this run ends at step 12: nothing would be trained"),
    ],
)
def test_bad_input_is_one_line_and_code_2(sets, finished: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    overrides = [override.replace("TRAINED", sets.paired).replace("FINISHED", str(finished)) for override in overrides]
    run = tmp_path / "run" if any("start_from" in override for override in overrides) else finished
    found = run_training([*sets.overrides(run), *TRAIN, *overrides], tmp_path, check=False)
    assert found.returncode == 2, found.output[-2000:]
    assert len(found.errors) == 1 and message in found.errors[0], found.errors
    assert "Traceback" not in found.output


def test_bad_input_under_the_launcher_is_one_line_and_code_2(sets, tmp_path: Path) -> None:
    """The outermost launcher passes the code on, and only one rank speaks."""
    found = launch_training([*sets.overrides(tmp_path), "model.image.dept=3"], check=False)
    assert found.returncode == 2 and "Traceback" not in found.output, found.output[-2000:]
    assert len(found.errors) == 1 and "did you mean model.image.depth" in found.errors[0], found.errors


def test_a_finished_run_started_again_says_so_and_changes_nothing(sets, finished: Path, tmp_path: Path) -> None:
    before = final_weights(finished)
    found = run_training([*sets.overrides(finished), *TRAIN], tmp_path)
    assert "nothing left to train: step 12 of 12 is done" in found.output and final_weights(finished) == before


def test_after_running_out_of_memory_a_run_goes_on_with_the_readmes_remedies(sets, finished: Path, tmp_path: Path) -> None:
    """Smaller parts, recomputed activations, another stage, offload, more loader processes: up to rounding the same weights."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for step in (8, 12):
        shutil.rmtree(checkpoint_path(run, step))
    remedies = [
        "optim.micro_batch=2", "model.checkpoint_activations=true", "zero_stage=2", "offload.optimizer=cpu", "data.workers=1",
        "log_every=1", "checkpoint.every=6", "health.window=20",
    ]  # fmt: skip
    output = run_training([*sets.overrides(run), *TRAIN, *remedies], tmp_path).output
    assert "going on from step 4 of 12" in output and "is deprecated" not in output
    (row,) = read_metrics(run, "changes.jsonl")
    assert row["after_step"] == 12 and row["changed"]["optim.micro_batch"] == [None, 2] and "run_dir" in row["changed"]
    for ours, theirs in zip(losses(run)[-1:], losses(finished)[-1:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    ours, theirs = (load_file(checkpoint_path(folder, 12) / "model.safetensors") for folder in (run, finished))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_too_many_undecodable_samples_stop_the_run_and_are_listed(sets, tmp_path: Path) -> None:
    manifest = load_manifest(sets.paired)
    spoiled = str(tmp_path / "spoiled")
    samples = {key: {"png": b"no image", "json": members["json"]} if number % 4 == 0 else members
               for number, (key, members) in enumerate(iterate(sets.paired))}  # fmt: skip
    with ShardWriter(
        spoiled, kind="base", dataset="d", split="train", config_hash="c", labels=manifest.labels
    ) as writer:
        for key, members in samples.items():
            writer.add(key, members)
    run = tmp_path / "run"
    overrides = [*sets.overrides(run), *TRAIN, f"data.sources=[{{url: {spoiled}}}]", "loss.entity=0"]
    found = run_training(overrides, tmp_path, check=False)
    assert found.returncode == 2, found.output[-2000:]
    (line,) = found.errors
    assert "could not be decoded" in line and "quarantine" in line
    listed = [
        json.loads(row)["key"] for path in run.glob("quarantine-*.jsonl") for row in path.read_text().splitlines()
    ]
    assert listed and all(samples[key]["png"] == b"no image" for key in listed)


def test_ranks_die_with_their_launcher(sets, tmp_path: Path) -> None:
    """SIGKILL of the launcher leaves no rank behind that would go on writing."""
    run = tmp_path / "run"
    command = train_command("quickstart", [*sets.overrides(run), "optim.steps=100000", "log_every=1"], 2)
    launcher = subprocess.Popen(
        command, env=environment(accelerator_environment()), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(read_metrics(run)) >= 2)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    assert len(ranks) >= 3
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=15)
    assert not alive
