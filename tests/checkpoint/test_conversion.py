"""Checkpoints for another number of ranks: the states that DeepSpeed leaves out are put together from the ranks' shares.

tests/engine/test_optimizer.py and tests/test_broken_runs.py go on from converted checkpoints.
"""

from __future__ import annotations

import os
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_SHAPES,
    PARAM_SLICE_MAPPINGS,
    ZERO_STAGE,
)
from torch import Tensor

from mmclip_dist.checkpoint import conversion
from mmclip_dist.checkpoint.conversion_process import convert_other_states
from mmclip_dist.engine import deepspeed_inside

MATRIX, BIAS, SMALL = torch.arange(12.0).reshape(3, 4), torch.arange(5.0) + 100, torch.arange(2.0) + 200
SHAPES = [{"bias": BIAS.shape, "matrix": MATRIX.shape}, {"small": SMALL.shape}]
PADDING = -1.0


def states(average: list[float]) -> dict[str, Any]:
    """Of one flat tensor: Adam's, which DeepSpeed converts, and the average."""
    flat = torch.tensor(average)
    return {"step": torch.zeros(()), "exp_avg": flat + 1000, "exp_avg_sq": flat + 2000, "ema": flat}


def write(folder: Path, optimizers: list[dict[str, Any]]) -> None:
    for rank, optimizer in enumerate(optimizers):
        torch.save({OPTIMIZER_STATE_DICT: optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save({PARAM_SHAPES: SHAPES}, folder / "mp_rank_00_model_states.pt")
    for name in ("matrix", "bias", "small"):
        (folder / "out" / "zero" / name).mkdir(parents=True)


def converted(folder: Path) -> dict[str, Tensor]:
    convert_other_states(str(folder), folder / "out")
    found = {path: torch.load(path)[PARAM] for path in (folder / "out").rglob("*.pt")}
    assert {path.name for path in found} == {"ema.pt"}
    return {path.parent.name: value for path, value in found.items()}


def assert_whole(found: dict[str, Tensor]) -> None:
    assert {name: value.tolist() for name, value in found.items()} == {
        "matrix": MATRIX.tolist(), "bias": BIAS.tolist(), "small": SMALL.tolist(),
    }  # fmt: skip


def test_shares_that_cut_a_weight_anywhere_are_put_together(tmp_path: Path) -> None:
    """ZeRO 1 and 2: each group is one flat tensor, padded and cut into equal shares."""
    groups = [[*MATRIX.flatten().tolist(), *BIAS.tolist(), PADDING], SMALL.tolist()]

    def at(start: int, count: int) -> Any:
        return types.SimpleNamespace(start=start, numel=count)

    places = [
        [{"matrix": at(0, 9)}, {"small": at(0, 1)}],
        [{"matrix": at(0, 3), "bias": at(3, 5)}, {"small": at(0, 1)}],
    ]
    write(tmp_path, [
        {
            ZERO_STAGE: 2, PARAM_SLICE_MAPPINGS: places[rank],
            BASE_OPTIMIZER_STATE: {"state": {0: states(groups[0][9 * rank :][:9]), 1: states(groups[1][rank:][:1])}},
        }
        for rank in range(2)
    ])  # fmt: skip
    assert_whole(converted(tmp_path))


def test_shares_of_every_weight_are_put_together_without_their_padding(tmp_path: Path) -> None:
    """ZeRO 3 on 4 ranks: of 5 elements they hold 2, 2, 1 and none; of 2 elements 1, 1, none and none."""

    def share(weight: Tensor, rank: int) -> list[float]:
        part = -(-weight.numel() // 4)
        own = weight.flatten().tolist()[rank * part : (rank + 1) * part]
        return own + [PADDING] * (part - len(own))

    write(tmp_path, [
        {
            ZERO_STAGE: 3,
            OPTIMIZER_STATE_DICT: {"state": {0: states(share(BIAS, rank) + share(MATRIX, rank)), 1: states(share(SMALL, rank))}},
        }
        for rank in range(4)
    ])  # fmt: skip
    assert_whole(converted(tmp_path))


def test_the_conversion_is_no_rank_and_tells_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rank's variables in its environment it would try to join the run that waits for it."""
    seen: dict[str, str] = {}

    def run(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        seen.update(env)
        return subprocess.CompletedProcess(command, 1, "", "Traceback ...\nKeyError: 'param_shapes'\n")

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(subprocess, "run", run)
    scratch = tmp_path / "scratch"
    (scratch / "left").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"saved could not be converted for another number of ranks: KeyError: 'param_shapes'$"):
        conversion.convert(tmp_path / "saved", scratch)
    assert seen["PATH"] == os.environ["PATH"] and not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(seen)
    assert not (scratch / "left").exists()  # what a killed conversion left


class Engine:
    """One that gives all groups the settings of the first, as DeepSpeed does at stage 3, and finds nothing or something."""

    def __init__(self, found: bool) -> None:
        self.found = found
        groups = [
            {"params": ["a"], "weight_decay": 0.5, "lr_scale": 1.0}, {"params": ["b"], "weight_decay": 0.0, "lr_scale": 0.25}
        ]  # fmt: skip
        self.optimizer = types.SimpleNamespace(param_groups=groups)
        self._config = types.SimpleNamespace(load_universal_checkpoint=False)

    def zero_optimization_stage(self) -> int:
        return 2

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict]:
        assert self._config.load_universal_checkpoint
        first, *others = self.optimizer.param_groups
        for group in others:
            group.update({name: value for name, value in first.items() if name != "params"})
        return (f"{folder}/{tag}" if self.found else None), {}


@pytest.mark.parametrize("found", [True, False])
def test_every_group_keeps_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    engine = Engine(found)
    before = [dict(group) for group in engine.optimizer.param_groups]
    assert conversion.load_converted(engine, tmp_path / "universal") is found
    assert engine.optimizer.param_groups == before
    assert engine._config.load_universal_checkpoint is False  # a later load is of the usual format


def test_the_universal_format_is_left_when_a_load_fails() -> None:
    engine = Engine(found=True)
    with pytest.raises(KeyError), deepspeed_inside.loading_universal(engine):
        raise KeyError("a file is missing")
    assert engine._config.load_universal_checkpoint is False
