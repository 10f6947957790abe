"""Several reports share a row, so that no padding is computed.

N texts of T columns each, padded; packed they fill R rows of L. Whatever works token by token runs over the rows as they are;
attention sees the texts of a row apart by `blocks`. The rows are as long as the longest text, or a few times as long where that
leaves less room over: they never cost more than the padded texts do.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each of K tokens lies. texts, columns: N and T. rows, length: R and L.

    place [K]: in the padded texts, laid end to end. slot [K]: in the packed rows, laid end to end. segment [R, L]: number of the
    text, -1 where a row has room left. column [R, L]: of the token in its text, 0 there. All int64, on the texts' device.
    """

    texts: int
    columns: int
    rows: int
    length: int
    place: Tensor
    slot: Tensor
    segment: Tensor
    column: Tensor

    @classmethod
    def of(cls, mask: Tensor, width: int) -> Packing:
        """The packing of texts with mask [N, T] bool (True: a token) for an encoder of `width`. A mask on a card is waited for.

        A text without a token takes no place. One row is left where no text has any: see `TextTower`.
        """
        present = mask.cpu().numpy()
        lengths = present.sum(1)
        longest = max(1, int(lengths.max(initial=0)))
        placed = [_place_texts(lengths.tolist(), times * longest) for times in (1, 2, 4)]
        # A layer's work per token is 24 width^2 + 4 length width operations.
        first, rows, length = min(placed, key=lambda found: found[1] * found[2] * (6 * width + found[2]))
        text, column = np.nonzero(present)
        within = np.arange(len(text)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        slot = np.asarray(first, dtype=np.int64)[text] + within
        segments, columns = np.full(rows * length, -1), np.zeros(rows * length, dtype=np.int64)
        segments[slot], columns[slot] = text, column
        indices = np.stack([text * mask.shape[1] + column, slot]), np.stack([segments, columns])
        place_slot, by_row = (torch.from_numpy(array).to(mask.device, non_blocking=True) for array in indices)
        segment, columns_of = by_row.reshape(2, rows, length)
        return cls(len(mask), mask.shape[1], rows, length, place_slot[0], place_slot[1], segment, columns_of)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.place, self.slot, self.segment, self.column]

    def to(self, device: torch.device) -> Packing:
        moved = (indices.to(device, non_blocking=True) for indices in self.tensors)
        return Packing(self.texts, self.columns, self.rows, self.length, *moved)

    def pack(self, values: Tensor) -> Tensor:
        """Padded texts [N, T, ...] -> rows [R, L, ...], 0 where a row has room left."""
        shape = values.shape[2:]
        packed = values.new_zeros(self.rows * self.length, *shape)
        return packed.index_copy(0, self.slot, values.flatten(0, 1)[self.place]).unflatten(0, (self.rows, self.length))

    def unpack(self, values: Tensor) -> Tensor:
        """Rows [R, L, ...] -> padded texts [N, T, ...], 0 where there is no token."""
        padded = values.new_zeros(self.texts * self.columns, *values.shape[2:])
        padded = padded.index_copy(0, self.place, values.flatten(0, 1)[self.slot])
        return padded.unflatten(0, (self.texts, self.columns))

    def blocks(self, dtype: torch.dtype) -> Tensor:
        """The bias on the attention of a row's tokens [R, 1, L, L]: 0 within a text, the least number between two.

        A number and no bool, since both `sdpa` and `eager` attention of transformers take it. The room left in a row attends to
        itself: attention to nothing is NaN.
        """
        apart = self.segment[:, :, None] != self.segment[:, None, :]
        return torch.zeros_like(apart, dtype=dtype).masked_fill_(apart, torch.finfo(dtype).min)[:, None]


def _place_texts(lengths: Sequence[int], length: int) -> tuple[list[int], int, int]:
    """Best fit, longest first -> where each text begins in rows of `length` laid end to end, number of rows (>= 1), `length`."""
    first, rows = [0] * len(lengths), 0
    room: list[tuple[int, int]] = []  # (slots left, row), ascending, so that the best fit comes first
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        wanted = lengths[text]
        if not wanted:
            break
        fit = bisect_left(room, (wanted, -1))
        if fit == len(room):
            left, row, rows = length, rows, rows + 1
        else:
            left, row = room.pop(fit)
        first[text] = row * length + length - left
        insort(room, (left - wanted, row))
    return first, max(1, rows), length
