"""Children never outlive us; commands name what they start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mmclip_launch.deepspeed_command import free_port, local_ranks, train_command
from mmclip_launch.processes import child, environment, last_lines
from mmclip_launch.ray_jobs import Cluster, run_jobs, submit_command

SLEEP = "import time; time.sleep(60)"
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); time.sleep(60)"


def test_a_child_and_its_children_end_with_the_block(tmp_path: Path) -> None:
    with child([sys.executable, "-c", PARENT], tmp_path / "log" / "out.log", environment()) as process:
        deadline = time.monotonic() + 20
        while not (family := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    _, alive = psutil.wait_procs([*family], timeout=10)
    assert not alive and process.poll() is not None
    assert (tmp_path / "log" / "out.log").read_text().startswith(f"$ {sys.executable} -c")


@pytest.mark.slow
def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    with child([sys.executable, "-c", deaf], tmp_path / "out.log", environment()) as process:
        while "deaf\n" not in last_lines(tmp_path / "out.log") + "\n":
            time.sleep(0.02)
    assert process.poll() == -9


def test_a_child_dies_with_us(tmp_path: Path) -> None:
    """Even of SIGKILL, which leaves us no time to end it."""
    script = (
        "import sys, time; from pathlib import Path; from mmclip_launch.processes import child, environment\n"
        "with child([sys.executable, '-c', 'import time; time.sleep(60)'], Path(sys.argv[1]), environment()) as process:\n"
        "    print(process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    grandchild = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([grandchild], timeout=10)
    assert not alive


def test_commands_of_this_environment_come_first() -> None:
    found = environment({"MORE": "1"})
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent) and found["MORE"] == "1"


def test_the_training_command_has_its_own_port_and_the_overrides_last() -> None:
    command = train_command("quickstart", ["a=1", "b=2"], 2)
    assert command[:3] == ["deepspeed", "--num_accelerators", "2"]
    assert command[-5:] == ["--module", "mmclip_dist.train", "quickstart", "a=1", "b=2"]
    assert 1024 < int(command[command.index("--master_port") + 1]) < 65536
    assert free_port() != free_port()


def test_ranks_divide_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_ranks(64) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert local_ranks(64) == 4 and local_ranks(60) == 6 and local_ranks(7) == 1


def test_a_failed_ray_job_is_named_with_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmclip_launch.ray_jobs.submit_command", lambda address, job: [*job])
    cluster, polls = Cluster("http://nowhere", environment()), []
    jobs = [[sys.executable, "-c", "pass"], [sys.executable, "-c", "import sys; print('no such set'); sys.exit(3)"]]
    with pytest.raises(OSError, match=r"sys.exit\(3\)'` failed; the end of .*\n(.*\n)*no such set"):
        run_jobs(cluster, jobs, tmp_path / "jobs.log", lambda: polls.append(1))
    run_jobs(cluster, jobs[:1], tmp_path / "good.log", lambda: polls.append(1))
    assert polls


def test_jobs_are_submitted_to_the_given_cluster() -> None:
    command = submit_command("http://a:1", ["mmclip", "x"])
    assert command == ["ray", "job", "submit", "--address", "http://a:1", "--", "mmclip", "x"]
