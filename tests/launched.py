"""Training runs through the `deepspeed` launcher, and what they leave in their folders."""

from __future__ import annotations

import subprocess
from pathlib import Path

from mmclip_launch.deepspeed_command import accelerator_environment, train_command
from mmclip_launch.processes import environment
from safetensors.torch import load_file

from mmclip_dist.checkpoint.folder import checkpoint_path
from mmclip_dist.run.metrics import read_metrics


def run_training(
    overrides: list[str], ranks: int = 2, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    env = environment(accelerator_environment() | variables)
    found = subprocess.run(
        train_command("quickstart", overrides, ranks), env=env, capture_output=True, text=True, timeout=240
    )
    assert not check or found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found


def final_weights(run: Path, step: int = 12) -> dict[str, bytes]:
    weights = load_file(checkpoint_path(run, step) / "model.safetensors")
    return {name: value.numpy().tobytes() for name, value in weights.items()}


def losses(run: Path) -> list[dict]:
    return [{"step": row["step"], **row["loss"]} for row in read_metrics(run)]


def last_step(run: Path) -> int:
    rows = read_metrics(run)
    return rows[-1]["step"] if rows else 0
