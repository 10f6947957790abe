"""Block sizes of the Triton kernels: one static table, the same on every call, so results repeat.

Not tuned on a GPU yet. Chosen so that shared memory fits and ptxas (Triton 3.9; sm_80, sm_90) spills no registers;
on sm_100 the backward sweep spills 24 to 48 bytes, which costs less than the tiles that spill none (kernels/bench/NOTES.md).
`kernels/bench/first_hour.py` measures other tiles on a card and prints the lines for `BY_ARCHITECTURE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch


class Tile(NamedTuple):
    """One program computes rows x columns of logits, `depth` features at a time. warps, stages: Triton's options."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Rows x columns of logits whose per-tile partials are in memory at once: at most 34 MB in two-byte types, 67 MB in float32.
SWEEP_BLOCK = 16384, 16384
# Rows x columns of dL/ds in memory at once: 128 MiB. Each block costs three launches.
GRADIENT_BLOCK = 8192, 8192
# Rows or columns whose partials one program merges.
MERGED = 64

# The forward sweep of the contrastive loss, and the backward one, which holds cosines and dL/ds at once. masked: with exclusions
# or the sigmoid, whose code takes more registers.
Kernel = Literal["sweep", "sweep, masked", "gradient", "gradient, masked"]

# For two-byte types.
USUAL: dict[Kernel, Tile] = {
    "sweep": Tile(128, 128, 64, 4, 3),
    "sweep, masked": Tile(64, 128, 64, 8, 3),
    "gradient": Tile(64, 128, 64, 4, 3),
    "gradient, masked": Tile(64, 128, 64, 8, 3),
}
# Where an architecture has other ones: 90 for sm_90.
BY_ARCHITECTURE: dict[int, dict[Kernel, Tile]] = {}
# Exact float32 products run without tensor cores and hold their operands in registers.
FLOAT32 = Tile(64, 64, 32, 4, 2)
# Of a tile that few programs compute again, with more code: no register is spilled.
RARE_WARPS = 8

# Not a context variable: autograd runs the backward pass in a thread of its own.
_tried: dict[Kernel, Tile] = {}


def logits_tile(way: Literal["sweep", "gradient"], dtype: torch.dtype, masked: bool, architecture: int) -> Tile:
    """For one of the sweeps of the contrastive loss. architecture: 0 for the interpreter."""
    if dtype == torch.float32:
        return FLOAT32
    kernel: Kernel = f"{way}, masked" if masked else way  # type: ignore[assignment]
    return _tried.get(kernel) or BY_ARCHITECTURE.get(architecture, {}).get(kernel) or USUAL[kernel]


@contextmanager
def trying(kernel: Kernel, tile: Tile) -> Iterator[None]:
    """Within, `kernel` uses `tile` in two-byte types, on every architecture and in all threads. To measure candidates."""
    _tried[kernel] = tile
    try:
        yield
    finally:
        del _tried[kernel]


# One program scores, selects and copies an image of up to this many patches. Larger images are scored in blocks of this many.
FUSED_PATCHES = 256
# For kernels that only copy: 32 x 128 values in 256 threads are one or two 16-byte loads per thread.
COPY_WARPS = 8


class MaskTile(NamedTuple):
    """patches: all of an image, rounded up to a power of two. token_patches, tokens, token_depth, token_warps: block of patches
    and of words, step along the features, and warps when patches are scored against words. rows, depth, warps: the same when rows
    are copied, or scored against one vector."""

    patches: int
    token_patches: int
    tokens: int
    token_depth: int
    token_warps: int
    rows: int
    depth: int
    warps: int


def mask_tile(count: int, dtype: torch.dtype) -> MaskTile:
    """For images of `count` patches."""
    patches = max(16, 1 << (count - 1).bit_length())
    warps = min(max(patches // 32, 4), 8)
    # So small that two programs, or one of 16 warps, fit an SM: larger blocks hold their operands in 172 to 204 registers.
    token_patches = patches if patches <= FUSED_PATCHES else FUSED_PATCHES // 2
    token_warps = 2 * warps if dtype == torch.float32 else warps
    return MaskTile(patches, token_patches, 32, 16, token_warps, 32, 128, warps)
