"""Load a checkpoint saved with another rank count, or between ZeRO 1 and 2, via DeepSpeed's universal format.

The conversion runs in a process of its own: it forks, and holds the whole optimizer state on its way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)

from mmclip_dist.checkpoint.folder import Meta
from mmclip_dist.engine import deepspeed_inside

CLIENT_STATE = {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}
"""What the conversion needs in a checkpoint besides DeepSpeed's own state."""
_LAYOUTS = {0: "whole on every rank", 1: "optimizer cut into shares", 2: "optimizer cut into shares", 3: "weights cut, too"}


def needs_conversion(meta: Meta, world: int, zero_stage: int) -> bool:
    """Whether a checkpoint must be converted for this run. ValueError if it cannot be."""
    if _LAYOUTS[meta.zero_stage] != _LAYOUTS[zero_stage]:
        raise ValueError(
            f"the checkpoint of step {meta.step} was written at zero_stage={meta.zero_stage} ({_LAYOUTS[meta.zero_stage]}), and "
            f"this run has zero_stage={zero_stage} ({_LAYOUTS[zero_stage]}): DeepSpeed converts between numbers of ranks and "
            f"between stages 1 and 2 only. Go on with zero_stage={meta.zero_stage}"
        )
    return zero_stage > 0 and (meta.world_size, meta.zero_stage) != (world, zero_stage)


def convert(checkpoint: Path, scratch: Path) -> Path:
    """Write `checkpoint` as a universal one below the folder `scratch`, and return it. ValueError if that fails."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    converted = scratch / "universal"
    command = [sys.executable, "-m", "mmclip_dist.checkpoint.conversion_process", str(checkpoint), str(converted)]
    # Without the launcher's variables: this process is not a rank.
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or [f"it ended with code {found.returncode}"])[-1]
        raise ValueError(f"{checkpoint} could not be converted for another number of ranks: {reason}")
    return converted


def load_converted(engine: Any, converted: Path) -> bool:
    """Load a converted checkpoint into the engine; a collective call. False if DeepSpeed finds none."""
    groups = engine.optimizer.param_groups
    # At stage 3, DeepSpeed gives every group the settings of the first one. Give each its own back.
    own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    with deepspeed_inside.loading_universal(engine):
        loaded, _ = engine.load_checkpoint(str(converted.parent), tag=converted.name)
    for group, settings in zip(groups, own, strict=True):
        group.update(settings)
    if engine.zero_optimization_stage() == 3:
        deepspeed_inside.mend_universal_stage_3(engine.optimizer, converted / "zero")
    dist.barrier()  # the caller may delete it once all ranks have read it
    return loaded is not None
