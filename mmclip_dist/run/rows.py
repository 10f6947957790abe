"""Rows of the run folder: a disk that is full or a service that is away costs rows and a warning, never the run."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_EVERY_S = 600.0


class SeldomWarning:
    """Warns of a fault that may come at every step: the first time at once, then every ten minutes with the count so far."""

    def __init__(self) -> None:
        self.count, self._told = 0, -_EVERY_S

    def tell(self, text: str) -> None:
        self.count += 1
        now = time.monotonic()
        if self.count > 1 and now - self._told < _EVERY_S:
            return
        self._told = now
        times = f" ({self.count} times so far)" if self.count > 1 else ""
        print(f"warning: {text}{times}", file=sys.stderr, flush=True)


class RowFile:
    """A file with one JSON object a line, which only grows. A row that cannot be written is told and left out whole."""

    def __init__(self, path: Path) -> None:
        self.path, self._trouble = path, SeldomWarning()

    def write(self, *rows: Mapping[str, Any]) -> None:
        """Append rows. Never raises OSError."""
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            _append(self.path, data)
        except OSError as error:
            self._trouble.tell(f"{self.path} lacks a row: {error.strerror or error}; training goes on")


def _append(path: Path, data: bytes) -> None:
    """All or nothing: half a row would make the file unreadable once there is room again."""
    with path.open("ab", buffering=0) as handle:
        size = handle.seek(0, os.SEEK_END)
        try:
            if handle.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            handle.truncate(size)
            raise
