"""LAMB and the average of the weights, on one process, against their equations. (ZeRO stages: test_optimizer.py.)"""

from __future__ import annotations

import pytest
import torch

from mmclip_dist.config import Optim
from mmclip_dist.engine.optimizer import AVERAGE, build_optimizer


def test_the_average_starts_at_the_first_weights_and_remembers_them() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.0}], Optim(steps=1, ema=0.9), sharded=False)
    expected = weight.detach().clone()
    for _ in range(3):
        weight.grad = torch.tensor([1.0, -1.0])
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        expected = 0.9 * expected + 0.1 * weight.detach()
    torch.testing.assert_close(optimizer.state[weight][AVERAGE], expected)
    assert (weight.detach() - expected).abs().min() > 0.5  # the weights themselves are far away by now


def test_lamb_steps_by_its_trust_ratio() -> None:
    """The first step of Adam is its sign; LAMB scales it by |weight| / |direction|."""
    weight = torch.nn.Parameter(torch.full((3, 4), 2.0))
    optimizer = build_optimizer([{"params": [weight], "weight_decay": 0.5}], Optim(steps=1, name="lamb"), sharded=False)
    weight.grad = torch.full((3, 4), 0.7)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    # direction: 1 + 0.5 x 2 = 2 everywhere, as large as the weight: the ratio is 1.
    torch.testing.assert_close(weight.detach(), torch.full((3, 4), 1.8), rtol=1e-4, atol=0)
    plain = torch.nn.Parameter(torch.full((3, 4), 6.0))
    optimizer = build_optimizer([{"params": [plain], "weight_decay": 0.5}], Optim(steps=1, name="lamb"), sharded=False)
    plain.grad = torch.full((3, 4), 0.7)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    # direction: 1 + 0.5 x 6 = 4; the ratio is 6 / 4.
    torch.testing.assert_close(plain.detach(), torch.full((3, 4), 6 - 0.1 * 4 * 1.5), rtol=1e-4, atol=0)


def test_tensors_without_decay_are_not_scaled() -> None:
    bias = torch.nn.Parameter(torch.full((4,), 6.0))
    optimizer = build_optimizer([{"params": [bias], "weight_decay": 0.0}], Optim(steps=1, name="lamb"), sharded=False)
    bias.grad = torch.full((4,), 0.7)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert bias.detach().tolist() == pytest.approx([5.9] * 4, rel=1e-4)
