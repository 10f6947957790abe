"""The part that all offline stages share: one base shard in, one sidecar shard out, on Ray.

A task reads a base shard, makes one row for each sample, and publishes the sidecar shard as a whole. Only the driver writes
the manifest, once all shards exist; until then it keeps a journal of finished shards. A restarted stage continues after the
journal. Same input, same bytes.

A sample that cannot be read gets an empty row and a line in quarantine.jsonl. A shard is tried again after an error that is not
the data's fault, and after the death of its worker. One that fails for good is left out and named at the end, when all others are
made; the same command then makes what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import ray
from mmclip_shards import storage
from mmclip_shards.manifest import Kind, Manifest, Shard, load_manifest, save_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.textfiles import read_json
from mmclip_shards.writer import write_shard

from mmclip_dist.data.join import check_sidecar

Members = dict[str, bytes]


class Unreadable(Members):
    """The members of an empty row, and why the sample cannot be read."""

    def __init__(self, members: Members, reason: str) -> None:
        super().__init__(members)
        self.reason = reason


Maker = Callable[[list[tuple[str, Members]]], list[tuple[str, Members]]]
"""Makes the sidecar rows of a batch of samples: (key, members of the base shard) -> (key, members of the sidecar)."""

JOURNAL, QUARANTINE = "journal.json", "quarantine.jsonl"
MAX_BAD_FRACTION = 1e-3
_MEND = "delete it, and every shard is made again"
_BATCH = 64
_PUBLISH_EVERY_S = 2.0
_PUBLISH_SHARE = 0.02  # of the driver's time at most: a journal grows with the shards that it names
_TRIES = 3  # of one shard
_LOST_AT_MOST = 10  # shards: beyond, what fails is not the shards' own
_SHOWN = 3  # keys or shards in a message


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


class Made(NamedTuple):
    """A finished shard, and (key, reason) of the samples in it that could not be read."""

    shard: Shard
    bad: list[tuple[str, str]]


class _Worker:
    """A Ray actor: one process that holds the loaded models."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.make = stage, stage.build()
        self.readers = [ShardReader(url, load_manifest(url)) for url in (stage.base, stage.entities) if url]

    def ready(self) -> None:
        """Answers once the models are loaded."""

    def process(self, number: int) -> Made:
        bad: list[tuple[str, str]] = []
        return Made(write_shard(self.stage.out, number, self._rows(number, bad)), bad)

    def _rows(self, number: int, bad: list[tuple[str, str]]) -> Iterator[tuple[str, Members]]:
        """The sidecar rows of a shard; the base and its entities have the same keys in the same order."""
        rows = zip(*(reader.samples(number) for reader in self.readers), strict=True)
        while samples := list(islice(rows, _BATCH)):
            for key, members in self.make([_joined(parts) for parts in samples]):
                if isinstance(members, Unreadable):
                    bad.append((key, members.reason))
                yield key, members


def _joined(parts: tuple[tuple[str, Members], ...]) -> tuple[str, Members]:
    """(key, members) of one sample from its rows in the base and its sidecars. ValueError unless they share the key."""
    key = parts[0][0]
    members: Members = {}
    for other, more in parts:
        if other != key:
            raise ValueError(f"the sidecar has {other} where the set has {key}: rebuild it")
        members |= more
    return key, members


