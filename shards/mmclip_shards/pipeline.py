"""A packed set as the source of a `webdataset` pipeline: every byte checked, sidecars joined by key."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmclip_shards import storage
from mmclip_shards.chunks import ChunkReader
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.sidecars import check_sidecar
from mmclip_shards.storage import Url
from mmclip_shards.webdataset_extra import webdataset_module

if TYPE_CHECKING:
    from webdataset import FluidWrapper


def as_webdataset(url: Url, sidecars: Sequence[Url] = ()) -> FluidWrapper:
    """The set in folder `url` as a `webdataset.DataPipeline` of samples: `__key__`, `__url__`, and suffix -> bytes.

        as_webdataset("s3://bucket/set/train", sidecars=["s3://bucket/set/train/entities"])
            .shuffle(1000).decode("pil").to_tuple("png;jpg", "json", "entities.json")

    sidecars: folders of sidecars of this set, at most one of each kind; their members join the sample with the same key.
    Each node and each DataLoader worker reads whole shards of its own, divided by webdataset's `split_by_node` and
    `split_by_worker`, so the counts of nodes may differ (`.with_epoch` evens them out).

    ValueError at once for no set or a stale or short sidecar, and while reading for a damaged byte; other errors as of
    `ShardReader.read`. Needs the extra `webdataset`; ValueError without it.
    """
    webdataset = webdataset_module("webdataset")
    samples = _CheckedSamples(*_open(url, sidecars))
    shards: FluidWrapper = webdataset.FluidWrapper(webdataset.SimpleShardList(list(samples.numbers)))
    return shards.compose(webdataset.split_by_node, webdataset.split_by_worker, samples)


class _CheckedSamples:
    """A stage of a pipeline: shards ({"url": ...}) -> their samples. A copy sent to a worker opens its own files there."""

    def __init__(self, base: ShardReader, *sidecars: ShardReader) -> None:
        self.base, self.sidecars = base, sidecars
        self.numbers = {storage.join(base.url, shard.path): n for n, shard in enumerate(base.manifest.shards)}

    def __call__(self, shards: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            number = self.numbers[shard["url"]]
            for sidecar in self.sidecars:
                sidecar.prefetch(number, range(sidecar.manifest.shards[number].samples))
            for key, members in self.base.samples(number):
                for sidecar in self.sidecars:
                    members.update(sidecar.read(number, key))
                yield {"__key__": key, "__url__": shard["url"], **members}


def _open(url: Url, sidecars: Sequence[Url]) -> list[ShardReader]:
    """Readers of the set and of its checked sidecars, with one memory for chunks."""
    if isinstance(sidecars, str | os.PathLike):
        raise ValueError(f"sidecars is {os.fspath(sidecars)!r}: give a list of folders")
    base_url, base = os.fspath(url), load_manifest(url)
    if base.kind != "base":
        raise ValueError(f"{base_url} holds {base.kind} sidecars; name the packed set itself as `url`")
    chunks = ChunkReader()
    readers = [ShardReader(base_url, base, chunks=chunks)]
    for where in sidecars:
        folder = os.fspath(where)
        sidecar = load_manifest(folder)
        if sidecar.kind in {reader.manifest.kind for reader in readers}:
            raise ValueError(
                f"{folder} is a second set of kind {sidecar.kind}: name the packed set and one sidecar of each kind"
            )
        check_sidecar(sidecar.kind, base_url, base, folder, sidecar)
        readers.append(ShardReader(folder, sidecar, chunks=chunks))
    return readers
