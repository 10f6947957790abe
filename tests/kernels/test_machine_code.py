"""What a card would run, compiled along the kernels' own launch path: it fits, spills nothing, and does not grow."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import pytest
import triton

MACHINE_CODE = Path(__file__).parents[2] / "kernels" / "bench" / "machine_code.py"
CASES = [
    *((90, case) for case in ("bf16", "bf16, one row", "bf16, one column", "bf16, sigmoid")),
    (80, "bf16"), (80, "fp16, sigmoid, pairs excluded"), (90, "fp32, sigmoid"),
    (90, "vectors"), (80, "vectors, one row, sigmoid"),
    (90, "masking, bf16, 196 scores, split"), (90, "masking, bf16, 196 tokens"), (90, "masking, bf16, 1024 tokens"),
]  # fmt: skip


def _codes(architecture: int, case: str) -> list[Any]:
    spec = importlib.util.spec_from_file_location("machine_code", MACHINE_CODE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["machine_code"] = module
    spec.loader.exec_module(module)
    return [module.asdict(row.code) for row in module.rows_of(architecture, {case: module.CASES[case]})]


@pytest.mark.slow
def test_machine_code_is_that_of_the_committed_table(compiler: Executor) -> None:
    """One row and one column compile, too, which Triton makes constants. Nothing is spilled, and no kernel has grown by more than
    a tenth."""
    document = json.loads((MACHINE_CODE.parent / "results" / "machine_code.json").read_text())
    table = {(row["architecture"], row["case"], row["kernel"]): row for row in document["rows"]}
    for (architecture, case), codes in zip(CASES, compiler.map(_codes, *zip(*CASES, strict=True)), strict=True):
        for code in codes:
            found = architecture, case, code["kernel"]
            assert code["programs"] >= 1 and code["spilled"] == 0, found  # it fits an SM, shared memory included
            if code["kernel"] == "_select":
                assert code["programs"] * code["warps"] >= 16, found  # a quarter of an SM's warps, to hide its loads behind
            if triton.__version__ == document["triton"]:  # another compiler makes other code
                assert all(code[part] <= 1.1 * table[found][part] for part in ("loop", "usual", "rest")), found
