"""How fast a set is read in training order: `mmclip bench-loader`. The loader's own code, without tokens and masks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmclip_shards.chunks import Tally
from mmclip_shards.images import decode_image
from torch.utils.data import DataLoader

from mmclip_dist.config import Data, Source
from mmclip_dist.data.batch import Example
from mmclip_dist.data.loader import StreamShare, as_it_is, build_order, open_sets, raised
from mmclip_dist.data.transforms import WHOLE, crop_image


@dataclass(frozen=True)
class Rate:
    """samples, megabytes (of samples, as stored) per second; wait: share of the readers' time spent waiting for a store."""

    samples_per_s: float
    mb_per_s: float
    wait: float
    read: Tally


@dataclass(frozen=True)
class _Maker:
    """Replaces ExampleMaker. size: decode to size x size pixels; None: return the checked bytes as they are."""

    size: int | None

    def __call__(self, key: str, members: Mapping[str, bytes], epoch: int) -> Example:
        example: Example = {"bytes": sum(map(len, members.values()))}
        if self.size is not None:
            data = members.get("jpg") or members["png"]
            example["image"] = crop_image(decode_image(data), WHOLE, self.size)
        return example


def measure(sources: Sequence[Source], data: Data, *, seconds: float, size: int | None, batch: int = 256) -> Rate:
    """Read for `seconds` as one rank does, with `data.workers` processes. ValueError if batch and streams do not fit."""
    if batch % data.streams or data.streams % max(1, data.workers):
        raise ValueError(
            f"a batch of {batch} over {data.streams} streams and {data.workers} workers does not divide evenly: "
            "workers must divide data.streams, and that the batch"
        )
    sets = open_sets(sources, data, 1)
    order = build_order(sets, data.model_copy(update={"sources": tuple(sources)}), 0)
    share = StreamShare(sets, order, _Maker(size), range(data.streams), batch // data.streams, 0, data.prefetch)
    loader = DataLoader(
        share,
        batch_size=None,
        num_workers=data.workers,
        collate_fn=as_it_is,
        prefetch_factor=data.prefetch if data.workers else None,
    )
    items = raised(loader)
    for _ in range(max(1, data.workers)):
        next(items)  # processes start, shards open
    read, taken, started = Tally(), 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        examples, tally = next(items)
        read.add(tally)
        taken += sum(example["bytes"] for example in examples)
    for joined in sets:
        joined.chunks.close()
    return Rate(read.samples / elapsed, taken / elapsed / 1e6, read.waited_s / elapsed / max(1, data.workers), read)
