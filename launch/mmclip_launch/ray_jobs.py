"""Ray jobs: start a cluster on this machine for one stage, and submit jobs to it."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmclip_launch.deepspeed_command import free_port
from mmclip_launch.processes import child, environment, last_lines

_START_TIMEOUT_S = 90
_POLL_S = 0.5


@dataclass(frozen=True)
class Cluster:
    """Where to submit jobs: the address of Ray's job server, and an environment with its token."""

    address: str
    env: dict[str, str]


@contextmanager
def local_cluster(log: Path, *, cpus: int, gpus: int = 0) -> Iterator[Cluster]:
    """A Ray head on the loopback interface, with a new token. Leaving the block stops it.

    OSError with the end of the log if it does not start.
    """
    token = secrets.token_hex(32)
    env = environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"})
    env.pop("RAY_ADDRESS", None)
    port, dashboard, agent = free_port(), free_port(), free_port()
    command = [
        "ray", "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={free_port()}", f"--num-cpus={cpus}", f"--num-gpus={gpus}", "--object-store-memory=80000000",
    ]  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    with child(command, log, env) as head:
        _wait_until_up(f"{address}/api/version", token, head, log)
        # Wait for the node's agent, too: the job server answers earlier, and drops a job that waits long for the agent.
        _wait_until_up(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", token, head, log)
        yield Cluster(address, env)


def _wait_until_up(url: str, token: str, head: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + _START_TIMEOUT_S
    while head.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_S)
    raise OSError(f"the local Ray cluster did not start; the end of {log}:\n{last_lines(log)}")


def submit_command(address: str, entrypoint: Sequence[str]) -> list[str]:
    """The `ray job submit` command that runs `entrypoint` on the cluster and waits until it ends."""
    return ["ray", "job", "submit", "--address", address, "--", *entrypoint]


def run_jobs(cluster: Cluster, jobs: Sequence[Sequence[str]], log: Path, poll: Callable[[], None]) -> None:
    """Submit all jobs at once and wait for them. Calls poll() twice a second. OSError if a job fails."""
    with ExitStack() as stack:
        running = [stack.enter_context(child(submit_command(cluster.address, job), log, cluster.env)) for job in jobs]
        while any(process.poll() is None for process in running):
            poll()
            time.sleep(_POLL_S)
        for job, process in zip(jobs, running, strict=True):
            if process.returncode:
                raise OSError(f"the Ray job `{shlex.join(job)}` failed; the end of {log}:\n{last_lines(log)}")
    poll()


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