def run_stage(
    stage: Stage, *, workers: int, report: Callable[[int, int], None], max_bad_fraction: float = MAX_BAD_FRACTION
) -> Manifest:
    """Make all missing sidecar shards with `workers` processes, then the manifest.

    report(done, total) in shards. max_bad_fraction: share of the samples that may be unreadable (two may always be, unless it is
    0); they are listed in quarantine.jsonl. ValueError above it, if `out` holds sidecars of another configuration, or if the
    entities were made from other shards. OSError that names them if shards are damaged, or workers fail or die again and again
    at them; all others are made then, unless more than ten fail.
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
    most = max(2, int(max_bad_fraction * base.samples)) if max_bad_fraction else 0
    _check_bad(stage, done, most)  # of an earlier run, too
    with _workers(stage) as new_worker:
        _make_missing(stage, wanted, done, new_worker, workers, report, most)
    manifest = Manifest(
        kind=stage.kind, dataset=base.dataset, split=base.split, config_hash=stage.config_hash, base=wanted,
        checkpoint=stage.checkpoint, shards=tuple(done[number].shard for number in range(len(base.shards))),
    )  # fmt: skip
    if bad := _bad(done):
        lines = "".join(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in bad)
        storage.write_atomic(storage.join(stage.out, QUARANTINE), lines.encode())
        print(f"{len(bad)} of {base.samples} samples cannot be read and have empty rows: {stage.out}/{QUARANTINE}", flush=True)
    save_manifest(stage.out, manifest)
    storage.remove(storage.join(stage.out, JOURNAL))
    return manifest


def _bad(done: Mapping[int, Made]) -> list[tuple[str, str]]:
    return [pair for _, made in sorted(done.items()) for pair in made.bad]


def _check_bad(stage: Stage, done: Mapping[int, Made], most: int) -> None:
    if len(bad := _bad(done)) > most:
        shown = ", ".join(f"{key} ({reason})" for key, reason in bad[:_SHOWN])
        raise ValueError(f"{len(bad)} samples of {stage.base} cannot be read, more than {most} may be: {shown}, ...")


@contextmanager
def _workers(stage: Stage) -> Iterator[Callable[[], Any]]:
    """A function that starts a worker; leaving the block ends all of them. Else whoever keeps an error of the stage would keep
    the frames that it came through, a worker in them, and that worker's CPU."""
    # What fails is tried again by `_make_missing`, and not by Ray, which counts a worker's deaths and not those at one shard.
    actor: Any = ray.remote(num_cpus=1, num_gpus=stage.gpus, max_restarts=0, max_task_retries=0)(_Worker)
    with ExitStack() as ends:

        def new_worker() -> Any:
            worker = actor.remote(stage)
            ends.callback(ray.kill, worker)
            return worker

        yield new_worker


class _Pool:
    """Workers, and the shards that wait for one. A shard is given only to a worker that is up: a cluster that has lost a machine
    has no room for another worker, and the shard would wait for ever."""

    def __init__(self, new_worker: Callable[[], Any], waiting: Iterable[int]) -> None:
        self.waiting, self.idle = deque(waiting), list[Any]()
        self._new_worker = new_worker
        self._running: dict[Any, tuple[int | None, Any]] = {}

    def begin(self) -> None:
        """Start a worker."""
        worker = self._new_worker()
        self._running[worker.ready.remote()] = (None, worker)

    def give(self, worker: Any) -> None:
        """Give a worker the next shard."""
        if self.waiting:
            number = self.waiting.popleft()
            self._running[worker.process.remote(number)] = (number, worker)
        else:
            self.idle.append(worker)

    def wait(self) -> tuple[Any, int | None, Any]:
        """The next result, its shard (None: the worker has started), and the worker."""
        (finished,), _ = ray.wait(list(self._running), num_returns=1)
        return finished, *self._running.pop(finished)

    def take_back(self, number: int | None, worker: Any | None) -> None:
        """After a failure. number: a shard to try again; worker: None if it is dead."""
        if number is not None:
            self.waiting.appendleft(number)
        worker = self.idle.pop() if worker is None and self.idle else worker
        if worker is not None:
            self.give(worker)
        elif self.waiting:
            self.begin()


