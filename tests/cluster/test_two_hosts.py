"""Training across two machines with addresses, sshd and a store of their own: DeepSpeed's launcher by pdsh over ssh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmclip_dist.run.metrics import read_metrics
from tests.cluster.machines import Machines, machines, missing, store
from tests.conftest import Sets, wait_for
from tests.launched import Finished, final_weights, last_step, run_training

pytestmark = pytest.mark.slow

STEPS = 32
LOST_S = 6
RUN = (f"optim.steps={STEPS}", "checkpoint.every=4", "log_every=1", "optim.lr=0.1", "data.workers=1", "zero_stage=1")
ALIVE_S = 20  # ssh gives a silent host up


@dataclass
class Cluster:
    """Two hosts, and a folder from which runs are started. overrides: of a run on sets in the store."""

    made: Machines
    folder: Path
    sources: str
    tokenizer: list[str]

    def overrides(self, run: Path) -> list[str]:
        return [*self.tokenizer, f"run_dir={run}", f"data.sources={self.sources}", *RUN, f"health.lost_s={LOST_S}"]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """`mmclip ...` on the first host."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return subprocess.Popen(
            [*self.made.enter("host-a"), "env", "-C", str(self.folder), sys.executable, "-m", "mmclip_launch.cli", *words],
            env=environment | {"DS_ACCELERATOR": "cpu"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *words: str, timeout: float = 240) -> Finished:
        process = self.start(*words)
        output, _ = process.communicate(timeout=timeout)
        return Finished(process.returncode, output)


@pytest.fixture(scope="module")
def cluster(sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        warnings.warn(f"training across hosts is NOT TESTED: {why}", stacklevel=1)
        pytest.skip(f"training across hosts is NOT TESTED: {why}")
    folder = tmp_path_factory.mktemp("cluster")
    with machines(folder / "machines", "host-a", "host-b") as made, store(made, sets.folder) as (url, variables):
        work = folder / "work"
        work.mkdir()
        (work / "hosts").write_text("host-a slots=1\nhost-b slots=1\n")
        keys = [f"{name.lower()} = {variables.pop(name)}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        (work / "credentials").write_text("\n".join(["[default]", *keys]))
        passed = variables | {"AWS_SHARED_CREDENTIALS_FILE": str(work / "credentials"), "DS_ACCELERATOR": "cpu"}
        (work / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in passed.items()))
        plain = sets.overrides("unused")
        sources = next(word for word in plain if word.startswith("data.sources="))
        kept = [word for word in plain if not word.startswith(("data.sources=", "run_dir="))]
        yield Cluster(made, work, sources.partition("=")[2].replace(str(sets.folder), url), kept)


def test_a_host_cut_off_ends_the_run_soon_and_the_same_command_goes_on_bit_for_bit(
    cluster: Cluster, sets: Sets, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("launch", "deepspeed", "quickstart", *cluster.overrides(run), "--hostfile", "hosts")
    broken = cluster.start(*command)
    wait_for(lambda: broken.poll() is not None or last_step(run) >= 6)
    if broken.poll() is not None:
        raise AssertionError(broken.communicate()[0])
    cluster.made.cut("host-b")
    began = time.monotonic()
    output, _ = broken.communicate(timeout=LOST_S + ALIVE_S + 30)
    print(
        f"the launcher ended {time.monotonic() - began:.0f} s after the cut, at step {last_step(run)}, code {broken.returncode}"
    )
    assert broken.returncode != 0 and 6 <= last_step(run) < STEPS, output[-4000:]
    told = [line for line in output.splitlines() if "no sign of life from machine host-b (ranks from 1 on)" in line]
    assert len(told) == 1 and "failed: host-a" in told[0], output[-4000:]

    cluster.made.end("host-b")
    began = time.monotonic()
    refused = cluster.run(*command)
    print(f"refused after {time.monotonic() - began:.0f} s: {refused.output}")
    assert refused.returncode == 2 and time.monotonic() - began < 30
    assert "error: host: host-b: " in refused.output and "is it on" in refused.output

    cluster.made.add("host-b", 2)
    resumed = cluster.run(*command)
    assert resumed.returncode == 0 and last_step(run) == STEPS, resumed.output[-4000:]
    assert [row["step"] for row in read_metrics(run)] == list(range(1, STEPS + 1))
    assert (
        len(list((run / "code").iterdir())) == 1
        and json.loads((run / "submitted.json").read_text())["target"] == "deepspeed"
    )
    assert "not-a-secret" not in output + resumed.output
    written = [path for path in run.rglob("*") if path.is_file() and "code" not in path.relative_to(run).parts]
    assert not [path for path in written if b"not-a-secret" in path.read_bytes()]

    run_training([*sets.overrides(tmp_path / "unbroken"), *RUN], tmp_path)
    assert final_weights(run, STEPS) == final_weights(tmp_path / "unbroken", STEPS)


def test_doctor_looks_at_both_hosts(cluster: Cluster, tmp_path: Path) -> None:
    url = json.loads(cluster.sources)[0]["url"]
    words = ("doctor", "--hostfile", "hosts", "--data", url, "--run-dir", str(tmp_path / "run"))
    found = cluster.run(*words, "--json")
    findings = json.loads(found.output)
    assert found.returncode == 0, found.output
    print(*findings, sep="\n")
    assert {(each["host"]) for each in findings if each["check"] == "storage" and each["level"] == "ok"} == {
        "host-a",
        "host-b",
    }
    assert [each["level"] for each in findings if each["check"] == "all-reduce"] in (["ok"], ["warning"])


def test_a_host_with_a_small_disk_of_its_own_instead_of_the_run_folder_is_named(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(run)]
    subprocess.run([*cluster.made.enter("host-b"), *small], check=True)
    began = time.monotonic()
    refused = cluster.run("launch", "deepspeed", "quickstart", *cluster.overrides(run), "--hostfile", "hosts")
    print(f"refused after {time.monotonic() - began:.0f} s:\n{refused.output}")
    assert refused.returncode == 2 and time.monotonic() - began < 30
    assert f"error: run_dir: host-b: {run} is not the folder that this machine sees" in refused.output
    assert (
        f"error: disk: host-b: run_dir: 0.0 GiB free in {run}" in refused.output
        and ": host-a: run_dir" not in refused.output
    )
