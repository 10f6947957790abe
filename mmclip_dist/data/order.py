"""The order of samples: a pure function of (seed, epoch, manifests). The state of the data is one integer, the step.

- An epoch of a set permutes its shards, lays their samples in a line and cuts the line into V equal streams of
  floor(N / V) samples. The remainder, fewer than V samples, differs from epoch to epoch.
- Inside a stream, samples are permuted in blocks, so that a reader needs bounded memory.
- Several sets are interleaved inside every stream by weight: how many samples of a set come before a position is
  arithmetic, so that seeking replays nothing.
- Global batch s is positions [s * m, (s + 1) * m) of every stream, m = G / V, streams in order. Who reads which stream
  does not enter, so ranks and workers never change a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64
_MASK = (1 << 64) - 1
_SPARE_BLOCKS = 64
_UNIT = 1 << 32  # weights are rationals with this denominator: exact arithmetic, no drift in a long run


def mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64 finaliser), the same on every platform and library version."""
    state = 0
    for value in values:
        state = (state ^ value) + _GOLDEN & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permutation(length: int, *key: int) -> np.ndarray:
    """A permutation of range(length) [length], int64, fixed by the integers of `key`.

    Sorting hashes, unlike numpy's generators, gives the same order under every numpy version.
    """
    with np.errstate(over="ignore"):
        state = np.arange(length, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(mix(*key))
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ state >> np.uint64(31), kind="stable")


class Place(NamedTuple):
    """Where one sample is: set number, that set's epoch, shard number, row inside the shard."""

    set: int
    epoch: int
    shard: int
    row: int


class SetOrder:
    """The order of one set's samples over `streams` streams."""

    def __init__(self, counts: Sequence[int], *, number: int, seed: int, streams: int, block: int) -> None:
        """`counts`: samples of each shard. Raises ValueError if a stream would get no sample."""
        self.counts = np.asarray(counts, dtype=np.int64)
        self.number, self.seed, self.streams, self.block = number, seed, streams, block
        self.samples = int(self.counts.sum())
        self.stream_length = self.samples // streams
        if self.stream_length == 0:
            raise ValueError(
                f"a set of {self.samples} samples cannot fill data.streams={streams} streams; "
                f"lower data.streams to at most {self.samples} or add data"
            )
        # An epoch's line costs 16 bytes a shard. Two are in use while streams cross the end of an epoch.
        self._line = lru_cache(maxsize=4)(self._epoch_line)
        # Each stream uses two blocks at once: one is read, the next one is fetched. With no place beyond these, a stream's third
        # block would push out one that the same step needs, and that the next.
        self._block = lru_cache(maxsize=2 * streams + _SPARE_BLOCKS)(self._places_of_block)

    @property
    def remainder(self) -> int:
        """Samples left out of each epoch: fewer than `streams`, others in each epoch."""
        return self.samples - self.stream_length * self.streams

    def locate(self, stream: int, position: int, retry: int = 0) -> Place:
        """The sample at `position` of `stream`, counted over all epochs.

        `retry` > 0 names the replacement for a sample that could not be decoded: the next ones of the same block.
        """
        epoch, offset = divmod(position, self.stream_length)
        block = (offset + self._phase(stream)) // self.block
        first, _ = self._bounds(stream, block)
        shards, rows = self._block(epoch, stream, block)
        at = (offset - first + retry) % len(shards)
        return Place(self.number, epoch, shards[at], rows[at])

    def _phase(self, stream: int) -> int:
        """How much shorter a stream's first block is. So streams end their blocks in turn, and the store has an even load."""
        return stream * self.block // self.streams

    def _bounds(self, stream: int, block: int) -> tuple[int, int]:
        """First offset of a block in its stream, and the one after its last."""
        start = block * self.block - self._phase(stream)
        return max(0, start), min(self.stream_length, start + self.block)

    def _epoch_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in this epoch's order [S], and where each one ends in the line of samples [S]."""
        shards = permutation(len(self.counts), self.seed, self.number, epoch)
        return shards, np.cumsum(self.counts[shards])

    def _places_of_block(self, epoch: int, stream: int, block: int) -> tuple[list[int], list[int]]:
        """Shard and row of every position of a block. Computed together: one by one they would cost more than reading."""
        first, stop = self._bounds(stream, block)
        order = permutation(stop - first, self.seed, self.number, epoch, stream, block)
        line = stream * self.stream_length + first + order
        shards, ends = self._line(epoch)
        slots = np.searchsorted(ends, line, side="right")
        numbers = shards[slots]
        return numbers.tolist(), (line - (ends[slots] - self.counts[numbers])).tolist()


class Order:
    """The order over all sets: `locate(stream, position)` gives the same sample on any rank."""

    def __init__(
        self, sets: Sequence[Sequence[int]], weights: Sequence[float], *, seed: int, streams: int, block: int
    ) -> None:
        """`sets`: for each set the samples of each shard; `weights`: relative share of each set in a batch."""
        self.streams = streams
        self.sets = [
            SetOrder(counts, number=number, seed=seed, streams=streams, block=block)
            for number, counts in enumerate(sets)
        ]
        # One binary choice of probability w_k / (w_k + ... + w_last) decides between set k and the sets after it.
        parts = [Fraction(weight) for weight in weights]
        self._shares = [int(part / sum(parts[k:]) * _UNIT) for k, part in enumerate(parts)]

    def counts_before(self, stream: int, position: int) -> list[int]:
        """How many samples of each set lie before `position` of `stream` [sets]; they sum to `position`.

        floor(t w + (v + 1/2) / V) over the V streams sums to V t w, rounded (Hermite's identity): for two sets the shares
        are honoured to half a sample of the whole batch, although every stream chooses alone.
        """
        left, counts = position, []
        for k, share in enumerate(self._shares):
            phase = _phase(stream, self.streams, k)
            taken = left if k == len(self._shares) - 1 else (left * share + phase) // _UNIT
            counts.append(taken)
            left -= taken
        return counts

    def locate(self, stream: int, position: int, retry: int = 0) -> Place:
        """The sample at `position` of `stream`, counted from step 0; `retry` as in `SetOrder.locate`."""
        if len(self.sets) == 1:
            return self.sets[0].locate(stream, position, retry)
        before, after = self.counts_before(stream, position), self.counts_before(stream, position + 1)
        chosen = next(k for k in range(len(before)) if after[k] > before[k])
        return self.sets[chosen].locate(stream, before[chosen], retry)


@lru_cache(maxsize=4096)
def _phase(stream: int, streams: int, level: int) -> int:
    """Where in its cycle a stream starts, in units of 1 / _UNIT: evenly spread, and in another order at each level."""
    rank = stream if level == 0 else int(permutation(streams, level)[stream])
    return (2 * rank + 1) * _UNIT // (2 * streams)
