"""Runs of two ranks that a test strikes: what tests/test_faults.py and tests/test_broken_runs.py share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
from mmclip_launch.deepspeed_command import accelerator_environment, train_command
from mmclip_launch.processes import environment

from mmclip_dist.checkpoint.folder import checkpoint_path, checkpoints_of
from mmclip_dist.run.stop import EXIT_CODE, STOP_FILE, STOPPED
from tests import faulty_train
from tests.conftest import wait_for
from tests.launched import Finished, last_step
from tests.ranks import Ranks

SAVE_S = 25  # from a request to a whole checkpoint
END_S = 90  # until all processes are gone; on a busy machine an interpreter takes its time to end
OF_THE_LAUNCHER = ("stop SIGTERM", "kill launcher")
ALL = os.environ.get("MMCLIP_FAULTS") == "all"


class Job:
    """A run that can be struck: forked ranks, or ranks under the launcher. log: what they printed."""

    def __init__(self, run: Path, overrides: list[str], fault: str = "none", *, launched: bool = False) -> None:
        self.run, self._log = run, run.with_name(f"{run.name}.log")
        self.runner: subprocess.Popen[bytes] | Ranks
        if not launched:
            self.runner = Ranks(faulty_train.main, [[fault, "quickstart", *overrides]], ranks=2, folder=run.with_name("ranks"))
            return
        command = train_command("quickstart", overrides, 2)
        at = command.index("--module")
        command[at : at + 2] = [faulty_train.__file__, fault]
        with self._log.open("wb") as output:
            self.runner = subprocess.Popen(
                command, env=environment(accelerator_environment()), stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        return self.runner.output if isinstance(self.runner, Ranks) else self._log.read_text()

    @property
    def errors(self) -> list[str]:
        return Finished(0, self.log).errors

    def wait(self, timeout: float = 300) -> int | None:
        """The exit code; None if it runs on."""
        try:
            return self.runner.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            return None

    def after(self, step: int) -> None:
        """Wait until the run has done this step."""
        wait_for(lambda: self.runner.poll() is not None or last_step(self.run) >= step)
        assert self.runner.poll() is None, self.log[-3000:]

    def until(self, name: str) -> None:
        """Wait for a file in the run folder."""
        wait_for(lambda: self.runner.poll() is not None or (self.run / name).exists())
        assert self.runner.poll() is None, self.log[-3000:]

    @property
    def launcher(self) -> psutil.Process:
        """The inner one, whose children are the ranks."""
        assert not isinstance(self.runner, Ranks)
        return psutil.Process(self.runner.pid).children()[0]

    def rank(self, number: int) -> psutil.Process:
        if isinstance(self.runner, Ranks):
            return psutil.Process(self.runner.processes[number].pid)
        return next(child for child in self.launcher.children() if f"--local_rank={number}" in child.cmdline())

    @property
    def family(self) -> list[psutil.Process]:
        """Runner, launcher, ranks and their children: those that still are."""
        roots = self.runner.processes if isinstance(self.runner, Ranks) else [self.runner]
        found = []
        for root in roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [*psutil.Process(root.pid).children(recursive=True), psutil.Process(root.pid)]
        return found


MARKS = {"kill in save": "saving", "stop in evaluation": "evaluating"}
"""Files by which faulty_train.py tells that it is where the fault shall strike."""


def strike(fault: str, job: Job, family: list[psutil.Process]) -> None:
    if fault == "kill in save":
        for process in family:
            process.kill()
        assert list((job.run / "checkpoints").glob(".step-*.writing"))
    elif fault == "kill rank":
        job.rank(1).kill()
        assert job.wait(60) not in (0, EXIT_CODE)
    elif fault == "kill launcher":
        job.launcher.kill()
    elif fault == "stop SIGTERM":
        job.launcher.terminate()
        assert job.wait(END_S) == 1  # the launcher's own; hence the mark in the run folder
    else:
        if fault == "stop file":
            (job.run / STOP_FILE).touch()
        else:
            job.rank(1).send_signal(signal.SIGUSR1 if fault == "stop SIGUSR1" else signal.SIGTERM)
        assert job.wait(END_S) == EXIT_CODE


def break_run(fault: str, run: Path, overrides: list[str]) -> None:
    """Start or go on with a run, and let the fault end it after some steps, of which at least one was saved."""
    begun = last_step(run)
    saved = checkpoints_of(run)
    for name in MARKS.values():
        (run / name).unlink(missing_ok=True)
    arranged = {"kill in save": "slow save", "stop in evaluation": "evaluation"}.get(fault, "none")
    job = Job(run, overrides, arranged, launched=ALL or fault in OF_THE_LAUNCHER)
    family: list[psutil.Process] = []
    try:
        if fault in MARKS:
            job.until(MARKS[fault])
        else:
            job.after(begun + 6)
        family, at = job.family, time.time()
        strike(fault, job, family)
        _, alive = psutil.wait_procs(family, timeout=END_S)
        assert not alive, job.log[-3000:]
    finally:
        for process in family or job.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        job.wait()
    if fault.startswith("stop") or fault == "kill launcher":
        saved_after = (run / STOPPED).stat().st_mtime - at
        assert saved_after < SAVE_S
        print(f"{fault}: saved {saved_after:.1f} s after the request, all processes gone after {time.time() - at:.1f} s")
        mark = json.loads((run / STOPPED).read_text())
        assert mark["step"] == last_step(run) and mark["exit_code"] == EXIT_CODE
        assert checkpoint_path(run, mark["step"]).is_dir()  # nothing is lost
    if fault == "stop in evaluation":
        assert "zero-shot evaluation: broken off by a stop" in job.log
    assert fault == "kill in save" or checkpoints_of(run)[-1] not in saved
