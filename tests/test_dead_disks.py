"""A file system whose server is gone is named, and nothing waits for it for ever: doctor, launch, and ranks that start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mmclip_launch import doctor, probe
from mmclip_launch.findings import PACKAGES
from mmclip_launch.hosts import LOCAL, Answer, Host, ask
from mmclip_launch.submit import job_of, submit_slurm

from mmclip_dist import train
from mmclip_dist.config import load_config
from mmclip_dist.errors import Mendable
from mmclip_dist.run import mounts
from tests.dead_mount import dead_mount
from tests.ranks import run_ranks

HERE = Host(LOCAL, 2)


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Path]:
    with dead_mount(tmp_path / "dead") as folder:
        yield folder


def mmclip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmclip_launch.cli", *words], capture_output=True, text=True, timeout=200
    )


def test_the_place_that_is_silent_is_named(dead: Path, tmp_path: Path) -> None:
    fine = [str(tmp_path), str(tmp_path / "not" / "there"), "s3://bucket/set", str(Path(__file__) / "below a file")]
    assert mounts.first_silent(fine, 60) is None
    assert mounts.first_silent([*fine, str(dead / "runs" / "one"), "/"], 2) == str(dead / "runs" / "one")


def test_doctor_names_a_dead_run_folder_and_a_dead_set_and_all_else_it_finds(dead: Path) -> None:
    run, data = dead / "runs" / "one", dead / "set" / "train"
    ran = mmclip("doctor", "--run-dir", str(run), "--data", str(data), "--json")
    found = {(each["level"], each["check"]): each["text"] for each in json.loads(ran.stdout)}
    assert ran.returncode == 1 and not ran.stderr, ran
    assert found["error", "run_dir"] == f"{run} cannot be written to: its file system does not answer within 10 s"
    assert found["error", "storage"].startswith(f"{data} cannot be read: it does not answer within 15 s")
    assert {"host", "open files", "versions"} <= {check for level, check in found if level == "ok"}, found
    assert {"all-reduce"} <= {check for level, check in found if level in ("ok", "warning")}, found


def test_a_run_folder_that_is_dead_here_alone_is_told(dead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine starts the run, and is none of its hosts, of which each has that folder."""
    monkeypatch.setattr(doctor, "MARK_S", 1.0)
    facts = probe.facts({"packages": [], "ours": [], "run_dir": "/tmp", "mark": None, "meets": None}) | {
        "packages": dict.fromkeys(PACKAGES)
    }
    monkeypatch.setattr(
        doctor, "run_everywhere", lambda hosts, *_, **__: {host.name: Answer(host, facts) for host in hosts}
    )
    found, _ = doctor.look([Host("a", 1)], dead / "run", by_ssh=True)
    (fault,) = [str(finding) for finding in found if finding.check == "run_dir"]
    assert fault.startswith(f"error: run_dir: {LOCAL}: {dead / 'run'}: its file system does not answer within 1 s: "), (
        fault
    )


def test_launch_starts_nothing_on_a_dead_run_folder(dead: Path, sets: Any) -> None:
    words = [word for word in sets.overrides("unused") if not word.startswith("run_dir=")]
    ran = mmclip("launch", "deepspeed", "quickstart", f"run_dir={dead / 'run'}", *words)
    assert ran.returncode == 2 and "nothing was started: 1 fault" in ran.stderr, ran
    assert (
        f"error: run_dir: {LOCAL}: {dead / 'run'} cannot be written to: its file system does not answer" in ran.stderr
    )


def test_slurm_gets_no_run_on_it(dead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "ANSWER_S", 1.0)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    words = [f"run_dir={dead / 'run'}", "data.sources=[{url: /a/train}]", "model.text.tokenizer=/tok", "loss.entity=0"]
    with pytest.raises(Mendable, match=f"{dead / 'run'}: its file system does not answer within 1 s"):
        submit_slurm(job_of("mmclip_vit_b16", words), nodes=1, gpus=1, dry=False)


def test_a_folder_of_temporary_files_on_it_hides_nothing(
    dead: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_FOLDER_S", 1.0)
    monkeypatch.setenv("TMPDIR", str(dead))
    folders = probe.look_at_folders(str(tmp_path), None)
    seen = folders["run_dir"]()
    assert seen and seen["path"] == str(tmp_path) and seen["fault"] is None and seen["free"] > 0
    assert folders["temporary"]() == {
        "path": str(dead),
        "fault": "its file system does not answer within 1 s",
        "seen": None,
    }


def training_soon(arguments: list[str]) -> int:
    mounts.ANSWER_S = 3.0
    return train.main(arguments)


def test_ranks_name_it_before_they_meet(dead: Path, sets: Any, tmp_path: Path) -> None:
    for words in (
        [*sets.overrides(dead / "run")],
        [*sets.overrides(tmp_path / "run"), f"evaluation.sets=[{dead / 'set'}]"],
    ):
        code, outputs = run_ranks(training_soon, ["quickstart", *words], ranks=2, folder=tmp_path, timeout=120)
        told = [line for line in "".join(outputs).splitlines() if line.startswith(("error:", "failed:"))]
        assert code == 2 and len(told) == 1 and "Traceback" not in "".join(outputs), outputs
        assert told[0].startswith(f"error: {dead}/") and "its file system does not answer within 3 s" in told[0]


def test_all_places_of_a_run_are_looked_at(sets: Any, dead: Path) -> None:
    config = load_config("quickstart", ["run_dir=/r", "data.sources=[{url: /a/train, entities: /a/e, attention: /a/t}, {url: s3://b/train}]",
                                        "model.text.tokenizer=/tok", "checkpoint.url=/copy", "checkpoint.start_from=/old",
                                        "evaluation.sets=[/e/test]", "data.reading.cache=/cache"])  # fmt: skip
    assert config.sets == ["/a/train", "/a/e", "/a/t", "s3://b/train"]
    assert {"/r", *config.sets, "/tok", "/copy", "/old", "/e/test", "/cache"} <= set(config.places)
    with pytest.raises(Mendable, match=f"{dead}/x: its file system does not answer within"):
        mounts.check_answering([*config.places, f"{dead}/x"])


# -- Processes that cannot be killed, as they wait for a disk -----------------------------------------------------------


def test_a_host_that_answers_and_does_not_end_is_not_waited_for() -> None:
    """Its pipes stay open: the other process has them."""
    began = time.monotonic()
    answer = ask(HERE, ["sh", "-c", "sleep 60 >&2 & echo MMCLIP-ANSWER 5; sleep 60"], "", 50)
    assert answer.value == 5 and time.monotonic() - began < 30


def test_one_that_cannot_be_killed_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: started.append(process.pid))
    began = time.monotonic()
    answer = ask(HERE, ["sleep", "60"], "x" * 10**6, 1)  # more than its pipe holds
    assert answer.fault == "no answer within 1 s" and time.monotonic() - began < 30
    os.kill(started[0], 9)
