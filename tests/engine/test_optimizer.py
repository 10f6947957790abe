"""Optimizers, ZeRO stages, precisions, the average of the weights: two ranks against each other and against plain torch."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from mmclip_dist.config import Config
from mmclip_dist.data.batch import Batch
from mmclip_dist.data.loader import label_names
from mmclip_dist.data.reading import open_sets
from mmclip_dist.engine.schedule import learning_rate
from mmclip_dist.model.build import build_model
from tests.batches import loader
from tests.engine import ranks_worker
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

STEPS = 3
# A decay of 0.5 at this rate, a clip far below the gradient's norm, unequal layers: what goes wrong shows in 3 steps.
BASE = (
    "optim.steps=100", "optim.warmup=0", "optim.lr=0.1", "optim.clip=0.5", "optim.weight_decay=0.5", "optim.layer_decay=0.5",
    "optim.ema=0.9",
)  # fmt: skip
# Without it, ZeRO-3 keeps weights as small as these whole on every rank.
SHARDED = "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}, fp16: {initial_scale_power: 4}}"
THEIRS = "{type: AdamW, params: {torch_adam: true, lr: 1, betas: [0.9, 0.95], weight_decay: 0.5}}"
USUAL = ("optim.lr=0.01",)
STAGES = range(4)
CASES: dict[str, tuple[tuple[str, ...], str | None]] = {
    **{f"zero{stage}": ((f"zero_stage={stage}", SHARDED), "universal" if stage > 1 else "checkpoint") for stage in STAGES},
    **{f"zero{stage}-bf16": ((f"zero_stage={stage}", SHARDED, "precision=bf16"), None) for stage in STAGES},
    **{f"zero{stage}-fp16": ((f"zero_stage={stage}", SHARDED, "precision=fp16"), "fp16") for stage in (1, 3)},
    **{f"zero{stage}-lamb": ((f"zero_stage={stage}", SHARDED, "optim.name=lamb"), None) for stage in (0, 1, 3)},
    # At a usual rate, so that what Adam makes of rounding stays below 1e-6.
    **{f"zero{stage}-cached": ((f"zero_stage={stage}", SHARDED, *USUAL, "optim.micro_batch=1"), None) for stage in STAGES},
    "zero3-whole": (("zero_stage=3",), None),
    "zero2-offload": (("zero_stage=2", "offload.optimizer=cpu"), None),
    "zero3-offload": (("zero_stage=3", "offload={optimizer: cpu, parameters: cpu}", SHARDED), None),
    "zero3-checkpointing": (("zero_stage=3", "model.checkpoint_activations=true", SHARDED), None),
    "zero3-split": (("zero_stage=3", "attmim.mode=split", SHARDED), None),
    "zero1-split": (("zero_stage=1", "attmim.mode=split"), None),
    "zero1-theirs": (("zero_stage=1", "optim.name=deepspeed", "optim.ema=null", f"deepspeed={{optimizer: {THEIRS}}}"), None),
}
AVERAGED = [name for name in CASES if name != "zero1-theirs"]


def part(batch: Batch, rows: list[int]) -> Batch:
    taken = {name: [value[row] for row in rows] if isinstance(value, list) and value else value for name, value in batch.items()}
    return Batch(**{name: value[rows] if isinstance(value, Tensor) else value for name, value in taken.items()})  # type: ignore[typeddict-item]


@pytest.fixture(scope="module")
def steps(sets, tokenizer) -> list[list[Batch]]:
    """What each of two ranks gets in each step: the second one unpaired images alone, and in the last step no sidecar."""
    batches = loader(sets.config("optim.global_batch=32"), tokenizer)
    found = []
    for _ in range(STEPS):
        batch = next(batches)
        paired = (batch["report_id"] >= 0).nonzero()[:3, 0].tolist()
        unpaired = (batch["report_id"] < 0).nonzero()[:5, 0].tolist()
        assert len(paired + unpaired) == 8
        found.append([part(batch, paired + unpaired[:1]), part(batch, unpaired[1:])])
    found[-1][1]["has_attention"][2] = False
    return found


@pytest.fixture(scope="module")
def results(sets, steps: list[list[Batch]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    diseases = label_names(open_sets(sets.config().data.sources, sets.config().data, 1))
    torch.save({"steps": steps, "diseases": diseases}, folder / "batches.pt")
    base = [*sets.overrides(folder / "run"), *BASE]
    cases = {name: ([*base, *overrides], probe) for name, (overrides, probe) in CASES.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    code, outputs = run_ranks(ranks_worker.main, folder, ranks=2, folder=folder, timeout=390)
    assert code == 0, "\n".join(output[-6000:] for output in outputs)
    return {name: torch.load(folder / f"{name}.pt") for name in CASES}


@pytest.fixture(scope="module")
def by_hand(sets, tokenizer, steps: list[list[Batch]]) -> dict[str, dict[str, Any]]:
    """The same training in this process on whole batches: torch's AdamW or the equations of LAMB, one tensor at a time."""
    diseases = label_names(open_sets(sets.config().data.sources, sets.config().data, 1))
    runs = {"adamw": (), "lamb": (), "adamw, usual rate": USUAL}
    return {
        name: train_by_hand(sets.config(*BASE, *overrides), tokenizer, diseases, steps, name) for name, overrides in runs.items()
    }


