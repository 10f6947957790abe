"""Training runs, and what they leave in their folders."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from mmclip_launch.deepspeed_command import accelerator_environment, train_command
from mmclip_launch.processes import environment
from safetensors.torch import load_file

from mmclip_dist import train
from mmclip_dist.checkpoint.folder import checkpoint_path
from mmclip_dist.run.metrics import read_metrics
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Finished:
    """output: of all ranks."""

    returncode: int
    output: str

    @property
    def errors(self) -> list[str]:
        """The lines by which errors are told."""
        return [line for line in self.output.splitlines() if line.startswith(("error:", "failed:"))]


def run_training(overrides: list[str], folder: Path, ranks: int = 2, check: bool = True, **variables: str) -> Finished:
    """Train on forked ranks. folder: for their logs."""
    code, outputs = run_ranks(train.main, ["quickstart", *overrides], ranks=ranks, folder=folder, **variables)
    found = Finished(code, "".join(outputs))
    assert not check or code == 0, found.output[-6000:]
    return found


def launch_training(overrides: list[str], ranks: int = 2, check: bool = True, **variables: str) -> Finished:
    """Train under the `deepspeed` launcher: slower by the imports of four processes."""
    env = environment(accelerator_environment() | variables)
    process = subprocess.run(
        train_command("quickstart", overrides, ranks), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=240,
    )  # fmt: skip
    assert not check or process.returncode == 0, process.stdout[-6000:]
    return Finished(process.returncode, process.stdout)


def final_weights(run: Path, step: int = 12) -> dict[str, bytes]:
    weights = load_file(checkpoint_path(run, step) / "model.safetensors")
    return {name: value.numpy().tobytes() for name, value in weights.items()}


def losses(run: Path) -> list[dict]:
    return [{"step": row["step"], **row["loss"]} for row in read_metrics(run)]


def last_step(run: Path) -> int:
    rows = read_metrics(run)
    return rows[-1]["step"] if rows else 0
