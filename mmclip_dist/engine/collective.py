"""Agreements of all ranks: what one refuses all refuse, what one does alone the others wait for without a time-out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mmclip_dist.engine import watchdog

T = TypeVar("T")
_POLL_S = 0.02, 1.0  # between two looks at whether the first rank is ready: at first, at last


@contextmanager
def agreed() -> Iterator[None]:
    """What one rank refuses, all refuse: a ValueError is raised on every rank for a ValueError or OSError on any of them, so
    that none waits for another. Nothing inside may wait for another rank."""
    refused = None
    try:
        yield
    except (ValueError, OSError) as error:
        refused = str(error)
    for refusal in gathered(refused):
        if refusal is not None:
            raise ValueError(refusal)


def gathered(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sums(device: torch.device, **values: float | Tensor) -> dict[str, float]:
    """Each value summed over the ranks, in one small all-reduce. A value that is not finite spoils no other."""
    known = [0.0 if isinstance(value, Tensor) else float(value) for value in values.values()]
    row = torch.tensor(known, dtype=torch.float64).to(device)  # one copy to the device for all of them
    for place, value in enumerate(values.values()):
        if isinstance(value, Tensor):
            row[place] = value
    dist.all_reduce(row)
    watchdog.beat()
    return dict(zip(values, row.tolist(), strict=True))


def first_rank_does(action: Callable[[], T], doing: str) -> T:
    """action() on the first rank alone, its result on all; its ValueError or OSError is a ValueError on all.

    However long it takes, no rank sits in one collective call: they ask again and again whether it is ready.
    """
    done: list[Any] = []

    def work() -> None:
        try:
            done.append((action(), None))
        except (ValueError, OSError) as error:
            done.append((None, str(error)))
        except BaseException as error:
            done.append((None, repr(error)))
            raise

    thread = threading.Thread(target=work, name=doing, daemon=True)
    if dist.get_rank() == 0:
        thread.start()
    pause = _POLL_S[0]
    while True:
        answer: list[Any] = [done[0] if done else None]
        dist.broadcast_object_list(answer)
        watchdog.beat(doing)
        if answer[0] is not None:
            break
        time.sleep(pause)
        pause = min(2 * pause, _POLL_S[1])
    result, refused = answer[0]
    if refused is not None:
        raise ValueError(refused)
    return result
