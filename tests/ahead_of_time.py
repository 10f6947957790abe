"""Compile Triton kernels for GPUs that this machine lacks. Needs another process: the tests' own runs Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path


def use_compiler(folder: Path) -> None:
    """Have Triton compile in this process, with its cache in `folder`. Call it before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default; named because Triton 3.9 warns that it will change
    os.environ["TRITON_CACHE_DIR"] = str(folder)
