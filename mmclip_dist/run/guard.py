"""What can end a run, decided after every step for all ranks alike: a stop request, undecodable samples, numerical trouble."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mmclip_dist.config import Health as Limits
from mmclip_dist.data.batch import Batch
from mmclip_dist.engine.collective import sums
from mmclip_dist.run.health import Health
from mmclip_dist.run.quarantine import Quarantine
from mmclip_dist.run.stop import StopRequest


class Guard:
    """Watches one run. `writing`: whether any rank was still writing a checkpoint at the last step."""

    def __init__(self, run_dir: Path, stop: StopRequest, limits: Limits, max_bad_fraction: float, device: torch.device) -> None:
        self.stop, self.device, self.writing = stop, device, False
        self.quarantine, self.health = Quarantine(run_dir, max_bad_fraction), Health(run_dir, limits)

    def after_step(self, step: int, batch: Batch, loss: Tensor, *, applied: bool, writing: bool) -> None:
        """Share this rank's news in one all-reduce, then judge the step. A collective call; AgreedError ends the run.

        loss []: this rank's. applied: whether the weights changed. writing: whether this rank still writes a checkpoint.
        """
        told = sums(
            self.device, stop=self.stop.wanted(), writing=writing, loss=loss.detach(),
            replaced=len(batch["replaced"]), seen=len(batch["keys"]),
        )  # fmt: skip
        self.stop.agreed = told["stop"] > 0
        self.writing = told["writing"] > 0
        self.quarantine.count(batch, step, replaced=told["replaced"], seen=told["seen"])
        self.health.check(step, batch["keys"], told["loss"] / dist.get_world_size(), applied=applied)
