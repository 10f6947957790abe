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
import resource
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import ray
from mmclip_shards import storage
from mmclip_shards.manifest import Kind, Manifest, Shard, load_manifest, save_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.textfiles import read_json
from mmclip_shards.writer import write_shard

from mmclip_dist.data.join import check_sidecar
from mmclip_dist.offline.crew import Crew

Members = dict[str, bytes]


class Unreadable(Members):
    """The members of an empty row, and why the sample cannot be read."""

    def __init__(self, members: Members, reason: str) -> None:
        super().__init__(members)
        self.reason = reason


Sample = tuple[str, Members]
Maker = Callable[[Iterable[Sample]], Iterable[Sample]]
"""Makes the sidecar rows of a shard, in order: (key, members of the base shard) -> (key, members of the sidecar). It batches the
samples itself, and may read ahead."""

JOURNAL, QUARANTINE = "journal.json", "quarantine.jsonl"
MAX_BAD_FRACTION = 1e-3
LOST_S = 600.0  # autoscalers start a machine in less
_MEND = "delete it, and every shard is made again"
_PUBLISH_EVERY_S = 2.0
_PUBLISH_SHARE = 0.02  # of the driver's time at most: a journal grows with the shards that it names
_TRIES = 3  # of one shard
_LOST_AT_MOST = 10  # shards: beyond, what fails is not the shards' own
_GIB = 1 << 30
_ROOM = 1.25  # of what a worker takes once its models are loaded: its batches, and what it learns of the text
_SHOWN = 3  # keys or shards in a message


@dataclass(frozen=True)
class Stage:
    """What to make from a base set. `build` runs once in each worker process and loads its models.

    config_hash: identity of everything that affects the rows but base and guide; rows of different identities are never mixed.
    guide: `manifest_hash` of the entities that shape the rows.
    """

    kind: Kind
    base: str
    out: str
    config_hash: str
    build: Callable[[], Maker]
    entities: str | None = None  # entity sidecar to read along with the base
    guide: str | None = None
    checkpoint: str | None = None
    gpus: float = 0  # of each worker; Ray hides all GPUs from a worker that asks for none
    cpus: int = 1  # of each worker
    measured: bool = False  # what a worker's models take is measured first, and Ray gives a node no more of them than it holds


class Made(NamedTuple):
    """A finished shard, and (key, reason) of the samples in it that could not be read."""

    shard: Shard
    bad: list[tuple[str, str]]


class Worker:
    """A Ray actor: one process that holds the loaded models."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.make = stage, stage.build()
        self.readers = [ShardReader(url, load_manifest(url)) for url in (stage.base, stage.entities) if url]

    def ready(self) -> None:
        """Returns once the cluster has had room for this worker, and its models are loaded."""

    def process(self, number: int) -> Made:
        bad: list[tuple[str, str]] = []
        return Made(write_shard(self.stage.out, number, self._rows(number, bad)), bad)

    def _rows(self, number: int, bad: list[tuple[str, str]]) -> Iterator[Sample]:
        """The sidecar rows of a shard; the base and its entities have the same keys in the same order."""
        samples = zip(*(reader.samples(number) for reader in self.readers), strict=True)
        for key, members in self.make(_joined(parts) for parts in samples):
            if isinstance(members, Unreadable):
                bad.append((key, members.reason))
            yield key, members


def _joined(parts: tuple[Sample, ...]) -> Sample:
    """(key, members) of one sample from its rows in the base and its sidecars. ValueError unless they share the key."""
    key = parts[0][0]
    members: Members = {}
    for other, more in parts:
        if other != key:
            raise ValueError(f"the sidecar has {other} where the set has {key}: rebuild it")
        members |= more
    return key, members


def run_stage(
    stage: Stage, *, workers: int, report: Callable[[int, int], None], max_bad_fraction: float = MAX_BAD_FRACTION,
    lost_s: float = LOST_S,
) -> Manifest:  # fmt: skip
    """Make all missing sidecar shards with at most `workers` processes, then the manifest.

    Workers that the cluster has no room for wait for it, so that an autoscaler sees them; they take part when nodes come.
    report(done, total) in shards. max_bad_fraction: share of the samples that may be unreadable (two may always be, unless it is
    0); they are listed in quarantine.jsonl. ValueError above it, if `out` holds sidecars of another configuration, finished or
    not, or if the entities were made from other shards. OSError that names them if shards are damaged, or workers fail or die
    again and again at them; all others are made then, unless more than ten fail. OSError that names the hosts if all that had
    room for a worker are lost, and no other one comes for `lost_s` seconds.
    """
    base = load_manifest(stage.base)
    if base.kind != "base":
        raise ValueError(f"{stage.base} holds {base.kind} sidecars; name the packed set itself")
    if stage.entities is not None:
        check_sidecar("entities", stage.base, base, stage.entities, load_manifest(stage.entities))
    wanted = {shard.path: shard.sha256 for shard in base.shards}
    if storage.exists(storage.join(stage.out, "manifest.json")):
        found = load_manifest(stage.out)
        if (found.kind, found.config_hash, found.guide, found.base) == (stage.kind, stage.config_hash, stage.guide, wanted):
            report(len(base.shards), len(base.shards))
            return found
        raise ValueError(
            f"{stage.out} holds {found.kind} of another configuration, checkpoint, precision, set or entities; "
            "name another --out, or delete that folder"
        )
    done = _read_journal(stage, wanted)
    report(len(done), len(base.shards))
    most = max(2, int(max_bad_fraction * base.samples)) if max_bad_fraction else 0
    _check_bad(stage, done, most)  # of an earlier run, too
    memory = _memory_of(stage) if stage.measured and len(done) < len(wanted) else 0
    if memory and workers > (fit := _fitting(memory, _nodes_memory())):
        print(f"{fit} of {workers} workers run: each takes {memory / _GIB:.1f} GiB", flush=True)
        workers = fit
    with _workers(stage, memory) as new_worker:
        crew = Crew(new_worker, workers, stage.cpus, stage.gpus, lost_s)
        _make_missing(stage, wanted, done, crew, report, most)
    manifest = Manifest(
        kind=stage.kind, dataset=base.dataset, split=base.split, config_hash=stage.config_hash, base=wanted,
        checkpoint=stage.checkpoint, guide=stage.guide, shards=tuple(done[number].shard for number in range(len(base.shards))),
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
def _workers(stage: Stage, memory: int) -> Iterator[Callable[[], Any]]:
    """A function that starts a worker; leaving the block ends all of them. Else whoever keeps an error of the stage would keep
    the frames that it came through, a worker in them, and that worker's CPU."""
    # What fails is tried again by `_make_missing`, and not by Ray, which counts a worker's deaths and not those at one shard.
    options: Any = {
        "num_cpus": stage.cpus, "num_gpus": stage.gpus, "memory": memory or None, "max_restarts": 0, "max_task_retries": 0
    }  # fmt: skip
    actor: Any = ray.remote(**options)(Worker)
    with ExitStack() as ends:

        def new_worker() -> Any:
            worker = actor.remote(stage)
            ends.callback(ray.kill, worker)
            return worker

        yield new_worker


