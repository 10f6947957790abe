"""The `deepspeed` command of a training run."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch

from mmclip_dist.config import Config

CPU_RANKS = 2


def local_ranks(streams: int) -> int:
    """Number of ranks on this machine: two on CPUs; on GPUs, the most that divides `streams`."""
    if not torch.cuda.is_available():
        return CPU_RANKS
    return max(ranks for ranks in range(1, torch.cuda.device_count() + 1) if streams % ranks == 0)


def free_port() -> int:
    """A TCP port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_command(recipe: str, overrides: Sequence[str], ranks: int) -> list[str]:
    """The command that trains `recipe` on `ranks` devices of this machine, with a free port for the launcher."""
    where = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return ["deepspeed", *where, "--module", "mmclip_dist.train", recipe, *overrides]


def accelerator_environment() -> dict[str, str]:
    """Environment variables that the launcher needs on a machine without GPU; none on one with GPUs."""
    if torch.cuda.is_available():
        return {}
    return {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}


def check_ranks(config: Config, ranks: int) -> None:
    """ValueError if the run cannot be divided among the ranks, or its sources do not fit. Call it before anything starts."""
    config.check_world(ranks)
    config.check_sources()
