"""The arithmetic of cost against what torch counts, keeps and allocates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmclip_dist.config import Config, load_config
from mmclip_dist.engine.layer_execution import checkpoint_activations
from mmclip_dist.plan import cost
from tests.model.synthetic_batch import VOCABULARY, batch_of, config_of, load_of, model_of
from tests.plan.live_memory import LiveMemory


@pytest.fixture
def one_rank(tmp_path: Path):
    """A process group, as in training: without one, the contrastive loss is a single operation to torch's counters."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("overrides", "load", "batch"),
    [
        ([], {}, 4),
        ([], {"scored": True}, 4),
        (["attmim.mode=split"], {}, 4),
        (["attmim.mode=context", "attmim.share=0.5", "entmlm.share=0.25", "entmlm.input=embeddings"], {}, 4),
        (["attmim.mode=context", "attmim.share=0.5"], {"scored": True}, 4),
        (["loss.image=0", "loss.entity=0"], {"tokens": 20}, 8),
        (["loss.contrastive=0", "loss.entity=0"], {"diseases": 20}, 3),
        (["model.image={size: 96, patch: 16, width: 64, depth: 2, heads: 2}"], {"tokens": 48, "masked": 3}, 2),
    ],
)
def test_flops_are_those_that_torch_counts(one_rank: None, overrides: list[str], load: dict, batch: int) -> None:
    config = config_of(*overrides, batch=batch)
    expected = load_of(config, **load)
    model, data = model_of(config, expected.prompts // 2), batch_of(config, expected)
    found = cost.pieces(config, expected, 4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:  # of CPU attention it counts this one
        losses = model(data)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        torch.stack(list(losses.values())).sum().backward()
    assert cost.forward_flops(found) == pytest.approx(forward.get_total_flops(), rel=0.005)
    total = forward.get_total_flops() + backward.get_total_flops()
    assert cost.training_flops(found) == pytest.approx(total, rel=0.005)


@pytest.mark.parametrize("mode", ["feature", "split", "context"])
def test_what_gradient_caching_computes_twice(one_rank: None, mode: str) -> None:
    config = config_of(f"attmim.mode={mode}", batch=4)
    load = load_of(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model_of(config, load.prompts // 2)(batch_of(config, load), embed_only=True)
    expected = cost.recomputed_flops(cost.pieces(config, load, 4), checkpointed=False, cached=True)
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.005)


@pytest.mark.parametrize("overrides", [[], ["loss.entity=0"], ["attmim.mode=split"]])
def test_parameters_are_those_of_the_model(overrides: list[str]) -> None:
    config = config_of(*overrides, batch=2)
    built = sum(parameter.numel() for parameter in model_of(config, 6).parameters())
    assert cost.parameters(config, VOCABULARY) == pytest.approx(built, rel=2e-3)


def kept_bytes(config: Config, load: cost.Load) -> int:
    """Bytes of the distinct storages that autograd keeps, without the weights and the batch."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model, data = model_of(config, load.prompts // 2).to(dtype), batch_of(config, load)
    outside = {p.untyped_storage().data_ptr() for p in model.parameters()}
    outside |= {value.untyped_storage().data_ptr() for value in data.values() if isinstance(value, torch.Tensor)}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in outside:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(data)
    return sum(value.untyped_storage().nbytes() for value in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("overrides", "load", "batch"),
    [
        ([], {}, 8),
        (["attmim.mode=split"], {}, 5),
        (["attmim.mode=context", "attmim.share=0.25", "entmlm.share=0.5", "entmlm.input=embeddings"], {}, 8),
        (["loss.image=0", "loss.entity=0"], {"tokens": 12}, 8),
        (["model.image={size: 96, patch: 16, width: 64, depth: 6, heads: 2}"], {"tokens": 48, "masked": 30}, 3),
    ],
)
def test_what_autograd_keeps(one_rank: None, overrides: list[str], load: dict, batch: int, precision: str) -> None:
    config = config_of(*overrides, batch=batch, precision=precision)
    expected = load_of(config, **load)
    found = cost.pieces(config, expected, 2 if precision == "bf16" else 4)
    assert sum(p.saved * p.layers for p in found) == pytest.approx(kept_bytes(config, expected), rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_fullest_moment_of_the_backward_pass(one_rank: None, checkpointed: bool, precision: str) -> None:
    """Bytes alive in forward and backward, with every layer's activations kept and with the layers' inputs alone."""
    config = config_of("model.image={size: 64, patch: 8, width: 96, depth: 8, heads: 4}", batch=8, precision=precision)
    load, number = load_of(config), 2 if precision == "bf16" else 4
    model = model_of(config, load.prompts // 2).to(torch.bfloat16 if number == 2 else torch.float32)
    if checkpointed:
        checkpoint_activations(model)
    data = batch_of(config, load)
    with LiveMemory() as live:
        before = live.alive
        torch.stack(list(model(data).values())).sum().backward()
    found = cost.pieces(config, load, number)
    moment = cost.fullest(cost.checkpointed(found) if checkpointed else found, number, most_gradients=1e12)
    assert moment.total == pytest.approx(live.peak - before, rel=0.15)


def test_published_flops_of_clip_g_14() -> None:
    """open_clip's profile of ViT-g-14: 581.15 GFLOP forward; ours has an MLP of 4 widths (5,632), it has 6,144."""
    config = load_config(
        "mmclip_vit_b16",
        [
            "loss.image=0", "loss.entity=0", "model.embed=1024",
            "model.image={size: 224, patch: 14, width: 1408, depth: 40, heads: 16}",
            "model.text={width: 1024, depth: 24, heads: 16, max_tokens: 77}",
        ],
    )  # fmt: skip
    found = cost.pieces(config, cost.Load(1, 1, 77, 0, 0, 1, 49408, 1), 2)
    narrower_mlp = 40 * 256 * 4 * 1408 * (6144 - 4 * 1408)
    assert cost.forward_flops(found) + narrower_mlp == pytest.approx(581.15e9, rel=0.01)


def test_no_gradient_of_the_pixels_is_counted() -> None:
    """The first layer's weights have a gradient, and so has its input everywhere but there."""
    config = config_of(batch=4)
    patches = next(piece for piece in cost.pieces(config, load_of(config), 4) if piece.name == "patches")
    assert patches.backward == 1.0
