"""The plan against memory as it is really allocated by a DeepSpeed engine, and the rules that it must obey."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from mmclip_dist.cli import app
from mmclip_dist.config import load_config
from mmclip_dist.plan.cards import card_named, card_of_device
from mmclip_dist.plan.layouts import communication, largest, layouts, links, memory, plan, recommend
from mmclip_dist.plan.setup import Choice, Corpus, Setup, configured, setup_of
from tests.conftest import PAPER
from tests.model.synthetic_batch import PROMPT_TOKENS, VOCABULARY, config_of, load_of
from tests.plan import measure_memory
from tests.plan.measure_memory import BUCKET
from tests.ranks import run_ranks

SHAPES: list[dict[str, Any]] = [
    # First activations rule, in the last one weights and optimizer.
    {"overrides": [], "batch": 8, "tokens": 40, "masked": 10},
    {"overrides": ["attmim.mode=split"], "batch": 8, "tokens": 40, "masked": 10},
    {"overrides": ["loss.image=0", "loss.entity=0"], "batch": 16, "tokens": 24, "masked": 0},
    {"overrides": ["model.image={size: 96, patch: 16, width: 128, depth: 6, heads: 4}"], "batch": 4, "tokens": 48, "masked": 20},
    {"overrides": ["model.image={size: 32, patch: 16, width: 192, depth: 3, heads: 4}", "attmim.mode=split"],
     "batch": 1, "tokens": 8, "masked": 2},
]  # fmt: skip
STAGES = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
CASES = [SHAPES[0] | {"stage": stage, "precision": precision} for stage, precision in STAGES]
CASES += [shape | {"stage": 1, "precision": ("fp32", "bf16")[index % 2]} for index, shape in enumerate(SHAPES[1:])]
CASES += [
    SHAPES[0] | {"overrides": [override], "stage": stage, "precision": precision}
    for override, stage, precision in (
        ("optim.micro_batch=2", 1, "bf16"), ("optim.micro_batch=2", 2, "fp32"), ("optim.ema=0.99", 1, "bf16"),
        ("model.checkpoint_activations=true", 1, "fp32"),
    )
]  # fmt: skip
CASES[-1]["batch"] = 24  # so that what is kept still outweighs the step


def allocated(cases: list[dict[str, Any]], ranks: int, folder: Path, devices: str = "") -> list[int]:
    """Bytes that real engines allocated on the first rank, case by case. devices: "": the CPU."""
    code, outputs = run_ranks(
        measure_memory.main, cases, ranks=ranks, folder=folder, timeout=400, CUDA_VISIBLE_DEVICES=devices
    )
    lines = [line for line in outputs[0].splitlines() if line.startswith("MEASURED ")]
    assert code == 0 and lines, outputs[0][-5000:]
    values: list[int] = json.loads(lines[0].removeprefix("MEASURED "))
    return values


def planned(case: dict[str, Any], ranks: int) -> float:
    config = config_of(*case["overrides"], batch=case["batch"] * ranks, precision=case["precision"])
    corpus = Corpus(case["tokens"], case["masked"], 1.0, load_of(config).prompts // 2, PROMPT_TOKENS, VOCABULARY)
    setup = Setup(config, corpus, card_named("h100"), ranks, 8, 0.2, bucket=BUCKET, overlap=False)
    return memory(setup, replace(configured(config, ranks), zero_stage=case["stage"])).allocated


def check(cases: list[dict[str, Any]], found: list[int], ranks: int) -> None:
    ratios = [planned(case, ranks) / size for case, size in zip(cases, found, strict=True)]
    for ratio, case in zip(ratios, cases, strict=True):
        print(f"planned / allocated {ratio:.3f} on {ranks} ranks: {case}")
    assert all(0.85 < ratio < 1.15 for ratio in ratios), ratios


@pytest.mark.slow
def test_memory_is_what_deepspeed_allocates(tmp_path: Path) -> None:
    check(CASES, allocated(CASES, 1, tmp_path), 1)


@pytest.mark.slow
def test_memory_of_two_ranks_that_share_the_states(tmp_path: Path) -> None:
    cases = [SHAPES[-1] | {"stage": stage, "precision": "bf16" if stage % 2 else "fp32"} for stage in range(4)]
    check(cases, allocated(cases, 2, tmp_path), 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_is_what_a_gpu_allocates(tmp_path: Path) -> None:
    """A ViT-B, so that the libraries' own workspaces, some ten MiB, weigh little."""
    big = {
        "overrides": ["model.image={size: 224, patch: 16, width: 768, depth: 12, heads: 12}",
                      "model.text={width: 768, depth: 12, heads: 12, max_tokens: 48}"],
        "batch": 64, "tokens": 40, "masked": 10, "precision": "bf16",
    }  # fmt: skip
    cases = [big | {"stage": stage} for stage in range(4)]
    check(cases, allocated(cases, 1, tmp_path, devices="0"), 1)


