"""What is really allocated: the bytes of all live tensor storages, followed through every operation of a step."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Follows the storages that exist when it starts, and those that any operation makes, until each is freed.

    No formula enters: bytes are those of `untyped_storage().nbytes()`. On a CPU this is what the allocator holds for
    tensors; a library's own workspace inside one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, int] = {}
        gc.collect()
        for item in gc.get_objects():
            if type(item) in (torch.Tensor, torch.nn.Parameter):
                self._follow(item)

    def _follow(self, value: object) -> None:
        if not isinstance(value, torch.Tensor) or value.device.type == "meta":
            return
        storage = value.untyped_storage()
        if storage._cdata in self._known or storage.nbytes() == 0:
            return
        self._known[storage._cdata] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.alive -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            self._follow(value)
        return found
