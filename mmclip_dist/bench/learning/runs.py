"""Runs of a plan through the ordinary `train.py`, one process each, several at once. What is finished is not run again."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmclip_shards.storage import write_atomic

from mmclip_dist.bench.learning.plan import Plan
from mmclip_dist.bench.learning.sets import Sets, overrides_of
from mmclip_dist.checkpoint.folder import checkpoints_of, read_meta
from mmclip_dist.run.metrics import EVALUATIONS, read_metrics

_POLL_S = 0.5
RESULT = "result.json"


@dataclass(frozen=True)
class Run:
    """One arm with one seed in one comparison, `steps` or `time`."""

    arm: str
    seed: int
    compare: str

    @property
    def name(self) -> str:
        return f"{self.compare}/{self.arm}/seed-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    best: the step of its best checkpoint by validation; processor_s: of training up to its last step, without start, evaluation
    and saving. failed: the line by which it ended early, or None.
    """

    steps: int
    best: int
    validation: float
    processor_s: float
    failed: str | None = None


class Runs:
    """The folder of a plan's runs."""

    def __init__(self, plan: Plan, sets: Sets, folder: Path) -> None:
        self.plan, self.sets, self.folder = plan, sets, folder

    def folder_of(self, run: Run) -> Path:
        return self.folder / run.name

    def outcome(self, run: Run) -> Outcome | None:
        """None: it has not been run to its end."""
        path = self.folder_of(run) / RESULT
        return Outcome(**json.loads(path.read_text())) if path.exists() else None

    def checkpoint(self, run: Run) -> Path:
        """The best checkpoint of a finished run."""
        outcome = self.outcome(run)
        assert outcome is not None
        return next(path for path in checkpoints_of(self.folder_of(run)) if read_meta(path).step == outcome.best)

    def steps(self, run: Run) -> int:
        """How many steps a run makes: those of the plan, or as many as the processor time of the control's allows."""
        if run.compare == "steps" or run.arm == self.plan.control:
            return self.plan.steps
        return max(1, round(self.plan.steps / self.cost(run.arm)))

    def cost(self, arm: str) -> float:
        """Processor time of a step over that of the control's: the ratio of the sums over the seeds, at equal steps."""
        return self._seconds_per_step(arm) / self._seconds_per_step(self.plan.control)

    def _seconds_per_step(self, arm: str) -> float:
        done = [self.outcome(Run(arm, seed, "steps")) for seed in self.plan.seeds]
        whole = [outcome for outcome in done if outcome is not None and outcome.failed is None]
        if not whole:
            raise ValueError(f"no run of the arm {arm} came to its end, so what a step costs is unknown")
        return sum(outcome.processor_s for outcome in whole) / sum(outcome.steps for outcome in whole)

    def complete(self, wanted: Sequence[Run], jobs: int) -> None:
        """Run what is missing, at most `jobs` at once. A run that fails is an outcome too."""
        waiting = [run for run in wanted if self.outcome(run) is None]
        running: dict[Run, subprocess.Popen[bytes]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = self._start(run)
                for run, process in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        self._finish(run, process.returncode)
                        told = self.outcome(run)
                        print(f"{run.name}: {told}", flush=True)
                time.sleep(_POLL_S)
        finally:
            for process in running.values():
                process.kill()
                process.wait()

    def _start(self, run: Run) -> subprocess.Popen[bytes]:
        folder = self.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mmclip_dist.train", self.plan.recipe, *self.overrides(run)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "MMCLIP_OWNER_PID": str(os.getpid()),
        }  # fmt: skip
        with (folder / "train.log").open("ab") as log:
            return subprocess.Popen(command, env=os.environ | alone, stdout=log, stderr=subprocess.STDOUT)

    def overrides(self, run: Run) -> list[str]:
        """Of the recipe: the plan's, the arm's, then what this bench decides."""
        plan, arm, steps = self.plan, self.plan.arms[run.arm], self.steps(run)
        every = max(1, steps // plan.evaluations)
        training = self.sets.training(run.seed)
        return [
            *plan.overrides, *arm.overrides,
            *overrides_of(plan, run.arm, training, dict(self._attention(run))),
            f"run_dir={self.folder_of(run)}", f"seed={run.seed}", f"optim.steps={steps}", "optim.stop_at=null",
            f"evaluation={{sets: [{self.sets.held_out('validation')}], every: {every}}}",
            f"checkpoint={{every: {every}, keep: 1, keep_best: 1}}", "threads=1",
        ]  # fmt: skip

    def _attention(self, run: Run) -> Iterator[tuple[str, str]]:
        """Base URL -> scores of its patches, if the arm wants them."""
        source = self.plan.arms[run.arm].attention
        if source is None:
            return
        scorer, training = Run(source, run.seed, "steps"), self.sets.training(run.seed)
        out = self.folder_of(scorer) / "attention"
        for number, base in enumerate(url for url in (training.pairs, training.unpaired) if url):
            entities = training.entities if base == training.pairs else None
            yield base, self.sets.attention(base, self.checkpoint(scorer), out / str(number), entities)

    def _finish(self, run: Run, code: int) -> None:
        folder = self.folder_of(run)
        rows, evaluations = read_metrics(folder), read_metrics(folder, EVALUATIONS)
        scores = {row["step"]: row["auc"].get("macro", 0.0) for row in evaluations}
        kept = {read_meta(path).step for path in checkpoints_of(folder)} & set(scores)
        best = max(kept, key=lambda step: scores[step], default=0)
        failed = None
        if code or not best:
            lines = (folder / "train.log").read_text(errors="replace").splitlines()
            errors = [line for line in lines if line.startswith(("error:", "failed:"))]
            failed = errors[-1] if errors else f"exit code {code}; see {folder / 'train.log'}"
        outcome = Outcome(
            steps=rows[-1]["step"] if rows else 0, best=best, validation=scores.get(best, 0.0),
            processor_s=round(sum(row["processor_s"] for row in rows), 2), failed=failed,
        )  # fmt: skip
        write_atomic(str(folder / RESULT), json.dumps(vars(outcome)).encode())
