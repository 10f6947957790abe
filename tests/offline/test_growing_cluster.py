"""Offline stages on a cluster whose nodes come and go: what waits is seen, new nodes are used, lost ones cost nothing."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
import ray
from mmclip_shards.manifest import load_manifest
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.cluster_utils import Cluster

from mmclip_dist.offline.stage import Stage, Worker, run_stage
from tests.conftest import wait_for
from tests.offline.failing_maker import build_slow

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, as clusters have that grow from nothing."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def node(cluster: Cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=80_000_000)


def slow_stage(sets, out: Path, go: Path) -> Stage:
    return Stage("entities", sets.paired, str(out), "0" * 64, partial(build_slow, str(go)))


def asked(cluster: Cluster) -> int:
    """Workers that the autoscaler is asked to find room for."""
    found = get_cluster_status(cluster.address).resource_demands.ray_task_actor_demand
    return sum(each.count for demand in found for each in demand.bundles_by_count)


class Running:
    """A stage in a thread of its own."""

    def __init__(self, stage: Stage, workers: int, lost_s: float = 600) -> None:
        self.seen: list[tuple[int, int]] = []
        self.error: BaseException | None = None
        self.thread = Thread(target=self._run, args=(stage, workers, lost_s))
        self.thread.start()

    def _run(self, stage: Stage, workers: int, lost_s: float) -> None:
        try:
            run_stage(stage, workers=workers, report=lambda done, total: self.seen.append((done, total)), lost_s=lost_s)
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive() and self.error is None, self.error


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(sets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The sidecar as one process makes it, by no cluster."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "go").touch()
    stage = slow_stage(sets, folder / "out", folder / "go")
    worker = Worker(stage)
    rows = [worker.process(number).shard for number in range(len(load_manifest(sets.paired).shards))]
    assert len(rows) >= 4
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@pytest.mark.timeout(150)
def test_a_cluster_that_grows_from_nothing_and_loses_a_node_makes_the_same_bytes(
    sets, cluster: Cluster, expected: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("mmclip_dist.offline.crew._TELL_EVERY_S", 1.0)
    shards, go = len(load_manifest(sets.paired).shards), tmp_path / "go"
    running = Running(slow_stage(sets, tmp_path / "out", go), workers=64)
    wait_for(lambda: asked(cluster) == shards, 30)  # as many as are of use, not 64
    told = []
    wait_for(lambda: told.append(capfd.readouterr().err) or "wait for room or" in "".join(told), 30)
    line = rf"no worker runs yet; {shards} wait for room or .* asks for 1 CPUs and 0 GPUs, the cluster has 0 CPUs"
    assert re.search(line, "".join(told))
    first = node(cluster)
    starts = tmp_path / "go.starts"
    wait_for(lambda: starts.exists() and len(starts.read_text().splitlines()) == 1, 60)
    second = node(cluster)
    wait_for(lambda: len(starts.read_text().splitlines()) == 2, 60)  # the node that came later works, too
    wait_for(lambda: asked(cluster) == shards - 2, 30)
    cluster.remove_node(first)  # in the middle of its shard
    go.touch()
    running.join()
    assert running.seen[-1] == (shards, shards) and len(starts.read_text().splitlines()) == shards + 1  # one was begun again
    assert {name: data for name, data in files(tmp_path / "out").items() if name != "manifest.json"} == expected
    wait_for(lambda: asked(cluster) == 0, 30)  # nothing is asked for any more
    cluster.remove_node(second)


@pytest.mark.timeout(150)
def test_a_stage_whose_nodes_are_all_lost_names_them_and_ends(
    sets, cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first node it waits for one as long as it takes; it is nodes that it had and lost that it gives up."""
    monkeypatch.setattr("mmclip_dist.offline.crew._TELL_EVERY_S", 1.0)
    go, starts = tmp_path / "go", tmp_path / "go.starts"
    running = Running(slow_stage(sets, tmp_path / "out", go), workers=1, lost_s=2)
    told: list[str] = []
    wait_for(lambda: told.append(capfd.readouterr().err) or "".join(told).count("no worker runs yet") > 3, 30)
    only = node(cluster)
    wait_for(lambda: starts.exists() and len(starts.read_text().splitlines()) == 1, 60)
    cluster.remove_node(only)
    running.thread.join(60)
    assert not running.thread.is_alive() and isinstance(running.error, OSError), running.error
    name = socket.gethostname()
    assert re.search(
        rf"no worker has run for 2 s, and no host is left with room for one \(each asks for 1 CPUs and 0 GPUs\); lost: {name} "
        r"\([\d.]+\); the same command makes the other shards",
        str(running.error),
    )
