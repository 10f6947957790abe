"""Runs that are killed, preempted and resumed, on the same and on other numbers of ranks: they end as an unbroken one.

MMCLIP_FAULTS=all tries every fault at every ZeRO stage; the quick round tries each fault once, and each stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from mmclip_launch.deepspeed_command import accelerator_environment, train_command
from mmclip_launch.processes import environment
from safetensors.torch import load_file

from mmclip_dist.checkpoint.folder import checkpoint_path, checkpoints_of, fault
from mmclip_dist.run.stop import EXIT_CODE, STOP_FILE, STOPPED
from tests import faulty_train
from tests.conftest import wait_for
from tests.launched import Finished, final_weights, last_step, losses, run_training
from tests.ranks import Ranks

pytestmark = pytest.mark.slow

STEPS = 36
TRAIN = (f"optim.steps={STEPS}", "checkpoint.every=4", "log_every=1", "optim.lr=0.1", "checkpoint.keep=20", "data.workers=1")
SAVE_S = 25  # from a request to a whole checkpoint
OUTLIVED_S = 20  # less than the launcher waits for a process that outlives SIGTERM; 5 s on an idle machine
END_S = 90  # until all processes are gone; on a busy machine an interpreter takes its time to end
QUICK = {1: ("stop SIGTERM", "kill in save"), 2: ("kill rank", "stop in evaluation"), 3: ("kill launcher",)}
EVERY = ("stop SIGTERM", "kill in save", "kill rank", "stop in evaluation", "kill launcher", "stop file", "stop SIGUSR1")
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


@pytest.fixture(scope="module", params=[1, 2, 3])
def whole(request: pytest.FixtureRequest, sets, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A ZeRO stage, and an unbroken run."""
    run = tmp_path_factory.mktemp(f"whole-{request.param}") / "run"
    run_training([*sets.overrides(run), *TRAIN, f"zero_stage={request.param}"], run.with_name("ranks"))
    return request.param, run


@pytest.mark.timeout(1200)
def test_a_broken_run_ends_in_the_weights_of_an_unbroken_one(sets, whole: tuple[int, Path], tmp_path: Path) -> None:
    stage, unbroken = whole
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    saving = {1: "checkpoint.keep=2", 2: "checkpoint.asynchronous=true", 3: f"checkpoint.url={mirror}"}[stage]
    evaluation = f"evaluation={{sets: [{sets.test}], every: 10}}"  # which changes no weight
    overrides = [*sets.overrides(run), *TRAIN, f"zero_stage={stage}", saving, evaluation]
    for fault_kind in EVERY if ALL else QUICK[stage]:
        if last_step(run) > STEPS - 10:
            shutil.rmtree(run)
            shutil.rmtree(mirror, ignore_errors=True)
        break_run(fault_kind, run, overrides)
    newest = checkpoints_of(run)[-1]
    if stage == 3:  # the machine is gone, and its disk with it
        shutil.rmtree(run)
    told = run_training(overrides, tmp_path / "ranks").output
    assert "torn" not in told and (stage != 3 or f"going on from a copy of {mirror}: {newest}" in told)
    assert final_weights(run, STEPS) == final_weights(unbroken, STEPS)
    ours = losses(run)
    assert ours == losses(unbroken)[-len(ours) :] and (stage == 3 or len(ours) == STEPS)
    assert all(fault(path) is None for path in checkpoints_of(run))
    assert not (run / STOPPED).exists()


