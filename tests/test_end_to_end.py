"""The whole job, small: every stage through the commands that users type, and what happens when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mmclip_launch.deepspeed_command import accelerator_environment, train_command
from mmclip_launch.processes import environment
from mmclip_launch.quickstart import Job, Synthetic, quickstart
from safetensors.torch import load_file

from mmclip_dist.config import load_config
from mmclip_dist.engine.checkpoint import checkpoint_path, newest_checkpoint
from mmclip_dist.engine.run import read_metrics
from tests.conftest import TINY

pytestmark = pytest.mark.slow

TRAIN = ("optim.steps=12", "checkpoint.every=4", "log_every=2", "optim.lr=0.1", "checkpoint.keep=5")


def run_training(overrides: list[str], ranks: int = 2, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = environment(accelerator_environment())
    found = subprocess.run(
        train_command("quickstart", overrides, ranks), env=env, capture_output=True, text=True, timeout=240
    )
    assert not check or found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found


def final_weights(run: Path, step: int = 12) -> dict[str, bytes]:
    weights = load_file(checkpoint_path(run, step) / "model.safetensors")
    return {name: value.numpy().tobytes() for name, value in weights.items()}


@pytest.fixture(scope="module")
def unbroken(sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    run_training([*sets.overrides(run), *TRAIN])
    return run


def losses(run: Path) -> list[dict]:
    return [{"step": row["step"], **row["loss"]} for row in read_metrics(run)]


def test_resume_equals_no_interruption_bit_for_bit(sets, unbroken: Path, tmp_path: Path) -> None:
    """The run's newest checkpoints are gone, as after a crash; it goes on from an older one and ends the same."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    (run / "config.yaml").write_text((unbroken / "config.yaml").read_text().replace(str(unbroken), str(run)))
    for step in (8, 12):
        shutil.rmtree(checkpoint_path(run, step))
    (run / "checkpoints" / ".step-00000008.writing").mkdir()  # and a save was torn
    run_training([*sets.overrides(run), *TRAIN])
    assert final_weights(run) == final_weights(unbroken)
    assert losses(run) == losses(unbroken)