def train_by_hand(config: Config, tokenizer: Any, diseases: Any, steps: list[list[Batch]], name: str) -> dict[str, Any]:
    model = build_model(config, tokenizer, diseases)
    weights = dict(model.named_parameters())
    average = {key: weight.detach().clone() for key, weight in weights.items()}
    moments = {key: (torch.zeros_like(weight), torch.zeros_like(weight)) for key, weight in weights.items()}
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step, parts in enumerate(steps):
        losses = model(whole(parts))
        model.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)))
        found["losses"].append([float(value.detach()) for value in losses.values()])
        for key, weight in weights.items():
            if weight.grad is None:
                continue
            rate = learning_rate(step, config.optim) * expected_scale(key)
            decay = config.optim.weight_decay if weight.squeeze().ndim >= 2 else 0.0
            with torch.no_grad():
                weight.copy_(stepped(weight, weight.grad, moments[key], step + 1, rate, decay, config.optim.betas, name))
                average[key].mul_(0.9).add_(weight, alpha=0.1)
    found["weights"], found["average"] = {key: weight.detach().clone() for key, weight in weights.items()}, average
    model.load_state_dict(average)
    return found | {"losses averaged": [float(value.detach()) for value in model(whole(steps[0])).values()]}


def stepped(
    weight: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int, rate: float, decay: float,
    betas: tuple[float, float], name: str,
) -> Tensor:  # fmt: skip
    """The weight after one step, as the papers write it."""
    for moment, value, beta in zip(moments, (gradient, gradient**2), betas, strict=True):
        moment.copy_(beta * moment + (1 - beta) * value)
    first, second = (moment / (1 - beta**step) for moment, beta in zip(moments, betas, strict=True))
    direction = first / (second.sqrt() + (1e-6 if name == "lamb" else 1e-8)) + decay * weight
    if name == "lamb" and decay and weight.norm() > 0 and direction.norm() > 0:
        direction = direction * weight.norm() / direction.norm()
    return weight - rate * direction


def expected_scale(name: str) -> float:
    """Encoders of one layer at a layer_decay of 0.5."""
    if ".embeddings." in name:
        return 0.25
    return 0.5 if name.startswith(("image.", "text.")) and ".layer" in name and ".layernorm." not in name else 1.0


