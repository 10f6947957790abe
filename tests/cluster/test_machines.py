"""The machines themselves: nothing of them outlives the process that made them, however that ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import skip_if_missing

pytestmark = pytest.mark.slow

MAKE = """
import json, sys
from pathlib import Path
from tests.cluster.machines import machines
with machines(Path(sys.argv[1]), "host-a") as made:
    made._start("half-made")  # as if the process were killed before the machine has a network
    print(json.dumps(made.pids), flush=True)
    sys.stdin.read()
"""


def test_machines_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    skip_if_missing()
    command = [sys.executable, "-c", MAKE, str(tmp_path / "machines")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        pids = json.loads(process.stdout.readline())
        made = [psutil.Process(pid) for pid in (process.pid, *pids.values())]
        made += [child for each in made for child in each.children(recursive=True)]
        assert pids.keys() == {"switch", "host-a", "half-made"} and len(made) > 6
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(made, timeout=10)
        for each in alive:
            each.kill()
        assert not alive
