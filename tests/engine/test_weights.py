"""Weights and their average out of an engine, on one process: looked at, never changed. (ZeRO stages: test_optimizer.py.)"""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmclip_dist.config import Optim, load_config
from mmclip_dist.engine.optimizer import build_optimizer
from mmclip_dist.engine.weights import averaged, averaged_weights, full_weights, temperature


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Counted(nn.Module):
    """One weight and one buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 4.0], dtype=dtype))
        self.register_buffer("count", torch.tensor([7]))


def engine_after(steps: int, *, half: bool = False) -> Any:
    """As much of a stage-0 engine as is asked for. half: bfloat16, with float32 weights beside it as DeepSpeed keeps them."""
    module = Counted(torch.bfloat16 if half else torch.float32)
    master = nn.Parameter(module.weight.detach().float()) if half else module.weight
    basic = build_optimizer([{"params": [master], "weight_decay": 0.0}], Optim(steps=10, ema=0.5), sharded=False)
    for group in basic.param_groups:
        group["lr"] = 0.3
    for _ in range(steps):
        master.grad = torch.tensor([1.0, -1.0, 1.0])
        basic.step()
    module.weight.data.copy_(master.detach())
    wrapped = types.SimpleNamespace(fp16_groups=[[module.weight]], fp32_groups=[[master]]) if half else basic
    return types.SimpleNamespace(
        module=module, optimizer=wrapped, basic_optimizer=basic, zero_optimization_stage=lambda: 0
    )  # fmt: skip


def expected(steps: int) -> tuple[Tensor, Tensor]:
    """The weights after so many steps, and their average. Adam's steps along a constant gradient are lr long."""
    weight = average = torch.tensor([1.0, 2.0, 4.0])
    for _ in range(steps):
        weight = weight - 0.3 * torch.tensor([1.0, -1.0, 1.0])
        average = 0.5 * average + 0.5 * weight
    return weight, average


@pytest.mark.parametrize("half", [False, True])
def test_the_average_is_returned_and_the_weights_stay(half: bool) -> None:
    engine, (weight, average) = engine_after(3, half=half), expected(3)
    for _ in range(2):  # the second look finds what the first one found
        assert full_weights(engine)["weight"].tolist() == pytest.approx(weight.tolist(), rel=1e-5)
        assert averaged_weights(engine)["weight"].tolist() == pytest.approx(average.tolist(), rel=1e-5)
    assert full_weights(engine)["count"].tolist() == [7.0]


@pytest.mark.parametrize("half", [False, True])
def test_the_model_computes_with_the_average_inside_and_with_its_own_weights_after(half: bool) -> None:
    engine, (weight, average) = engine_after(3, half=half), expected(3)
    near = 1e-2 if half else 1e-5
    before = engine.module.weight.detach().clone()
    with pytest.raises(KeyError), averaged(engine):
        assert engine.module.weight.tolist() == pytest.approx(average.tolist(), rel=near)
        raise KeyError("an evaluation that fails")
    assert torch.equal(engine.module.weight, before)
    assert full_weights(engine)["weight"].tolist() == pytest.approx(weight.tolist(), rel=1e-5)


def test_before_the_first_step_the_average_is_the_weights() -> None:
    assert averaged_weights(engine_after(0))["weight"].tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(("learned", "shown"), [(math.log(20.0), 0.05), (math.log(500.0), 0.01)])
def test_the_temperature_is_the_one_that_the_loss_uses(learned: float, shown: float) -> None:
    """It is not below 1 / model.max_scale, however far the weight has gone."""
    module = nn.Module()
    module.log_scale = nn.Parameter(torch.tensor([learned]))
    module.config = load_config("quickstart", ["model.max_scale=100"])  # type: ignore[assignment]
    engine = types.SimpleNamespace(module=module, optimizer=None, zero_optimization_stage=lambda: 0)
    assert temperature(engine) == pytest.approx(shown, rel=1e-5)