def whole(parts: list[Batch]) -> Batch:
    joined = {
        name: torch.cat([part[name] for part in parts]) if isinstance(value, Tensor) else value  # type: ignore[literal-required]
        for name, value in parts[0].items()
    }
    return Batch(**joined)  # type: ignore[typeddict-item]


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], largest: float = 3e-5, mean: float = 1e-6) -> None:
    """The rate is 8e-4. Biases of attention keys, whose gradient is rounding noise about 0, are the furthest apart."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error = (ours[name] - value).abs()
        assert error.max() <= largest, (name, error.max())
    errors = torch.cat([(ours[name] - value).abs().flatten() for name, value in theirs.items()])
    assert errors.mean() <= mean, errors.mean()


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in weights.values()])


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []


FP32 = [name for name in CASES if not name.endswith(("-bf16", "-fp16", "-split", "-cached"))]


@pytest.mark.parametrize("case", FP32)
def test_every_stage_trains_as_plain_torch_does(results, by_hand, case: str) -> None:
    """Losses, weights and their average, and the global norm, whatever is sharded, offloaded or computed twice."""
    ours, theirs = results[case], by_hand["lamb" if case.endswith("-lamb") else "adamw"]
    for step in range(STEPS):
        assert ours["losses"][step] == pytest.approx(theirs["losses"][step], rel=1e-5)
        assert ours["norms"][step] == (None if case[:5] == "zero0" else pytest.approx(theirs["norms"][step], rel=1e-4))
    assert_near(ours["weights"][-1], theirs["weights"])
    if case in AVERAGED:
        assert_near(ours["average"], theirs["average"])
        assert ours["losses averaged"] == pytest.approx(theirs["losses averaged"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_clipped_to_their_norm_over_all_ranks(results, case: str) -> None:
    assert results[case]["clipped"] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_each_layer_has_its_rate(sets, results, case: str) -> None:
    rate = learning_rate(STEPS - 1, sets.config(*BASE, *CASES[case][0]).optim)
    assert results[case]["rates"] == pytest.approx([rate / 4, rate / 2, rate])


@pytest.mark.parametrize("case", AVERAGED)
def test_the_average_is_that_of_the_float32_weights_from_the_first_ones_on(results, case: str) -> None:
    found = results[case]
    expected = found["weights"][0]
    assert_equal(found["average at first"], expected)
    for weights in found["weights"][1:]:
        expected = {name: 0.9 * value + 0.1 * weights[name] for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found["average"][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", AVERAGED)
def test_looking_at_the_average_leaves_the_weights_as_they_were(results, case: str) -> None:
    found = results[case]
    assert_equal(found["weights after"], found["weights"][-1])
    assert found["losses after"] == found["losses before"] != found["losses averaged"]
    assert found["temperature"] == pytest.approx(1 / found["weights"][-1]["log_scale"].exp().item(), rel=1e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_carry_the_average(results, stage: int) -> None:
    found = results[f"zero{stage}"]
    assert_equal(found["loaded"], found["weights"][-1])
    assert_equal(found["loaded average"], found["average"])


@pytest.mark.parametrize("stage", [2, 3])
def test_universal_checkpoints_go_on_bit_for_bit_once_mended(results, stage: int) -> None:
    """The average, the groups' weight decay and scales, and the step counters are what DeepSpeed loses."""
    found = results[f"zero{stage}"]
    assert_equal(found["converted"], found["weights"][-1])
    assert_equal(found["converted average"], found["average"])
    assert_equal(found["next of converted"], found["next"])
    assert_equal(found["next of converted, average"], found["next, average"])


@pytest.mark.parametrize("case", [name for name in CASES if name.endswith(("-bf16", "-fp16"))])
def test_half_precision_keeps_float32_weights(results, case: str) -> None:
    ours = results[case]
    for step in range(STEPS):
        assert ours["losses"][step] == pytest.approx(results["zero0"]["losses"][step], rel=2e-2)
    moved, should = (flat(found[-1]) - flat(found[0]) for found in (ours["weights"], results["zero0"]["weights"]))
    assert torch.cosine_similarity(moved, should, dim=0) > 0.95
    assert moved.norm().item() == pytest.approx(should.norm().item(), rel=0.05)
    half = torch.bfloat16 if case.endswith("bf16") else torch.float16
    weight = ours["weights"][-1]["image_head.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.to(half).float())


def test_stages_agree_in_half_precision(results) -> None:
    """At stage 0 DeepSpeed steps on zero gradients while it starts: with it, Adam would begin at its second step."""
    for stage in (1, 2):
        assert_near(results["zero0-bf16"]["weights"][-1], results[f"zero{stage}-bf16"]["weights"][-1])


def test_recomputed_activations_change_no_bit_under_zero3(results) -> None:
    assert_equal(results["zero3-checkpointing"]["weights"][-1], results["zero3"]["weights"][-1])


def test_split_mode_trains_alike_under_zero3(results) -> None:
    assert results["zero3-split"]["losses"] == [pytest.approx(row, rel=1e-5) for row in results["zero1-split"]["losses"]]
    assert_near(results["zero3-split"]["weights"][-1], results["zero1-split"]["weights"][-1])


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_caching_ends_in_the_weights_of_the_whole_batch(results, by_hand, stage: int) -> None:
    """Four parts of one sample a rank, through every stage: the batch, the temperature's gradient and the clip are exact."""
    cached, whole = results[f"zero{stage}-cached"], by_hand["adamw, usual rate"]
    for name, value in whole["weights"].items():
        # The gradient of an attention key's bias is 0 but for rounding, of which Adam makes steps of full size.
        near = 5e-6 if name.endswith(("key.bias", "k_proj.bias")) else 1e-6
        assert (cached["weights"][-1][name] - value).abs().max() <= near, name
    assert cached["losses"] == [pytest.approx(step, rel=1e-5) for step in whole["losses"]]
    assert cached["weights"][-1]["log_scale"] != cached["weights"][0]["log_scale"]
