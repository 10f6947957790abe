"""The workers of an offline stage on a cluster that may grow and shrink."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray

_TELL_EVERY_S = 60.0  # while no worker runs
_SHOWN = 8  # hosts in a message


class Crew:
    """At most so many workers (`most`), of which those run that the cluster has room for. The others wait: an autoscaler sees
    them, and when a node comes they take part. There are never more than are of use.

    Only a worker that runs gets a shard, so none waits for a node that may never come. cpus, gpus: what each asks for. lost_s:
    seconds to wait for another host, once those are lost that had room for a worker.
    """

    def __init__(self, new_worker: Callable[[], Any], most: int, cpus: int, gpus: float, lost_s: float) -> None:
        self.new_worker, self.most, self.lost_s = new_worker, most, lost_s
        self.asks = {"CPU": cpus, "GPU": gpus}
        self.hosts: dict[str, str] = {}  # every node that had room for a worker -> how a person knows it
        self.idle_since = time.monotonic()
        self.starting: dict[Any, Any] = {}  # what `ready` will return -> its worker
        self.running: dict[Any, tuple[int, Any]] = {}  # what `process` will return -> (shard, its worker)

    def call(self, waiting: int) -> None:
        """Ask for workers, or for fewer than before, now that so many shards wait."""
        useful = min(self.most - len(self.running), waiting)
        while len(self.starting) < useful:
            worker = self.new_worker()
            self.starting[worker.ready.remote()] = worker
        while len(self.starting) > useful:
            ray.kill(self.starting.popitem()[1])

    def give(self, worker: Any, waiting: deque[int]) -> None:
        """The worker's next shard. If there is none the worker ends, so that its node may go."""
        if waiting:
            number = waiting.popleft()
            self.running[worker.process.remote(number)] = (number, worker)
        else:
            ray.kill(worker)

    def next(self) -> tuple[Any, int | None, Any] | None:
        """(worker, its shard, what came of it, be it an error); no shard: the worker is ready. None if it is not for long.

        OSError if the hosts that had room for a worker are lost, and no other one has come for `lost_s`.
        """
        if self.running:
            self.idle_since = time.monotonic()
        timeout = _TELL_EVERY_S if self.running else min(_TELL_EVERY_S, self.lost_s)
        finished, _ = ray.wait([*self.running, *self.starting], num_returns=1, timeout=timeout)
        if not finished:
            if not self.running:
                self._tell()
            return None
        reference = finished[0]
        number, worker = self.running.pop(reference, None) or (None, self.starting.pop(reference))
        try:
            found = ray.get(reference)
        except ray.exceptions.RayError as error:
            return worker, number, error
        if number is None:
            self._meet()
        return worker, number, found

    def _meet(self) -> list[str]:
        """Note the nodes that have room for a worker -> those that had, and are lost; none while one is there."""
        alive = {
            node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= count for name, count in self.asks.items())
        }
        self.hosts |= alive
        names = sorted(set(self.hosts.values()))
        return [] if alive else [*names[:_SHOWN], *([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])]

    def _tell(self) -> None:
        asks = f"each asks for {self.asks['CPU']} CPUs and {self.asks['GPU']:g} GPUs"
        if (lost := self._meet()) and time.monotonic() - self.idle_since >= self.lost_s:
            raise OSError(
                f"no worker has run for {self.lost_s:g} s, and no host is left with room for one ({asks}); lost: "
                f"{', '.join(lost)}; the same command makes the other shards"
            )
        has, free = ray.cluster_resources(), ray.available_resources()
        there = ", ".join(f"{has.get(name, 0):g} {name}s ({free.get(name, 0):g} free)" for name in self.asks)
        waiting = f"{len(self.starting)} wait for room or load their models"
        gone = f"; lost: {', '.join(lost)}" if lost else ""
        print(f"no worker runs yet; {waiting}: {asks}, the cluster has {there}{gone}", file=sys.stderr, flush=True)
