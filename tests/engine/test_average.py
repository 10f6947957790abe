"""LAMB and the average of the weights, on one process, against their equations. (ZeRO stages: test_optimizer.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmclip_dist.config import Optim
from mmclip_dist.engine.optimizer import AVERAGE, build_optimizer
from tests.engine import two_ranks
from tests.ranks import run_ranks


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


@pytest.mark.slow
def test_lamb_of_ranks_that_hold_shares_steps_as_one_that_holds_all(tmp_path: Path) -> None:
    code, outputs = run_ranks(two_ranks.lamb, tmp_path, ranks=2, folder=tmp_path)
    assert code == 0 and all("shares step as the whole" in output for output in outputs), outputs


def test_lamb_is_adam_with_a_trust_ratio_over_many_steps() -> None:
    """Without decay it is Adam itself, bias correction included."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-2, 3, 12)) for _ in range(2))
    lamb = build_optimizer([{"params": [ours], "weight_decay": 0.0}], Optim(steps=1, name="lamb"), sharded=False)
    adam = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-6)
    lamb.param_groups[0]["lr"] = 0.1
    for step in range(4):
        ours.grad = theirs.grad = torch.linspace(1, 2, 12).mul(step).sin()
        lamb.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_tensors_without_decay_are_not_scaled() -> None:
    bias = torch.nn.Parameter(torch.full((4,), 6.0))
    optimizer = build_optimizer([{"params": [bias], "weight_decay": 0.0}], Optim(steps=1, name="lamb"), sharded=False)
    bias.grad = torch.full((4,), 0.7)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert bias.detach().tolist() == pytest.approx([5.9] * 4, rel=1e-4)
