"""The gradients of the terms at the encoders: against plain autograd on the encoders' outputs."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmclip_dist.config import Loss
from mmclip_dist.engine.term_gradients import term_gradients
from mmclip_dist.model.build import build_model
from mmclip_dist.run.metrics import read_metrics
from tests.batches import DISEASES, mixed_batch
from tests.conftest import LONG
from tests.launched import run_training


def test_norms_and_cosines_are_those_of_the_encoders_outputs(sets, tokenizer) -> None:
    batch = mixed_batch(sets, tokenizer)
    model = build_model(sets.config(), tokenizer, DISEASES)
    weights = Loss(image=0.5)
    found = term_gradients(types.SimpleNamespace(module=model), model.prepared(batch), weights)
    assert all(parameter.grad is None for parameter in model.parameters())

    outputs: list[torch.Tensor] = []
    hook = model.image.vit.layernorm.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    losses = model(batch)
    hook.remove()
    (seen,) = outputs
    pulls = {name: torch.autograd.grad(loss, seen, retain_graph=True)[0].flatten() for name, loss in losses.items()}
    assert found["image"]["contrastive"] == pytest.approx(float(pulls["contrastive"].norm()), rel=1e-5)
    assert found["image"]["image"] == pytest.approx(0.5 * float(pulls["image"].norm()), rel=1e-5)
    for term in ("image", "entity"):
        cosine = torch.cosine_similarity(pulls[term], pulls["contrastive"], dim=0)
        assert found["image"][f"{term}_cosine"] == pytest.approx(float(cosine), abs=1e-6)
    assert set(found["text"]) == {"contrastive", "image", "entity", "image_cosine", "entity_cosine"}
    assert all(abs(value) <= 1 for name, value in found["text"].items() if name.endswith("cosine"))


@pytest.mark.slow
def test_a_run_writes_them_and_trains_as_without_them(sets, unbroken: Callable[[int], Path], tmp_path: Path) -> None:
    overrides = [*LONG, "optim.stop_at=10", "zero_stage=2", "log_gradients=true"]
    run_training([*sets.overrides(tmp_path / "run"), *overrides], tmp_path / "ranks")
    rows, plain = read_metrics(tmp_path / "run"), read_metrics(unbroken(2))[:10]
    assert [row["step"] for row in rows if "gradients" in row] == [10]
    assert json.dumps([row["loss"] for row in rows]) == json.dumps([row["loss"] for row in plain])
    for pulls in rows[-1]["gradients"].values():
        assert pulls["contrastive"] > 0 and pulls["entity"] > 0
