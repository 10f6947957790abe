"""How often and how long a remote store is tried again: exponential backoff with full jitter, within a budget."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

_waits = random.SystemRandom()  # stateless: neither shared by forked workers nor a draw from the training's generators

OUR_OWN = (TypeError, AttributeError, NameError, NotImplementedError, ImportError)
"""What no second try mends."""

_SETTLED = (FileNotFoundError, PermissionError, ValueError)
_MENDABLE = (FileNotFoundError, PermissionError, NotADirectoryError, ValueError)
# A store that says 404 or 403, or sends damaged bytes, may do so for a moment, but not for two minutes.
_SETTLED_TRIES = 4


@dataclass(frozen=True)
class Patience:
    """How long to bear with a store.

    budget_s: seconds without progress after which a read fails. stall_s: seconds without a byte that end one try.
    The n-th wait is drawn from [0, min(longest_wait_s, first_wait_s 2^n)] ("full jitter"): ranks that fail together do not come
    back together.
    """

    budget_s: float = 120.0
    stall_s: float = 10.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 10.0


class CutFile(OSError):
    """A file ends before the wanted bytes. No second try mends it: the file must be copied again."""


def renamed(error: Exception, message: str) -> Exception:
    """The error with another message, of a kind that says who can mend it.

    What a user can mend keeps its kind: FileNotFoundError, PermissionError, NotADirectoryError and ValueError; a cut
    file is a ValueError, like other damaged bytes. All else (time-outs, refused connections, 5xx) is an OSError.
    """
    if isinstance(error, CutFile):
        return ValueError(message)
    return next((kind for kind in _MENDABLE if isinstance(error, kind)), OSError)(message)


class GaveUp(Exception):
    """Raised instead of waiting on, once the reader was closed."""


class Tries:
    """The tries of one read. `count`: how many failed."""

    def __init__(self, patience: Patience, closed: threading.Event | None = None) -> None:
        self.patience, self.closed = patience, closed or threading.Event()
        self.count, self._in_a_row, self._settled = 0, 0, 0
        self._since = time.monotonic()

    def wait(self, what: str, fault: Exception, *, progress: bool = False) -> None:
        """Sleep before the next try; once the budget is spent, raise an error of the fault's kind that names `what`."""
        if isinstance(fault, OUR_OWN):
            raise fault
        if progress:
            self._in_a_row, self._settled, self._since = 0, 0, time.monotonic()
        self.count += 1
        self._in_a_row += 1
        self._settled = self._settled + 1 if isinstance(fault, _SETTLED) else 0
        spent = time.monotonic() - self._since
        if spent > self.patience.budget_s or self._settled >= _SETTLED_TRIES:
            if isinstance(fault, ValueError):
                raise fault
            tried = f"tried {self.count} times in {spent:.0f} s"
            raise renamed(fault, f"{what}: {tried}: {type(fault).__name__}: {fault}") from fault
        longest = min(self.patience.longest_wait_s, self.patience.first_wait_s * 2 ** min(self._in_a_row, 30))
        if self.closed.wait(_waits.uniform(0, min(longest, max(0.0, self.patience.budget_s - spent)))):
            raise GaveUp(what) from fault
