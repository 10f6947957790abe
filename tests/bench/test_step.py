"""The parts of the step benchmark at a tiny shape: what it counts, not how long it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmclip_dist.bench import step
from mmclip_dist.bench.variants import (
    PLAIN,
    SHAPES,
    VARIANTS,
    AdamW,
    build,
    loss_of,
    make_sample,
    report_lengths,
    run_step,
    without_idle_parts,
)

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]


def parts(variant: str, unpaired: float = 0.0, batch: int = 8):
    model = build(TINY, variant, CPU, batch)
    return model, make_sample(model, TINY, batch, unpaired, 0, CPU)


def test_reports_are_as_long_as_said() -> None:
    lengths = report_lengths(np.random.default_rng(0), 4096, 112)
    assert 44 < lengths.mean() < 46 and lengths.min() >= 6 and lengths.max() == 112


@pytest.mark.parametrize("unpaired", [0.0, 0.25])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_takes_steps_that_lower_its_loss(variant: str, unpaired: float) -> None:
    model, sample = parts(variant, unpaired)
    assert (sample.batch["report_id"] < 0).sum() == 8 * unpaired and sample.mask.any(1).all()
    optimizer = AdamW(list(without_idle_parts(model).parameters()))
    for group in optimizer.adam.param_groups:
        group["lr"] = 1e-2
    before = float(loss_of(model, variant, sample).detach())
    for _ in range(10):
        run_step(model, optimizer, variant, sample)
    assert float(loss_of(model, variant, sample).detach()) < 0.95 * before


def test_half_precision_weights_are_stepped_in_float32() -> None:
    """A change too small for bf16 adds up."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([weight])
    for group in optimizer.adam.param_groups:
        group.update(lr=1e-3, weight_decay=0.0)
    for _ in range(10):
        weight.grad = torch.ones(4, dtype=torch.bfloat16)
        optimizer.step()
    torch.testing.assert_close(weight.detach().float(), torch.full((4,), 0.99), atol=4e-3, rtol=0)
    assert weight.grad is None and (weight < 1).all()


def test_tokens_and_operations_are_those_of_each_variant() -> None:
    found = {}
    for variant in VARIANTS:
        model, sample = parts(variant)
        found[variant] = step.counted(model, variant, [sample])
    tokens = {variant: counts for variant, (counts, _) in found.items()}
    mask = sample.batch["token_mask"]
    assert tokens[PLAIN] == {"image tokens": 16, "text tokens": 24, "image decoder tokens": 0, "text decoder tokens": 0}
    assert tokens["MMCLIP feature"]["image tokens"] == 16 and tokens["MMCLIP split"]["image tokens"] == 12
    assert tokens["MMCLIP split"]["image decoder tokens"] == 16
    reports = tokens["MMCLIP feature"]["text decoder tokens"]
    assert int(mask.sum()) / 8 <= reports < mask.shape[1]
    assert tokens["MMCLIP feature"]["text tokens"] == pytest.approx(tokens["contrastive only"]["text tokens"] + reports, abs=0.11)
    operations = {variant: value for variant, (_, value) in found.items()}
    context, alone = operations["MMCLIP context"], operations["contrastive only"]
    assert operations["MMCLIP feature"] > operations["MMCLIP split"] > context > alone > 0
    assert operations[PLAIN] > 0


def test_attention_on_the_cpu_is_counted_as_elsewhere() -> None:
    query = torch.randn(2, 4, 50, 16, requires_grad=True)
    with step.FlopCounterMode(display=False, custom_mapping=step._cpu_attention()) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    # Two products forwards; five backwards, one of which computes the scores anew.
    assert counter.get_total_flops() == 7 * 2 * (2 * 4 * 50 * 50 * 16)


@pytest.mark.slow
def test_the_command_writes_both_tables(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from mmclip_dist.bench import step; step.RESULTS = pathlib.Path(sys.argv[1]); "
        "step.main(['--shape', 'tiny', '--rounds', '1'])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = tmp_path.glob("*.json")
    result = json.loads(found.read_text())
    assert [row["variant"] for row in result["rows"]] == list(VARIANTS) and len(result["engine"]) == 1
    assert result["rows"][0]["ratio"] == 1 and all(row["ms"] > 0 for row in result["rows"])
    assert "overhead" in found.with_suffix(".md").read_text()
