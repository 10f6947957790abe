"""What DeepSpeed is given: its JSON, the parameter groups, and no stale lock."""

from __future__ import annotations

import os
import types
from pathlib import Path

import pytest
import torch

from mmclip_dist.config import Optim, load_config
from mmclip_dist.engine import deepspeed_inside
from mmclip_dist.engine.deepspeed_engine import deepspeed_json, set_learning_rate
from mmclip_dist.engine.optimizer import layer_scales, parameter_groups
from mmclip_dist.engine.stale_locks import refuse_stale_locks
from mmclip_dist.model.build import build_model


def test_deepspeed_json_is_derived_and_the_passthrough_wins() -> None:
    config = load_config(
        "quickstart", ["zero_stage=2", "deepspeed={zero_optimization: {overlap_comm: true}, prescale_gradients: true}"]
    )
    found = deepspeed_json(config, 2, gpu=False)
    assert found["train_batch_size"] == config.optim.global_batch == 2 * found["train_micro_batch_size_per_gpu"]
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True} and found["prescale_gradients"] is True
    assert found["gradient_clipping"] == config.optim.clip and found["bf16"]["enabled"] is False


def test_offload_and_half_precision_reach_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(
        "quickstart", ["zero_stage=3", "precision=fp16", "offload={optimizer: cpu, parameters: cpu}", "optim.name=lamb"]
    )
    found = deepspeed_json(config, 2, gpu=True)
    assert found["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
    }  # fmt: skip
    assert found["fp16"] == {"enabled": True} and found["bf16"] == {"enabled": False}
    assert found["zero_force_ds_cpu_optimizer"] is False and found["zero_allow_untested_optimizer"] is True
    assert "optimizer" not in found  # ours is handed over built
    monkeypatch.setattr(deepspeed_inside, "multiplies_fp16", lambda: False)
    with pytest.raises(ValueError, match="AVX512-FP16"):
        deepspeed_json(config, 2, gpu=False)


def test_layers_further_from_the_loss_learn_more_slowly(sets, tokenizer) -> None:
    shape = "width: 32, depth: 3, heads: 2"
    config = sets.config(f"model.image={{size: 32, patch: 8, {shape}}}", f"model.text={{{shape}, max_tokens: 48}}")
    model = build_model(config, tokenizer, ["Nodule"])
    scales = {name: layer_scales(model, 0.5).get(p, 1.0) for name, p in model.named_parameters()}
    assert scales["image.vit.embeddings.patch_embeddings.projection.weight"] == 0.5**4
    assert scales["text.bert.embeddings.word_embeddings.weight"] == 0.5**4
    for layer in range(3):
        encoders = ("image.vit", "text.bert")
        of_layer = {scale for name, scale in scales.items() if f".{layer}." in name and name.startswith(encoders)}
        assert of_layer == {0.5 ** (3 - layer)}
    full = {name for name, scale in scales.items() if scale == 1.0}
    assert {"image.vit.layernorm.weight", "image_head.weight", "log_scale", "image_decoder.layers.0.self_norm.bias"} <= full
    groups = parameter_groups(model, Optim(steps=1), layer_scales(model, 0.5))
    assert len(groups) == 2 * 5 and sum(len(group["params"]) for group in groups) == len(scales)
    alone = parameter_groups(model, Optim(steps=1, name="lamb"), layer_scales(model, 0.5))
    assert all(len(group["params"]) == 1 for group in alone if group["weight_decay"])


def test_a_lock_of_a_killed_build_is_told(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    refuse_stale_locks(tmp_path)
    lock.touch()
    refuse_stale_locks(tmp_path)  # a build may well be under way
    os.utime(lock, (0, 0))
    with pytest.raises(ValueError, match=r"killed and left .*cpu_adam/lock"):
        refuse_stale_locks(tmp_path)


def test_norms_biases_tokens_and_the_temperature_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model.token = torch.nn.Parameter(torch.zeros(1, 1, 4))
    model.scale = torch.nn.Parameter(torch.zeros(1))
    groups = parameter_groups(model, Optim(steps=1, weight_decay=0.1), {})
    plain, decayed = sorted(groups, key=lambda group: group["weight_decay"])
    assert [p.shape for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 5 and plain["weight_decay"] == 0.0


def test_parts_of_the_batch_are_accumulated() -> None:
    config = load_config("quickstart", ["optim.global_batch=64", "optim.micro_batch=8"])
    found = deepspeed_json(config, 2, gpu=False)
    assert found["train_micro_batch_size_per_gpu"] == 8 and found["gradient_accumulation_steps"] == 4


def test_a_part_larger_than_a_ranks_share_is_the_share() -> None:
    """So that a recipe of one machine runs on many."""
    config = load_config("quickstart", ["optim.global_batch=64", "optim.micro_batch=32"])
    found = deepspeed_json(config, 8, gpu=False)
    assert found["train_micro_batch_size_per_gpu"] == 8 and found["gradient_accumulation_steps"] == 1


def test_each_group_gets_the_rate_of_the_step_times_its_scale() -> None:
    optim = Optim(steps=100, warmup=0, lr=0.1, global_batch=1024)
    groups: list[dict] = [{"lr": 0.0, "lr_scale": 0.25}, {"lr": 0.0}]
    engine = types.SimpleNamespace(optimizer=types.SimpleNamespace(param_groups=groups))
    assert set_learning_rate(engine, 50, optim) == pytest.approx(0.05)
    assert [group["lr"] for group in groups] == pytest.approx([0.0125, 0.05])
