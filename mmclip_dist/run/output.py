"""What a rank prints must not end it before it has saved. Ranks on other hosts print through ssh: once the launcher is gone,
nobody reads any more, and the next line is an error."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any


class _Outlasting(io.FileIO):
    """A stream that leads to /dev/null from the moment on when nobody reads it. left: called then."""

    def __init__(self, descriptor: int, left: Callable[[], None]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._left = left

    def write(self, data: Any, /) -> Any:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            self._left()
            return super().write(data)


def outlast_readers(ask: Callable[[str], None]) -> None:
    """Request a stop, as where the launcher is gone, if nobody reads this process's stdout or stderr any more; and go on until
    then. Processes that it forks print to the same streams."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        old.flush()
        raw = io.BufferedWriter(_Outlasting(old.fileno(), lambda name=name: ask(f"nobody reads its {name}")))  # type: ignore[misc]
        setattr(sys, name, io.TextIOWrapper(raw, encoding=old.encoding, errors=old.errors, line_buffering=True))
