"""What the host knows of a batch before it reaches the device: the model then runs without waiting for the device.

Indexing by a mask, counting on a card, or packing texts there would each make the host wait in the middle of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from mmclip_kernels.ranks import rank_sizes
from torch import Tensor

from mmclip_dist.data.batch import Batch, split_batch, to_device
from mmclip_dist.model.packing import Packing


@dataclass(frozen=True)
class Plan:
    """Facts of one batch, or of one of its parts.

    paired [n], unpaired [B - n]: rows with and without a report. masked [K]: places of the masked tokens among the n x T tokens
    of the reports, laid end to end. All int64. scored: which images have attention scores. packing: how the reports share rows.
    tokens, unscored: number of the reports' tokens, and of images without scores. parts: plans of the parts, if there are any.
    """

    paired: Tensor
    unpaired: Tensor
    masked: Tensor
    scored: Literal["all", "some", "none"]
    packing: Packing
    tokens: int
    unscored: int
    parts: tuple[Plan, ...] = ()

    @classmethod
    def of(cls, batch: Batch, width: int) -> Plan:
        """width: of the text encoder."""
        has_report = batch["report_id"].cpu() >= 0
        paired, unpaired = has_report.nonzero()[:, 0], (~has_report).nonzero()[:, 0]
        mask, target = batch["token_mask"].cpu()[paired], batch["target_tokens"].cpu()[paired]
        unscored = int((~batch["has_attention"]).sum())
        scored: Literal["all", "some", "none"] = "some" if unscored else "all"
        return cls(
            paired, unpaired, (target >= 0).flatten().nonzero()[:, 0], "none" if unscored == len(has_report) else scored,
            Packing.of(mask, width), int(mask.sum()), unscored,
        )  # fmt: skip

    @property
    def counts(self) -> list[int]:
        """This rank's row of `Counts`."""
        return [len(self.paired), len(self.unpaired), len(self.masked)]

    @property
    def tensors(self) -> list[Tensor]:
        """All that lies on the device."""
        packing = self.packing
        own = [self.paired, self.unpaired, self.masked, packing.place, packing.slot, packing.segment, packing.column]
        return own + [tensor for part in self.parts for tensor in part.tensors]

    def to(self, device: torch.device) -> Plan:
        return replace(
            self,
            paired=self.paired.to(device, non_blocking=True),
            unpaired=self.unpaired.to(device, non_blocking=True),
            masked=self.masked.to(device, non_blocking=True),
            packing=self.packing.to(device),
            parts=tuple(part.to(device) for part in self.parts),
        )


@dataclass(frozen=True)
class Counts:
    """Of each rank, in rank order: samples with a report, samples without, and masked tokens."""

    paired: tuple[int, ...]
    unpaired: tuple[int, ...]
    masked: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, group: dist.ProcessGroup | None, device: torch.device) -> Counts:
        """Ask the ranks: a collective call, in which the host waits for the device."""
        return cls(*map(tuple, rank_sizes(plan.counts, group, device)))

    @property
    def samples(self) -> float:
        """Mean number of samples of a rank."""
        return (sum(self.paired) + sum(self.unpaired)) / len(self.paired)


class PlannedBatch(Batch, total=False):
    """A batch with its plan, and with the counts of all ranks. The model makes what is missing, and waits for the device."""

    plan: Plan
    counts: Counts


def planned(batch: Batch, width: int, passes: int = 1) -> PlannedBatch:
    """The batch with its plan, for a text encoder of `width`. passes: in how many parts it is computed."""
    plan = Plan.of(batch, width)
    if passes > 1:
        plan = replace(plan, parts=tuple(Plan.of(part, width) for part in split_batch(batch, passes)))
    return PlannedBatch(**batch, plan=plan)


def moved(batch: PlannedBatch, device: torch.device) -> PlannedBatch:
    """The batch and its plan on `device`."""
    return PlannedBatch(**to_device(batch, device) | {"plan": batch["plan"].to(device)})  # type: ignore[typeddict-item]


def parts_of(batch: PlannedBatch) -> list[PlannedBatch]:
    """The parts of a planned batch. They keep the counts of the whole batch."""
    plans = batch["plan"].parts
    if not plans:
        return [batch]
    whole = {name: value for name, value in batch.items() if name != "plan"}
    parts = split_batch(Batch(**whole), len(plans))  # type: ignore[typeddict-item]
    return [PlannedBatch(**part, plan=plan) for part, plan in zip(parts, plans, strict=True)]
