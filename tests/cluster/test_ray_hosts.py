"""The offline stages on a Ray cluster of two hosts: the bytes of one machine, also after the worker host is cut off."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from mmclip_launch.processes import child, environment
from mmclip_shards.datasets.synthetic.set import pack_synthetic

from mmclip_dist.offline.attention import attention_stage
from mmclip_dist.offline.entities import entities_stage
from mmclip_dist.offline.stage import Stage, Worker
from tests.cluster.conftest import Cluster, ended
from tests.conftest import wait_for
from tests.launched import Finished

pytestmark = pytest.mark.slow

HEAD, PORT = "10.77.0.1", 6379
SET = ("synthetic", "--count", "128", "--seed", "1", "--size", "32", "--splits", "train=1", "--samples-per-shard", "1")
SHARDS = 128
# Ray gives a silent host up after 5 tries of 10 s, 3 s apart; here sooner, and still later than a busy machine answers.
SOON = {"period_ms": "1000", "timeout_ms": "3000", "failure_threshold": "4", "initial_delay_ms": "1000"}


@dataclass
class RayHosts:
    """A Ray head on host-a with one CPU, and nodes on other hosts with one CPU each."""

    cluster: Cluster
    folder: Path
    base: str
    local: Path
    held: ExitStack
    variables: dict[str, str]

    def node(self, host: str, *words: str) -> None:
        """Switch Ray on at a host."""
        command = ["ray", "start", "--block", "--disable-usage-stats", "--num-cpus=1", "--object-store-memory=80000000", *words]
        own = 'mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && exec "$@"'  # hosts share no folder for sessions
        entered = [*self.cluster.made.enter(host), "bash", "-c", own, "bash", *command]
        self.held.enter_context(child(entered, self.folder / f"{host}.log", environment(self.variables)))

    def nodes(self) -> int:
        found = subprocess.run(
            [*self.cluster.made.enter("host-a"), "ray", "list", "nodes", "--filter", "state=ALIVE", "--format", "json",
             "--address", f"http://{HEAD}:8265"], env=environment(self.variables), capture_output=True, text=True, check=False,
        )  # fmt: skip
        return found.stdout.count('"node_id"')

    def submit(self, *words: str) -> subprocess.Popen[str]:
        told = self.variables | {"RAY_ADDRESS": f"http://{HEAD}:8265"}
        return self.cluster.start("launch", "ray-job", "--", *words, "--workers", "2", variables=told)

    def broken(self, out: Path, *words: str) -> Finished:
        """A job whose worker host is cut off once some shards are made."""
        job = self.submit(*words, "--out", str(out))
        wait_for(lambda: job.poll() is not None or len(list(out.glob("*.tar"))) >= 12, 240)
        self.cluster.made.cut("host-b")
        made, began = len(list(out.glob("*.tar"))), time.monotonic()
        assert job.poll() is None and made < SHARDS, ended(job).output[-3000:]
        found = ended(job, timeout=200)
        print(f"ended {time.monotonic() - began:.0f} s after the cut at {made} shards, code {found.returncode}")
        return found


@pytest.fixture(scope="module")
def hosts(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    folder = tmp_path_factory.mktemp("ray")
    pack_synthetic(str(folder / "many"), 128, seed=1, size=32, splits={"train": 1.0}, samples_per_shard=1)
    packed = ended(cluster.start("pack", *SET, f"{cluster.url}/many", variables=cluster.variables))
    assert packed.returncode == 0, packed.output
    variables = cluster.variables | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    variables |= {f"RAY_health_check_{name}": value for name, value in SOON.items()}
    with ExitStack() as held:
        made = RayHosts(cluster, folder, f"{cluster.url}/many/train", folder / "many" / "train", held, variables)
        made.node("host-a", "--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--dashboard-host=0.0.0.0")
        made.node("host-b", f"--address={HEAD}:{PORT}", "--node-ip-address=10.77.0.2")
        wait_for(lambda: made.nodes() == 2)
        yield made
    cluster.made.end("host-b")
    cluster.made.add("host-b", 2)


def files_in(folder: Path) -> dict[str, bytes]:
    """Shards and indexes. A killed writer leaves a file that begins with a dot."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "." and path.name != "manifest.json"}


def in_one_process(stage: Stage) -> dict[str, bytes]:
    """The files of a stage without Ray."""
    worker = Worker(stage)
    for number in range(SHARDS):
        worker.process(number)
    return files_in(Path(stage.out))


def test_a_worker_host_that_is_lost_costs_time_and_no_byte(hosts: RayHosts, untrained: Path, tmp_path: Path) -> None:
    """Two workers, one on each host: first both stay, then the worker host's cable is pulled."""
    entities = in_one_process(entities_stage(str(hosts.local), str(tmp_path / "entities")))
    scores = in_one_process(attention_stage(str(hosts.local), str(tmp_path / "scores"), str(untrained)))
    whole = ended(hosts.submit("entities", hosts.base, "--out", str(tmp_path / "whole")))
    assert whole.returncode == 0, whole.output[-3000:]
    assert files_in(tmp_path / "whole") == entities

    cut = hosts.broken(tmp_path / "cut", "attention", hosts.base, "--checkpoint", str(untrained))
    assert cut.returncode == 0, cut.output[-3000:]
    assert files_in(tmp_path / "cut") == scores
