"""What a card would run, compiled along the kernels' own launch path: it fits, spills nothing, and does not grow."""

from __future__ import annotations

import importlib
import json
import sys
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from mmclip_kernels import tiles

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
CASES = [
    *((90, case) for case in ("bf16", "bf16, one row", "bf16, one column", "bf16, sigmoid")),
    (80, "bf16"), (100, "bf16"), (80, "fp16, sigmoid, pairs excluded"), (90, "fp32, sigmoid"),
    (90, "vectors"), (80, "vectors, one row, sigmoid"),
    (90, "masking, bf16, 196 scores, split"), (90, "masking, bf16, 196 tokens"), (90, "masking, bf16, 1024 tokens"),
]  # fmt: skip


def _codes(architecture: int, case: str) -> list[Any]:
    sys.path.insert(0, str(BENCH))
    module = importlib.import_module("machine_code")
    return [module.asdict(row.code) for row in module.rows_of(architecture, {case: module.CASES[case]})]


def test_the_computed_time_of_a_loss_is_within_its_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It follows from the committed table and launches, for the tiles that are in use."""
    monkeypatch.syspath_prepend(str(BENCH))
    bound = importlib.import_module("bound")
    table = json.loads((BENCH / "results" / "machine_code.json").read_text())
    codes = {row["kernel"]: row for row in table["rows"] if (row["case"], row["architecture"]) == ("bf16", 90)}
    used = [tiles.logits_tile(way, torch.bfloat16, False, 90) for way in ("sweep", "gradient")]
    for committed, card in zip(table["losses"], (bound.H200, bound.H100), strict=True):
        assert committed == bound.document(bound.parts(codes, *used, 32768, 512, card), 32768, 512, card)
    assert table["losses"][0]["bound ms"] <= 8.5 < table["losses"][0]["nothing hidden ms"]
    products = [part.products for part in bound.parts(codes, *used, 32768, 512, bound.H200)]
    assert sum(products) == pytest.approx(4.004 * 2 * 32768**2 * 512 / (bound.H200.tensor * 1e9), rel=1e-3)
    slow = replace(bound.H200, bandwidth=0.001)
    assert bound.parts(codes, *used, 32768, 512, slow)[3].bound > 1000 * 2 * 32768**2 / 1e9


@pytest.mark.slow
def test_machine_code_is_that_of_the_committed_table(compiler: Executor) -> None:
    """One row and one column compile, too, which Triton makes constants. Nothing is spilled but a little by the backward sweep on
    sm_100, and no kernel has grown by more than a tenth."""
    document = json.loads((BENCH / "results" / "machine_code.json").read_text())
    table = {(row["architecture"], row["case"], row["kernel"]): row for row in document["rows"]}
    for (architecture, case), codes in zip(CASES, compiler.map(_codes, *zip(*CASES, strict=True)), strict=True):
        for code in codes:
            found = architecture, case, code["kernel"]
            spilled = 48 if found == (100, "bf16", "_gradient_tile") else 0  # why: tiles.py
            assert code["programs"] >= 1 and code["spilled"] <= spilled, found  # it fits an SM, shared memory included
            if code["kernel"] == "_select":
                assert code["programs"] * code["warps"] >= 16, found  # a quarter of an SM's warps, to hide its loads behind
            if triton.__version__ == document["triton"]:  # another compiler makes other code
                assert all(code[part] <= 1.1 * table[found][part] for part in ("loop", "usual", "rest")), found
