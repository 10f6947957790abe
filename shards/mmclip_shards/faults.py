"""Retries of a remote store: exponential backoff with full jitter, within a budget of seconds."""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from dataclasses import dataclass

# It has no state: forked workers draw different waits, and training's generators are not touched.
_waits = random.SystemRandom()

NOT_RETRIED = (TypeError, AttributeError, NameError, NotImplementedError, ImportError)
"""Errors of our own code: raised at once, never tried again."""

_SETTLED = (FileNotFoundError, ValueError)
_SETTLED_TRIES = 4  # for 404, 403 and damaged bytes: they can be passing errors of a store, but not for two minutes
_START_S = 15.0  # for a store that has not answered yet: a wrong address or missing keys are told soon
_MENDABLE = (FileNotFoundError, PermissionError, NotADirectoryError, ValueError)


@dataclass(frozen=True)
class Patience:
    """How long to keep trying a store.

    budget_s: seconds without progress after which a read fails. stall_s: seconds without a byte that end one try.
    The n-th wait is drawn from [0, min(longest_wait_s, first_wait_s 2^n)] ("full jitter"), so ranks that fail together do
    not all retry at the same moment.
    """

    budget_s: float = 120.0
    stall_s: float = 10.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 10.0


class Stalled(OSError):
    """A try was given up because nothing came for too long."""


class MissingCredentials(PermissionError):
    """No credentials were found. A metadata service that many processes ask at once may refuse for seconds."""


class CutFile(OSError):
    """A file ends before the wanted bytes. No second try mends it: the file must be copied again."""


def renamed(error: Exception, message: str) -> Exception:
    """A new error with this message. Its kind tells whether the user can mend the cause.

    What a user can mend keeps its kind: FileNotFoundError, PermissionError, NotADirectoryError, ValueError. A cut file
    becomes a ValueError, like other damaged bytes. All else (time-outs, refused connections, 5xx) becomes an OSError.
    """
    if isinstance(error, CutFile):
        return ValueError(message)
    return next((kind for kind in _MENDABLE if isinstance(error, kind)), OSError)(message)


class GaveUp(Exception):
    """The reader was closed while a read waited for its next try."""


class Tries:
    """Counts the tries of one read and waits between them. count: failed tries. closed: ends the waiting when it is set."""

    def __init__(self, patience: Patience, closed: threading.Event | None = None) -> None:
        self.patience, self.closed = patience, closed or threading.Event()
        self.count, self._in_a_row, self._settled = 0, 0, 0
        self._since = time.monotonic()

    def wait(self, what: str, fault: Exception, *, progress: bool = False, served: bool = True) -> None:
        """Sleep before the next try. Once the budget is spent, raise `renamed(fault)` with a message that names `what`.

        progress: the failed try brought bytes, so the budget starts anew. served: the store answered before. Then refused access
        is taken for a passing fault and has the whole budget, as other faults have; if not, the user is told soon what is wrong.
        GaveUp when the reader is closed meanwhile.
        """
        if isinstance(fault, NOT_RETRIED):
            raise fault
        if progress:
            self._in_a_row, self._settled, self._since = 0, 0, time.monotonic()
        self.count += 1
        self._in_a_row += 1
        self._settled = self._settled + 1 if _is_settled(fault, served) else 0
        spent = time.monotonic() - self._since
        budget = self.patience.budget_s if served else min(self.patience.budget_s, _START_S)
        if spent >= budget or self._settled >= _SETTLED_TRIES:
            if isinstance(fault, ValueError):
                raise fault
            told = f"{what}: tried {self.count} times in {spent:.0f} s: {type(fault).__name__}: {fault}"
            if not served and not isinstance(fault, FileNotFoundError | MissingCredentials):
                told += " (it never served this process: check the address, AWS_ENDPOINT_URL, the keys and the network)"
            raise renamed(fault, told) from fault
        longest = min(self.patience.longest_wait_s, self.patience.first_wait_s * 2 ** min(self._in_a_row, 30))
        if self.closed.wait(_waits.uniform(0, min(longest, max(0.0, budget - spent)))):
            raise GaveUp(what) from fault


def _is_settled(fault: Exception, served: bool) -> bool:
    """Whether a fault that stays for a few tries will stay for good."""
    if isinstance(fault, PermissionError):
        return not served and not isinstance(fault, MissingCredentials)
    return isinstance(fault, _SETTLED)


class Lateness:
    """When a request counts as late, from the seconds that the last ones took, and how many may be made a second time.

    Late: three times the 95th percentile, at least half a second. Of all requests, one in twenty may be repeated, so that a
    store that is slow for all is not asked twice for everything.
    """

    _KNOWN = 256
    _FEWEST = 16  # requests to know before any counts as late
    _LEAST_S, _TIMES, _SHARE = 0.5, 3.0, 20

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=self._KNOWN)
        self._requests, self._hedges = 0, 0

    def add(self, seconds: float) -> None:
        """A request that brought its bytes at the first try took so long."""
        self._seconds.append(seconds)
        self._requests += 1

    def after_s(self) -> float | None:
        """Seconds after which a request is late; None while too few are known."""
        known = sorted(self._seconds.copy())
        if len(known) < self._FEWEST:
            return None
        return max(self._LEAST_S, self._TIMES * known[math.ceil(0.95 * len(known)) - 1])

    def may_hedge(self) -> bool:
        """Whether one more request may be made a second time. If so, it is counted."""
        allowed = self._hedges < self._requests // self._SHARE + 1
        self._hedges += allowed
        return allowed