@pytest.mark.timeout(600)
def test_2_ranks_then_1_then_4(sets, whole: tuple[int, Path], tmp_path: Path) -> None:
    """The newest checkpoint is torn, besides, and passed over."""
    stage, unbroken = whole
    if stage == 1 and not ALL:
        pytest.skip("as stage 2; MMCLIP_FAULTS=all tries it")
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    overrides = [*sets.overrides(run), *TRAIN, f"zero_stage={stage}", "data.workers=1"]
    done: list[dict] = []
    for ranks, before, at in ((1, 2, STEPS - 12), (4, 1, STEPS - 8)):
        for path in checkpoints_of(run):
            if path > checkpoint_path(run, at + 4):
                shutil.rmtree(path)
        with (checkpoint_path(run, at + 4) / "meta.json").open("a") as handle:
            handle.write(" ")
        told = run_training(overrides, tmp_path / "ranks", ranks=ranks).output
        assert f"passing over {checkpoint_path(run, at + 4)}, which is torn: meta.json has" in told
        assert f"{checkpoint_path(run, at)} was written by {before} ranks" in told
        if ranks == 1:  # what was done before stays as it was, bit for bit
            assert losses(run)[:at] == losses(unbroken)[:at]
        else:  # and so does what one rank did
            assert losses(run)[:at] == done
        done = losses(run)[: at + 4]
    for ours, theirs in zip(losses(run), losses(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4), (ours, theirs)
    there = load_file(checkpoint_path(unbroken, STEPS) / "model.safetensors")
    for name, value in load_file(checkpoint_path(run, STEPS) / "model.safetensors").items():
        assert value.numpy() == pytest.approx(there[name].numpy(), rel=1e-3, abs=2e-4), name


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
    job = Job(run, [*sets.overrides(run), *TRAIN, f"data.workers={workers}"], fault, launched=launched)
    assert job.wait() == code, job.log[-3000:]
    assert job.errors == [told.format(host=socket.gethostname())], job.log[-3000:]
    assert ("Traceback" in job.log) == (fault == "bug"), job.log[-3000:]


@pytest.mark.parametrize("fault", ["out of memory", "out of memory, others deaf"])
def test_a_job_with_loader_processes_ends_within_seconds_of_an_uncaught_exception(sets, tmp_path: Path, fault: str) -> None:
    """The launcher gives processes that outlive SIGTERM half a minute, and they give themselves a whole one."""
    run = tmp_path / "run"
    job = Job(run, [*sets.overrides(run), *TRAIN, "data.workers=2"], fault, launched=True)
    job.until("struck")
    family = job.family
    assert job.wait() == 1, job.log[-3000:]
    took = time.time() - (run / "struck").stat().st_mtime
    assert took < OUTLIVED_S and not psutil.wait_procs(family, timeout=OUTLIVED_S - took)[1], f"{took:.1f} s\n{job.log[-3000:]}"
    assert [line for line in job.errors if "OutOfMemoryError: CUDA out of memory" in line] == job.errors, job.log[-3000:]
    assert "Alarm clock" not in job.log


def test_a_full_disk_ends_the_run_and_loses_nothing(sets, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(run, [*sets.overrides(run), *TRAIN], "full disk")
    assert job.wait() == 2, job.log[-3000:]
    log, (line,) = job.log, job.errors
    assert "the checkpoint of step 8 could not be written: [Errno 27] File too large" in line
    assert f"{checkpoint_path(run, 4)} and those before it are untouched" in line and "Traceback" not in log
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert fault(checkpoint_path(run, 4)) is None


def test_an_infinite_loss_of_one_rank_skips_steps_on_both_and_ends_the_run(sets, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(run, [*sets.overrides(run), *TRAIN, "health.max_bad_steps=5"], "bad loss")
    assert job.wait() == 2, job.log[-3000:]
    log, (line,) = job.log, job.errors
    assert "not finite in 5 steps in a row, up to step 9" in line and "Traceback" not in log
    listed = [[json.loads(row) for row in (run / f"trouble-{rank}.jsonl").read_text().splitlines()] for rank in range(2)]
    for rows in listed:
        assert [row["step"] for row in rows] == [5, 6, 7, 8, 9] and all(len(row["keys"]) == 4 for row in rows)
    assert not {*listed[0][0]["keys"]} & {*listed[1][0]["keys"]}
    assert final_weights(run, 4) == final_weights(run, 8)