BIG = ("optim.global_batch=4096", "data.streams=4096")


def vit_b16(*overrides: str, gpus: int = 64, card: str = "h100", **options: Any) -> Setup:
    return setup_of(load_config("mmclip_vit_b16", [*BIG, *PAPER, *overrides]), card_named(card), gpus, **options)


def test_what_each_stage_shards() -> None:
    setup, number = vit_b16(), vit_b16().parameters
    found = [memory(setup, Choice(stage, 64)) for stage in range(4)]
    assert [m.optimizer for m in found] == [12 * number, *[12 * number / 64] * 3]
    assert [m.weights for m in found] == [2 * number] * 3 + [pytest.approx(2 * number * (1 + 1 / 64))]  # gathered to compute
    small = vit_b16("deepspeed={zero_optimization: {reduce_bucket_size: 1000000}}")
    assert memory(small, Choice(2, 16)).gradients < 0.1 * memory(small, Choice(1, 16)).gradients
    offloaded = memory(setup, Choice(3, 64, offload_optimizer=True, offload_parameters=True))
    assert offloaded.optimizer == 0 and offloaded.weights == 2 * number and offloaded.host > 12 * number / 64


def test_checkpointing_and_small_passes_trade_time_for_memory() -> None:
    setup = vit_b16()
    plain, checkpointed, cached = (plan(setup, c) for c in (Choice(1, 64), Choice(1, 64, True), Choice(1, 16)))
    for saving in (checkpointed, cached):
        assert saving.memory.total < 0.8 * plain.memory.total and saving.time.total > 1.1 * plain.time.total
    assert checkpointed.time.flops == plain.time.flops  # recomputed work is no model FLOP
    with pytest.raises(ValueError, match=r"micro_batch=48 does not divide the 64"):
        plan(setup, Choice(1, 48))


def test_a_run_is_paid_for_to_the_step_at_which_it_stops() -> None:
    whole, half = (plan(vit_b16(*stop), Choice(1, 64)) for stop in ((), ("optim.stop_at=25000",)))
    assert whole.setup.config.optim.steps == 50_000
    assert half.days == pytest.approx(whole.days / 2)


def test_overlap_comm_of_the_configuration_is_planned_with() -> None:
    """Without it ZeRO-3's collectives stand beside no backward pass."""
    found = [vit_b16(f"deepspeed={{zero_optimization: {{overlap_comm: {value}}}}}") for value in ("true", "false")]
    assert [setup.overlap for setup in found] == [True, False] and vit_b16().overlap is None
    hidden, exposed = (plan(setup, Choice(3, 64)).time.exposed for setup in found)
    assert exposed > 1.1 * hidden


def test_links_by_hand() -> None:
    """H100 nodes: 450 GB/s between neighbours, 400 GB/s out of a node, 80% of either reached."""
    assert links(vit_b16(gpus=8), 8e9) == pytest.approx(8e9 * 7 / 8 / 450e9 / 0.8)
    assert links(vit_b16(gpus=64), 8e9) == pytest.approx(8e9 * 7 / 8 / 400e9 / 0.8)
    assert communication(vit_b16(gpus=1), Choice(1, 4096)) == 0
    one, three = communication(vit_b16(), Choice(1, 64)), communication(vit_b16(), Choice(3, 64))
    assert three > 1.4 * one  # three times the weights over the links in place of two
    assert communication(vit_b16(), Choice(2, 16)) > 2 * communication(vit_b16(), Choice(1, 16))  # it scatters in every pass


def test_the_time_is_that_of_the_assumed_share_of_the_peak() -> None:
    setup = vit_b16("loss.image=0", gpus=1, mfu=0.5)
    found = plan(setup, Choice(1, 4096))
    per_sample = found.time.flops / 4096
    assert 3 * 2 * 86e6 * 196 < per_sample < 3 * 2 * 150e6 * 196  # the ViT-B's parameters on its patches, and some text
    assert found.time.products == pytest.approx(found.time.flops / (0.5 * 989e12), rel=0.01)
    assert found.mfu == pytest.approx(0.5, abs=0.02)
    slow_loader = plan(vit_b16("data.workers=0", gpus=64), Choice(1, 64))
    assert slow_loader.time.total == slow_loader.time.data == pytest.approx(64 / 580)
    many = plan(vit_b16("data.workers=100", gpus=64), Choice(1, 64))
    assert many.time.data == pytest.approx(64 * 0.033e-3)  # however many workers there are, the main thread takes what they make


