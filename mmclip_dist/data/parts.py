"""How batches travel from loader workers to the training process: one buffer of shared memory for each worker's part."""

from __future__ import annotations

import queue
import resource
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmclip_dist.data.batch import Batch, Example, collate_into
from mmclip_dist.launcher import ranks_of_machine

T = TypeVar("T")
_SHARED_MEMORY = Path("/dev/shm")
_ALIGNMENT = 64  # bytes: a tensor of any type may begin there
_OPEN_FILES = 100  # of a rank without loaders: libraries, logs, connections to the other ranks
_CLOSE_S = 10.0  # the thread may take so long to end the workers; after that it ends with the process


Place = tuple[torch.dtype, torch.Size, int]
"""Type and shape of a tensor, and its first byte in a buffer."""


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, for another process. Sending it costs one file descriptor, however many tensors there are.

    places: of each tensor in `buffer`, by its name. rest: what is no tensor.
    """

    buffer: Tensor
    places: dict[str, Place]
    rest: dict[str, Any]

    @classmethod
    def of(cls, examples: Sequence[Example], step: int, padding: int) -> Part:
        """Collate examples in shared memory. padding: the tokenizer's padding id."""
        buffer, places = torch.empty(0, dtype=torch.uint8), list[Place]()

        def room(sizes: Sequence[tuple[torch.dtype, torch.Size]]) -> list[Tensor]:
            end = 0
            for dtype, size in sizes:
                places.append((dtype, size, end))
                end += -(-dtype.itemsize * size.numel() // _ALIGNMENT) * _ALIGNMENT
            buffer.set_(torch.UntypedStorage._new_shared(end))  # as torch's own collate does
            return [_view(buffer, *place) for place in places]

        batch = collate_into(examples, step, padding, room)
        tensors = [name for name, value in batch.items() if isinstance(value, Tensor)]
        rest = {name: value for name, value in batch.items() if name not in tensors}
        return cls(buffer, dict(zip(tensors, places, strict=True)), rest)

    def batch(self) -> Batch:
        """The batch; its tensors lie in the shared buffer."""
        return Batch(**self.rest, **{name: _view(self.buffer, *place) for name, place in self.places.items()})  # type: ignore[typeddict-item]


def _view(buffer: Tensor, dtype: torch.dtype, size: torch.Size, start: int) -> Tensor:
    return buffer[start : start + dtype.itemsize * size.numel()].view(dtype).view(size)


def check_shared_memory(batch_bytes: int, prefetch: int, folder: Path = _SHARED_MEMORY) -> None:
    """ValueError if the parts that the workers of this machine's ranks hold at once find no room in shared memory.

    Without this check a worker is killed by a bus error. batch_bytes: of one rank's share of a step.
    """
    if not folder.exists():  # no Linux: shared memory has another limit
        return
    needed = batch_bytes * (prefetch + 1) * ranks_of_machine()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"loader workers need about {needed >> 20} MiB of shared memory on this machine, but {folder} has {free >> 20} MiB "
            "free: enlarge it (docker run --shm-size=..., or mount an emptyDir of medium Memory there), or lower data.prefetch, "
            "or set data.workers=0"
        )


def check_open_files(workers: int, prefetch: int, connections: int) -> None:
    """ValueError if this process may not open as many files as it and its loader workers need. First raises its limit as far as
    it may.

    Without this check a loader fails in the middle of a step, or its rank waits for a part that never comes.
    connections: of one process to a store.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = _OPEN_FILES + workers * (prefetch + 1) + connections
    if needed > hard != resource.RLIM_INFINITY:
        raise ValueError(
            f"a rank with {workers} loader workers needs about {needed} open files, but may open {hard}: raise the limit "
            f"(`ulimit -n {max(4096, needed)}`, docker run --ulimit nofile=...), or lower data.workers or data.prefetch"
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
        thread.join(_CLOSE_S)
