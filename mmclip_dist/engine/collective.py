"""Collective helpers: share refusals, sum small values, wait for rank 0 without timing out."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmclip_dist.engine import watchdog
from mmclip_dist.errors import FAILED, Mendable, exit_code
from mmclip_dist.launcher import first_of_machine

T = TypeVar("T")
_POLL_S = 0.02, 1.0  # seconds between two questions whether rank 0 is ready: at first, at last
_SHARED = (ValueError, OSError, Mendable)


class AgreedError(ValueError):
    """A fault that the user can mend, raised on every rank with the same text. Rank 0 prints it."""


class AgreedFailure(OSError):
    """A failure of a machine or a store, raised on every rank with the same text. Rank 0 prints it."""


class Refusal(NamedTuple):
    """What went wrong on one rank. code: `errors.exit_code`."""

    text: str
    code: int | None


def place() -> str:
    """This rank and its machine, as error messages name them."""
    return f"rank {dist.get_rank()} on {socket.gethostname()}"


def broken(error: Exception) -> bool:
    """Whether a collective call failed because another rank is gone: the user needs that rank's own error."""
    backend = isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))
    return backend or isinstance(error, dist.DistError)


@contextmanager
def agreed() -> Iterator[None]:
    """Share refusals: if any rank raises ValueError, OSError or Mendable inside, every rank raises `AgreedError` or
    `AgreedFailure` with the same text, which names the ranks unless all of them refused alike.

    Nothing inside may wait for another rank.
    """
    refusal = None
    try:
        yield
    except _SHARED as error:
        refusal = Refusal(str(error), exit_code(error))
    raise_shared(gathered((place(), refusal)))


def raise_shared(told: Sequence[tuple[str, Refusal | None]]) -> None:
    """Raise what any rank refused, the same on all ranks. told: the place and the refusal of each rank."""
    refusals = [(place, refusal) for place, refusal in told if refusal is not None]
    if not refusals:
        return
    texts = dict.fromkeys(refusal.text for _, refusal in refusals)
    if len(refusals) == len(told) and len(texts) == 1:
        text = next(iter(texts))
    else:
        text = "; ".join(
            f"{', '.join(place for place, refusal in refusals if refusal.text == text)}: {text}" for text in texts
        )
    failed = any(refusal.code == FAILED for _, refusal in refusals)
    raise AgreedFailure(text) if failed else AgreedError(text)


def gathered(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sums(device: torch.device, **values: float | Tensor) -> dict[str, float]:
    """Sum each value over the ranks, in one small all-reduce. A value that is not finite does not affect the others."""
    known = [0.0 if isinstance(value, Tensor) else float(value) for value in values.values()]
    row = torch.tensor(known, dtype=torch.float64).to(device)  # one copy to the device for all of them
    for place, value in enumerate(values.values()):
        if isinstance(value, Tensor):
            row[place] = value
    dist.all_reduce(row)
    watchdog.beat()
    return dict(zip(values, row.tolist(), strict=True))


def first_rank_does(action: Callable[[], T], doing: str) -> T:
    """Run action() on rank 0 alone and return its result on all ranks; its ValueError or OSError is raised as by `agreed`.

    However long it takes, no collective call times out: the ranks ask again and again whether rank 0 is ready.
    """
    done = _started(action, doing) if dist.get_rank() == 0 else []

    def ask() -> Any:
        answer: list[Any] = [done[0] if done else None]
        dist.broadcast_object_list(answer)
        return answer[0]

    result, refused = _asked_until_ready(ask, doing)
    raise_shared([("", refused)])
    found: T = result
    return found


def hosts_do(action: Callable[[], T], doing: str) -> T:
    """As `first_rank_does`, on the first rank of every machine; a machine's ranks get the result of its own."""
    first = first_of_machine()
    done = _started(action, doing) if first else []

    def ask() -> Any:
        told = gathered((place(), first, done[0] if done else None))
        firsts = [(number, where, end) for number, (where, first, end) in enumerate(told) if first]
        return firsts if all(end is not None for *_, end in firsts) else None

    firsts = _asked_until_ready(ask, doing)
    raise_shared([(where, refused) for _, where, (_, refused) in firsts])
    found: T = [result for number, _, (result, _) in firsts if number <= dist.get_rank()][-1]  # ranks are numbered by machine
    return found


def _started(action: Callable[[], T], doing: str) -> list[tuple[T | None, Refusal | None]]:
    """Begin action() in a thread -> a list that gets one entry, its result and what it refused, when it ends."""
    done: list[tuple[T | None, Refusal | None]] = []

    def work() -> None:
        try:
            done.append((action(), None))
        except _SHARED as error:
            done.append((None, Refusal(str(error), exit_code(error))))
        except BaseException as error:
            done.append((None, Refusal(f"{place()}: {error!r}", FAILED)))
            raise

    threading.Thread(target=work, name=doing, daemon=True).start()
    return done


def _asked_until_ready(ask: Callable[[], Any], doing: str) -> Any:
    """Call ask(), a collective call, until it returns something else than None."""
    pause = _POLL_S[0]
    while True:
        answer = ask()
        watchdog.beat(doing)
        if answer is not None:
            return answer
        time.sleep(pause)
        pause = min(2 * pause, _POLL_S[1])
