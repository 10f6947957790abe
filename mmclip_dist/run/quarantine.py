"""Samples that could not be decoded: count them, list their keys, end the run if there are too many."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from mmclip_dist.data.batch import Batch
from mmclip_dist.engine.collective import AgreedError


class Quarantine:
    """Counts replaced samples over all ranks, and lists those of this rank in quarantine-RANK.jsonl of the run folder."""

    def __init__(self, run_dir: Path, max_fraction: float) -> None:
        self.path = run_dir / f"quarantine-{dist.get_rank()}.jsonl"
        self.max_fraction = max_fraction
        self.bad = self.seen = 0

    def count(self, batch: Batch, step: int, *, replaced: float, seen: float) -> None:
        """replaced, seen: samples of this step on all ranks. AgreedError above the allowed fraction."""
        if batch["replaced"]:
            with self.path.open("a") as handle:
                handle.writelines(
                    json.dumps({"step": step, "key": key, "reason": reason}) + "\n" for key, reason in batch["replaced"]
                )
        self.bad, self.seen = self.bad + int(replaced), self.seen + int(seen)
        # Early on, one or two bad samples are a large fraction of few. They pass, unless none at all is allowed.
        if self.bad > (max(2.0, self.max_fraction * self.seen) if self.max_fraction else 0):
            raise AgreedError(
                f"{self.bad} of {self.seen} samples could not be decoded, more than "
                f"data.max_bad_fraction={self.max_fraction}; they are listed in {self.path.parent}/quarantine-*.jsonl"
            )
