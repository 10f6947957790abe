"""Ranks without a launcher: forked from one process that has imported everything, so that a run costs its steps and no imports.

What has to do with the `deepspeed` launcher itself (tests/launched.py) starts it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from mmclip_launch.deepspeed_command import accelerator_environment, free_port

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([
    "deepspeed", "mmclip_dist.train", "mmclip_dist.checkpoint.store", "mmclip_dist.evaluate.zeroshot", "transformers.models.vit",
    "transformers.models.bert", "tests.ranks", "tests.faulty_train",
    # What engines, evaluations and decoders import when they are first used.
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.ops.op_builder.all_ops", "sklearn.metrics", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin",
    "torch.utils.serialization.config",
])  # fmt: skip
_LAUNCHER_WAITS_S = 10.0  # for the other ranks, after one has failed


class Ranks:
    """Processes that run `target(*arguments)`, each with a rank's environment and a log. An int that it returns is the exit
    code."""

    def __init__(
        self, target: Callable[..., Any], arguments: Sequence[Any], *, ranks: int, folder: Path,
        variables: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        shared = {
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            **accelerator_environment(), "MMCLIP_OWNER_PID": str(os.getpid()), **(variables or {}),
        }  # fmt: skip
        self.logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(_FORKS.Process(target=_run, args=(target, arguments, own, str(log))))
            self.processes[-1].start()

    def poll(self) -> int | None:
        """As of Popen: the exit code once all have ended, that of the first to fail."""
        return self.wait(timeout=0)

    def wait(self, timeout: float) -> int | None:
        """The exit code, once all have ended: of the rank that failed first, after which the others are ended as a launcher does.
        None if some still run after so many seconds."""
        deadline = time.monotonic() + timeout
        running: dict[Any, Any] = {process.sentinel: process for process in self.processes if process.is_alive()}
        first = self._failed()
        while running and first is None:
            left = deadline - time.monotonic()
            ended = wait(list(running), max(0.0, left))
            if not ended:
                return None
            for sentinel in ended:
                running.pop(sentinel).join()
            first = self._failed()
        for process in running.values():
            process.terminate()
        until = time.monotonic() + _LAUNCHER_WAITS_S
        for process in running.values():
            process.join(max(0.0, until - time.monotonic()))
            process.kill()
            process.join()
        return first or 0

    def _failed(self) -> int | None:
        return next((process.exitcode for process in self.processes if process.exitcode), None)

    @property
    def output(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _run(target: Callable[..., Any], arguments: Sequence[Any], variables: dict[str, str], log: str) -> None:
    os.environ.update(variables)
    gc.freeze()  # what the fork inherits stays: else each of DeepSpeed's garbage collections looks at it, for most of a second
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as under a launcher
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(handle, stream)
    try:
        code = target(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    if isinstance(code, int) and code:
        sys.exit(code)


def run_ranks(
    target: Callable[..., Any], *arguments: Any, ranks: int, folder: Path, timeout: float = 240, **variables: str
) -> tuple[int, list[str]]:
    """Run to the end -> exit code, output of each rank."""
    running = Ranks(target, arguments, ranks=ranks, folder=folder, variables=variables)
    try:
        code = running.wait(timeout)
        assert code is not None, f"still running after {timeout} s:\n{running.output[-3000:]}"
    finally:
        running.kill()
    # A rank that is ended before it could open its log, because another one failed at once, said nothing.
    return code, [log.read_text(errors="replace") if log.exists() else "" for log in running.logs]
