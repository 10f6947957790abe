"""An offline stage over very many shards: what the driver takes, and what a shard costs beside its samples.

    python -m mmclip_dist.bench.stage [--shards 1000 20000] [--workers 2]

Sets of shards that hold one sample each, on the local disk; a stage that makes an empty row of each. So nothing but the stage's
own work is left: tasks, shards written, journal, manifest. Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmclip_shards.manifest import Manifest, save_manifest
from mmclip_shards.writer import write_shard

from mmclip_dist.offline.stage import JOURNAL, Maker, Sample, Stage, connect, run_stage

RESULTS = Path(__file__).parent / "results" / "stage.md"


def build_empty() -> Maker:
    def make(samples: Iterable[Sample]) -> list[Sample]:
        return [(key, {"entities.json": b"[]"}) for key, _ in samples]

    return make


def make_base(folder: Path, shards: int) -> str:
    rows = tuple(write_shard(str(folder), n, [(f"s-{n}", {"json": b"{}"})]) for n in range(shards))
    save_manifest(str(folder), Manifest(kind="base", dataset="empty", split="train", config_hash="0" * 64, shards=rows))
    return str(folder)


def measure(shards: int, workers: int) -> dict[str, Any]:
    """Of one stage: seconds, and MiB of the driver before it and at its peak. The journal is sampled as it grows."""
    with tempfile.TemporaryDirectory() as folder:
        base, out = make_base(Path(folder, "base"), shards), Path(folder, "out")
        connect(None)
        journal = 0

        def report(done: int, total: int) -> None:
            nonlocal journal
            if done % 500 == 0 and (out / JOURNAL).exists():
                journal = max(journal, (out / JOURNAL).stat().st_size)

        before, began = _peak_mib(), time.monotonic()
        processor = time.process_time()
        run_stage(Stage("entities", base, str(out), "1" * 64, build_empty), workers=workers, report=report)
        return {
            "shards": shards, "seconds": time.monotonic() - began, "processor": time.process_time() - processor,
            "before": before, "peak": _peak_mib(), "journal": journal / 2**20,
        }  # fmt: skip


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmclip_dist.bench.stage", description=str(__doc__).splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 20000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.one:
        print(json.dumps(measure(options.shards[0], options.workers)))
        return
    names = (
        "shards", "seconds", "shards/s", "driver's processor time, ms a shard", "before, MiB", "peak, MiB", "KiB a shard",
        "journal, MiB",
    )  # fmt: skip
    lines = [
        "# Offline stages over many shards", "",
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, {options.workers} workers. Command:",
        f"`python -m mmclip_dist.bench.stage {' '.join(words)}`".replace(" `", "`"), "",
        "One sample a shard. Memory is the driver's resident peak.", "",
        f"| {' | '.join(names)} |", "|---" * len(names) + "|",
    ]  # fmt: skip
    for shards in options.shards:
        one = ["--one", "--shards", str(shards), "--workers", str(options.workers)]
        command = [sys.executable, "-m", "mmclip_dist.bench.stage", *one]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = json.loads(told.splitlines()[-1])
        grown = row["peak"] - row["before"]
        lines.append(
            f"| {shards:,} | {row['seconds']:.0f} | {shards / row['seconds']:.0f} | {1000 * row['processor'] / shards:.2f} | "
            f"{row['before']:.0f} | {row['peak']:.0f} | {1024 * grown / shards:.1f} | {row['journal']:.1f} |"
        )
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
