"""How fast a set is read in training order: `mmclip bench-loader`. The training loader itself, with all that an example holds."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mmclip_shards.chunks import Tally
from transformers import PreTrainedTokenizerBase

from mmclip_dist.config import Augment, Data, EntMLM, Source
from mmclip_dist.data.batch import Example
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.data.loader import BatchRows, build_loader, build_order, in_workers, label_names, raised
from mmclip_dist.data.prompts import load_prompts
from mmclip_dist.data.reading import open_sets
from mmclip_dist.data.tokenizer import reports_of, train_tokenizer

_REPORTS = 200  # read to train a tokenizer, whose speed hardly depends on its vocabulary
_PATCH = 16  # pixels: the grid of attention scores
_MAX_TOKENS = 112


@dataclass(frozen=True)
class Rate:
    """samples, megabytes (as fetched or stored) per second. wait: share of the readers' time spent waiting for a store.
    main_ms: processor time of the training process's main thread for each sample; with 0 workers all work is in it."""

    samples_per_s: float
    mb_per_s: float
    wait: float
    main_ms: float
    read: Tally


def measure(sources: Sequence[Source], data: Data, *, seconds: float, size: int | None, batch: int = 256) -> Rate:
    """Read for `seconds` as one rank does, with `data.workers` processes.

    size: make full examples of size x size pixels, with tokens and masks; None: only read and check the stored bytes.
    ValueError if the streams do not divide the batch.
    """
    if batch % data.streams:
        raise ValueError(f"a batch of {batch} does not divide over {data.streams} streams")
    data = data.model_copy(update={"sources": tuple(sources)})
    sets = open_sets(sources, data, 1)
    made = _batches(sets, data, size, batch) if size else _stored(sets, data, batch)
    for _ in range(max(1, data.workers)):
        next(made)  # processes start, shards open
    read, taken, began, busy = Tally(), 0.0, time.perf_counter(), time.thread_time()
    while (elapsed := time.perf_counter() - began) < seconds:
        tally, stored = next(made)
        read.add(tally)
        taken += stored
    busy = time.thread_time() - busy
    made.close()
    for joined in sets:
        joined.chunks.close()
    readers = max(1, data.workers)
    return Rate(
        read.samples / elapsed, taken / elapsed / 1e6, read.waited_s / elapsed / readers, 1e3 * busy / read.samples, read
    )


def _batches(sets: list[JoinedSet], data: Data, size: int, batch: int) -> Generator[tuple[Tally, float]]:
    stored = [sum(shard.bytes for shard in joined.manifest.shards) / joined.manifest.samples for joined in sets]
    mean = sum(bytes_ * source.weight for bytes_, source in zip(stored, data.sources, strict=True))
    mean /= sum(source.weight for source in data.sources)
    diseases = label_names(sets)
    maker = ExampleMaker(
        _tokenizer([source.url for source in data.sources], diseases), diseases, size, size // _PATCH, _MAX_TOKENS,
        EntMLM(), Augment(),
    )  # fmt: skip
    order = build_order(sets, data, 0)
    for made in build_loader(sets, order, maker, data=data, global_batch=batch, rank=0, world=1, start=0):
        yield made["reading"], mean * len(made["keys"])


def _tokenizer(urls: Sequence[str], diseases: Sequence[str]) -> PreTrainedTokenizerBase:
    prompts = [text for texts in load_prompts(diseases or ("disease",)).texts for text in texts]
    return train_tokenizer([*islice(reports_of(urls), _REPORTS), *prompts, *prompts])


def _stored(sets: list[JoinedSet], data: Data, batch: int) -> Generator[tuple[Tally, float]]:
    rows = BatchRows(
        sets, build_order(sets, data, 0), _size_of, None,
        rows=range(batch), per_stream=batch // data.streams, start=0, ahead=data.prefetch,
    )  # fmt: skip
    for examples, tally in raised(in_workers(rows, data.workers, data.prefetch)):
        yield tally, sum(example["bytes"] for example in examples)


def _size_of(key: str, members: Mapping[str, bytes], epoch: int) -> Example:
    found: dict[str, Any] = {"bytes": sum(map(len, members.values()))}
    return found
