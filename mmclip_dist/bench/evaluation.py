"""Does evaluation keep the model busy, and how much memory does a large set take?

    python -m mmclip_dist.bench.evaluation [--images 256] [--rounds 3] [--large 10000]

Rate: zero-shot evaluation of drawn images at 224 pixels by a ViT-B/16 of random weights, from packed set to scores, beside the
same model on the same pixels, decoded before; in turn, in one process. Memory: `mmclip evaluate zeroshot` on many images, in a
process of its own; a small model of the same image size, since what a set adds to a model's own memory does not depend on it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from mmclip_shards.datasets.synthetic.set import pack_synthetic
from mmclip_shards.images import decode_image
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from mmclip_shards.schema import image_of

from mmclip_dist.checkpoint.folder import Meta, checkpoint_path
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.config import load_config
from mmclip_dist.data.tokenizer import save_tokenizer, tokenizer_of_sets
from mmclip_dist.evaluate.encoders import open_encoder
from mmclip_dist.evaluate.protocol import OWN, load_protocol
from mmclip_dist.evaluate.reading import BATCH
from mmclip_dist.evaluate.zeroshot import Evaluation, labelled_sets
from mmclip_dist.model.build import build_model

RESULTS = Path(__file__).parent / "results" / "evaluation.md"
SIZE = 224
TEXT = ("model.text.width=384", "model.text.depth=6", "model.text.heads=6")
SMALL = (f"model.image={{size: {SIZE}, patch: 16, width: 96, depth: 2, heads: 4}}", *TEXT)


def drawn_set(folder: Path, images: int) -> str:
    pack_synthetic(str(folder), images, seed=5, size=SIZE, splits={"test": 1.0}, workers=os.cpu_count() or 1)
    return str(folder)


def random_run(folder: Path, data: str, *overrides: str) -> Path:
    tokenizer = tokenizer_of_sets([f"{data}/test"])
    save_tokenizer(tokenizer, folder / "tokenizer")
    config = load_config("mmclip_vit_b16", [f"model.text.tokenizer={folder / 'tokenizer'}", f"run_dir={folder}", *overrides])
    diseases = load_manifest(f"{data}/test").labels
    place = checkpoint_path(folder, 1)
    place.mkdir(parents=True)
    write_model(place, build_model(config, tokenizer, diseases), tokenizer, config, Meta(1, 1, 1, diseases, ()))
    return folder


def rates(run: Path, data: str, rounds: int) -> tuple[float, float, float]:
    """Images/s of the model alone, of an evaluation, and the median of the rounds' own ratios."""
    with open_encoder(str(run)) as encoder, encoder.evaluating():
        evaluation = Evaluation(labelled_sets([f"{data}/test"], ()), load_protocol(OWN), encoder.prompts)
        images = [image_of(members) or b"" for _, members in iterate(f"{data}/test")]
        batches = torch.stack([encoder.pixels(decode_image(image)) for image in images]).split(BATCH)
        alone, whole = [], []
        for _ in range(rounds):
            began = time.monotonic()
            for batch in batches:
                encoder.embed_images(batch)
            alone.append(len(images) / (time.monotonic() - began))
            began = time.monotonic()
            evaluation.scored(encoder)
            whole.append(len(images) / (time.monotonic() - began))
    return statistics.median(alone), statistics.median(whole), statistics.median(w / a for w, a in zip(whole, alone, strict=True))


def peak_mib(command: list[str]) -> tuple[float, float]:
    """Seconds that a command takes, and the largest sum of its processes' resident memory, looked at every 50 ms."""
    began = time.monotonic()
    running = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while running.poll() is None:
        with suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(each.memory_info().rss for each in [running, *running.children(recursive=True)]))
        time.sleep(0.05)
    if running.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {running.returncode}")
    return time.monotonic() - began, peak / 2**20


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmclip_dist.bench.evaluation", description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=10_000)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = drawn_set(folder / "few", options.images)
        alone, whole, ratio = rates(random_run(folder / "vit_b16", few, *TEXT), few, options.rounds)
        many = drawn_set(folder / "many", options.large)
        small = random_run(folder / "small", few, *SMALL)
        rows = []
        for data, count in ((few, options.images), (many, options.large)):
            command = [sys.executable, "-m", "mmclip_dist.cli", "evaluate", "zeroshot", str(small), "--data", data]
            rows.append((count, *peak_mib(command)))
    lines = [
        "# Evaluation: rate and memory", "",
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}. Command:",
        f"`python -m mmclip_dist.bench.evaluation {' '.join(words)}`".replace(" `", "`"), "",
        f"ViT-B/16 on {options.images} drawn images of {SIZE} pixels, medians of {options.rounds} rounds: {alone:.2f} images/s "
        f"alone, {whole:.2f} in `mmclip evaluate zeroshot`'s loop; **{ratio:.3f}** of it (goal 0.9).", "",
        "| images | seconds | peak of all processes, MiB (goal at 10,000: 2,000) |", "|---|---|---|",
        *(f"| {count:,} | {seconds:.0f} | {peak:.0f} |" for count, seconds, peak in rows),
    ]  # fmt: skip
    print("\n".join(lines))
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
