"""The whole job, small: every stage through the commands that users type, and what happens when it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from mmclip_launch.quickstart import Job, Synthetic, control_steps, quickstart

from mmclip_dist.checkpoint.folder import checkpoint_path, newest_checkpoint
from mmclip_dist.config import load_config
from mmclip_dist.run.metrics import read_metrics
from tests.conftest import TINY, TRAIN, wait_for

pytestmark = pytest.mark.slow

QUICK = (*TINY, *TRAIN, "optim.stop_at=6")
SMALL = Synthetic(paired=120, unpaired=30, size=40)
SCRIPT = """
import json, sys
from pathlib import Path
from mmclip_launch.quickstart import Job, Synthetic, quickstart
out, overrides, drawn = sys.argv[1], *map(json.loads, sys.argv[2:])
quickstart(Job(Path(out), overrides=tuple(overrides), synthetic=Synthetic(**drawn)))
"""
STAGES = ["pack", "tokenizer", "entities", "warmup", "attention", "train", "control", "evaluate", "report"]


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
    control = summary["control"]
    assert control["steps"] > 6 and control["processor_s"] > 0 and 0 <= control["zero_shot"]["auc_macro"] <= 1
    rows = read_metrics(whole_job / "control")
    assert rows[0]["step"] > 6 and all(set(row["loss"]) == {"contrastive"} for row in rows)
    page = Path(summary["report"]).read_text()
    assert f"same processor time: {control['steps']} steps" in page and f"{control['zero_shot']['auc_macro']:.3f}" in page
    assert "<svg" in page and "Cardiomegaly" in page
    rows = read_metrics(whole_job / "train")
    assert rows[0]["step"] == 8 and rows[-1]["step"] == 12  # it went on where the warm-up stopped
    assert newest_checkpoint(whole_job / "warmup") == checkpoint_path(whole_job / "warmup", 6)


def test_run_again_it_skips_what_is_done(whole_job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole_job.rglob("*.tar")}
    found = numbers(whole_job)
    quickstart(Job(whole_job, overrides=QUICK, synthetic=SMALL))
    assert capsys.readouterr().out.count("skipped") == 8
    assert numbers(whole_job) == found and {p: p.stat().st_mtime_ns for p in whole_job.rglob("*.tar")} == before


def killed_when(out: Path, reached: Callable[[list[str]], bool]) -> None:
    """Start the job, kill it as soon as reached(finished stages), and run it to its end; nothing of it may be left."""
    command = [sys.executable, "-c", SCRIPT, str(out), json.dumps(QUICK), json.dumps(asdict(SMALL))]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: reached(finished(out)) or job.poll() is not None, 240)
    assert job.poll() is None, "the job ended before it could be killed"
    children = psutil.Process(job.pid).children(recursive=True)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    _, alive = psutil.wait_procs(children, timeout=60)  # Ray's agents look for their node now and then
    assert not alive


def finished(out: Path) -> list[str]:
    state = out / "quickstart.json"
    return [stage["name"] for stage in json.loads(state.read_text())["stages"]] if state.exists() else []


def copy_without(whole_job: Path, out: Path, stages: Collection[str], files: Collection[str]) -> None:
    """A copy of the finished job in which some stages never were, nor what they wrote."""
    shutil.copytree(whole_job, out, ignore=shutil.ignore_patterns("summary.json", *files))
    state = json.loads((out / "quickstart.json").read_text())
    state["stages"] = [stage for stage in state["stages"] if stage["name"] not in stages]
    (out / "quickstart.json").write_text(json.dumps(state))


def test_killed_in_a_ray_stage_it_makes_the_same_sidecars(whole_job: Path, tmp_path: Path) -> None:
    """What the later stages are made of is then the same to the byte; they are not run again here."""
    out, sidecars = tmp_path / "start", Path("sidecars") / "entities"
    copy_without(whole_job, out, {"entities"}, {"entities", "entities.log"})
    killed_when(out, lambda done: (out / "logs" / "entities.log").exists())
    made, meant = (
        {path.relative_to(folder): path.read_bytes() for path in (folder / sidecars).rglob("*") if path.is_file()}
        for folder in (out, whole_job)
    )
    assert made == meant and len(meant) >= 3
    assert finished(out)[-1] == "entities" and numbers(out) == numbers(whole_job)


def test_killed_in_training_it_ends_the_same(whole_job: Path, tmp_path: Path) -> None:
    """From a copy of the finished job in which training and what is made of it never were. The control, made of the warm-up, is
    there."""
    out = tmp_path / "start"
    written = {"train.log", "zeroshot.json", "control.json", "report.html"}
    copy_without(whole_job, out, {"train", "evaluate", "report"}, written)
    shutil.rmtree(out / "train")
    killed_when(out, lambda done: len(read_metrics(out / "train")) > 0)
    assert numbers(out) == numbers(whole_job)
    assert control_steps(Job(out, overrides=QUICK, synthetic=SMALL)) > 6  # by the time of both parts of the training


def test_another_configuration_is_refused(whole_job: Path) -> None:
    with pytest.raises(ValueError, match="another configuration"):
        quickstart(Job(whole_job, overrides=(*QUICK, "seed=7"), synthetic=SMALL))


def test_a_folder_that_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="no quick start made it"):
        quickstart(Job(tmp_path, overrides=QUICK, synthetic=SMALL))
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_quickstart_recipe_is_the_documented_one() -> None:
    config = load_config("quickstart")
    assert config.optim.stop_at is not None and config.optim.stop_at < config.optim.steps
    assert config.optim.stop_at % config.checkpoint.every == 0 or config.optim.last_step == config.optim.stop_at
