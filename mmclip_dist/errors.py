"""Which errors a user can mend, and how a program ends with each kind.

- A wrong argument, file, configuration or data set (ValueError, a missing or forbidden path, `Mendable`): code 2, `error: ...`.
- A machine, disk, network or store that failed (any other OSError): code 1, `failed: ...`.
- A bug (everything else): code 1, a traceback, `failed: ...`.
"""

from __future__ import annotations

import errno

USER, FAILED = 2, 1

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Mendable(Exception):
    """A fault that the user can mend, where a ValueError would be taken for the fault of one sample and be passed over."""


def exit_code(error: BaseException) -> int | None:
    """`USER`, `FAILED`, or None for a bug."""
    if isinstance(error, ValueError | Mendable | FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError):
        return USER
    return FAILED if isinstance(error, OSError) else None


def line(error: BaseException, where: str = "") -> str:
    """What the user reads of an error. where: who raised it, if several could have."""
    code = exit_code(error)
    text = f"{type(error).__name__}: {error}" if code is None else str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        text += ": make room, then give the same command again"
    return ("error: " if code == USER else "failed: ") + (f"{where}: " if where else "") + text
