"""What one contrastive loss takes at least on a card, forward and backward, from its machine code, bytes and launches.

Each kernel takes as long as the slowest of four: its products at the tensor cores' rate, its instructions at the issue slots,
its exponentials, its bytes. At best the other three are hidden behind it, at worst nothing is. `machine_code.py` prints both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmclip_kernels.tiles import GRADIENT_BLOCK, SWEEP_BLOCK, Tile

LAUNCHES = Path(__file__).parent / "results" / "launches.json"
SCHEDULERS = 4  # of an SM: each issues one instruction of a warp per cycle
EXPONENTIALS = 16  # an SM's, per cycle
TENSOR = 4096  # floating-point operations of an SM's tensor cores per cycle: bfloat16, not sparse
LAUNCH_US = 2.5  # from one kernel's end to the next one's begin. An assumption


@dataclass(frozen=True)
class Card:
    """tensor: TFLOP/s of the fastest matrix product measured (bfloat16). bandwidth: TB/s, nine tenths of the data sheet's."""

    name: str
    architecture: int
    processors: int
    tensor: float
    bandwidth: float

    @property
    def clock(self) -> float:
        """GHz at which the tensor cores would reach their measured rate: what power allows, not the data sheet's 1.98."""
        return self.tensor * 1e3 / (self.processors * TENSOR)


# tensor: github.com/stas00/ml-engineering, "Maximum Achievable Matmul FLOPS": 80% of the data sheet's 989, the same on both.
H200 = Card("H200 SXM", 90, 132, 794.5, 0.9 * 4.8)
H100 = Card("H100 SXM", 90, 132, 794.5, 0.9 * 3.35)


def warp_instructions(code: Mapping[str, int], tile: Tile, size: int, width: int) -> float:
    """Of all tiles of size x size logits: the loop of products and the usual way behind it."""
    programs = (size / tile.rows) * (size / tile.columns)
    return programs * code["warps"] * (width / tile.depth * code["loop"] + code["usual"])


@dataclass(frozen=True)
class Part:
    """Milliseconds of one kernel, or of all launches of it."""

    name: str
    products: float
    issue: float
    exponentials: float
    bytes: float

    @property
    def bound(self) -> float:
        return max(self.products, self.issue, self.exponentials, self.bytes)

    @property
    def times(self) -> tuple[float, ...]:
        return self.products, self.issue, self.exponentials, self.bytes, self.bound

    @property
    def apart(self) -> float:
        """If nothing is hidden behind anything else."""
        return self.products + self.issue + self.exponentials + self.bytes


def parts(codes: Mapping[str, Mapping[str, Any]], sweep: Tile, gradient: Tile, size: int, width: int, card: Card) -> list[Part]:
    """Forward and backward in bfloat16, N = M = size, ids given. codes: of each kernel, `warps`, `loop` and `usual`."""
    logits, features = size * size, 2 * size * width  # features: bytes of the images, or of the texts
    partials = 2 * 4 * logits * (1 / sweep.rows + 1 / sweep.columns)  # (maximum, sum) of each tile's rows and columns
    # Each block reads its features once: what is read again comes from the L2 cache.
    of_sweep, of_gradient = (2 * features * size / min(block[0], size) for block in (SWEEP_BLOCK, GRADIENT_BLOCK))
    rare = sweep.columns / size  # of the tiles: those on the diagonal hold the positives
    blocks = size / min(GRADIENT_BLOCK[0], size)

    def part(name: str, products: float = 0.0, share: float = 0.0, tile: Tile | None = None, moved: float = 0.0) -> Part:
        issued = share * warp_instructions(codes[name], tile, size, width) if tile else 0.0
        return Part(
            name,
            products=products * 2 * logits * width / (card.tensor * 1e9),
            issue=issued / (card.processors * SCHEDULERS * card.clock * 1e6),
            exponentials=share * logits / (card.processors * EXPONENTIALS * card.clock * 1e6),
            bytes=moved / (card.bandwidth * 1e9),
        )

    return [
        part("_sweep_tile", 1, 1, sweep, of_sweep + partials),
        part("_rare_tile", rare, rare, sweep, rare * of_sweep),
        part("_merge_tiles", moved=partials),
        part("_gradient_tile", 1, 1, gradient, of_gradient + 2 * logits),
        # Two for each block of dL/ds, which both read; their float32 sums are read and written by each.
        part("products with dL/ds", 2, moved=2 * 2 * logits + of_gradient + 2 * 2 * 2 * features * blocks),
        # Features without those left out, twice; their extremes; gradients times the factor, and in the features' type.
        part("small kernels", moved=2 * (2 * 2 * features + features + 2 * 2 * features + 3 * features)),
    ]


def launch_ms(size: int) -> float:
    counts = next(row for row in json.loads(LAUNCHES.read_text()) if (row["size"], row["ranks"]) == (size, 1))
    return 1e-3 * LAUNCH_US * sum(counts[way]["launches"] for way in ("forward", "backward"))


def document(found: list[Part], size: int, width: int, card: Card) -> dict[str, Any]:
    launches = launch_ms(size)
    return {
        "card": card.name, "size": size, "width": width, "kernels ms": round(sum(part.bound for part in found), 2),
        "launches ms": round(launches, 2), "bound ms": round(sum(part.bound for part in found) + launches, 2),
        "nothing hidden ms": round(sum(part.apart for part in found) + launches, 2),
    }  # fmt: skip


def table(found: list[Part], size: int, width: int, card: Card) -> list[str]:
    """Markdown lines."""
    whole = document(found, size, width, card)
    return [
        f"## One loss on an {card.name}, computed", "",
        f"bfloat16, N = M = {size:,}, E = {width}, forward and backward: at least **{whole['bound ms']} ms**, of which launches"
        f" {whole['launches ms']} ms; {whole['nothing hidden ms']} ms if no", "kernel hid anything behind anything else. "
        f"Assumed: {card.processors} SMs, {SCHEDULERS} issue slots, {EXPONENTIALS} exponentials and {TENSOR} operations of",
        f"tensor cores an SM and cycle, {card.clock:.2f} GHz, so {card.tensor} TFLOP/s, {card.bandwidth:.2f} TB/s,",
        f"{LAUNCH_US} us a launch.", "",
        "| kernel | products ms | issue ms | exponentials ms | bytes ms | bound ms |", "|---|---|---|---|---|---|",
        *(f"| {part.name} | {' | '.join(f'{value:.2f}' for value in part.times)} |" for part in found), "",
    ]  # fmt: skip