def _memory_of(stage: Stage) -> int:
    """Bytes that a worker's models take, with room for its batches: measured in a process of its own. ValueError or OSError if
    they cannot be loaded, or no node has room for them."""
    try:
        measure = ray.remote(num_cpus=stage.cpus, num_gpus=stage.gpus, max_calls=1, max_retries=0)(_peak_of)
        peak = ray.get(measure.remote(stage.build))
    except ray.exceptions.RayTaskError as error:
        raise (ValueError if isinstance(error.cause, ValueError) else OSError)(f"a worker cannot start: {error.cause}") from None
    except ray.exceptions.RayError as error:
        largest = max(_nodes_memory()) / _GIB
        told = str(error).strip().splitlines()[0]
        raise OSError(f"a worker's models cannot be loaded (the largest node lends {largest:.1f} GiB): {told}") from None
    return int(peak * _ROOM)


def _peak_of(build: Callable[[], Maker]) -> int:
    """Bytes of memory that this process has held at most, once its models are loaded."""
    build()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _nodes_memory() -> list[int]:
    """Bytes that each node of the cluster lends to workers."""
    return [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]


def _fitting(memory: int, nodes: list[int]) -> int:
    """How many workers of that many bytes the nodes hold. ValueError if none does."""
    if fit := sum(node // memory for node in nodes):
        return fit
    raise ValueError(
        f"a worker takes {memory / _GIB:.1f} GiB and the largest node lends {max(nodes) / _GIB:.1f} GiB: choose a smaller model "
        "or linker, or a larger node (ray start --memory BYTES says what a node lends)"
    )


def _make_missing(
    stage: Stage, wanted: dict[str, str], done: dict[int, Made], crew: Crew, report: Callable[[int, int], None], most_bad: int
) -> None:
    paths = list(wanted)
    waiting = deque(number for number in range(len(paths)) if number not in done)
    failures: Counter[int | None] = Counter()  # None: of workers that had no shard yet
    lost: dict[str, str] = {}  # path of a shard -> what happened to it
    publish_at = time.monotonic() + _PUBLISH_EVERY_S
    while (crew.running or waiting) and len(lost) <= _LOST_AT_MOST:
        crew.call(len(waiting))
        if (event := crew.next()) is None:
            continue
        worker, number, found = event
        if isinstance(found, ray.exceptions.RayError):
            failures[number] += not getattr(found, "preempted", False)  # a node that was taken away is no fault of the shard
            final = _final(found, failures[number])
            if number is not None and not final:
                waiting.appendleft(number)
            elif number is not None:
                lost[paths[number]] = final
            elif final:
                raise OSError(f"a worker cannot start: {final}")
            if not isinstance(found, ray.exceptions.RayActorError):
                crew.give(worker, waiting)
            continue
        crew.give(worker, waiting)
        if number is None:
            failures[None] = 0
            continue
        done[number] = found
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
    document = {"config_hash": stage.config_hash, "guide": stage.guide, "base": wanted, "shards": rows}
    storage.write_atomic(storage.join(stage.out, JOURNAL), json.dumps(document).encode())


def _read_journal(stage: Stage, wanted: dict[str, str]) -> dict[int, Made]:
    """Shards that an interrupted stage of the same identity has finished. ValueError if it was another one's."""
    url = storage.join(stage.out, JOURNAL)
    if not storage.exists(url):
        return {}
    document = read_json(url, _MEND)
    try:
        same = (document["config_hash"], document.get("guide"), document["base"]) == (stage.config_hash, stage.guide, wanted)
        rows = {int(number): dict(row) for number, row in document["shards"].items()}
        bad = {number: [(key, reason) for key, reason in row.pop("bad", ())] for number, row in rows.items()}
        done = {number: Made(Shard(**row), bad[number]) for number, row in rows.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{url} is no journal of an offline stage ({error!r}): {_MEND}") from error
    if done and not same:
        raise ValueError(
            f"{stage.out} holds {len(done)} shards of an interrupted stage of another configuration, checkpoint, precision, set "
            f"or entities; name another --out, or, to make them again, delete {JOURNAL} there"
        )
    return done


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
