"""A rank ends with its launcher: it is asked to stop at once, and ended if it does not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from mmclip_dist.run import orphans
from mmclip_dist.run.orphans import EXIT_CODE, OWNER, _alive
from tests.conftest import wait_for

RANK = """
import sys, time
from mmclip_dist.run import orphans
orphans.ORPHAN_S = float(sys.argv[1])
orphans.exit_with_launcher(lambda reason: print(reason, flush=True), interval_s=0.05)
print("watching", flush=True)
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.run(sys.argv[1:])"

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a process whose output goes to `out`; all of them are killed afterwards."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*command: str, owner: int | None = None) -> subprocess.Popen[bytes]:
        env = {name: value for name, value in os.environ.items() if name != OWNER} | ({OWNER: str(owner)} if owner else {})
        with (tmp_path / "out").open("ab") as output:
            process = subprocess.Popen([sys.executable, *command], stdout=output, env=env)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def output(tmp_path: Path) -> list[str]:
    return (tmp_path / "out").read_text().splitlines()


def test_a_job_that_dies_takes_its_ranks_along(start: Start, tmp_path: Path) -> None:
    owner = start("-c", "import time; time.sleep(60)")
    rank = start("-c", RANK, "0.2", owner=owner.pid)
    wait_for(lambda: output(tmp_path) == ["watching"])
    time.sleep(0.3)
    assert rank.poll() is None
    owner.kill()  # not waited for: a zombie is gone, too
    assert rank.wait(timeout=20) == EXIT_CODE
    assert output(tmp_path) == ["watching", "its launcher is gone"]


def test_a_rank_has_time_to_save(start: Start, tmp_path: Path) -> None:
    owner = start("-c", "import time; time.sleep(60)")
    rank = start("-c", RANK, "60", owner=owner.pid)
    wait_for(lambda: output(tmp_path) == ["watching"])
    owner.kill()
    owner.wait()
    wait_for(lambda: output(tmp_path) == ["watching", "its launcher is gone"])
    time.sleep(0.3)
    assert rank.poll() is None


def test_a_launcher_is_known_by_its_name(start: Start, tmp_path: Path) -> None:
    """The process that ran `deepspeed`, or one of its modules, and no other ancestor."""
    for name in ("deepspeed", "shell"):
        (tmp_path / name).write_text(LAUNCHER)
        launcher = start(str(tmp_path / name), sys.executable, "-c", RANK, "0.2")
        before = output(tmp_path).count("watching")
        wait_for(lambda before=before: output(tmp_path).count("watching") == before + 1)
        (rank,) = psutil.Process(launcher.pid).children()
        launcher.kill()
        launcher.wait()
        _, alive = psutil.wait_procs([rank], timeout=20 if name == "deepspeed" else 1)
        assert bool(alive) == (name != "deepspeed"), name
        for process in alive:
            process.kill()
    assert output(tmp_path).count("its launcher is gone") == 1


def test_a_job_that_is_gone_before_its_rank_starts_ends_it_at_once(start: Start, tmp_path: Path) -> None:
    owner = start("-c", "pass")
    owner.wait()
    assert start("-c", RANK, "60", owner=owner.pid).wait(timeout=20) == EXIT_CODE
    assert output(tmp_path) == []


def test_a_process_that_ends_while_it_is_looked_at_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    process = psutil.Process()
    assert _alive(process)

    def gone(self: psutil.Process) -> str:
        raise psutil.NoSuchProcess(self.pid)

    monkeypatch.setattr(psutil.Process, "status", gone)
    assert not _alive(process)


def test_the_next_run_waits_longer_than_an_orphan_may_take() -> None:
    """Else a run that is started again right after a crash would be refused."""
    from inspect import signature

    from mmclip_dist.run.folder import locked

    assert signature(locked).parameters["wait_s"].default > orphans.ORPHAN_S
