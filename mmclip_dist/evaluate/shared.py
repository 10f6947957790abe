"""An evaluation that several ranks share: who takes part, and what all of them found.

Batches are the same whatever the number of ranks, and come back in the order of the sets: the figures are equal bit for bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist

from mmclip_dist import errors
from mmclip_dist.engine.collective import broken, first_rank_does, gathered
from mmclip_dist.engine.rendezvous import meet

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # one rank's share may take much longer than another's; a launcher ends the rest of a broken job
_OTHERS_S = 5.0  # for the first rank to say what it refused


class SaidByFirst(SystemExit):
    """Ends a rank whose error is that of the first rank, which prints it."""


@contextmanager
def joined() -> Iterator[None]:
    """Join the ranks that a launcher (torchrun, deepspeed) has started; without one, a single process is all.

    An error that all ranks have is raised on the first one alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, world = meet(_PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    try:
        yield
    except Exception as error:
        if rank == 0:
            store.set("refused", errors.line(error))
            time.sleep(1)  # it may hold the store, which the others ask
            if broken(error):
                raise OSError("another rank or its machine ended: its own message says why") from error
        elif broken(error) or _said(store, errors.line(error)):
            time.sleep(_OTHERS_S)  # a launcher ends the first rank as soon as another one has ended: it shall print first
            raise SaidByFirst(errors.exit_code(error) or errors.FAILED) from error
        raise
    finally:
        dist.destroy_process_group()


def _said(store: dist.Store, line: str) -> bool:
    try:
        store.wait(["refused"], timedelta(seconds=_OTHERS_S))
        return store.get("refused").decode() == line
    except (RuntimeError, dist.DistError):
        return False


def place() -> tuple[int, int]:
    """Rank and number of ranks; (0, 1) in a single process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together(own: list[list[T]]) -> list[T]:
    """own: what this rank found in each round -> what all ranks found, on each of them, in the order of the sets."""
    of_ranks = gathered(own) if dist.is_initialized() else [own]
    return [one for of_round in zip_longest(*of_ranks, fillvalue=[]) for of_rank in of_round for one in of_rank]


def by_first(action: Callable[[], T], doing: str) -> T:
    """What action() gives on the first rank, which alone runs it, on all ranks."""
    return first_rank_does(action, doing) if dist.is_initialized() else action()
