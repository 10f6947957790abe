"""The `deepspeed` command of a training run."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch

from mmclip_dist.config import Config

CPU_RANKS = 2


def local_ranks(streams: int) -> int:
    """Ranks on this machine: every GPU (as many as divide `streams`), else two CPU processes."""
    if not torch.cuda.is_available():
        return CPU_RANKS
    return max(ranks for ranks in range(1, torch.cuda.device_count() + 1) if streams % ranks == 0)


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_command(recipe: str, overrides: Sequence[str], ranks: int) -> list[str]:
    """The command that trains `recipe` on `ranks` devices of this machine, on a port of its own."""
    where = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return ["deepspeed", *where, "--module", "mmclip_dist.train", recipe, *overrides]


def accelerator_environment() -> dict[str, str]:
    """What the launcher needs to know on a machine without GPU."""
    if torch.cuda.is_available():
        return {}
    return {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}


def check_ranks(config: Config, ranks: int) -> None:
    """Raise ValueError, before anything is started, if the run cannot be spread over the ranks."""
    config.check_world(ranks)
    config.check_sources()
