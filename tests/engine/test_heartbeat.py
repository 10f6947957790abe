"""A machine that falls silent ends the run within its time; one that is slow to start or has left does not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mmclip_launch.deepspeed_command import free_port

from mmclip_dist.engine import watchdog

LOST_S = 0.9
SCRIPT = """
import sys, time
from mmclip_dist.engine.heartbeat import Heartbeat
node, port, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
beats = Heartbeat(node, b"secret" if len(sys.argv) < 6 else b"stranger", ("127.0.0.1", port), float(sys.argv[4]))
beats.start()
print("beating", flush=True)
time.sleep(seconds)
beats.leave()
"""


@contextlib.contextmanager
def machine(node: int, port: int, seconds: str, *stranger: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SCRIPT, str(node), str(port), seconds, str(LOST_S), *stranger]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )  # fmt: skip
    try:
        assert process.stdout and process.stdout.readline() == "beating\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])
def test_a_machine_without_a_word_ends_the_others(lost: int) -> None:
    port = free_port()
    with machine(0, port, "60") as first, machine(1, port, "60") as second:
        time.sleep(LOST_S)  # they know each other
        silent, other = (second, first) if lost else (first, second)
        os.kill(silent.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert other.wait(20) == watchdog.EXIT_CODE
        assert LOST_S / 2 < time.monotonic() - began < LOST_S + 5
        assert other.stderr and "no sign of life from machine" in (told := other.stderr.read()) and told.count("\n") == 1


@pytest.mark.slow
def test_a_machine_that_left_or_never_came_or_is_a_stranger_ends_nobody() -> None:
    port = free_port()
    with machine(1, port, "60") as early, machine(0, port, "4") as first:  # the first beats of machine 1 find nobody
        with machine(2, port, "0.5") as leaving, machine(3, port, "60", "stranger") as stranger:
            assert leaving.wait(10) == 0
            os.kill(stranger.pid, signal.SIGSTOP)
            assert first.wait(20) == 0
        assert early.wait(20) == watchdog.EXIT_CODE  # the run was not over there
