"""The first process of a pod: starts the ranks of its node, and turns SIGTERM into the stop file.

`python -m mmclip_launch.node RECIPE key=value ...` reads NODES, NODE (this node's number), FIRST (name of the first node), GPUS
(of each node) and RUN_DIR. The exit code is the run's: 75 after a stop on request.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmclip_dist.run.marks import EXIT_CODE, STOP_FILE, STOPPED
from mmclip_launch.hosts import Host, hostfile_text
from mmclip_launch.processes import environment

PORT = 29500
NAME_S = 600.0  # a pod's name resolves only once the pod has an address, and its node may have to be started first
_ASKED = ("NODES", "NODE", "FIRST", "GPUS", "RUN_DIR")


def command(variables: Mapping[str, str], hostfile: Path, words: Sequence[str]) -> list[str]:
    """DeepSpeed's launcher for the ranks of this node, without ssh."""
    where = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", variables["NODE"]]
    where += ["--master_addr", variables["FIRST"], "--master_port", str(PORT)]
    return [
        "deepspeed",
        *where,
        "--module",
        "mmclip_dist.train",
        words[0],
        f"run_dir={variables['RUN_DIR']}",
        *words[1:],
    ]


def wait_for_name(name: str, timeout_s: float = NAME_S, pause: Callable[[float], None] = time.sleep) -> None:
    """Wait until a name has an address. OSError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(name, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise OSError(
                    f"the first node {name} has no address after {timeout_s:g} s: is its pod pending?"
                ) from error
            pause(1.0)


def raise_open_files() -> None:
    """Containers start with few open files; ranks need more (`mmclip_dist.data.parts`)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(words: Sequence[str], variables: Mapping[str, str]) -> int:
    missing = [name for name in _ASKED if not variables.get(name)]
    if missing or not words:
        print(f"error: set {', '.join(missing)}" if missing else "error: name a recipe", file=sys.stderr)
        return 2
    run_dir = Path(variables["RUN_DIR"])
    run_dir.mkdir(parents=True, exist_ok=True)
    raise_open_files()
    earlier = mark(run_dir)
    # As the first process of a container it gets no signal that it does not handle.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # Only the number of hosts and their slots count here: the ranks find each other by the first node's name.
    hosts = [Host(f"node-{number}", int(variables["GPUS"])) for number in range(int(variables["NODES"]))]
    with tempfile.TemporaryDirectory() as folder:
        hostfile = Path(folder, "hostfile")
        hostfile.write_text(hostfile_text(hosts))
        try:
            wait_for_name(variables["FIRST"])
        except OSError as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
        process = subprocess.Popen(command(variables, hostfile, words), env=environment())
        signal.signal(signal.SIGTERM, lambda *_: (run_dir / STOP_FILE).touch())
        code = reap_until(process.pid)
    # A launcher has another code if it was ended by its cluster; a new mark shows that the run has saved.
    return EXIT_CODE if code and mark(run_dir) not in (None, earlier) else code


def mark(run_dir: Path) -> tuple[int, int] | None:
    """Which stopped.json is there. Clocks of hosts and file servers differ, so it is not told by times alone."""
    try:
        found = (run_dir / STOPPED).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def reap_until(child: int) -> int:
    """The exit code of a child. Orphans come to the first process of a container: they are taken care of meanwhile."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
