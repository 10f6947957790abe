"""`python -m mmclip_dist.checkpoint.conversion_process CHECKPOINT OUT`: DeepSpeed's conversion, in a process of its own.

It unpickles whatever the files hold, so `safe.check_files` must have seen them before.
DeepSpeed converts Adam's two moments only. This adds the optimizer's other states (averaged weights, AMSGrad's maximum).
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
)
from torch import Tensor

from mmclip_dist.engine import deepspeed_inside

_ADAM = {"exp_avg", "exp_avg_sq", "step"}


def main(checkpoint: str, out: str) -> None:
    ds_to_universal.main(
        Namespace(
            input_folder=checkpoint, output_folder=out, num_extract_workers=4, num_merge_workers=2, keep_temp_folder=False,
            strict=True, inject_missing_state=False,
        )
    )  # fmt: skip
    convert_other_states(checkpoint, Path(out))


def convert_other_states(checkpoint: str, out: Path) -> None:
    """Write OUT/zero/WEIGHT/STATE.pt for each state of the optimizer that DeepSpeed leaves out."""
    files, stage = deepspeed_inside.optimizer_files(checkpoint)
    ranks = [_load(file)[OPTIMIZER_STATE_DICT] for file in files]
    shapes = _load(deepspeed_inside.weight_file(checkpoint))[PARAM_SHAPES]
    cut = stage == 3
    pieces: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for rank, optimizer in enumerate(ranks):
        shares = _shares_of_weights(optimizer, shapes, rank, len(ranks)) if cut else _shares_of_groups(optimizer)
        for name, states, start, length in shares:
            for key in _others(states):
                pieces[name, key].append(states[key].narrow(0, start, length))
    shape_of = {name: shape for group in shapes for name, shape in group.items()}
    for (name, key), parts in pieces.items():
        torch.save({PARAM: torch.cat(parts).view(shape_of[name])}, out / "zero" / name / f"{key}.pt")


def _load(file: str) -> Any:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _others(states: dict[str, Any]) -> list[str]:
    return [key for key, value in states.items() if key not in _ADAM and torch.is_tensor(value) and value.ndim == 1]


Share = tuple[str, dict[str, Any], int, int]
"""A weight's name, the states of the flat tensor with its share on one rank, and the share's start and length there."""


def _shares_of_groups(optimizer: dict[str, Any]) -> Iterator[Share]:
    """ZeRO 1 and 2: a rank holds a slice of each group's flat tensor, wherever that cuts the weights."""
    for group, mapping in enumerate(optimizer[PARAM_SLICE_MAPPINGS]):
        for name, fragment in mapping.items():
            yield name, optimizer[BASE_OPTIMIZER_STATE]["state"][group], fragment.start, fragment.numel


def _shares_of_weights(optimizer: dict[str, Any], shapes: list[dict[str, Any]], rank: int, world: int) -> Iterator[Share]:
    """ZeRO 3: a rank holds its part of every weight, the last one padded."""
    for group, sizes in enumerate(shapes):
        start = 0
        for name, shape in sizes.items():
            part = math.ceil(shape.numel() / world)
            length = max(0, min(part, shape.numel() - rank * part))
            yield name, optimizer[OPTIMIZER_STATE_DICT]["state"][group], start, length
            start += part


if __name__ == "__main__":
    main(*sys.argv[1:])
