"""Layers that are recomputed or compiled: the same losses and gradients, for less memory."""

from __future__ import annotations

import shutil
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from mmclip_dist.data.batch import Batch
from mmclip_dist.engine.layer_execution import checkpoint_activations, compile_encoders
from mmclip_dist.model.build import build_model
from mmclip_dist.model.mmclip import MMCLIP
from tests.batches import DISEASES, loader

DEEP = (
    "model.image={size: 32, patch: 8, width: 32, depth: 3, heads: 2}",
    "model.text={width: 32, depth: 3, heads: 2, max_tokens: 48}",
)
TEXT = ("tokens", "token_mask", "masked_tokens", "target_tokens", "evidence")


@pytest.fixture
def batches(sets, tokenizer) -> list[Batch]:
    """Batches of different report lengths and numbers, the last one without any report."""
    found = list(islice(loader(sets.config(), tokenizer), 3))
    shorter = {name: found[1][name][:5, :-3] for name in TEXT}  # type: ignore[literal-required]
    rows = {name: value[:5] for name, value in found[1].items() if isinstance(value, Tensor)}
    found[1] = Batch(**(found[1] | rows | shorter))  # type: ignore[typeddict-item]
    found[2]["report_id"].fill_(-1)
    return found


def model_of(sets: Any, tokenizer: Any, *overrides: str) -> MMCLIP:
    return build_model(sets.config(*overrides), tokenizer, DISEASES)


def step(model: MMCLIP, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Losses, gradients, and the bytes that autograd keeps between the passes."""
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)
    total = sum(kept.values())
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [loss.detach() for loss in losses.values()], gradients, total


@pytest.mark.parametrize("mode", ["feature", "split"])
def test_recomputed_activations_change_no_bit_and_save_memory(sets, tokenizer, batches: list[Batch], mode: str) -> None:
    plain, recomputed = (model_of(sets, tokenizer, *DEEP, f"attmim.mode={mode}") for _ in range(2))
    checkpoint_activations(recomputed)
    assert plain.state_dict().keys() == recomputed.state_dict().keys()
    for batch in batches:
        losses, gradients, memory = step(plain, batch)
        again, same, less = step(recomputed, batch)
        assert losses == again and gradients.keys() == same.keys()
        assert all(torch.equal(gradients[name], same[name]) for name in gradients)
        assert less < 0.5 * memory, (less, memory)


def assert_near(ours: MMCLIP, theirs: MMCLIP, batches: list[Batch]) -> None:
    for batch in batches:
        (losses, gradients, _), (again, near, _) = step(theirs, batch), step(ours, batch)
        torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(near[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_compiled_layers_share_graphs_and_new_lengths_need_no_new_one(sets, tokenizer, batches: list[Batch]) -> None:
    """Three layers an encoder; lengths and numbers of reports change from batch to batch. The backend only counts."""
    graphs: list[Any] = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    plain, compiled = model_of(sets, tokenizer, *DEEP), model_of(sets, tokenizer, *DEEP)
    torch._dynamo.reset()
    compile_encoders(compiled, counted)  # type: ignore[arg-type]
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert_near(compiled, plain, batches)
    first = len(graphs)
    for batch in batches:
        for length in (40, 43, 45):
            cut = {name: batch[name][:, :length] for name in TEXT}  # type: ignore[literal-required]
            step(compiled, Batch(**(batch | cut)))  # type: ignore[typeddict-item]
    assert len(graphs) == first <= 6, (first, len(graphs))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_compiled_encoders_of_inductor_compute_the_same(sets, tokenizer, batches: list[Batch]) -> None:
    plain, compiled = model_of(sets, tokenizer), model_of(sets, tokenizer)
    torch._dynamo.reset()
    compile_encoders(compiled)
    assert_near(compiled, plain, batches[:2])


def test_compiling_without_a_compiler_is_refused(sets, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with pytest.raises(ValueError, match=r"cannot build code here.*C\+\+ compiler"):
        compile_encoders(model_of(sets, tokenizer))
