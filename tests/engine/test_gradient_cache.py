"""Gradient caching: parts add up to the whole, gradient by gradient, dropout included. (ZeRO stages: test_optimizer.py.)"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmclip_dist.config import Config
from mmclip_dist.data.batch import Batch, split_batch
from mmclip_dist.engine import gradient_cache
from mmclip_dist.engine.gradient_cache import forward_backward, weighted_sum
from mmclip_dist.model.build import build_model
from tests.batches import DISEASES, in_passes, mixed_batch
from tests.engine import two_ranks
from tests.ranks import run_ranks


class PlainEngine:
    """The part of DeepSpeed's interface that a step uses, over plain autograd.

    parts: the gradient accumulation steps, by which DeepSpeed divides a loss unless it is told not to.
    """

    def __init__(self, module: nn.Module, parts: int = 1) -> None:
        self.module, self.parts, self.boundaries = module, parts, []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        (loss / self.parts if scale_wrt_gas else loss).backward()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundaries.append(is_boundary)


def step(config: Config, tokenizer: Any, batch: Batch, dropout: float = 0.0) -> tuple[dict, dict, PlainEngine]:
    model = build_model(config, tokenizer, DISEASES).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    count = len(batch["keys"])
    engine = PlainEngine(model, count // (config.optim.micro_batch or count))
    torch.manual_seed(3)
    losses = forward_backward(engine, in_passes(batch, model, config.optim.micro_batch), config.loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in losses.items()}, gradients, engine


@pytest.mark.parametrize("mode", ["feature", "split", "context,attmim.share=0.5,entmlm.share=0.5,entmlm.input=embeddings"])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("weights", [(), ("loss.contrastive=0",), ("loss.image=0", "loss.entity=0"), ("loss.contrastive=0.5",)])
def test_parts_add_up_to_the_whole(sets, tokenizer, mode: str, micro: int, weights: tuple[str, ...]) -> None:
    batch = mixed_batch(sets, tokenizer)
    options = [*f"attmim.mode={mode}".split(","), *weights]
    whole_losses, whole, _ = step(sets.config(*options), tokenizer, batch)
    losses, parts, engine = step(sets.config(*options, f"optim.micro_batch={micro}"), tokenizer, batch)
    assert engine.boundaries == [False] * (8 // micro - 1) + [True]
    torch.testing.assert_close(losses, whole_losses, rtol=1e-5, atol=1e-6)
    assert parts.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_the_temperature_is_counted_once(sets, tokenizer) -> None:
    batch = mixed_batch(sets, tokenizer)
    whole = step(sets.config(), tokenizer, batch)[1]["log_scale"]
    for micro in (1, 2, 4):
        ratio = step(sets.config(f"optim.micro_batch={micro}"), tokenizer, batch)[1]["log_scale"] / whole
        assert ratio.item() == pytest.approx(1.0, abs=1e-4)


def test_dropout_is_the_same_in_both_passes(sets, tokenizer) -> None:
    """The cached gradient fits only the embeddings that it was made for."""
    batch = mixed_batch(sets, tokenizer)
    config = sets.config("optim.micro_batch=2", "loss.image=0", "loss.entity=0")
    seen: dict[bool, list[Tensor]] = {False: [], True: []}

    def watch(module: nn.Module, _: Any, output: Tensor) -> None:
        seen[torch.is_grad_enabled()].append(output.detach())

    model = build_model(config, tokenizer, DISEASES).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.image_head.register_forward_hook(watch)
    torch.manual_seed(3)
    forward_backward(PlainEngine(model), in_passes(batch, model, config.optim.micro_batch), config.loss)
    after = torch.rand(1)
    assert len(seen[False]) == len(seen[True]) == 4
    assert all(torch.equal(first, second) for first, second in zip(seen[False], seen[True], strict=True))
    torch.manual_seed(3)
    assert not torch.equal(after, torch.rand(1))  # and the generators have moved on


@pytest.mark.parametrize("contrastive", [1.0, 0.0])
def test_every_part_of_every_step_draws_dropout_of_its_own(sets, tokenizer, contrastive: float) -> None:
    """With and without a first pass, whose dropout is replayed: 8 times the same sample, in parts of 2, twice."""
    batch = mixed_batch(sets, tokenizer)
    same = taken(batch, [int((batch["report_id"] >= 0).nonzero()[0, 0])] * 8)
    config = sets.config("optim.micro_batch=2", f"loss.contrastive={contrastive}")
    model = build_model(config, tokenizer, DISEASES).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    seen: list[Tensor] = []
    model.image_decoder.register_forward_hook(lambda module, _, output: seen.append(output.detach()))
    torch.manual_seed(3)
    for _ in range(2):
        forward_backward(PlainEngine(model), in_passes(same, model, config.optim.micro_batch), config.loss)
    assert len(seen) == 8
    assert not any(torch.equal(first, second) for first, second in combinations(seen, 2))


@pytest.mark.parametrize("micro", [2, 8])
def test_an_infinite_loss_leaves_no_finite_gradient(sets, tokenizer, monkeypatch: pytest.MonkeyPatch, micro: int) -> None:
    """So that the step is skipped. An infinite constant has finite gradients of its own."""
    monkeypatch.setattr(gradient_cache, "weighted_sum", lambda *sums: weighted_sum(*sums) + torch.inf)
    _, gradients, _ = step(sets.config(f"optim.micro_batch={micro}"), tokenizer, mixed_batch(sets, tokenizer))
    for name in ("log_scale", "image_head.weight", "mask_token"):
        assert not bool(gradients[name].isfinite().any()), name


@pytest.mark.slow
def test_parts_add_up_on_ranks_that_mask_different_numbers_of_tokens(sets, tokenizer, tmp_path: Path) -> None:
    """Rank 0 has one report, rank 1 several."""
    batch = mixed_batch(sets, tokenizer)
    order = (batch["report_id"] < 0).long().argsort(stable=True).tolist()
    batches = [taken(batch, rows) for rows in (order[:1] + order[5:], order[1:5])]
    first, second = (int((of_rank["target_tokens"] >= 0).sum()) for of_rank in batches)
    assert 0 < first < second
    torch.save(batches, tmp_path / "batches.pt")
    code, outputs = run_ranks(two_ranks.caching, sets.overrides(tmp_path), tmp_path, ranks=2, folder=tmp_path)
    assert code == 0 and all("parts add up" in output for output in outputs), outputs


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["feature", "split", "context,attmim.share=0.5,entmlm.share=0.5,entmlm.input=embeddings"])
def test_ranks_with_unequal_shares_train_as_one_process(sets, tokenizer, tmp_path: Path, mode: str) -> None:
    options = f"attmim.mode={mode}".split(",")
    batch, config = mixed_batch(sets, tokenizer), sets.config(*options)
    losses, gradients, _ = step(config, tokenizer, batch)
    whole = {"losses": {name: float(value) for name, value in losses.items()}, "gradients": list(gradients.values())}
    torch.save(whole, tmp_path / "whole.pt")
    torch.save([taken(batch, list(range(5))), taken(batch, list(range(5, 8)))], tmp_path / "batches.pt")
    arguments = [*sets.overrides(tmp_path), *options], tmp_path
    code, outputs = run_ranks(two_ranks.uneven, *arguments, ranks=2, folder=tmp_path)
    assert code == 0 and all("unequal shares add up" in output for output in outputs), outputs


def taken(batch: Batch, rows: list[int]) -> Batch:
    found = {name: value[rows] if isinstance(value, Tensor) else value for name, value in batch.items()}
    return Batch(**found | {"keys": [batch["keys"][row] for row in rows]})  # type: ignore[typeddict-item]


def test_a_part_holds_the_samples_of_its_place(sets, tokenizer) -> None:
    batch = mixed_batch(sets, tokenizer)
    parts = split_batch(batch, 4)
    assert [key for part in parts for key in part["keys"]] == batch["keys"]
    assert torch.equal(torch.cat([part["image"] for part in parts]), batch["image"])
    assert all(part["step"] == batch["step"] for part in parts) and split_batch(batch, 1) == [batch]


def test_memory_follows_the_part_not_the_batch(sets, tokenizer) -> None:
    """Bytes that autograd keeps at once, of a batch four times as large."""

    def kept(config: Config, batch: Batch) -> int:
        alive, peak = 0, 0

        class Engine(PlainEngine):
            def __call__(self, *arguments: Any, **options: Any) -> Any:
                nonlocal alive
                alive = 0  # what the last part kept is gone with its graph
                return super().__call__(*arguments, **options)

        def pack(tensor: Tensor) -> Tensor:
            nonlocal alive, peak
            alive += tensor.nbytes
            peak = max(peak, alive)
            return tensor

        model = build_model(config, tokenizer, DISEASES)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward_backward(Engine(model), in_passes(batch, model, config.optim.micro_batch), config.loss)
        return peak

    batch = mixed_batch(sets, tokenizer)
    large = Batch(**{name: value.repeat(4, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value * 4
                     if isinstance(value, list) else value for name, value in batch.items()})  # fmt: skip
    whole = kept(sets.config(), batch)
    assert kept(sets.config(), large) > 3 * whole
    assert kept(sets.config("optim.micro_batch=8"), large) < 1.1 * whole
