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

    paired [n], unpaired [B - n]: rows with and without a report. known [V]: rows with a report or a label, which the contrastive
    loss can use. rebuilt [R]: rows whose image AttMIM rebuilds. read [m]: rows whose report EntMLM rebuilds; read_known [m]:
    their places in `known`. masked [K]: places of the masked tokens among the m x T tokens of those reports, laid end to end.
    All int64. scored: which images have attention scores. packing, read_packing: how the n and the m reports share rows. tokens,
    unscored: number of the reports' tokens, and of images without scores. parts: plans of the parts, if there are any.
    """

    paired: Tensor
    unpaired: Tensor
    known: Tensor
    rebuilt: Tensor
    read: Tensor
    read_known: Tensor
    masked: Tensor
    scored: Literal["all", "some", "none"]
    packing: Packing
    read_packing: Packing
    tokens: int
    unscored: int
    parts: tuple[Plan, ...] = ()

    @classmethod
    def of(cls, batch: Batch, width: int, shares: tuple[float, float]) -> Plan:
        """width: of the text encoder. shares: of the known images, and of the reports, that are masked and rebuilt, by lot: the
        lowest lots for images, the highest for reports, so that two small shares are of different samples. An image without
        report and label is always rebuilt: nothing else is learned from it."""
        has_report, lot = batch["report_id"].cpu() >= 0, batch["lot"].cpu()
        has_anything = has_report | (batch["labels"].cpu() >= 0).any(1)
        paired, unpaired, known = (rows.nonzero()[:, 0] for rows in (has_report, ~has_report, has_anything))
        rebuilt = ((lot < shares[0]) | ~has_anything).nonzero()[:, 0]
        read = (has_report & (lot >= 1 - shares[1])).nonzero()[:, 0]
        mask, target = batch["token_mask"].cpu(), batch["target_tokens"].cpu()[read]
        packing = Packing.of(mask[paired], width)
        unscored = int((~batch["has_attention"]).sum())
        scored: Literal["all", "some", "none"] = "some" if unscored else "all"
        return cls(
            paired, unpaired, known, rebuilt, read, torch.searchsorted(known, read), (target >= 0).flatten().nonzero()[:, 0],
            "none" if unscored == len(has_report) else scored,
            packing, packing if len(read) == len(paired) else Packing.of(mask[read], width), int(mask[paired].sum()), unscored,
        )  # fmt: skip

    @property
    def counts(self) -> list[int]:
        """This rank's row of `Counts`."""
        return [len(self.paired), len(self.unpaired), len(self.rebuilt), len(self.masked)]

    @property
    def tensors(self) -> list[Tensor]:
        """All that lies on the device."""
        own = [getattr(self, name) for name in _INDICES]
        packings = [tensor for packing in (self.packing, self.read_packing) for tensor in packing.tensors]
        return own + packings + [tensor for part in self.parts for tensor in part.tensors]

    def to(self, device: torch.device) -> Plan:
        packing = self.packing.to(device)
        return replace(
            self,
            **{name: getattr(self, name).to(device, non_blocking=True) for name in _INDICES},
            packing=packing,
            read_packing=packing if self.read_packing is self.packing else self.read_packing.to(device),
            parts=tuple(part.to(device) for part in self.parts),
        )


_INDICES = ("paired", "unpaired", "known", "rebuilt", "read", "read_known", "masked")


@dataclass(frozen=True)
class Counts:
    """Of each rank, in rank order: samples with a report, samples without, images that are rebuilt, and masked tokens."""

    paired: tuple[int, ...]
    unpaired: tuple[int, ...]
    rebuilt: tuple[int, ...]
    masked: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, group: dist.ProcessGroup | None, device: torch.device) -> Counts:
        """Ask the ranks: a collective call, in which the host waits for the device."""
        return cls(*map(tuple, rank_sizes(plan.counts, group, device)))


class PlannedBatch(Batch, total=False):
    """A batch with its plan, and with the counts of all ranks. The model makes what is missing, and waits for the device."""

    plan: Plan
    counts: Counts


def planned(batch: Batch, width: int, passes: int, shares: tuple[float, float]) -> PlannedBatch:
    """The batch with its plan. width, shares: as in `Plan.of`. passes: in how many parts it is computed."""
    plan = Plan.of(batch, width, shares)
    if passes > 1:
        plan = replace(plan, parts=tuple(Plan.of(part, width, shares) for part in split_batch(batch, passes)))
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
