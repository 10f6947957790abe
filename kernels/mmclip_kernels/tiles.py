"""The sizes that the Triton kernels cut their work into: one static table, the same on every call, so results repeat.

Not tuned on a card yet: chosen so that ptxas (Triton 3.9, sm_80 and sm_90) spills no register and shared memory fits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One program's rows x columns of logits, the width of a step along the features, and how Triton runs it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Rows x columns of logits whose per-tile partials exist at once: 25 MB at most.
SWEEP_BLOCK = 8192, 16384
# Rows x columns of dL/ds in memory at once: 96 MiB in two-byte types, which with the products of a block stays below 128 MiB.
GRADIENT_BLOCK = 8192, 6144


def sweep_tile(dtype: torch.dtype, exclusions: bool) -> Tile:
    """For the forward sweep of the contrastive loss. Reading exclusions takes registers: half the rows, then."""
    if dtype == torch.float32:  # exact products run on the ordinary cores, out of registers
        return Tile(64, 64, 32, 4, 2)
    return Tile(64 if exclusions else 128, 128, 64, 8, 3)


def gradient_tile(dtype: torch.dtype) -> Tile:
    """For the backward sweep, which holds the cosines and dL/ds at once: 128 x 128 of both do not fit the registers."""
    return sweep_tile(dtype, exclusions=True)


# Images of up to so many patches are scored, selected and copied by one program; more are scored in blocks of so many.
FUSED_PATCHES = 256
# Of the kernels that only copy: 32 x 128 values in 256 threads are one or two 16-byte loads each.
COPY_WARPS = 8


class MaskTile(NamedTuple):
    """One program's patches (all of an image, a power of two), tokens and width of a step where a text of several tokens is
    scored, rows and width of a step where rows are copied or scored against one vector."""

    patches: int
    tokens: int
    token_depth: int
    rows: int
    depth: int
    warps: int


def mask_tile(count: int, dtype: torch.dtype) -> MaskTile:
    """For images of `count` patches."""
    patches = max(16, 1 << (count - 1).bit_length())
    return MaskTile(patches, 32, 16 if dtype == torch.float32 else 32, 32, 128, min(max(patches // 32, 4), 8))
