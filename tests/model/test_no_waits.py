"""A step never waits for the device. On the meta device there is nothing to read: every read by the host is an error there.

Copies to the host, `.item()`, indexing by a mask, `nonzero` and branches on a value would each make the host wait for a card, in
the middle of a step. What needs them is done on the host beforehand, in the batch's plan.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmclip_kernels import topk_mask_torch
from mmclip_kernels.patches import Plan as Choice
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmclip_dist.engine.gradient_cache import forward_backward
from mmclip_dist.model.inputs import Counts, PlannedBatch, moved, planned
from tests.engine.test_gradient_cache import PlainEngine
from tests.model.synthetic_batch import batch_of, config_of, load_of, model_of

META = torch.device("meta")


@pytest.fixture
def three_ranks():
    """Ranks that do not exist: their collective calls return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield
    dist.destroy_process_group()


def mixed(scored: bool, known: list[bool]) -> tuple[Any, Any]:
    config = config_of(batch=12)
    load = load_of(config, ranks=3, scored=scored)
    batch = batch_of(config, load)
    batch["report_id"][1], batch["target_tokens"][1], batch["token_mask"][1] = -1, -100, False
    batch["has_attention"] = torch.tensor(known)
    return load, batch


def on_meta(model: nn.Module, batch: PlannedBatch) -> PlannedBatch:
    plan = batch["plan"]
    batch["counts"] = Counts(*(tuple(count + rank - 1 for rank in range(3)) for count in plan.counts))  # ranks differ
    model.to(META)
    return moved(batch, META) | {"counts": batch["counts"]}  # type: ignore[return-value]


@pytest.mark.usefixtures("three_ranks")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("mode", "known"), [("feature", [True] * 4), ("feature", [True, False] * 2), ("feature", [False] * 4),
                                             ("split", [True] * 4), ("context", [True] * 4)])  # fmt: skip
def test_a_step_reads_nothing_from_the_device(mode: str, known: list[bool], passes: int) -> None:
    load, batch = mixed(scored=not all(known), known=known)
    shares = ("attmim.share=0.5", "entmlm.share=0.5", "entmlm.input=embeddings") if mode == "context" else ()
    config = config_of(f"attmim.mode={mode}", *shares, batch=12)
    batch["lot"] = torch.tensor([0.1, 0.2, 0.9, 0.8])
    model = model_of(config, load.prompts // 2)
    ready = on_meta(model, planned(batch, model.text.width, passes, config.shares))
    losses = forward_backward(PlainEngine(model, passes), ready, config.loss)
    assert {name: (loss.shape, loss.device) for name, loss in losses.items()} == {
        name: (torch.Size([]), META) for name in ("contrastive", "image", "entity")
    }
    assert model.mask_token.grad is not None and model.text_head.weight.grad is not None


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.cpu(),
                                  lambda x: x.tolist(), lambda x: x.nonzero()])  # fmt: skip
def test_a_read_would_show(read: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones(4, device=META))


def test_without_a_plan_the_model_reads() -> None:
    """So the first test would fail if the plan were not used."""
    load, batch = mixed(scored=False, known=[True] * 4)
    model = model_of(config_of(batch=4), load.prompts // 2).to(META)
    with pytest.raises((RuntimeError, NotImplementedError)):
        model({name: value.to(META) if isinstance(value, Tensor) else value for name, value in batch.items()})


def test_choosing_patches_reads_nothing() -> None:
    patches, scores = torch.empty(2, 16, 8, device=META), torch.empty(2, 16, device=META)
    topk_mask_torch.forward(
        patches, torch.empty(8, device=META), None, None, None, scores, scores, Choice(8, 1, 8, 0, False, False, 0.1)
    )