def test_the_recommended_layout_fits_and_the_least_is_named_where_none_does() -> None:
    setup = vit_b16("model.image={width: 1408, depth: 40, heads: 16, size: 224, patch: 14}", gpus=8, card="a100-40")
    found = [largest(setup, layout) for layout in layouts()]
    best = recommend(found)
    assert best.fits and best.choice.micro_batch < setup.share
    larger = plan(setup, replace(best.choice, micro_batch=2 * best.choice.micro_batch))
    assert not larger.fits
    assert all(c.time.total > best.time.total / 1.05 for c in found if c.fits)
    huge = vit_b16("model.image={width: 8192, depth: 64, heads: 64, size: 224, patch: 14}", gpus=1, card="a100-40")
    with pytest.raises(ValueError, match=r"nothing fits: .*GiB of 40\.0.*use more GPUs"):
        recommend([largest(huge, layout) for layout in layouts()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": 12}, "12 GPUs do not fill nodes of 8; use 8 or 16"),
        ({"gpus": 24}, r"global_batch=4096 does not divide over 24 GPUs; set it to 4080 or 4104"),
        ({"mfu": 21.0}, "between 0 and 1"),
        ({"card": "v100"}, "the known ones are a100-40, a100-80, h100"),
    ],
)
def test_bad_input_says_what_to_change(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit_b16(**arguments)


def test_cards_are_known_by_the_name_of_their_driver() -> None:
    for device, name in {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA GH200 480GB": "gh200", "NVIDIA B200": "b200", "NVIDIA H100 PCIe": None, "NVIDIA H200 NVL": None,
        "NVIDIA GB200": None, "Tesla V100-SXM2-32GB": None,
    }.items():  # fmt: skip
        card = card_of_device(device)
        assert (card and card.name) == name


def test_the_command_prints_every_part_and_overrides_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    command(["mmclip_vit_b16", "--gpus", "8", "--gpu", "h200", "--price", "2.5", "--samples", "1000000"])
    out = capsys.readouterr().out
    for part in (
        "weights", "gradients", "optimizer", "activations", "loss", "workspace", "reserve", "communication", "data", "samples/s",
        "MFU assumed of the compute: 21.0% (", "51.2 epochs", "at 2.5 a GPU hour", "<- as configured",
    ):  # fmt: skip
        assert part in out, part
    assert "computed on paper, not measured" in out
    tables = [re.findall(r"^\| (\S.*?) +\| +([\d.]+) \|$", part, re.MULTILINE) for part in out.split("| time of a step")]
    gib, ms = ({name: float(value) for name, value in table} for table in tables)
    best = recommend([largest(setup_of(load_config("mmclip_vit_b16"), card_named("h200"), 8), layout) for layout in layouts()])
    assert sum(gib.values()) == pytest.approx(2 * gib["sum"] + gib["of h200"], abs=0.05)  # all other rows are its parts
    assert gib["sum"] == pytest.approx(best.memory.total / 2**30, abs=0.006)
    assert ms["step"] == pytest.approx(1e3 * best.time.total, abs=0.006)
    hours = 50_000 * best.time.total / 3600 * 8
    assert f"{hours:,.0f} GPU hours, {hours * 2.5:,.0f} at 2.5 a GPU hour" in out
    pasted = next(line for line in out.splitlines() if line.startswith("recommended: ")).split()[1:]
    assert pasted == ["zero_stage=1", "optim.micro_batch=128"]
    assert configured(load_config("mmclip_vit_b16", pasted), 8) == Choice(1, 128)
    for choice in (Choice(3, 8, True, True, True), Choice(1, 16, False, True), Choice(0, 4)):
        assert configured(load_config("mmclip_vit_b16", choice.overrides()), 8) == choice


def test_the_tables_of_the_scaling_document_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "launch" / "scaling.md").read_text()
    blocks = re.findall(r"```\n(mmclip plan .*?)\n```\n\n(\|.*?\n)(?:\n|\Z)", text, re.DOTALL)
    assert len(blocks) >= 5
    for line, table in blocks:
        command(shlex.split(line.replace("\\\n", " "))[2:])
        assert capsys.readouterr().out == table, line


def command(arguments: list[str]) -> None:
    found = typer.main.get_command(app).main(["plan", *arguments], standalone_mode=False)
    assert not found
