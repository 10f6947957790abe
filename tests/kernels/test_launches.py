"""How often one contrastive loss launches something, and that the host waits for nothing: counted without a card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, "kernels/bench")
import launches
print(json.dumps([{way: count.sums() for way, count in launches.count_loss(*case).items()} for case in launches.CASES[::2]]))
"""


@pytest.mark.slow
def test_launches_are_those_of_the_committed_table() -> None:
    table = json.loads((ROOT / "kernels/bench/results/launches.json").read_text())
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert found.returncode == 0, found.stderr[-3000:]
    for known, counted in zip(table[::2], json.loads(found.stdout), strict=True):
        for way in ("forward", "backward"):
            assert counted[way]["reads"] == 0  # a CUDA graph cannot hold one
            assert counted[way]["launches"] <= known[way]["launches"]
            assert counted[way]["collectives"] <= known[way]["collectives"]
    assert table[0]["forward"]["launches"] <= 40 and table[0]["backward"]["launches"] <= 60
