"""What feeds a rank: samples a second, main-thread time and open files of the training loader, by its number of workers.

    python -m mmclip_dist.bench.feed [--rounds 5] [--seconds 6]

Full examples (512-pixel JPEG decoded to 224, report tokens, entity masks, attention scores), 128 a step. Every round measures
each number of workers once, in turn, each in a process of its own; the table holds medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
from mmclip_shards.manifest import Manifest, load_manifest, save_manifest
from mmclip_shards.schema import encode_npy
from mmclip_shards.writer import ShardWriter, write_shard

from mmclip_dist.config import Data, Source, load_config
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.loader import build_loader, build_order, label_names
from mmclip_dist.data.reading import open_sets
from mmclip_dist.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BATCH, SIZE, SAMPLES = 128, 224, 2000
WORKERS = (0, 1, 2)
WORDS = """the lungs are clear there is a small left pleural effusion without consolidation heart size normal no""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Fed:
    """main_ms: processor time of the main thread for each sample. files: descriptors of the process at the most."""

    samples_per_s: float
    main_ms: float
    files: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--beside", metavar="TREE", help="measure another checkout of this repository in the same rounds")
    parser.add_argument("--one", nargs=2, metavar=("SET", "WORKERS"), help="measure once and print JSON")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.one:
        print(json.dumps(vars(feed(arguments.one[0], int(arguments.one[1]), arguments.seconds))))
        return
    trees = {"this checkout": ROOT} | ({"the other": Path(arguments.beside).resolve()} if arguments.beside else {})
    found: dict[tuple[str, int], list[Fed]] = {(name, workers): [] for name in trees for workers in WORKERS}
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        for _ in range(arguments.rounds):
            for (name, workers), rows in found.items():
                rows.append(measured(trees[name], folder, workers, arguments.seconds))
    print("| code | workers | samples/s | of none | main thread, ms a sample | open files |\n|---|---|---|---|---|---|")
    for (name, workers), rows in found.items():
        none = found[name, 0]
        ratio = statistics.median(one.samples_per_s / without.samples_per_s for one, without in zip(rows, none, strict=True))
        rate, busy = (statistics.median(getattr(row, figure) for row in rows) for figure in ("samples_per_s", "main_ms"))
        print(f"| {name} | {workers} | {rate:,.0f} | {ratio:.2f} | {busy:.3f} | {max(row.files for row in rows)} |")


def measured(tree: Path, url: str, workers: int, seconds: float) -> Fed:
    """The figures of one checkout, from a process that imports its packages."""
    paths = os.pathsep.join(str(tree / folder) for folder in (".", "kernels", "launch", "shards"))
    command = [sys.executable, __file__, "--seconds", f"{seconds:g}", "--one", url, str(workers)]
    output = subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": paths}).stdout
    return Fed(**json.loads(output.splitlines()[-1]))


def write(url: str) -> None:
    """A set of radiograph-like JPEGs with reports, entities and attention scores."""
    from mmclip_dist.bench.loader_peers import jpeg  # another checkout may not have it, and measures only

    random = np.random.default_rng(0)
    with ShardWriter(url, kind="base", dataset="bench", split="train", config_hash="bench", samples_per_shard=500) as writer:
        for number in range(SAMPLES):
            report = " ".join(random.choice(WORDS, 40))
            text = json.dumps({"report": {"text": report}, "labels": {"Effusion": 1}})
            writer.add(f"k{number:07d}", {"jpg": jpeg(random), "json": text.encode()})
    base = load_manifest(url)
    for kind in ("entities", "attention"):
        shards = []
        for number, shard in enumerate(base.shards):
            keys = [f"k{index:07d}" for index in range(number * 500, number * 500 + shard.samples)]
            shards.append(write_shard(f"{url}/{kind}", number, [(key, _sidecar(kind, random)) for key in keys]))
        of = {shard.path: shard.sha256 for shard in base.shards}
        made = Manifest(kind=kind, dataset="bench", split="train", shards=tuple(shards), config_hash="bench", base=of)
        save_manifest(f"{url}/{kind}", made)


def _sidecar(kind: str, random: np.random.Generator) -> dict[str, bytes]:
    if kind == "attention":
        return {"attention.npy": encode_npy(random.random((14, 14), dtype=np.float32).astype(np.float16))}
    span = {"start": 4, "end": 9, "text": "lungs", "label": "ANATOMY", "negated": False}
    return {"entities.json": json.dumps([span]).encode()}


def feed(url: str, workers: int, seconds: float) -> Fed:
    """Read for `seconds` as a rank does whose batch is BATCH."""
    config = load_config("mmclip_vit_b16")
    data = Data(
        streams=BATCH, workers=workers, sources=(Source(url=url, entities=f"{url}/entities", attention=f"{url}/attention"),)
    )
    sets = open_sets(data.sources, data, 1)
    maker = ExampleMaker(
        train_tokenizer([" ".join(WORDS)] * 2), label_names(sets), SIZE, 14, 112, config.entmlm, data.augment, 0,
        needs_entities=True,
    )  # fmt: skip
    batches = build_loader(sets, build_order(sets, data, 0), maker, data=data, global_batch=BATCH, rank=0, world=1, start=0)
    for _ in islice(batches, max(2, workers)):  # processes start, shards open
        pass
    process, files, samples = psutil.Process(), 0, 0
    began, busy = time.perf_counter(), time.thread_time()
    while (elapsed := time.perf_counter() - began) < seconds:
        samples += len(next(batches)["keys"])
        files = max(files, process.num_fds())
    return Fed(samples / elapsed, 1e3 * (time.thread_time() - busy) / samples, files)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
