"""Which errors a user can mend, and how a program ends with each kind.

- A wrong argument, file, configuration or data set (ValueError, a missing or forbidden path, `Mendable`): code 2, `error: ...`.
- A machine, disk, network or store that failed (any other OSError): code 1, `failed: ...`.
- A bug (everything else): code 1, a traceback, `failed: ...`.
"""

from __future__ import annotations

import errno
import re
import sys

SECRET = re.compile(
    r"""(?<=://)[^/\s:@"',]*:(?!\d+(?:/|\s|$))[^\s"']*(?=@)"""  # user:password, but not host:port; a key of AWS may hold a slash
    r"|(?<=http://)[^/\s]+(?=@)|(?<=https://)[^/\s]+(?=@)"
    r"""|(?i:(?<=[?&])(?:x-(?:amz|goog)-[\w-]+|awsaccesskeyid|signature|sig|(?:access_)?token|(?:api_?)?key|password)=[^&\s"']+)"""
)
"""The parts of a URL that logs and lists of processes must not show."""

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
    if isinstance(error, OSError) and error.strerror and error.filename:  # without the number that Python puts first
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in _FULL:
        text += ": make room, then give the same command again"
    return masked(("error: " if code == USER else "failed: ") + (f"{where}: " if where else "") + text)


def masked(text: str) -> str:
    """The text without what is secret in its URLs and in those of the command line, of which libraries tell parts."""
    found = {match[0] for word in (text, *sys.argv) for match in SECRET.finditer(word)}
    for secret in sorted(found, key=len, reverse=True):
        text = text.replace(secret, "...")
    return text
