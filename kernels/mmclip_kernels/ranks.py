"""Rows that are spread over ranks: gather them, sum them, and return each rank its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# Since torch 2.13 these have new names, and the old ones warn.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# Texts are sent in up to 4 pieces of at least this many rows of each rank. One piece is computed while the next is sent.
PIECE_ROWS = 512


def all_reduce(value: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or what `op` says) over the ranks of the group, as a new tensor; without a group, the value itself."""
    if group is None:
        return value
    value = value.clone()
    dist.all_reduce(value, op, group)
    return value


def rank_sizes(counts: Sequence[int], group: Group, device: torch.device) -> list[list[int]]:
    """Each of these counts of every rank, in rank order: [[n of rank 0, ...], ...]. The host waits for the device once."""
    if group is None:
        return [[count] for count in counts]
    own = torch.tensor(counts, device=device)
    every = own.new_empty(dist.get_world_size(group) * len(own))
    all_gather_single(every, own, group)
    found: list[list[int]] = every.view(-1, len(own)).T.tolist()
    return found


def gather_rows(rows: Tensor, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """The rows [n, ...] of all ranks in rank order; n may differ between ranks. No gradient.

    sizes: n of each rank. None: gathered first, and the host waits for the device.
    """
    rows = rows.detach()
    if group is None:
        return rows
    if sizes is None:
        (sizes,) = rank_sizes([len(rows)], group, rows.device)
    longest = max(sizes)
    whole = rows.new_empty((len(sizes) * longest, *rows.shape[1:]))
    if longest:
        all_gather_single(whole, _padded(rows, longest), group)
    if min(sizes) == longest:
        return whole
    return whole[_places(tuple(sizes)).to(rows.device, non_blocking=True)]


@lru_cache(maxsize=8)  # a step asks for the same ones in every gather
def _places(sizes: tuple[int, ...]) -> Tensor:
    """Where the rows of all ranks lie among their padded parts [sum of sizes], int64 on the CPU."""
    length, start = _extents(sizes)
    padding = torch.arange(len(sizes)) * max(sizes) - start
    return padding.repeat_interleave(length) + torch.arange(sum(sizes))


@lru_cache(maxsize=8)
def _extents(sizes: tuple[int, ...]) -> Tensor:
    """Number of rows of each rank, and the place of its first one among those of all ranks [2, W], int64 on the CPU."""
    length = torch.tensor(sizes)
    return torch.stack([length, length.cumsum(0) - length])


def _padded(rows: Tensor, length: int, padding: int = 0) -> Tensor:
    if len(rows) == length:
        return rows.contiguous()
    return torch.cat([rows, rows.new_full((length - len(rows), *rows.shape[1:]), padding)])


def own_rows(rows: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """This rank's part of rows that `gather_rows` gathered."""
    rank = dist.get_rank(group) if group is not None else 0
    return rows[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


class Shards:
    """The rows of all ranks, cut into pieces. A piece holds equally many rows of every rank, padded where a rank has fewer.

    sizes: number of rows of each rank. columns: for each piece, its places among the rows of all pieces. padded: whether there is
    padding. Without a group there is one piece: all rows in their order.
    """

    def __init__(self, sizes: Sequence[int], group: Group) -> None:
        self.sizes, self.group = sizes, group
        self._length, pieces = sizes[0], 1
        if group is not None:
            longest = max(sizes)
            self._length = -(-longest // min(max(longest // PIECE_ROWS, 1), 4))
            pieces = max(-(-longest // max(self._length, 1)), 1)
        wide = len(sizes) * self._length
        self.columns = [slice(number * wide, (number + 1) * wide) for number in range(pieces)]
        self.padded = min(sizes) < pieces * self._length

    def spread(self, rows: Tensor, padding: int) -> Tensor:
        """rows [n] of this rank -> those of all ranks, piece by piece. No gradient."""
        if self.group is None:
            return rows
        pieces = len(self.columns)
        own = _padded(rows.detach(), pieces * self._length, padding)
        whole = own.new_empty(len(self.sizes) * len(own))
        if len(own):
            all_gather_single(whole, own, self.group)
        return whole.view(-1, pieces, self._length).transpose(0, 1).flatten()

    def places(self, number: int, device: torch.device) -> Tensor:
        """Where the rows of a piece lie among those of all ranks in rank order; padding, at `sum(sizes)`."""
        # Of all ranks at once: the work of the host must not grow with their number.
        size, start = _extents(tuple(self.sizes))[..., None].to(device, non_blocking=True)
        row = torch.arange(number * self._length, (number + 1) * self._length, device=device)
        return torch.where(row < size, row + start, sum(self.sizes)).flatten()

    def gather(self, rows: Tensor) -> Iterator[Tensor]:
        """rows [n, E] of this rank -> the pieces, each [W x length, E]. Later pieces are sent while one is used."""
        if self.group is None:
            yield rows
            return
        under_way = []
        for piece in self._cut(rows):
            whole = piece.new_empty((len(self.sizes) * len(piece), *piece.shape[1:]))
            under_way.append((all_gather_single(whole, piece, self.group, async_op=True), whole))
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
            under_way.append((reduce_scatter_single(own, piece, group=self.group, async_op=True), piece, own))
        for work, *_ in under_way:
            work.wait()
        return torch.cat([own for *_, own in under_way])[: self.sizes[dist.get_rank(self.group)]]

    def _cut(self, rows: Tensor) -> Iterator[Tensor]:
        for index in range(len(self.columns)):
            yield _padded(rows[index * self._length : (index + 1) * self._length], self._length)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, sizes: Sequence[int]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return gather_rows(rows, group, sizes)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return own_rows(all_reduce(upstream[0], ctx.group), ctx.sizes, ctx.group), None, None


def gather_with_gradient(rows: Tensor, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """The rows [n, ...] of all ranks in rank order. The backward pass sums the ranks' gradients of each row.

    sizes: as in `gather_rows`.
    """
    if sizes is None:
        (sizes,) = rank_sizes([len(rows)], group, rows.device)
    gathered: Tensor = _GatherWithGradient.apply(rows, group, sizes)
    return gathered
