"""What can end a run, decided for all ranks alike, one step late: a stop request, undecodable samples, numerical trouble."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmclip_dist.config import Health as Limits
from mmclip_dist.data.batch import Batch
from mmclip_dist.engine.exchange import Exchange
from mmclip_dist.engine.feed import Feed
from mmclip_dist.model.inputs import Counts, Plan, PlannedBatch
from mmclip_dist.run.health import Health
from mmclip_dist.run.quarantine import Quarantine
from mmclip_dist.run.stop import StopRequest

_FLAGS = ("stop", "writing", "loss", "replaced", "seen")
_COUNTS = ("paired", "unpaired", "rebuilt", "masked")


class _Step(NamedTuple):
    """A step that is not judged yet: its number, and of this rank its batch and whether the weights changed."""

    number: int
    batch: Batch
    applied: bool


class Guard:
    """Watches one run. `writing`: whether any rank was writing a checkpoint."""

    def __init__(self, run_dir: Path, stop: StopRequest, limits: Limits, max_bad_fraction: float, device: torch.device) -> None:
        self.stop, self.writing = stop, False
        self.quarantine, self.health = Quarantine(run_dir, max_bad_fraction), Health(run_dir, limits)
        self._exchange = Exchange([*_FLAGS, *_COUNTS], device)
        self._feed: Feed | None = None
        self._unjudged: _Step | None = None
        self._counts: Counts | None = None

    def counted(self, feed: Feed) -> Iterator[PlannedBatch]:
        """The batches of `feed` with the counts of all ranks: asked for at the first batch, then by `after_step`. Collective."""
        self._feed = feed
        self._tell(feed.ahead(1))
        self._counts = _counts(self._exchange.told())
        self._tell(feed.ahead(2))
        for batch in feed:
            batch["counts"] = self._counts
            yield batch

    def after_step(self, step: int, batch: Batch, loss: Tensor, *, applied: bool, writing: bool) -> None:
        """Share this rank's news and the counts of its batch after the next one; judge the step before. A collective call.

        loss []: this rank's. applied: whether the weights changed. writing: whether this rank still writes a checkpoint.
        AgreedError ends the run.
        """
        told = self._exchange.told()
        self._tell(
            self._feed.ahead(2) if self._feed else None, stop=self.stop.wanted(), writing=writing, loss=loss.detach(),
            replaced=len(batch["replaced"]), seen=len(batch["keys"]),
        )  # fmt: skip
        self._judge(told)
        self._unjudged, self._counts = _Step(step, batch, applied), _counts(told)

    def finish(self) -> None:
        """Judge the last step. A collective call."""
        self._judge(self._exchange.told())

    def _tell(self, plan: Plan | None, **flags: float | Tensor) -> None:
        counts = plan.counts if plan else [0] * len(_COUNTS)
        self._exchange.tell(**dict.fromkeys(_FLAGS, 0.0) | flags | dict(zip(_COUNTS, counts, strict=True)))

    def _judge(self, told: dict[str, list[float]]) -> None:
        if self._unjudged is None:
            return
        step, batch, applied = self._unjudged
        self._unjudged = None
        self.stop.agreed = sum(told["stop"]) > 0
        self.writing = sum(told["writing"]) > 0
        self.quarantine.count(batch, step, replaced=sum(told["replaced"]), seen=sum(told["seen"]))
        self.health.check(step, batch["keys"], sum(told["loss"]) / len(told["loss"]), applied=applied)


def _counts(told: dict[str, list[float]]) -> Counts:
    return Counts(*(tuple(map(int, told[name])) for name in _COUNTS))
