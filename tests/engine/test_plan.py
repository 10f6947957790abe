"""The plan against memory as it is really allocated by a DeepSpeed engine, and the rules that it must obey."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.measure_memory import BUCKET
from mmclip_dist.engine.cards import card_named
from mmclip_dist.engine.plan import Choice, Corpus, Setup, memory
from tests.model.synthetic_batch import PROMPT_TOKENS, VOCABULARY, config_of, load_of

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
CASES = [shape | {"stage": stage, "precision": precision} for shape in (SHAPES[0], SHAPES[-1]) for stage, precision in STAGES]
CASES += [shape | {"stage": 1, "precision": precision} for shape, precision in zip(SHAPES, ("fp32", "bf16", "fp32", "bf16"))]


@pytest.fixture(scope="module")
def allocated() -> list[int]:
    """Bytes that real engines allocated, case by case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "engine.measure_memory", port, json.dumps(CASES)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=Path(__file__).parents[1])
    lines = [line for line in found.stdout.splitlines() if line.startswith("MEASURED ")]
    assert found.returncode == 0 and lines, found.stdout[-2000:] + found.stderr[-3000:]
    values: list[int] = json.loads(lines[0].removeprefix("MEASURED "))
    return values


@pytest.mark.parametrize("index", range(len(CASES)))
def test_memory_is_what_deepspeed_allocates(allocated: list[int], index: int) -> None:
    case = CASES[index]
    config = config_of(*case["overrides"], batch=case["batch"], precision=case["precision"])
    load = load_of(config, tokens=case["tokens"], masked=case["masked"])
    corpus = Corpus(load.tokens, load.masked, 1.0, load.prompts // 2, PROMPT_TOKENS, VOCABULARY)
    fused = torch.cuda.is_available()
    setup = Setup(config, corpus, card_named("h100"), 1, 8, 0.2, bucket=BUCKET, overlap=False, fused=fused)
    planned = memory(setup, Choice(case["stage"], case["batch"]))
    print(f"RATIO {planned.allocated / allocated[index]:.3f} {case} {planned}")
    assert planned.allocated == pytest.approx(allocated[index], rel=0.15), (case, planned)
