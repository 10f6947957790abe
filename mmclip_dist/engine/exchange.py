"""Numbers that the ranks tell each other in every step, read one step late so that nobody waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from mmclip_kernels.ranks import all_gather_single
from torch import Tensor

from mmclip_dist.engine import watchdog


class Exchange:
    """One small all-gather a step. `tell` starts it; `told`, a step later, returns what every rank told.

    On a card the answer is copied to the host behind the step's own work. When it is read, the device is still busy with the next
    step, so it does not run dry.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names, self.device = tuple(names), device
        size, pinned = (dist.get_world_size(), len(self.names)), device.type == "cuda"
        self._answer = torch.zeros(size, dtype=torch.float64, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None
        self._under_way: dist.Work | None = None

    def tell(self, **values: float | Tensor) -> None:
        """This rank's values: a number, or a tensor on the device that holds one. Every name has a value."""
        known = [0.0 if isinstance(values[name], Tensor) else float(values[name]) for name in self.names]
        row = torch.tensor(known, dtype=torch.float64, pin_memory=self._copied is not None).to(self.device, non_blocking=True)
        for place, name in enumerate(self.names):
            if isinstance(value := values[name], Tensor):
                row[place] = value
        if self._copied is None:
            self._under_way = all_gather_single(self._answer.view(-1), row, async_op=True)
            return
        every = row.new_empty(self._answer.numel())
        all_gather_single(every, row)
        self._answer.copy_(every.view_as(self._answer), non_blocking=True)
        self._copied.record()

    def told(self) -> dict[str, list[float]]:
        """What the ranks told last, in rank order: {name: [of rank 0, ...]}. The only wait of a step."""
        if self._copied is not None:
            self._copied.synchronize()
        elif self._under_way is not None:
            self._under_way.wait()
        watchdog.beat()
        return dict(zip(self.names, self._answer.T.tolist(), strict=True))
