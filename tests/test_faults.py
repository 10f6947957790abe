"""Faults of one rank: its error is told once, the whole job ends soon, and nothing that was saved is lost."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import psutil
import pytest

from mmclip_dist.checkpoint.folder import checkpoint_path, fault
from tests.conftest import LONG
from tests.launched import final_weights
from tests.struck import Job

pytestmark = pytest.mark.slow

OUTLIVED_S = 20  # less than the launcher waits for a process that outlives SIGTERM; 5 s on an idle machine


@pytest.mark.parametrize(
    ("fault", "workers", "launched", "code", "told"),
    [
        ("damaged shard", 0, False, 2, "error: rank 1 on {host}: shard 7 is damaged: copy it again"),
        ("damaged shard", 1, True, 2, "error: rank 1 on {host}: shard 7 is damaged: copy it again"),
        ("store down", 1, False, 1, "failed: rank 1 on {host}: no answer from the store for 120 s"),
        ("bug", 0, False, 1, "failed: rank 1 on {host}: KeyError: 'gone'"),
    ],
)
def test_the_error_of_any_rank_is_told_once_with_rank_and_host(
    sets, tmp_path: Path, fault: str, workers: int, launched: bool, code: int, told: str
) -> None:
    run = tmp_path / "run"
    job = Job(run, [*sets.overrides(run), *LONG, f"data.workers={workers}"], fault, launched=launched)
    assert job.wait() == code, job.log[-3000:]
    assert job.errors == [told.format(host=socket.gethostname())], job.log[-3000:]
    assert ("Traceback" in job.log) == (fault == "bug"), job.log[-3000:]


@pytest.mark.parametrize("fault", ["out of memory", "out of memory, others deaf"])
def test_a_job_with_loader_processes_ends_within_seconds_of_an_uncaught_exception(sets, tmp_path: Path, fault: str) -> None:
    """The launcher gives processes that outlive SIGTERM half a minute, and they give themselves a whole one."""
    run = tmp_path / "run"
    job = Job(run, [*sets.overrides(run), *LONG, "data.workers=2"], fault, launched=True)
    job.until("struck")
    family = job.family
    assert job.wait() == 1, job.log[-3000:]
    took = time.time() - (run / "struck").stat().st_mtime
    assert took < OUTLIVED_S and not psutil.wait_procs(family, timeout=OUTLIVED_S - took)[1], f"{took:.1f} s\n{job.log[-3000:]}"
    assert [line for line in job.errors if "OutOfMemoryError: CUDA out of memory" in line] == job.errors, job.log[-3000:]
    assert "Alarm clock" not in job.log


def test_a_full_disk_ends_the_run_and_loses_nothing(sets, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(run, [*sets.overrides(run), *LONG], "full disk")
    assert job.wait() == 2, job.log[-3000:]
    log, (line,) = job.log, job.errors
    assert "the checkpoint of step 8 could not be written: [Errno 27] File too large" in line
    assert f"{checkpoint_path(run, 4)} and those before it are untouched" in line and "Traceback" not in log
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert fault(checkpoint_path(run, 4)) is None


def test_an_infinite_loss_of_one_rank_skips_steps_on_both_and_ends_the_run(sets, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(run, [*sets.overrides(run), *LONG, "health.max_bad_steps=5"], "bad loss")
    assert job.wait() == 2, job.log[-3000:]
    log, (line,) = job.log, job.errors
    assert "not finite in 5 steps in a row, up to step 9" in line and "Traceback" not in log
    listed = [[json.loads(row) for row in (run / f"trouble-{rank}.jsonl").read_text().splitlines()] for rank in range(2)]
    for rows in listed:
        assert [row["step"] for row in rows] == [5, 6, 7, 8, 9] and all(len(row["keys"]) == 4 for row in rows)
    assert not {*listed[0][0]["keys"]} & {*listed[1][0]["keys"]}
    assert final_weights(run, 4) == final_weights(run, 8)
