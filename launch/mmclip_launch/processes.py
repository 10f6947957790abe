"""Child processes that end with this process and write their output to a log file."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_STOP_WAIT_S = 3  # enough: ranks save by themselves when their launcher ends, and a Ray head would need half a minute


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment and `extra`. PATH starts with this interpreter's folder, which holds `deepspeed` and `ray`."""
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if path.partition(os.pathsep)[0] != folder:
        path = f"{folder}{os.pathsep}{path}"
    return {**os.environ, "PATH": path, **(extra or {})}


def _die_with_parent() -> None:
    # Linux only. Elsewhere the user must end the children of an interrupted job.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def child(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in its own session and append its output to `log`. Leaving the block stops it.

    Call it from the main thread: on Linux, the child ends with the thread that started it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(env),
            start_new_session=True, preexec_fn=_die_with_parent,  # noqa: PLW1509 (it makes one system call and takes no lock)
        )  # fmt: skip
        try:
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child and its process group: first with SIGTERM, after a few seconds with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(_STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            continue


def last_lines(log: Path, count: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
