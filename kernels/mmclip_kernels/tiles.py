"""Block sizes of the Triton kernels: one static table, the same on every call, so results repeat.

Not tuned on a GPU yet. Chosen so that ptxas (Triton 3.9, sm_80 and sm_90) spills no registers and shared memory fits.
"""

from __future__ import annotations

from typing import NamedTuple

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


def sweep_tile(dtype: torch.dtype, masked: bool) -> Tile:
    """For the forward sweep of the contrastive loss. masked: with exclusions or the sigmoid, whose code takes more registers."""
    if dtype == torch.float32:  # exact float32 products run without tensor cores and hold their operands in registers
        return Tile(64, 64, 32, 4, 2)
    return Tile(64, 128, 64, 8, 3) if masked else Tile(128, 128, 64, 4, 3)


# Of a tile that few programs compute again, with more code: no register is spilled.
RARE_WARPS = 8


def gradient_tile(dtype: torch.dtype, masked: bool) -> Tile:
    """For the backward sweep, which holds cosines and dL/ds at once."""
    if dtype == torch.float32:
        return sweep_tile(dtype, masked)
    return Tile(64, 128, 64, 8 if masked else 4, 3)


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
