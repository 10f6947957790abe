"""Packed sets as sources of new ones: opened with the sidecars that fit them, and gone through in the order of their keys."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, get_args

from mmclip_shards import storage
from mmclip_shards.chunks import ChunkReader
from mmclip_shards.document import Document, named_fields, read_document
from mmclip_shards.foreign import is_foreign
from mmclip_shards.manifest import MANIFEST_NAME, Kind, Manifest, find_sets, load_manifest, manifest_hash
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import check_key
from mmclip_shards.sidecars import check_sidecar
from mmclip_shards.storage import Url

SIDECARS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "base")

_AHEAD = 64  # samples of a remote set that are fetched before they are due
_DOCUMENT = ("json", "txt")


@dataclass(frozen=True)
class Source:
    """A set to read. prefix: of its new keys. sidecars: by kind, a reader of those that fit it, or why they cannot be used."""

    folder: str
    manifest: Manifest
    reader: ShardReader
    prefix: str
    sidecars: Mapping[Kind, ShardReader | str]


class Sample(NamedTuple):
    """A sample of a source, by shard and row. key: in the new set."""

    source: Source
    shard: int
    row: int
    key: str

    def read(self, reader: ShardReader, suffixes: Collection[str] | None = None) -> dict[str, bytes]:
        """Members of it in its set, or in a sidecar of it."""
        return reader.read(self.shard, self.source.reader.keys(self.shard)[self.row], suffixes)

    def document(self) -> Document:
        return self._parsed(read_document)

    def fields(self) -> dict[str, Any]:
        return self._parsed(partial(named_fields, self.key))

    def _parsed(self, parse: Callable[[Mapping[str, bytes]], Any]) -> Any:
        try:
            return parse(self.read(self.source.reader, _DOCUMENT))
        except ValueError as error:
            raise ValueError(f"{self.source.folder}, sample {self.key}: {error}") from error


def open_sources(urls: Sequence[Url], prefix_keys: bool = False) -> list[Source]:
    """The base sets at these URLs, and below them, with one memory for chunks. ValueError for sidecars, and a set named twice."""
    chunks = ChunkReader()
    sources: list[Source] = []
    hashes: dict[str, str] = {}
    for folder in (folder for url in urls for folder in find_sets(url)):
        manifest = load_manifest(folder)
        if manifest.kind != "base":
            if folder in map(str, urls):
                raise ValueError(f"{folder} holds {manifest.kind} sidecars: name the packed set itself; its sidecars follow")
            continue
        twin = hashes.setdefault(manifest_hash(manifest), folder)
        if twin != folder or folder in (each.folder for each in sources):
            raise ValueError(f"{twin} and {folder} are the same set: name it once")
        prefix = f"{manifest.dataset}-" if prefix_keys else ""
        if prefix:
            check_key(prefix)
        found = {kind: _sidecar(kind, folder, manifest, chunks) for kind in SIDECARS}
        reader = ShardReader(folder, manifest, chunks=chunks)
        sources.append(Source(folder, manifest, reader, prefix, {kind: each for kind, each in found.items() if each}))
    if not sources:
        raise ValueError(f"{', '.join(map(str, urls))}: there is no packed set, only sidecars")
    return sources


def _sidecar(kind: Kind, base_folder: str, base: Manifest, chunks: ChunkReader) -> ShardReader | str | None:
    folder = storage.join(base_folder, kind)
    if not storage.exists(storage.join(folder, MANIFEST_NAME)):
        return None
    try:
        manifest = load_manifest(folder)
        check_sidecar(kind, base_folder, base, folder, manifest)
    except ValueError as error:
        return f"those of {base_folder} are stale or damaged: {error}"
    return ShardReader(folder, manifest, chunks=chunks)


def check_joinable(sources: Sequence[Source]) -> None:
    """ValueError if patients of these sets cannot be compared, or their keys are in no order."""
    if len(sources) == 1:
        return
    for source in sources:
        if is_foreign(source.manifest):
            raise ValueError(
                f"{source.folder} was indexed, not packed: its keys are in no order, so it cannot be joined with others; "
                "train on the sets side by side, or pack it"
            )
    first: dict[str, str] = {}
    for source in sources:
        if source.manifest.patient_key_id is not None:
            first.setdefault(source.manifest.patient_key_id, source.folder)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise ValueError(
            f"{one} and {other} were packed with different patient keys, so nobody can tell whether they share patients: pack "
            "one of them again with the key of the other (MMCLIP_PATIENT_KEY)"
        )


def unknown_keys(sources: Sequence[Source]) -> list[str]:
    unknown = [source.folder for source in sources if source.manifest.patient_key_id is None]
    if len(sources) == 1 or not unknown:
        return []
    return [
        "patients were compared as if all sets had one patient key, which some manifests do not tell: " + ", ".join(unknown)
    ]


def in_order(sources: Sequence[Source]) -> Iterator[Sample]:
    """All samples of these sets by rising key; those of a single set as they are."""
    streams = [_samples_of(source) for source in sources]
    last: Sample | None = None
    for sample in heapq.merge(*streams, key=lambda sample: sample.key) if len(streams) > 1 else streams[0]:
        if last is not None and sample.key <= last.key and not is_foreign(sample.source.manifest):
            if sample.source is last.source:
                raise ValueError(f"{sample.source.folder}: key {sample.key!r} is not after {last.key!r}; see `mmclip verify`")
            mend = "leave out one of the sets" + ("" if sample.source.prefix else ", or give --prefix-keys")
            raise ValueError(f"{last.source.folder} and {sample.source.folder} both hold the key {sample.key!r}: {mend}")
        last = sample
        yield sample


def _samples_of(source: Source) -> Iterator[Sample]:
    for shard in range(len(source.manifest.shards)):
        for row, key in enumerate(source.reader.keys(shard)):
            yield Sample(source, shard, row, source.prefix + key)


def fetched(samples: Iterator[Sample], reader_of: Callable[[Sample], ShardReader]) -> Iterator[Sample]:
    """The same samples; remote ones are fetched while those before them are used."""

    def begin() -> list[Sample]:
        window = list(islice(samples, _AHEAD))
        rows: dict[tuple[int, int], tuple[ShardReader, list[int]]] = {}
        for sample in window:
            reader = reader_of(sample)
            rows.setdefault((id(reader), sample.shard), (reader, []))[1].append(sample.row)
        for (_, shard), (reader, wanted) in rows.items():
            reader.prefetch(shard, wanted)
        return window

    window = begin()
    while window:
        following = begin()
        yield from window
        window = following
