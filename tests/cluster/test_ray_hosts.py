"""The offline stages on a Ray cluster of two hosts: the bytes of one machine, also after the worker host is switched off or cut
off."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
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
SHARDS = 80
SET = ("synthetic", "--count", f"{SHARDS}", "--seed", "1", "--size", "32", "--splits", "train=1", "--samples-per-shard", "1")
# Ray gives a silent host up after 5 tries of 10 s, 3 s apart; here sooner, and still later than a busy machine answers.
SOON = {"period_ms": "1000", "timeout_ms": "3000", "failure_threshold": "4", "initial_delay_ms": "1000"}


@dataclass
class RayHosts:
    """A Ray head on host-a with one CPU, and a node on host-b."""

    cluster: Cluster
    folder: Path
    base: str
    local: Path
    held: ExitStack
    variables: dict[str, str]

    def node(self, host: str, cpus: int, *words: str) -> None:
        """Switch Ray on at a host."""
        command = ["ray", "start", "--block", "--disable-usage-stats", f"--num-cpus={cpus}", "--object-store-memory=80000000"]
        own = 'mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && exec "$@"'  # hosts share no folder for sessions
        entered = [*self.cluster.made.enter(host), "bash", "-c", own, "bash", *command, *words]
        self.held.enter_context(child(entered, self.folder / f"{host}.log", environment(self.variables)))

    def renew_worker(self, cpus: int) -> None:
        """Switch host-b off, whatever it is, and on again, as a node with so many CPUs."""
        if "host-b" in self.cluster.made.pids:
            self.cluster.made.end("host-b")
        self.cluster.made.add("host-b", 2)
        self.node("host-b", cpus, f"--address={HEAD}:{PORT}", "--node-ip-address=10.77.0.2")
        wait_for(lambda: self.nodes() == 2)

    def nodes(self) -> int:
        found = subprocess.run(
            [*self.cluster.made.enter("host-a"), "ray", "list", "nodes", "--filter", "state=ALIVE", "--format", "json",
             "--address", f"http://{HEAD}:8265"], env=environment(self.variables), capture_output=True, text=True, check=False,
        )  # fmt: skip
        return found.stdout.count('"node_id"')

    def submit(self, *words: str) -> subprocess.Popen[str]:
        told = self.variables | {"RAY_ADDRESS": f"http://{HEAD}:8265"}
        return self.cluster.start("launch", "ray-job", "--", *words, "--workers", "2", variables=told)

    def broken(self, strike: Callable[[str], None], out: Path, *words: str) -> Finished:
        """A job whose worker host is struck once some more shards are made."""
        before = made_in(out)
        job = self.submit(*words, "--out", str(out))
        wait_for(lambda: job.poll() is not None or made_in(out) >= before + 12, 240)
        strike("host-b")
        made, began = made_in(out), time.monotonic()
        assert job.poll() is None and made < SHARDS, ended(job).output[-3000:]
        found = ended(job, timeout=200)
        print(f"ended {time.monotonic() - began:.0f} s after the loss at {made} shards, code {found.returncode}")
        return found


def made_in(out: Path) -> int:
    return len(list(out.glob("*.tar")))


@pytest.fixture(scope="module")
def hosts(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    folder = tmp_path_factory.mktemp("ray")
    pack_synthetic(str(folder / "many"), SHARDS, seed=1, size=32, splits={"train": 1.0}, samples_per_shard=1)
    packed = ended(cluster.start("pack", *SET, f"{cluster.url}/many", variables=cluster.variables))
    assert packed.returncode == 0, packed.output
    variables = cluster.variables | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    variables |= {f"RAY_health_check_{name}": value for name, value in SOON.items()}
    with ExitStack() as held:
        made = RayHosts(cluster, folder, f"{cluster.url}/many/train", folder / "many" / "train", held, variables)
        made.node("host-a", 1, "--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--dashboard-host=0.0.0.0")
        wait_for(lambda: made.nodes() == 1)
        yield made
    if "host-b" in cluster.made.pids:
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


def test_a_worker_host_that_is_switched_off_costs_time_and_no_byte(hosts: RayHosts, tmp_path: Path) -> None:
    """Two workers, one on each host, of which one loses all its processes at once."""
    hosts.renew_worker(cpus=1)
    expected = in_one_process(entities_stage(str(hosts.local), str(tmp_path / "entities")))
    found = hosts.broken(hosts.cluster.made.end, tmp_path / "off", "entities", hosts.base)
    assert found.returncode == 0, found.output[-3000:]
    assert files_in(tmp_path / "off") == expected


@pytest.mark.timeout(600)
def test_the_only_host_with_room_is_named_when_it_is_lost_and_the_job_goes_on_until_another_is_cut_off(
    hosts: RayHosts, untrained: Path, tmp_path: Path
) -> None:
    expected = in_one_process(attention_stage(str(hosts.local), str(tmp_path / "expected"), str(untrained)))
    out, words = tmp_path / "scores", ("attention", hosts.base, "--checkpoint", str(untrained))
    hosts.renew_worker(cpus=2)
    alone = hosts.broken(hosts.cluster.made.end, out, *words, "--cpus", "2", "--lost-s", "5")
    assert alone.returncode == 1 and made_in(out) < SHARDS, alone.output[-3000:]
    told = "failed: no worker has run for 5 s, and no host is left with room for one (each asks for 2 CPUs and 0 GPUs)"
    assert f"{told}; lost: host-b (10.77.0.2); the same command makes the other shards" in alone.output, alone.output[-3000:]
    assert "Traceback" not in alone.output

    hosts.renew_worker(cpus=1)
    cut = hosts.broken(hosts.cluster.made.cut, out, *words)  # one worker on each host again, of which one is silent
    assert cut.returncode == 0, cut.output[-3000:]
    assert files_in(out) == expected
