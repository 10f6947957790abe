"""What a rank prints must not end it. Ranks on other hosts print through ssh: once the launcher is gone, nobody reads any more,
and the next line that a rank prints would be an error, before it could save."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Outlasting(io.FileIO):
    """A stream that leads to /dev/null from the moment on when nobody reads it."""

    def write(self, data: Any, /) -> Any:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


def outlast_readers() -> None:
    """Let stdout and stderr of this process go on when their reader ends. Processes that it forks inherit that."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        old.flush()
        raw = io.BufferedWriter(_Outlasting(old.fileno(), "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, encoding=old.encoding, errors=old.errors, line_buffering=True))
