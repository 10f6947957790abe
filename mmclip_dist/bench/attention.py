"""Does the attention stage keep its model busy?

    python -m mmclip_dist.bench.attention [--images 64] [--batch 16] [--rounds 3] [--precision fp32]

A worker of the stage, as Ray runs it, from packed shards of drawn images and reports to published sidecar shards; beside it the
same model on the same batches, made before; in turn, in one process, on one thread as a worker has it. ViT-B/16 of random weights
at 224 pixels. And reading and decoding alone: how many images a core can feed to a faster model.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate

from mmclip_dist.bench.evaluation import SIZE, TEXT, drawn_set, random_run
from mmclip_dist.model.inputs import PlannedBatch
from mmclip_dist.offline.attention import attention_stage
from mmclip_dist.offline.scorer import Scorer
from mmclip_dist.offline.stage import Worker

RESULTS = Path(__file__).parent / "results" / "attention.md"


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def rates(folder: Path, options: argparse.Namespace) -> tuple[float, float, float, float]:
    """Images/s of the model alone, of a worker, and of reading and decoding alone, medians; the median of the rounds' ratios."""
    data = drawn_set(folder / "set", options.images)
    run = random_run(folder / "run", data, *TEXT)
    base = f"{data}/test"
    stage = attention_stage(base, str(folder / "out"), str(run), precision=options.precision, batch=options.batch)
    worker, shards = Worker(stage), range(len(load_manifest(base).shards))
    scorer = worker.make
    assert isinstance(scorer, Scorer)
    batches: list[PlannedBatch] = []

    def decode() -> None:
        batches[:] = [made for examples in scorer.decoded(iterate(base)) if (made := scorer.collated(examples))]

    times = [
        (seconds(decode), seconds(lambda: [scorer.score(batch).cpu() for batch in batches]),
         seconds(lambda: [worker.process(number) for number in shards]))
        for _ in range(options.rounds)
    ]  # fmt: skip
    decoding, alone, whole = (options.images / statistics.median(column) for column in zip(*times, strict=True))
    return alone, whole, decoding, statistics.median(model / stage for _, model, stage in times)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmclip_dist.bench.attention", description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        alone, whole, decoding, ratio = rates(Path(name), options)
    lines = [
        "# The attention stage beside its model", "",
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, one thread and one that decodes, torch {torch.__version__}. "
        "Command:",
        f"`python -m mmclip_dist.bench.attention {' '.join(words)}`".replace(" `", "`"), "",
        f"ViT-B/16 and its text encoder on {options.images} drawn images of {SIZE} pixels with reports, {options.precision}, "
        f"batches of {options.batch}, medians of {options.rounds} rounds: {alone:.2f} images/s alone, {whole:.2f} in the stage; "
        f"**{ratio:.3f}** of it (goal 0.9).", "",
        f"Reading, decoding and collating alone: {decoding:.0f} images/s, which is what one of `--cpus` can feed to a card.",
    ]  # fmt: skip
    print("\n".join(lines))
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
