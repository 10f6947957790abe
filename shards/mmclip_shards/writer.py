"""Write shards: uncompressed, deterministic ustar tars with an offset index. Each file appears whole, the manifest last."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable
from types import TracebackType

import xxhash

from mmclip_shards import storage
from mmclip_shards.manifest import MANIFEST_NAME, Kind, Manifest, Member, Shard, index_bytes, save_manifest
from mmclip_shards.schema import check_key, member_name
from mmclip_shards.storage import Url

SAMPLES_PER_SHARD = 1000
"""About 100 MB of 512-pixel JPEGs: few objects in the store, and a shard fits in memory while it is written."""

Sample = tuple[str, dict[str, bytes]]
"""A key and its members: suffix -> bytes."""

_END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


def shard_name(number: int) -> str:
    """The file name of a set's shard."""
    return f"{number:06d}.tar"


def index_name(number: int) -> str:
    """The file name of a shard's offset index."""
    return f"{number:06d}.index.json"


def write_shard(url: Url, number: int, samples: Iterable[Sample]) -> Shard:
    """Publish one shard in folder `url`, then its index -> the shard's row in the manifest.

    samples: (key, {suffix: bytes}), in the order to write them; for a sidecar, the order of its base. ValueError for a key
    or suffix that is refused, a duplicate key, or no samples. The same samples give the same bytes; writing again replaces
    both files.
    """
    chunks: list[bytes] = []
    members: list[tuple[str, Member]] = []
    position, keys = 0, set()
    for key, files in samples:
        check_key(key)
        if key in keys:
            raise ValueError(f"sample key {key!r} comes twice: keys must be unique")
        keys.add(key)
        if not files:
            raise ValueError(f"sample {key} has no members")
        for suffix in sorted(files):
            name, data = member_name(key, suffix), bytes(files[suffix])
            header = _header(name, len(data))
            padding = bytes(-len(data) % tarfile.BLOCKSIZE)
            members.append((name, Member(position + len(header), len(data), xxhash.xxh3_64_hexdigest(data))))
            chunks += [header, data, padding]
            position += len(header) + len(data) + len(padding)
    if not keys:
        raise ValueError(f"shard {shard_name(number)} would hold no samples")
    tar = b"".join([*chunks, _END_OF_TAR])
    digest = hashlib.sha256(tar).hexdigest()
    storage.write_atomic(storage.join(url, shard_name(number)), tar)
    index = index_bytes(members, digest)
    storage.write_atomic(storage.join(url, index_name(number)), index)
    return Shard(shard_name(number), len(keys), len(tar), digest, index_name(number), hashlib.sha256(index).hexdigest())


def check_next_key(key: str, last_key: str) -> None:
    """ValueError unless `key` is legal and comes after `last_key` ("" at the start)."""
    check_key(key)
    if key == last_key:
        raise ValueError(f"sample key {key!r} comes twice: keys must be unique")
    if key < last_key:
        raise ValueError(f"sample key {key!r} comes after {last_key!r}: add the samples sorted by key")


class ShardWriter:
    """Writes a set, sample by sample: `with ShardWriter(url, ...) as writer: writer.add(key, {suffix: bytes})`.

    Keys must be strictly increasing. A full shard is published at once. A clean exit publishes the manifest, which is then
    in `.manifest`; an exception removes everything that this writer published. ValueError when the folder already holds a
    finished set.
    """

    def __init__(
        self,
        url: Url,
        *,
        kind: Kind,
        dataset: str,
        split: str,
        config_hash: str,
        labels: tuple[str, ...] = (),
        base: dict[str, str] | None = None,
        checkpoint: str | None = None,
        samples_per_shard: int = SAMPLES_PER_SHARD,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        if storage.exists(storage.join(url, MANIFEST_NAME)):
            raise ValueError(f"{url} already holds a finished set: remove it first, or write to another folder")
        self.manifest: Manifest | None = None
        self._url = url
        self._kind, self._dataset, self._split, self._config_hash = kind, dataset, split, config_hash
        self._labels, self._base, self._checkpoint = tuple(labels), base, checkpoint
        self._samples_per_shard = samples_per_shard
        self._pending: list[Sample] = []
        self._last_key = ""
        self._shards: list[Shard] = []
        self._started = 0  # shards that were begun, so that `_clean_up` also removes one that failed half-way

    def add(self, key: str, files: dict[str, bytes]) -> None:
        """Add one sample: suffix -> bytes. ValueError for a refused, duplicate or unsorted key."""
        check_next_key(key, self._last_key)
        self._pending.append((key, files))
        self._last_key = key
        if len(self._pending) == self._samples_per_shard:
            self._publish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            if self.manifest is None:
                self._clean_up()

    def _publish(self) -> None:
        self._started += 1
        self._shards.append(write_shard(self._url, self._started - 1, self._pending))
        self._pending = []

    def _finish(self) -> None:
        if self._pending:
            self._publish()
        if not self._shards:
            raise ValueError(f"{self._url}: a set needs at least one sample, and none was added")
        manifest = Manifest(
            kind=self._kind,
            dataset=self._dataset,
            split=self._split,
            shards=tuple(self._shards),
            config_hash=self._config_hash,
            labels=self._labels,
            base=self._base,
            checkpoint=self._checkpoint,
        )
        save_manifest(self._url, manifest)
        self.manifest = manifest

    def _clean_up(self) -> None:
        for number in range(self._started):
            storage.remove(storage.join(self._url, index_name(number)))
            storage.remove(storage.join(self._url, shard_name(number)))
        storage.remove_empty_folder(self._url)


def _header(name: str, size: int) -> bytes:
    """A ustar header that depends on name and size alone: no clock, no user."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uid, info.gid = size, 0, 0o644, 0, 0
    return info.tobuf(tarfile.USTAR_FORMAT)
