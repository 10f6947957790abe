"""What one contrastive loss launches on a card, counted without one: python kernels/bench/launches.py [--print-only]

The loss runs on a CPU with its real host code. Triton's kernels and the matrix products are counted and not computed; every other
PyTorch operation that would launch something is counted once (a sort is one, though a card runs it in several steps; views and
new memory are none). Several ranks are ranks that do not exist; `N` is the batch of all of them.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then take tensors of a CPU

import torch
import torch.distributed as dist
import triton
from mmclip_kernels import contrastive, contrastive_triton
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

RESULTS = Path(__file__).parent / "results"
WIDTH = 512
CASES = ((32768, 1), (65536, 1), (32768, 8), (65536, 8))  # N, ranks
NO_LAUNCH = ("aten.empty", "aten.new_empty", "aten.lift_fresh", "aten.detach", "aten.scalar_tensor", "aten.promote_types")
READS = ("_local_scalar_dense", "nonzero", "_unique", "item")  # the host waits for the device; a graph cannot hold them


class Count(TorchDispatchMode):
    """launches: Triton's, products and other operations; collectives; reads by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if not (function.is_view or name.startswith(NO_LAUNCH)) or any(read in name for read in READS):
            self.names[name] += 1
        return function(*args, **kwargs or {})

    def sums(self) -> dict[str, int]:
        found = {"launches": 0, "collectives": 0, "reads": 0}
        for name, count in self.names.items():
            kind = "reads" if any(read in name for read in READS) else "collectives" if name.startswith("c10d.") else "launches"
            found[kind] += count
        return found


@contextmanager
def counting() -> Iterator[Count]:
    count = Count()

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def run(*_: Any, **__: Any) -> None:
            count.names[f"triton.{kernel.fn.__name__}"] += 1

        return run

    def product(*_: Any, **__: Any) -> None:
        count.names["product"] += 1

    own = InterpretedFunction.__getitem__, contrastive_triton._add_product
    InterpretedFunction.__getitem__, contrastive_triton._add_product = launch, product
    try:
        with count:
            yield count
    finally:
        InterpretedFunction.__getitem__, contrastive_triton._add_product = own


def count_loss(size: int, ranks: int, ids: bool = True, mode: Any = "softmax") -> dict[str, Count]:
    """-> what forward and backward of one rank launch, for a batch of `size` over `ranks`. ids: given, or the diagonal."""
    rows = size // ranks
    image, text = (torch.ones(rows, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    own, scale = torch.arange(rows), torch.ones(())
    group = None
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=ranks)
        group = dist.group.WORLD
    sizes = [rows] * ranks
    arguments = (
        image, text, scale, torch.zeros(()), own, own, None, None, None, not ids, mode, "triton", group, sizes, sizes
    )  # fmt: skip
    try:
        with counting() as forward:
            output = contrastive._forward(*arguments)
            output[0].mean()
        upstream = torch.ones(()).expand(2)
        with counting() as backward:
            contrastive._backward(upstream / 2, *output, *arguments)
    finally:
        if ranks > 1:
            dist.destroy_process_group()
    return {"forward": forward, "backward": backward}


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python kernels/bench/launches.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--print-only", action="store_true", help="write no results")
    parser.add_argument("--names", action="store_true", help="print what is launched at N = 32,768 on one rank")
    options = parser.parse_args(words)
    warnings.filterwarnings("ignore")
    if options.names:
        for way, count in count_loss(32768, 1).items():
            print(way, *(f"  {number:4} {name}" for name, number in count.names.most_common()), sep="\n")
        return
    lines = [
        "# Launches of one contrastive loss", "",
        f"{datetime.date.today()}, Triton {triton.__version__}, torch {torch.__version__}, no card. bfloat16, E = {WIDTH},",
        "ids given, softmax. N: the batch of all ranks. Command: `python kernels/bench/launches.py`", "",
        "| N | ranks | forward | backward | collectives, both | reads by the host, both |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    table = []
    for size, ranks in CASES:
        found = {way: count.sums() for way, count in count_loss(size, ranks).items()}
        table.append({"size": size, "ranks": ranks, **found})
        cells = [f"{size:,}", ranks, *(found[way]["launches"] for way in found)]
        cells += [sum(each[kind] for each in found.values()) for kind in ("collectives", "reads")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    print("\n".join(lines))
    if not options.print_only:
        (RESULTS / "launches.md").write_text("\n".join(lines) + "\n")
        (RESULTS / "launches.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
