"""A packed set with its sidecars, joined by key. Stale and short sidecars are refused."""

from __future__ import annotations

from collections.abc import Sequence

from mmclip_shards import storage
from mmclip_shards.chunks import ChunkReader
from mmclip_shards.manifest import MANIFEST_NAME, load_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.sidecars import check_sidecar

from mmclip_dist.config import Source


class JoinedSet:
    """Random access to the samples of one source: members of the base shard and of its sidecars together.

    ahead: positions of a stream that memory has room to fetch before they are due; 0 if it is short.
    """

    ahead = 0

    def __init__(self, source: Source, open_shards: int = 64) -> None:
        """open_shards: as in `ShardReader`."""
        self.url = source.url
        self.manifest = load_manifest(source.url)
        if self.manifest.kind != "base":
            raise ValueError(f"{source.url} holds {self.manifest.kind} sidecars; name the packed set itself as `url`")
        self.chunks = ChunkReader()
        self._chosen: Sequence[Sequence[int]] | None = None
        self._base = ShardReader(source.url, self.manifest, open_shards=open_shards, chunks=self.chunks)
        self._sidecars = []
        for kind, url in (("entities", source.entities), ("attention", source.attention)):
            if url is not None:
                sidecar = load_manifest(url)
                check_sidecar(kind, source.url, self.manifest, url, sidecar)
                self._sidecars.append(ShardReader(url, sidecar, open_shards=open_shards, chunks=self.chunks))

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        if self._chosen is not None:
            return [len(rows) for rows in self._chosen]
        return [shard.samples for shard in self.manifest.shards]

    def choose(self, rows: Sequence[Sequence[int]]) -> None:
        """Use only these rows of each shard from now on, numbered anew."""
        self._chosen = rows

    def _row(self, shard: int, row: int) -> int:
        return row if self._chosen is None else self._chosen[shard][row]

    @property
    def readers(self) -> list[ShardReader]:
        """Readers of the set itself and of its sidecars."""
        return [self._base, *self._sidecars]

    def read_through(self, chunks: ChunkReader) -> None:
        """Read remote shards through these chunks from now on. Sets that share chunks share one memory."""
        self.chunks = chunks
        for reader in self.readers:
            reader.chunks = chunks

    def key(self, shard: int, row: int) -> str:
        return self._base.keys(shard)[self._row(shard, row)]

    def read(self, shard: int, key: str) -> dict[str, bytes]:
        """All members of a sample: suffix -> bytes, each checked against its index."""
        members = self._base.read(shard, key)
        for sidecar in self._sidecars:
            members.update(sidecar.read(shard, key))
        return members

    def prefetch(self, shard: int, rows: Sequence[int], due: int) -> None:
        """Start fetching samples of a shard from object storage, and return at once. due: the step that reads them."""
        places = [self._row(shard, row) for row in rows]
        for reader in self.readers:
            reader.prefetch(shard, places, due)


def with_sidecars(source: Source) -> Source:
    """The source with the sidecars that lie in their usual folders below the set."""
    found = {
        kind: storage.join(source.url, kind)
        for kind in ("entities", "attention")
        if storage.exists(storage.join(source.url, kind, MANIFEST_NAME))
    }
    return source.model_copy(update=found)
