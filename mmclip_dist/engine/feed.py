"""Batches on the device, a few steps ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from mmclip_dist.data.batch import Batch
from mmclip_dist.model.inputs import Plan, PlannedBatch, moved, planned

AHEAD = 2  # batches: the ranks tell each other the counts of a batch two steps before it is used


class Feed:
    """An iterator of planned batches. On a card they are copied on a side stream while earlier steps are computed.

    width, shares: as in `Plan.of`. passes: over each batch.
    """

    def __init__(
        self, batches: Iterator[Batch], width: int, passes: int, shares: tuple[float, float], device: torch.device
    ) -> None:
        self.batches, self.width, self.passes, self.shares, self.device = batches, width, passes, shares, device
        self._waiting: deque[tuple[PlannedBatch, torch.cuda.Event | None]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> PlannedBatch:
        self._fetch(1 + AHEAD)
        batch, copied = self._waiting.popleft()
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for value in [*batch.values(), *batch["plan"].tensors]:
                if isinstance(value, Tensor):
                    value.record_stream(stream)  # its memory is not reused before this step is over
        return batch

    def ahead(self, steps: int) -> Plan:
        """The plan of the batch that comes so many steps after the last one that was returned. steps: 1 to AHEAD."""
        self._fetch(steps)
        return self._waiting[steps - 1][0]["plan"]

    def _fetch(self, count: int) -> None:
        while len(self._waiting) < count:
            batch = planned(next(self.batches), self.width, self.passes, self.shares)
            if self._stream is None:
                self._waiting.append((batch, None))
                continue
            with torch.cuda.stream(self._stream):
                batch = moved(batch, self.device)
                self._waiting.append((batch, self._stream.record_event()))
