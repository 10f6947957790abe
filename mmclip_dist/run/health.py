"""Numerical trouble: count skipped steps, list jumps of the loss, end the run after too many bad steps in a row."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from mmclip_dist.config import Health as Limits
from mmclip_dist.engine.collective import AgreedError
from mmclip_dist.run.rows import RowFile

TROUBLE = "trouble-{rank}.jsonl"
_LEAST = 16  # losses; with fewer the median says little
_MAD_TO_SIGMA = 1.4826  # of a normal distribution: sigma / median absolute deviation


def is_spike(loss: float, before: Sequence[float], limit: float) -> bool:
    """Whether `loss` lies above the median of the losses before it by more than `limit` robust standard deviations."""
    if len(before) < _LEAST:
        return False
    median = statistics.median(before)
    deviation = _MAD_TO_SIGMA * statistics.median(abs(value - median) for value in before)
    return loss - median > limit * max(deviation, 1e-3 * abs(median))


class Health:
    """Counts bad steps and lists their samples, by key alone, in trouble-RANK.jsonl of the run folder."""

    def __init__(self, run_dir: Path, limits: Limits) -> None:
        self.list = RowFile(run_dir / TROUBLE.format(rank=dist.get_rank()))
        self.limits, self._listed = limits, run_dir / TROUBLE.format(rank="*")
        self.skipped = self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=limits.window)

    def check(self, step: int, keys: Sequence[str], loss: float, *, applied: bool) -> None:
        """Call after every step, with the mean loss of all ranks and whether the weights changed.

        AgreedError after too many bad steps in a row.
        """
        if not applied:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            self._list("skipped", step, keys, loss)
            if self.in_a_row >= self.limits.max_bad_steps:
                raise AgreedError(
                    f"loss or gradients were not finite in {self.in_a_row} steps in a row, up to step {step}; their samples are "
                    f"listed in {self._listed}. No weights were changed by them: go on from the last checkpoint in a new run, "
                    "with a lower optim.lr or without those samples"
                )
            return
        self.in_a_row = 0
        if is_spike(loss, self._losses, self.limits.spike):
            self._list("spike", step, keys, loss)
        if math.isfinite(loss):
            self._losses.append(loss)

    def _list(self, kind: str, step: int, keys: Sequence[str], loss: float) -> None:
        self.list.write({"step": step, "kind": kind, "loss": loss if math.isfinite(loss) else None, "keys": list(keys)})
        if dist.get_rank() == 0:
            told = "step skipped, loss or gradients are not finite" if kind == "skipped" else "the loss jumps"
            print(f"step {step}  {told} (loss {loss:.4g}); its samples: {self._listed}", flush=True)