def _make_missing(
    stage: Stage, wanted: dict[str, str], done: dict[int, Made], new_worker: Callable[[], Any], workers: int,
    report: Callable[[int, int], None], most_bad: int,
) -> None:  # fmt: skip
    paths = list(wanted)
    pool = _Pool(new_worker, [number for number in range(len(paths)) if number not in done])
    failures: Counter[int | None] = Counter()
    lost: dict[str, str] = {}  # path of a shard -> what happened to it
    for _ in range(min(workers, len(pool.waiting))):
        pool.begin()
    publish_at = time.monotonic() + _PUBLISH_EVERY_S
    while len(done) + len(lost) < len(paths) and len(lost) <= _LOST_AT_MOST:
        finished, number, worker = pool.wait()
        try:
            made = ray.get(finished)
        except ray.exceptions.RayError as error:
            failures[number] += 1
            final = _final(error, failures[number])
            if final and number is None:
                raise OSError(f"a worker cannot start: it {final}") from None
            if final and number is not None:
                lost[paths[number]] = final
            dead = isinstance(error, ray.exceptions.RayActorError)
            pool.take_back(None if final else number, None if dead else worker)
            continue
        pool.give(worker)
        if number is None:
            del failures[None]
            continue
        done[number] = made
        if (began := time.monotonic()) > publish_at:
            _write_journal(stage, wanted, done)
            ended = time.monotonic()
            publish_at = ended + max(_PUBLISH_EVERY_S, (ended - began) / _PUBLISH_SHARE)
        report(len(done), len(wanted))
        if done[number].bad:  # not after every shard: it looks at all of them
            _check_bad(stage, done, most_bad)
    _write_journal(stage, wanted, done)
    if lost:
        told = "; ".join(f"shard {path}: {what}" for path, what in list(lost.items())[:_SHOWN])
        more = f"; and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise OSError(f"{len(done)} of {len(paths)} shards are made; the same command makes the others. {told}{more}")


def _final(error: ray.exceptions.RayError, failures: int) -> str:
    """What to say of a shard that is not tried again: faults of the data at once, others at the last try; else "". ValueError or
    OSError if workers cannot start."""
    cause = getattr(error, "cause", None)
    told = " ".join(str(cause).split())
    if isinstance(cause, ValueError):
        return told
    last_line = str(error).strip().splitlines()[-1].strip()
    if getattr(error, "actor_init_failed", False):
        mendable = last_line.startswith("ValueError: ")
        raise (ValueError if mendable else OSError)(f"a worker cannot start: {last_line.removeprefix('ValueError: ')}") from None
    if failures < _TRIES:
        return ""
    return f"failed {failures} times: " + (f"{type(cause).__name__}: {told}" if cause else f"its worker died ({last_line})")


def _write_journal(stage: Stage, wanted: dict[str, str], done: dict[int, Made]) -> None:
    rows = {str(number): asdict(made.shard) | {"bad": made.bad} for number, made in sorted(done.items())}
    document = {"config_hash": stage.config_hash, "base": wanted, "shards": rows}
    storage.write_atomic(storage.join(stage.out, JOURNAL), json.dumps(document).encode())


def _read_journal(stage: Stage, wanted: dict[str, str]) -> dict[int, Made]:
    """Shards that an interrupted stage of the same identity has finished."""
    url = storage.join(stage.out, JOURNAL)
    if not storage.exists(url):
        return {}
    document = read_json(url, _MEND)
    try:
        if (document["config_hash"], document["base"]) != (stage.config_hash, wanted):
            return {}
        rows = {int(number): dict(row) for number, row in document["shards"].items()}
        bad = {number: [(key, reason) for key, reason in row.pop("bad", ())] for number, row in rows.items()}
        return {number: Made(Shard(**row), bad[number]) for number, row in rows.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{url} is no journal of an offline stage ({error!r}): {_MEND}") from error


def progress_line(unit: str, *, as_json: bool = False) -> Callable[[int, int], None]:
    """Prints "done/total unit, rate, time left" as it changes, or the same as one JSON object a line."""
    started, first = time.monotonic(), -1

    def report(done: int, total: int) -> None:
        nonlocal first
        first = done if first < 0 else first
        made, elapsed = done - first, time.monotonic() - started
        rate, left = made / max(elapsed, 1e-9), elapsed / made * (total - done) if made else None
        if as_json:
            document = {"unit": unit, "done": done, "total": total, "per_s": round(rate, 3), "left_s": left and round(left, 1)}
            print(json.dumps(document), flush=True)
        else:
            print(f"{done}/{total} {unit}, {rate:.2f}/s" + ("" if left is None else f", {left:.0f} s left"), flush=True)

    return report


def connect(address: str | None) -> None:
    """Join the Ray cluster at `address`, or the one that RAY_ADDRESS names (Ray sets it inside a job); else start one.

    Never the last cluster of this machine, which is Ray's default: if it was killed, joining would wait for minutes.
    """
    found = address or os.environ.get("RAY_ADDRESS") or "local"
    ray.init(address=found, include_dashboard=False if found == "local" else None, logging_level=logging.ERROR)
