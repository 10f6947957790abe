"""Rows that are spread over ranks: gather them, sum them, and return each rank its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# Texts are sent in up to 4 pieces of at least this many rows of each rank. One piece is computed while the next is sent.
PIECE_ROWS = 512


def all_reduce(value: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or what `op` says) over the ranks of the group, as a new tensor."""
    value = value.clone()
    if group is not None:
        dist.all_reduce(value, op, group)
    return value


def gather_rows(rows: Tensor, group: Group) -> tuple[Tensor, list[int]]:
    """-> the rows [n, ...] of all ranks in rank order, and each rank's n, which may differ between ranks. No gradient."""
    rows = rows.detach()
    if group is None:
        return rows, [len(rows)]
    world = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device), group)
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]), counts


def own_rows(rows: Tensor, sizes: list[int], group: Group) -> Tensor:
    """This rank's part of rows that `gather_rows` gathered."""
    rank = dist.get_rank(group) if group is not None else 0
    return rows[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


class Shards:
    """The rows of all ranks, cut into pieces. A piece holds equally many rows of every rank, padded where a rank has fewer.

    sizes: number of rows of each rank. columns: for each piece, the places of its rows among all rows in rank order; padding has
    the place `sum(sizes)`, one past the last. Without a group there is one piece: all rows in their order.
    """

    def __init__(self, sizes: list[int], group: Group, device: torch.device) -> None:
        self.sizes, self.group = sizes, group
        self.columns: list[Tensor | slice] = [slice(0, sizes[0])]
        if group is None:
            return
        longest = max(sizes)
        pieces = min(max(longest // PIECE_ROWS, 1), 4)
        self._length = -(-longest // pieces)
        starts = [0, *accumulate(sizes)]
        self.columns = []
        for first in range(0, max(longest, 1), max(self._length, 1)):
            row = torch.arange(first, first + self._length, device=device)
            own = [torch.where(row < size, row + start, sum(sizes)) for size, start in zip(sizes, starts, strict=False)]
            self.columns.append(torch.cat(own))

    def gather(self, rows: Tensor) -> Iterator[Tensor]:
        """rows [n, E] of this rank -> the pieces, each [W x length, E]. Later pieces are sent while one is used."""
        if self.group is None:
            yield rows
            return
        under_way = []
        for piece in self._cut(rows):
            whole = piece.new_empty((len(self.sizes) * len(piece), *piece.shape[1:]))
            under_way.append((dist.all_gather_into_tensor(whole, piece, self.group, async_op=True), whole))
        for work, whole in under_way:
            work.wait()
            yield whole

    def reduce(self, pieces: Iterable[Tensor]) -> Tensor:
        """Each rank's partial sums, in pieces as `gather` yields them -> this rank's rows [n, E], summed over the ranks."""
        if self.group is None:
            (only,) = pieces
            return only
        under_way = []
        for piece in pieces:
            own = piece.new_empty((len(piece) // len(self.sizes), *piece.shape[1:]))
            under_way.append((dist.reduce_scatter_tensor(own, piece, group=self.group, async_op=True), piece, own))
        for work, *_ in under_way:
            work.wait()
        return torch.cat([own for *_, own in under_way])[: self.sizes[dist.get_rank(self.group)]]

    def _cut(self, rows: Tensor) -> Iterator[Tensor]:
        for index in range(len(self.columns)):
            piece = rows[index * self._length : (index + 1) * self._length]
            padding = piece.new_zeros((self._length - len(piece), *rows.shape[1:]))
            yield torch.cat([piece, padding])


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        gathered, ctx.sizes = gather_rows(rows, group)
        ctx.group = group
        return gathered

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return own_rows(all_reduce(upstream[0], ctx.group), ctx.sizes, ctx.group), None


def gather_with_gradient(rows: Tensor, group: Group) -> Tensor:
    """The rows [n, ...] of all ranks in rank order. The backward pass sums the ranks' gradients of each row."""
    gathered: Tensor = _GatherWithGradient.apply(rows, group)
    return gathered
