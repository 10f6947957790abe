"""The workers of an offline stage on a cluster that may grow and shrink."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import ray

_TELL_EVERY_S = 60.0  # while no worker runs


class Crew:
    """At most so many workers (`most`), of which those run that the cluster has room for. The others wait: an autoscaler sees
    them, and when a node comes they take part. There are never more than are of use.

    Only a worker that runs gets a shard, so none waits for a node that may never come. asks: what each asks for, in words.
    """

    def __init__(self, new_worker: Callable[[], Any], most: int, asks: str) -> None:
        self.new_worker, self.most, self.asks = new_worker, most, asks
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
        """(worker, its shard, what came of it, be it an error); no shard: the worker is ready. None if it is not for long."""
        finished, _ = ray.wait([*self.running, *self.starting], num_returns=1, timeout=_TELL_EVERY_S)
        if not finished:
            if not self.running:
                self._tell()
            return None
        reference = finished[0]
        number, worker = self.running.pop(reference, None) or (None, self.starting.pop(reference))
        try:
            return worker, number, ray.get(reference)
        except ray.exceptions.RayError as error:
            return worker, number, error

    def _tell(self) -> None:
        has, free = ray.cluster_resources(), ray.available_resources()
        there = ", ".join(f"{has.get(name, 0):g} {name}s ({free.get(name, 0):g} free)" for name in ("CPU", "GPU"))
        waiting = f"{len(self.starting)} wait for room or load their models"
        print(f"no worker runs yet; {waiting}: each asks for {self.asks}, the cluster has {there}", file=sys.stderr, flush=True)
