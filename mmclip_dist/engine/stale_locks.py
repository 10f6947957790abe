"""Locks that a killed compilation left behind. torch's extension loader waits on them forever, without a message."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

_LONGEST_BUILD_S = 1800.0


def refuse_stale_locks(root: Path | None = None) -> None:
    """ValueError if an extension's build folder holds a lock older than any build takes. root: None: torch's own."""
    root = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    stale = [str(lock) for lock in sorted(root.rglob("lock")) if time.time() - lock.stat().st_mtime > _LONGEST_BUILD_S]
    if stale:
        raise ValueError(
            f"a build of DeepSpeed's optimizer was killed and left {', '.join(stale)}, on which this run would wait "
            "forever: delete it if no other run is building, and start again"
        )
