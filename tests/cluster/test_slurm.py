"""`mmclip launch slurm` on a Slurm of two nodes: the real daemons, on machines of their own."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster, ended
from tests.conftest import wait_for
from tests.launched import final_weights, last_step

pytestmark = pytest.mark.slow

HOSTS = ("host-a", "host-b")
STEPS = 16
CONF = """
ClusterName=here
SlurmctldHost=host-a
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
GresTypes=gpu
NodeName=host-a,host-b CPUs=2 RealMemory=1000 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES
"""
# A node's ranks are those of its GPUs. These are none, and the ranks run on the CPU.
GRES = "Name=gpu File=/dev/null\n"

Slurm = Callable[..., str]


@pytest.fixture(scope="module")
def slurm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Runs a command of Slurm on the first host -> what it says."""
    if absent := [tool for tool in ("slurmctld", "slurmd", "munged") if not shutil.which(tool)]:
        why = f"launching through Slurm is NOT TESTED: no {', '.join(absent)} (Debian's slurm-wlm and munge)"
        warnings.warn(why, stacklevel=1)
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("etc", "state", *HOSTS):
        (folder / name).mkdir()
    (folder / "etc" / "slurm.conf").write_text(CONF.format(folder=folder))
    (folder / "etc" / "gres.conf").write_text(GRES)
    (folder / "key").write_bytes(secrets.token_bytes(64))
    (folder / "key").chmod(0o600)

    def on(host: str, *words: str) -> str:
        done = subprocess.run([*cluster.made.enter(host), *words], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    daemons = ("munged", "slurmctld", "slurmd")
    for host in HOSTS:
        on(host, "mkdir", "-p", "/run/munge", "/etc/slurm")
        on(host, "mount", "--bind", str(folder / "etc"), "/etc/slurm")
        files = [f"--{name}-file={folder}/munged-{host}.{name}" for name in ("log", "seed")]
        on(host, "munged", "--force", f"--key-file={folder / 'key'}", "--pid-file=/run/munged.pid", *files)
    on(HOSTS[0], "slurmctld")
    for host in HOSTS:
        on(host, "slurmd")
    wait_for(lambda: on(HOSTS[0], "sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"], 30)
    try:
        yield lambda *words: on(HOSTS[0], *words)
    finally:
        for host in HOSTS:
            on(host, "sh", "-c", f"kill $(cat {' '.join(f'/run/{name}.pid' for name in daemons)} 2>/dev/null); umount /etc/slurm")


def submit(cluster: Cluster, *words: str) -> str:
    """-> the number of the job."""
    found = ended(cluster.start("launch", "slurm", *words, "--nodes", "2", "--gpus", "1", variables=cluster.variables))
    assert found.returncode == 0, found.output
    return re.findall(r"Submitted batch job (\d+)", found.output)[0]


def state(slurm: Slurm, job: str) -> str:
    return re.findall(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))[0]


def test_a_job_that_is_preempted_is_queued_again_and_goes_on_bit_for_bit(
    cluster: Cluster, slurm: Slurm, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, "quickstart", *cluster.overrides(run, f"optim.stop_at={STEPS}", "zero_stage=1"))
    said = cluster.folder / f"slurm-{job}.out"
    wait_for(lambda: state(slurm, job) not in ("PENDING", "RUNNING") or last_step(run) >= 5)
    slurm("scancel", "--signal=USR1", "--batch", job)  # as at the time limit
    wait_for(lambda: state(slurm, job) not in ("RUNNING", "COMPLETING"))
    assert state(slurm, job) == "PENDING" and "has saved: queued again" in said.read_text(), said.read_text()[-3000:]
    stopped = last_step(run)
    assert 5 <= stopped < STEPS
    # Slurm waits two minutes before it starts a job again. Within the same second, nodes take it for the one that they ended.
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+4")
    wait_for(lambda: state(slurm, job) in ("COMPLETED", "FAILED", "CANCELLED"))
    text = said.read_text()
    assert state(slurm, job) == "COMPLETED" and last_step(run) == STEPS, text[-3000:]
    assert json.loads((run / "submitted.json").read_text())["target"] == "slurm"
    assert "not-a-secret" not in text
    assert final_weights(run, STEPS) == final_weights(unbroken(1), STEPS)


def test_a_fault_of_the_user_is_not_queued_again(cluster: Cluster, slurm: Slurm, tmp_path: Path) -> None:
    """One that shows only where the job runs: launching has looked at the configuration."""
    job = submit(cluster, "quickstart", *cluster.overrides(tmp_path / "run", "model.text.tokenizer=/not/there"))
    wait_for(lambda: state(slurm, job) not in ("PENDING", "RUNNING", "COMPLETING"))
    shown, said = slurm("scontrol", "show", "job", job), (cluster.folder / f"slurm-{job}.out").read_text()
    assert "JobState=FAILED" in shown and "ExitCode=2:0" in shown and "Restarts=0" in shown, shown
    assert "error: " in said and "/not/there" in said and "Traceback" not in said, said[-3000:]
