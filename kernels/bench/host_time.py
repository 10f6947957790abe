"""Host time of the contrastive loss by the number of ranks: python kernels/bench/host_time.py [--rounds 9]

Forward and backward on the CPU, of two rows a rank, on ranks that do not exist: next to nothing is computed and nothing is sent,
so that what is left is the work of the host. Every round measures each number of ranks once, in turn; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
import torch.distributed as dist
from mmclip_kernels import contrastive_loss
from mmclip_kernels import ranks as spread
from torch.testing._internal.distributed.fake_pg import FakeStore

RANKS, ROWS, WIDTH = (8, 64, 512, 1024), 2, 8


class Sent:
    """A collective call that is over. torch's fake process group would copy once for each rank, on this host."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def wait(self) -> None:
        pass


spread.all_gather_single = spread.reduce_scatter_single = Sent


def seconds(ranks: int, repeats: int) -> float:
    """Of one forward and backward pass on one of `ranks` ranks, every other of which has one row less."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=ranks)
    sizes = [ROWS - number % 2 for number in range(ranks)]
    image, text = (torch.rand(sizes[1], WIDTH, requires_grad=True) for _ in range(2))
    ids, scale = torch.arange(sizes[1]), torch.ones(1, requires_grad=True)

    def once() -> None:
        loss = contrastive_loss(
            image, text, scale, image_ids=ids, text_ids=ids, group=dist.group.WORLD, sizes=(sizes, sizes)
        )  # fmt: skip
        loss.backward()

    once()
    began = time.process_time()
    for _ in range(repeats):
        once()
    spent = (time.process_time() - began) / repeats
    dist.destroy_process_group()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=20, help="passes of one measurement")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    for _ in range(arguments.rounds):
        for ranks, times in found.items():
            times.append(seconds(ranks, arguments.repeats))
    print("| ranks | host time, ms | of 8 ranks |\n|---|---|---|")
    for ranks, times in found.items():
        ratio = statistics.median(own / few for own, few in zip(times, found[RANKS[0]], strict=True))
        print(f"| {ranks} | {1000 * statistics.median(times):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
