"""Child processes that never outlive us, with their output in a log file."""

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
_STOP_WAIT_S = 3  # the ranks of a training run save by themselves when their launcher ends; a Ray head would take half a minute


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment, with the commands installed beside this interpreter first on the PATH: deepspeed, ray."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, **(extra or {})}


def _die_with_parent() -> None:
    # Linux only; elsewhere an interrupted job leaves the clean-up to the user.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def child(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a session of its own, its output appended to `log`; it is stopped when the block is left.

    Call it from the main thread: Linux ties the child to the thread that started it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(env),
            start_new_session=True, preexec_fn=_die_with_parent,  # noqa: PLW1509 (one system call, no lock that a thread could hold)
        )  # fmt: skip
        try:
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child and its process group: politely first."""
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
