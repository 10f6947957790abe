"""How many samples a second two hosts train, against one: a rank and a core for each host of `tests/cluster`.

    python -m tests.cluster.two_against_one [--rounds 3] [--steps 16] [--batch 64]

The same batch for each rank, so that two hosts have twice the global batch. Every round measures both, in turn. Needs root, two
cores, and what `tests/cluster` needs; results: launch/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from mmclip_shards.datasets.synthetic.set import pack_synthetic

from mmclip_dist.data.tokenizer import save_tokenizer, tokenizer_of_sets
from mmclip_dist.run.metrics import read_metrics
from tests.cluster.machines import Machines, machines, missing

NAMES = ("host-a", "host-b")
MODEL = (
    "model.image={size: 64, patch: 8, width: 192, depth: 6, heads: 6}",
    "model.text={width: 192, depth: 4, heads: 6, max_tokens: 72}",
    "loss.entity=0", "optim.stop_at=null", "threads=1", "data.workers=1", "data.streams=32", "checkpoint.every=100000",
    "log_every=1",
)  # fmt: skip
_WARM = 4  # steps that are not counted: imports of loaders, first allocations


def measure(made: Machines, names: tuple[str, ...], run: Path, words: list[str]) -> float:
    """Samples a second, the median of the steps of a run. Each host's rank keeps to a core."""
    pods = []
    for number, name in enumerate(names):
        variables = {
            "NODES": str(len(names)), "NODE": str(number), "FIRST": names[0], "GPUS": "1", "RUN_DIR": str(run),
            "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        command = ["taskset", "-c", str(number), sys.executable, "-m", "mmclip_launch.node", "quickstart", *words]
        with (run.parent / f"{run.name}-{name}.log").open("w") as log:
            pods.append(
                subprocess.Popen([*made.enter(name), *command], env=os.environ | variables, stdout=log, stderr=log)
            )
    codes = [pod.wait() for pod in pods]
    assert not any(codes), f"codes {codes}: see {run.parent}"
    return statistics.median(row["samples_per_s"] for row in read_metrics(run) if row["step"] > _WARM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 3), ("steps", 16), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if why := missing():
        sys.exit(f"error: {why}")
    with tempfile.TemporaryDirectory() as made_in, machines(Path(made_in, "machines"), *NAMES) as made:
        folder = Path(made_in)
        pack_synthetic(str(folder / "set"), 512, seed=1, size=64, splits={"train": 1.0})
        url = str(folder / "set" / "train")
        save_tokenizer(tokenizer_of_sets([url], 600), folder / "tokenizer")
        shared = [*MODEL, f"data.sources={json.dumps([{'url': url}])}", f"model.text.tokenizer={folder / 'tokenizer'}"]
        ratios = []
        for turn in range(options.rounds):
            rates = []
            for count in (1, 2):
                words = [*shared, f"optim.steps={options.steps}", f"optim.global_batch={count * options.batch}"]
                rates.append(measure(made, NAMES[:count], folder / f"run-{turn}-{count}", words))
            ratios.append(rates[1] / rates[0])
            told = f"{rates[0]:.1f} samples/s on one host, {rates[1]:.1f} on two"
            print(f"round {turn + 1}: {told}: {ratios[-1]:.2f} times", flush=True)
        print(f"median: {statistics.median(ratios):.2f} times")


if __name__ == "__main__":
    main()
