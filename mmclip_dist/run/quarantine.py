"""Samples that could not be decoded: count them, list their keys, end the run if there are too many."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from mmclip_dist.data.batch import Batch
from mmclip_dist.engine.collective import AgreedError
from mmclip_dist.run.rows import RowFile


class Quarantine:
    """Counts replaced samples over all ranks, and lists those of this rank in quarantine-RANK.jsonl of the run folder."""

    def __init__(self, run_dir: Path, max_fraction: float) -> None:
        self.list = RowFile(run_dir / f"quarantine-{dist.get_rank()}.jsonl")
        self.max_fraction = max_fraction
        self.bad = self.seen = 0

    def count(self, batch: Batch, step: int, *, replaced: float, seen: float) -> None:
        """replaced, seen: samples of this step on all ranks. AgreedError above the allowed fraction."""
        if batch["replaced"]:
            self.list.write(*({"step": step, "key": key, "reason": reason} for key, reason in batch["replaced"]))
        self.bad, self.seen = self.bad + int(replaced), self.seen + int(seen)
        # Early on, one or two bad samples are a large fraction of few. They pass, unless none at all is allowed.
        if self.bad > (max(2.0, self.max_fraction * self.seen) if self.max_fraction else 0):
            raise AgreedError(
                f"{self.bad} of {self.seen} samples could not be decoded, more than "
                f"data.max_bad_fraction={self.max_fraction}; they are listed in {self.list.path.parent}/quarantine-*.jsonl"
            )
