"""What a launcher tells a rank through its environment."""

from __future__ import annotations

import os


def ranks_of_machine() -> int:
    """Number of ranks on this machine; 1 without a launcher. torchrun and DeepSpeed name it differently."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def first_of_machine() -> bool:
    """Whether this rank is the first on its machine; True without a launcher."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
