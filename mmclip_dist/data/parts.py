"""How batches travel from loader workers to the training process: one buffer of shared memory for each worker's part."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmclip_dist.data.batch import Batch
from mmclip_dist.launcher import ranks_of_machine

T = TypeVar("T")
_SHARED_MEMORY = Path("/dev/shm")
_ALIGNMENT = 64  # bytes: a tensor of any type may begin there
_CLOSE_S = 10.0  # the thread may take so long to end the workers; after that it ends with the process


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, for another process. Sending it costs one file descriptor, however many tensors there are.

    layout: name, type, shape and first byte in `buffer` of each tensor. rest: what is no tensor.
    """

    buffer: Tensor
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    rest: dict[str, Any]

    @classmethod
    def of(cls, batch: Batch) -> Part:
        """A copy of the batch in shared memory."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        layout, end = [], 0
        for name, value in tensors.items():
            layout.append((name, value.dtype, tuple(value.shape), end))
            end += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
        rest = {name: value for name, value in batch.items() if name not in tensors}
        part = cls(torch.empty(end, dtype=torch.uint8).share_memory_(), tuple(layout), rest)
        for name, view in part._views():
            view.copy_(tensors[name])
        return part

    def batch(self) -> Batch:
        """The batch; its tensors lie in the shared buffer."""
        return Batch(**self.rest, **dict(self._views()))  # type: ignore[typeddict-item]

    def _views(self) -> Iterator[tuple[str, Tensor]]:
        for name, dtype, shape, start in self.layout:
            bytes_ = dtype.itemsize * torch.Size(shape).numel()
            yield name, self.buffer[start : start + bytes_].view(dtype).view(shape)


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
