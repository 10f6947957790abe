"""How batches travel from loader workers to the training process: in buffers that both share, used again and again."""

from __future__ import annotations

import mmap
import queue
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeVar

import torch
import torch.utils.data._utils as loader_inside
from torch import Tensor

from mmclip_dist.data.batch import TENSORS, Batch, Example, collate_into

T = TypeVar("T")
_ALIGNMENT = 64  # bytes: a tensor of any type may begin there
_OPEN_FILES = 100  # of a rank without loaders: libraries, logs, connections to the other ranks
_FILES_OF_WORKER = 4  # pipes of its queue and its life
_CLOSE_S = 10.0  # the thread may take so long to end the workers; after that it ends with the process


Place = tuple[torch.dtype, torch.Size, int]
"""Type and shape of a tensor, and its first byte in a buffer."""


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, for another process. Its tensors stay in a slot of `Slots`; sending it costs no file descriptor.

    places: of each tensor in the slot, by its name. rest: what is no tensor.
    """

    slot: int
    places: dict[str, Place]
    rest: dict[str, Any]


class Slots:
    """The memory in which one worker hands its parts over, made before the worker is forked. It has no name, so no limit of
    /dev/shm counts it and nothing is left when its processes die.

    Slots are filled in turn. A loader asks a worker for part n when it has given out part n - prefetch, so with one slot more
    than that none is filled before the next part is asked for: until then its tensors may be used, after that they change.
    Fresh memory for every part would cost a page fault for each 4 KiB, in both processes: more than copying does.
    """

    def __init__(self, rows: int, bytes_per_row: int, prefetch: int) -> None:
        """rows: of a part. bytes_per_row: at the most."""
        size = rows * bytes_per_row + len(TENSORS) * _ALIGNMENT
        self._slots = [torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) for _ in range(prefetch + 1)]
        self._turns = cycle(range(len(self._slots)))

    def collate(self, examples: Sequence[Example], step: int, padding: int) -> Part:
        """In the worker: collate examples in the next slot. padding: the tokenizer's padding id."""
        slot, places = next(self._turns), list[Place]()

        def room(sizes: Sequence[tuple[torch.dtype, torch.Size]]) -> list[Tensor]:
            end = 0
            for dtype, size in sizes:
                places.append((dtype, size, end))
                end += -(-dtype.itemsize * size.numel() // _ALIGNMENT) * _ALIGNMENT
            return [_view(self._slots[slot], *place) for place in places]

        batch = collate_into(examples, step, padding, room)
        tensors = [name for name, value in batch.items() if isinstance(value, Tensor)]
        rest = {name: value for name, value in batch.items() if name not in tensors}
        return Part(slot, dict(zip(tensors, places, strict=True)), rest)

    def batch(self, part: Part) -> Batch:
        """The batch of a part of this worker; its tensors lie in the slot."""
        buffer = self._slots[part.slot]
        return Batch(**part.rest, **{name: _view(buffer, *place) for name, place in part.places.items()})  # type: ignore[typeddict-item]


def _view(buffer: Tensor, dtype: torch.dtype, size: torch.Size, start: int) -> Tensor:
    return buffer[start : start + dtype.itemsize * size.numel()].view(dtype).view(size)


def check_open_files(workers: int, connections: int) -> None:
    """ValueError if this process may not open as many files as it and its loader workers need. First raises its limit as far as
    it may.

    Without this check the run ends with the traceback of whichever library opens the last file.
    connections: of one process to a store.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = _OPEN_FILES + workers * _FILES_OF_WORKER + connections
    if needed > hard != resource.RLIM_INFINITY:
        raise ValueError(
            f"a rank with {workers} loader workers needs about {needed} open files, but may open {hard}: raise the limit "
            f"(`ulimit -n {max(4096, needed)}`, docker run --ulimit nofile=...), or lower data.workers"
        )


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


@contextmanager
def in_thread(items: Iterator[T], name: str) -> Iterator[Iterator[T]]:
    """Run an endless iterator in a thread, one item ahead. Its error is raised in place of the item that did not come."""
    ready: queue.Queue[T | _Raised] = queue.Queue(1)
    closed = threading.Event()

    def put(item: T | _Raised) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            while not closed.is_set():
                put(next(items))
        except BaseException as error:
            put(_Raised(error))
        finally:
            items.close()  # type: ignore[attr-defined]  # a generator: ends the workers

    def taken() -> Iterator[T]:
        while True:
            item = ready.get()
            if isinstance(item, _Raised):
                raise item.error
            yield item

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        closed.set()
        if not loader_inside.python_exit_status:  # else its processes are gone, and it waits for them in vain
            thread.join(_CLOSE_S)
