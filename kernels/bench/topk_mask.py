"""Attention-guided masking beside the usual code: MAE's two sorts and gathers, AttMask's top-k and replacement.

    python kernels/bench/topk_mask.py [--rounds 20] [--seconds 20]

On a CUDA device: 4,096 images of 196 and 1,024 patches, width 768, in bfloat16. Otherwise: 64 images of 196 patches in float32,
with the torch implementation. Half of the patches are kept. Each round runs every case once; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from measuring import Row, extra_memory, ratios, rounds, write_results
from mmclip_kernels import attention_topk_mask
from torch import Tensor
from torch.nn import functional as F

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
SIZES = [(4096, 196), (4096, 1024)] if CUDA else [(64, 196)]  # images, patches
Masking = Callable[["Inputs"], Tensor]


@dataclass(frozen=True)
class Shape:
    """What is measured. scored: against one text vector; otherwise the scores are given."""

    images: int
    patches: int
    width: int
    dtype: torch.dtype
    mode: str
    scored: bool


@dataclass
class Inputs:
    patches: Tensor
    text: Tensor
    scores: Tensor
    token: Tensor
    upstream: Tensor
    keep: int
    mode: str
    scored: bool

    @property
    def leaves(self) -> list[Tensor]:
        return [self.patches] if self.mode == "gather" else [self.patches, self.token]


def inputs(shape: Shape, seed: int = 0) -> Inputs:
    device = "cuda" if CUDA else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=shape.dtype)

    keep = shape.patches // 2
    written = keep if shape.mode == "gather" else shape.patches
    return Inputs(
        normal(shape.images, shape.patches, shape.width).requires_grad_(), normal(shape.images, shape.width),
        normal(shape.images, shape.patches).float(), normal(shape.width).requires_grad_(),
        normal(shape.images, written, shape.width), keep, shape.mode, shape.scored,
    )  # fmt: skip


def ours(impl: str) -> Masking:
    def mask(x: Inputs) -> Tensor:
        source = {"text": x.text} if x.scored else {"scores": x.scores}
        token = x.token if x.mode == "replace" else None
        return attention_topk_mask(x.patches, keep=x.keep, mode=x.mode, mask_token=token, impl=impl, **source).visible

    return mask


def usual(x: Inputs) -> Tensor:
    """MAE's random_masking with scores instead of noise, and AttMask's replacement of the patches of highest score."""
    scores = x.scores
    if x.scored:
        with torch.no_grad():
            normal = F.normalize(x.patches, dim=-1)
            scores = (normal @ F.normalize(x.text, dim=-1)[:, :, None])[:, :, 0]
    count = x.patches.shape[1]
    if x.mode == "replace":
        hidden = scores.topk(count - x.keep, dim=1).indices
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, hidden, True)
        return torch.where(mask[:, :, None], x.token, x.patches)
    shuffle = scores.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    kept = shuffle[:, : x.keep]
    mask = torch.ones_like(scores)
    mask[:, : x.keep] = 0
    mask.gather(1, restore)
    return x.patches.gather(1, kept[:, :, None].expand(-1, -1, x.patches.shape[2]))


def implementations() -> dict[str, Masking]:
    found: dict[str, Masking] = {"ours, triton": ours("triton")} if CUDA else {}
    found |= {"ours, torch": ours("torch"), "usual, eager": usual}
    if CUDA:
        found["usual, torch.compile"] = torch.compile(usual)
    return found


def prepare(name: str, shape: Shape) -> Callable[[int], object]:
    x, mask = inputs(shape), implementations()[name]
    return lambda _: step(mask, x)


def step(mask: Masking, x: Inputs) -> None:
    torch.autograd.grad(mask(x), x.leaves, x.upstream)


def measure(shape: Shape, count: int, seconds: float, with_memory: bool = True) -> Iterator[Row]:
    """Every implementation, for at most `count` rounds and `seconds`. with_memory: a CPU takes a new process for each."""
    # Several inputs, used in turn: the last one may still be in the cache.
    sets = [inputs(shape, seed) for seed in range(2 if CUDA else 4)]
    graphs = {name: [mask(x) for x in sets] for name, mask in implementations().items()}
    forward = {name: (lambda turn, mask=mask: mask(sets[turn % len(sets)])) for name, mask in implementations().items()}

    def backward(name: str) -> Callable[[int], object]:
        def run(turn: int) -> object:
            x = sets[turn % len(sets)]
            return torch.autograd.grad(graphs[name][turn % len(sets)], x.leaves, x.upstream, retain_graph=True)

        return run

    with torch.no_grad():
        of_forward = rounds(forward, count, seconds / 2)
    of_backward = rounds({name: backward(name) for name in forward}, count, seconds / 2)
    first = next(iter(forward))
    relative = ratios(of_forward, first), ratios(of_backward, first)
    small = Shape(2, shape.patches, 16, shape.dtype, shape.mode, shape.scored)
    for name in forward:
        memory = extra_memory(prepare, name, shape, small=(name, small)) if with_memory else None
        yield {
            "images": shape.images, "patches": shape.patches, "width": shape.width, "type": str(shape.dtype).split(".")[1],
            "mode": shape.mode, "scores": "one text vector" if shape.scored else "given", "implementation": name,
            "forward ms": round(statistics.median(of_forward[name]), 3), "forward x": round(relative[0][name], 2),
            "backward ms": round(statistics.median(of_backward[name]), 3), "backward x": round(relative[1][name], 2),
            "extra MiB": None if memory is None else round(memory / 2**20, 1),
        }  # fmt: skip


def compare(
    images: int, patches: int, width: int, count: int, seconds: float = 16.0, with_memory: bool = True
) -> list[Row]:  # fmt: skip
    """Both modes, with scores given and with one text vector."""
    shapes = [Shape(images, patches, width, DTYPE, *how) for how in product(("gather", "replace"), (False, True))]
    return [row for shape in shapes for row in measure(shape, count, seconds, with_memory)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=16.0, help="at most, for each shape")
    arguments = parser.parse_args()
    rows = [row for size in SIZES for row in compare(*size, 768, arguments.rounds, arguments.seconds)]
    write_results(
        "topk_mask", rows,
        notes=["`extra MiB`: the peak of forward and backward above the inputs.",
               "`x`: the median of the rounds' own ratios to the first implementation."],
    )  # fmt: skip


if __name__ == "__main__":
    main()
