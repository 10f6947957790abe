"""The part that all offline stages share: one base shard in, one sidecar shard out, on Ray.

A task reads a base shard, makes one row for each sample, and publishes the sidecar shard as a whole. Only the driver writes
the manifest, once all shards exist; until then it keeps a journal of finished shards. A restarted stage continues after the
journal. Same input, same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import ray
from mmclip_shards import storage
from mmclip_shards.manifest import Kind, Manifest, Shard, load_manifest, save_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.textfiles import read_json
from mmclip_shards.writer import write_shard

from mmclip_dist.data.join import check_sidecar

Members = dict[str, bytes]
Maker = Callable[[list[tuple[str, Members]]], list[tuple[str, Members]]]
"""Makes the sidecar rows of a batch of samples: (key, members of the base shard) -> (key, members of the sidecar)."""

JOURNAL = "journal.json"
_MEND = "delete it, and every shard is made again"
_BATCH = 64
_PUBLISH_EVERY_S = 2.0


@dataclass(frozen=True)
class Stage:
    """What to make from a base set. `build` runs once in each worker process and loads its models.

    config_hash: identity of everything that affects the rows; rows of different identities are never mixed.
    """

    kind: Kind
    base: str
    out: str
    config_hash: str
    build: Callable[[], Maker]
    entities: str | None = None  # entity sidecar to read along with the base
    checkpoint: str | None = None
    gpus: float = 0  # of each worker; Ray hides all GPUs from a worker that asks for none


class _Worker:
    """A Ray actor: one process that holds the loaded models."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.make = stage, stage.build()
        self.readers = [ShardReader(url, load_manifest(url)) for url in (stage.base, stage.entities) if url]

    def process(self, number: int) -> Shard:
        return write_shard(self.stage.out, number, self._rows(number))

    def _rows(self, number: int) -> Iterator[tuple[str, Members]]:
        """The sidecar rows of a shard; the base and its entities have the same keys in the same order."""
        rows = zip(*(reader.samples(number) for reader in self.readers), strict=True)
        while samples := list(islice(rows, _BATCH)):
            yield from self.make([_joined(parts) for parts in samples])


def _joined(parts: tuple[tuple[str, Members], ...]) -> tuple[str, Members]:
    """(key, members) of one sample from its rows in the base and its sidecars. ValueError unless they share the key."""
    key = parts[0][0]
    members: Members = {}
    for other, more in parts:
        if other != key:
            raise ValueError(f"the sidecar has {other} where the set has {key}: rebuild it")
        members |= more
    return key, members


def run_stage(stage: Stage, *, workers: int, report: Callable[[int, int], None]) -> Manifest:
    """Make all missing sidecar shards with `workers` processes, then the manifest.

    report(done, total) in shards. A worker process that dies is replaced and its shard made again, three times.
    ValueError if `out` holds sidecars of another configuration, or if the entities were made from other shards.
    """
    base = load_manifest(stage.base)
    if base.kind != "base":
        raise ValueError(f"{stage.base} holds {base.kind} sidecars; name the packed set itself")
    if stage.entities is not None:
        check_sidecar("entities", stage.base, base, stage.entities, load_manifest(stage.entities))
    wanted = {shard.path: shard.sha256 for shard in base.shards}
    if storage.exists(storage.join(stage.out, "manifest.json")):
        found = load_manifest(stage.out)
        if (found.kind, found.config_hash, found.base) == (stage.kind, stage.config_hash, wanted):
            report(len(base.shards), len(base.shards))
            return found
        raise ValueError(
            f"{stage.out} holds {found.kind} of another configuration, checkpoint or set; "
            "name another --out, or delete that folder"
        )
    done = _read_journal(stage, wanted)
    report(len(done), len(base.shards))
    _make_missing(stage, wanted, done, [n for n in range(len(base.shards)) if n not in done], workers, report)
    manifest = Manifest(
        kind=stage.kind, dataset=base.dataset, split=base.split, config_hash=stage.config_hash, base=wanted,
        checkpoint=stage.checkpoint, shards=tuple(done[number] for number in range(len(base.shards))),
    )  # fmt: skip
    save_manifest(stage.out, manifest)
    storage.remove(storage.join(stage.out, JOURNAL))
    return manifest


def _make_missing(
    stage: Stage, wanted: dict[str, str], done: dict[int, Shard], missing: list[int], workers: int,
    report: Callable[[int, int], None],
) -> None:  # fmt: skip
    if not missing:
        return
    actor = ray.remote(num_cpus=1, num_gpus=stage.gpus, max_restarts=3, max_task_retries=3)(_Worker)
    pool = [actor.remote(stage) for _ in range(min(workers, len(missing)))]
    queue = iter(missing)
    running: dict[Any, tuple[int, Any]] = {}

    def start(worker: Any) -> None:
        number = next(queue, None)
        if number is not None:
            running[worker.process.remote(number)] = (number, worker)

    for worker in pool:
        start(worker)
    published = time.monotonic()
    while running:
        (finished,), _ = ray.wait(list(running), num_returns=1)
        number, worker = running.pop(finished)
        done[number] = ray.get(finished)
        start(worker)
        if time.monotonic() - published > _PUBLISH_EVERY_S or not running:
            _write_journal(stage, wanted, done)
            published = time.monotonic()
        report(len(done), len(wanted))


def _write_journal(stage: Stage, wanted: dict[str, str], done: dict[int, Shard]) -> None:
    rows = {str(number): asdict(shard) for number, shard in sorted(done.items())}
    document = {"config_hash": stage.config_hash, "base": wanted, "shards": rows}
    storage.write_atomic(storage.join(stage.out, JOURNAL), json.dumps(document).encode())


def _read_journal(stage: Stage, wanted: dict[str, str]) -> dict[int, Shard]:
    """Shards that an interrupted stage of the same identity has finished."""
    url = storage.join(stage.out, JOURNAL)
    if not storage.exists(url):
        return {}
    document = read_json(url, _MEND)
    try:
        if (document["config_hash"], document["base"]) != (stage.config_hash, wanted):
            return {}
        return {int(number): Shard(**row) for number, row in document["shards"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{url} is no journal of an offline stage ({error!r}): {_MEND}") from error


def progress_line(unit: str) -> Callable[[int, int], None]:
    """Prints "done/total unit, rate, time left" as it changes."""
    started, first = time.monotonic(), -1

    def report(done: int, total: int) -> None:
        nonlocal first
        first = done if first < 0 else first
        made, elapsed = done - first, time.monotonic() - started
        left = f", {elapsed / made * (total - done):.0f} s left" if made else ""
        print(f"{done}/{total} {unit}, {made / max(elapsed, 1e-9):.2f}/s{left}", flush=True)

    return report


def connect(address: str | None) -> None:
    """Join the Ray cluster at `address`, or the one that RAY_ADDRESS names (Ray sets it inside a job); else start one.

    Never the last cluster of this machine, which is Ray's default: if it was killed, joining would wait for minutes.
    """
    found = address or os.environ.get("RAY_ADDRESS") or "local"
    ray.init(address=found, include_dashboard=False if found == "local" else None, logging_level=logging.ERROR)