def test_two_ranks_equal_one(sets, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training([*sets.overrides(run), *TRAIN], ranks=1)
    for ours, theirs in zip(losses(run), losses(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4), (ours, theirs)


@pytest.mark.parametrize("overrides", [("zero_stage=2",), ("zero_stage=0",)])
def test_zero_stages_train_alike(sets, unbroken: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    run_training([*sets.overrides(run), *TRAIN, *overrides, "optim.stop_at=4"])
    for ours, theirs in zip(losses(run), losses(unbroken), strict=False):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_split_mode_trains_in_bf16(sets, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_training([*sets.overrides(run), *TRAIN, "attmim.mode=split", "precision=bf16", "optim.stop_at=4"])
    assert [row["step"] for row in losses(run)] == [1, 2, 4]
    assert set(losses(run)[-1]) == {"step", "contrastive", "image", "entity"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=0.2"], "another configuration (differs in lr)"),
        (["model.image.dept=3"], "did you mean model.image.depth"),
        (["data.streams=3"], "does not divide over 2 ranks"),
        (["data.streams=512", "optim.global_batch=512"], "samples cannot fill data.streams=512"),
        (["data.sources=[{url: /nowhere, entities: /nowhere}]"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_code_2(sets, unbroken: Path, overrides: list[str], message: str) -> None:
    found = run_training([*sets.overrides(unbroken), *TRAIN, *overrides], check=False)
    assert found.returncode == 2, found.stderr[-2000:]
    lines = [line for line in (found.stdout + found.stderr).splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0], lines
    assert "Traceback" not in found.stderr and "Traceback" not in found.stdout


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


def wait_for(condition, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


QUICK = (*TINY, *TRAIN, "optim.stop_at=6")
SMALL = Synthetic(paired=120, unpaired=30, size=40)
SCRIPT = """
import sys
from pathlib import Path
from mmclip_launch.quickstart import Job, quickstart
from tests.test_end_to_end import QUICK, SMALL
quickstart(Job(Path(sys.argv[1]), overrides=QUICK, synthetic=SMALL))
"""
STAGES = ["pack", "tokenizer", "entities", "warmup", "attention", "train", "evaluate", "report"]


@pytest.fixture(scope="module")
def whole_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quick") / "start"
    quickstart(Job(out, overrides=QUICK, synthetic=SMALL))
    return out


def numbers(out: Path) -> dict:
    summary = json.loads((out / "summary.json").read_text())
    return {key: summary[key] for key in ("samples", "world_size", "zero_stage", "loss", "zero_shot")}


def test_the_summary_says_what_happened(whole_job: Path) -> None:
    summary = json.loads((whole_job / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == STAGES
    assert all(stage["seconds"] >= 0 for stage in summary["stages"])
    assert summary["samples"] == 12 * 8 and summary["world_size"] == 2 and summary["zero_stage"] == 1
    assert set(summary["loss"]) == {"contrastive", "image", "entity"}
    shot = summary["zero_shot"]
    assert len(shot["per_class"]) >= 4 and all(0 <= auc <= 1 for auc in shot["per_class"].values())
    assert shot["auc_macro"] == pytest.approx(sum(shot["per_class"].values()) / len(shot["per_class"]))
    assert shot["auc_macro_ci95"][0] <= shot["auc_macro"] <= shot["auc_macro_ci95"][1]
    page = Path(summary["report"]).read_text()
    assert "<svg" in page and "Cardiomegaly" in page
    rows = read_metrics(whole_job / "train")
    assert rows[0]["step"] == 8 and rows[-1]["step"] == 12  # it went on where the warm-up stopped
    assert newest_checkpoint(whole_job / "warmup") == checkpoint_path(whole_job / "warmup", 6)


def test_run_again_it_skips_what_is_done(whole_job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole_job.rglob("*.tar")}
    found = numbers(whole_job)
    quickstart(Job(whole_job, overrides=QUICK, synthetic=SMALL))
    assert capsys.readouterr().out.count("skipped") == 7
    assert numbers(whole_job) == found and {p: p.stat().st_mtime_ns for p in whole_job.rglob("*.tar")} == before


def test_another_configuration_is_refused(whole_job: Path) -> None:
    with pytest.raises(ValueError, match="another configuration"):
        quickstart(Job(whole_job, overrides=(*QUICK, "seed=7"), synthetic=SMALL))


def test_a_folder_that_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="no quick start made it"):
        quickstart(Job(tmp_path, overrides=QUICK, synthetic=SMALL))
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.tex"]


@pytest.mark.parametrize("seconds_into", ["entities", "train"])
def test_killed_and_started_again_it_ends_the_same(whole_job: Path, tmp_path: Path, seconds_into: str) -> None:
    """SIGKILL of the whole job in the middle of a Ray stage and of training; started again at once."""
    out = tmp_path / "start"
    command = [sys.executable, "-c", SCRIPT, str(out)]
    cwd = Path(__file__).resolve().parents[1]
    job = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = STAGES[STAGES.index(seconds_into) - 1]

    def reached() -> bool:
        state = out / "quickstart.json"
        done = [stage["name"] for stage in json.loads(state.read_text())["stages"]] if state.exists() else []
        return before in done and (seconds_into != "train" or len(read_metrics(out / "train")) > 0)

    wait_for(reached, 240)
    time.sleep(0 if seconds_into == "train" else 4)
    children = psutil.Process(job.pid).children(recursive=True)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    again = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert numbers(out) == numbers(whole_job)
    assert not [process for process in children if process.is_running()]


def test_quickstart_recipe_is_the_documented_one() -> None:
    config = load_config("quickstart")
    assert config.optim.stop_at is not None and config.optim.stop_at < config.optim.steps
    assert config.optim.stop_at % config.checkpoint.every == 0 or config.optim.last_step == config.optim.stop_at
