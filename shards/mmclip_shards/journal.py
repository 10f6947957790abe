"""A split on its way: its shards as they are finished, the journal that a killed pack goes on from, and the quarantine."""

from __future__ import annotations

import itertools
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import xxhash

from mmclip_shards import storage
from mmclip_shards.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest, save_manifest
from mmclip_shards.rawpath import RemotePath, ahead
from mmclip_shards.schema import RawImage, Record, canonical_json
from mmclip_shards.storage import Url
from mmclip_shards.textfiles import read_rows
from mmclip_shards.writer import Sample, index_name, shard_name, write_shard

logger = logging.getLogger(__name__)

JOURNAL, QUARANTINE = "pack.jsonl", "quarantine.jsonl"

_KILLED = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # the half-written file of a killed `storage.write_atomic`

_PUBLISHED = re.compile(r"\d{6,}\.(tar|index\.json)")

Write = Callable[[Url, int, list[tuple[str, Any]]], Callable[[], Shard]]
"""`preparation.Workers.write`."""

Bad = tuple[str, str]
"""The key of a record whose image cannot be used, and why."""


@dataclass(frozen=True)
class Done:
    """A finished shard. records: how many of the split, sorted by key, it dealt with; bad: those of them that it left out;
    images: hash of their keys and of the marks of their images (`image_mark`)."""

    shard: Shard
    records: int
    bad: tuple[Bad, ...]
    images: str


def image_mark(image: RawImage) -> str:
    """A text that changes with an image: of a file its `storage.version`, so that it need not be read. What is drawn changes with
    the settings alone (`config_hash`). OSError when a store fails."""
    if callable(image):
        return "drawn"
    if isinstance(image, Path | RemotePath):
        try:
            return storage.version(image)
        except OSError as error:
            if isinstance(image, RemotePath) and not isinstance(error, FileNotFoundError):
                raise
            return "none"
    if isinstance(image, bytes):
        return xxhash.xxh3_128_hexdigest(image)
    return f"{image.shape} {image.dtype} {xxhash.xxh3_128_hexdigest(image.tobytes())}"


def write_at_once(url: Url, number: int, samples: list[Sample]) -> Callable[[], Shard]:
    """A `Write` that publishes the shard before it returns."""
    shard = write_shard(url, number, samples)
    return lambda: shard


class Unfinished:
    """Writes one split of a base set, record by record in the order of the keys, and keeps what is finished after any end.

    A full shard is published at once, then the journal, a small file that is written whole each time. An earlier journal in
    folder `url` is read first: call `keep_unchanged`, then add the split's records from number `start` on, then `wait`. size:
    records of the split; left_out: others of it, which are only listed; write, ahead: see `preparation.Workers`. ValueError if
    the journal is of another pack, or unreadable.
    """

    def __init__(
        self, url: Url, config_hash: str, samples_per_shard: int, size: int, *, left_out: Sequence[Bad] = (),
        write: Write | None = None, ahead: int = 0,
    ) -> None:  # fmt: skip
        self._left_out = list(left_out)
        self._url, self._config_hash, self._samples_per_shard, self._size = url, config_hash, samples_per_shard, size
        self._write, self._ahead = write or write_at_once, ahead
        self._writing: deque[tuple[Callable[[], Shard], int, tuple[Bad, ...], str]] = deque()  # with the other fields of Done
        self._done = read_journal(url, config_hash)
        self._pending: list[tuple[str, Any]] = []
        self._bad: list[Bad] = []
        self._seen = self._begun = self.start  # records of the split; those before the shard that is being filled
        self._marks = xxhash.xxh3_128()

    @property
    def start(self) -> int:
        """How many of the split's records are in finished shards, or left out by them."""
        return sum(done.records for done in self._done)

    @property
    def samples(self) -> int:
        """Samples in finished shards."""
        return sum(done.shard.samples for done in self._done)

    @property
    def bad(self) -> list[Bad]:
        """All records that were left out so far: those that were never to be added, then the others in the order of the keys."""
        on_their_way = [bad for each in self._writing for bad in each[2]]
        return self._left_out + [bad for done in self._done for bad in done.bad] + on_their_way + self._bad

    def keep_unchanged(self, records: Iterator[Record], is_bad: Callable[[Record], bool]) -> None:
        """Keep the finished shards before the first that must be made again; the files of the others are removed.

        A shard is kept if its files are whole, its images are unchanged, and those that it left out still cannot be used.
        records: of the split, sorted by key; is_bad(record): whether its image cannot be used.
        """
        found = len(self._done)
        kept = sum(itertools.takewhile(bool, (self._same(done, records, is_bad) for done in self._done)))
        if kept < found:
            logger.warning(
                "%s: files or images of shard %d have changed, so %d of %d finished shards are made again",
                self._url, kept, found - kept, found,
            )  # fmt: skip
            self._done = self._done[:kept]
            self._seen = self._begun = self.start
            self._write_journal()  # first: it must never promise what is not there
        whole = {name for number in range(kept) for name in (shard_name(number), index_name(number))}
        for name in storage.list_folder(self._url):  # some were perhaps published just before the pack was killed
            if _KILLED.fullmatch(name) or (_PUBLISHED.fullmatch(name) and name not in whole):
                storage.remove(storage.join(self._url, name))

    def add(self, key: str, mark: str, sample: Any) -> None:
        """The next record. mark: of its image, taken before it was read; sample: what `write` takes, or why it is left out."""
        self._seen += 1
        _add_mark(self._marks, key, mark)
        if isinstance(sample, str):
            self._bad.append((key, sample))
        else:
            self._pending.append((key, sample))
        if len(self._pending) == self._samples_per_shard or (self._pending and self._seen == self._size):
            self._publish()

    def wait(self) -> None:
        """Return when all shards are published, and in the journal."""
        self._collect(0)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The finished shards."""
        return tuple(done.shard for done in self._done)

    def finish(self, dataset: str, split: str, labels: tuple[str, ...], **more: Any) -> Manifest:
        """Publish the quarantine and the manifest, remove the journal -> the manifest. more: other fields of it, as `licence`."""
        self.write_quarantine()
        manifest = Manifest("base", dataset, split, self.shards, self._config_hash, labels, **more)
        save_manifest(self._url, manifest)
        storage.remove(storage.join(self._url, JOURNAL))
        return manifest

    def write_quarantine(self) -> None:
        """List the records that were left out, or remove an earlier list if there are none."""
        url = storage.join(self._url, QUARANTINE)
        if self.bad:
            storage.write_atomic(url, b"".join(canonical_json({"key": key, "reason": why}) for key, why in self.bad))
        else:
            storage.remove(url)

    def _publish(self) -> None:
        published = self._write(self._url, len(self._done) + len(self._writing), self._pending)
        self._writing.append((published, self._seen - self._begun, tuple(self._bad), self._marks.hexdigest()))
        self._pending, self._bad = [], []
        self._marks.reset()
        self._begun = self._seen
        # A split that is at its end is in the journal before the next one begins: a kill then costs no shard of it.
        self._collect(self._ahead if self._seen < self._size else 0)

    def _collect(self, left: int) -> None:
        """Wait until at most `left` shards are on their way; the journal lists them in order."""
        while len(self._writing) > left:
            published, records, bad, images = self._writing[0]
            self._done.append(Done(published(), records, bad, images))
            self._writing.popleft()
            self._write_journal()

    def _write_journal(self) -> None:
        lines = [{"config_hash": self._config_hash}, *map(asdict, self._done)]
        storage.write_atomic(storage.join(self._url, JOURNAL), b"".join(map(canonical_json, lines)))

    def _same(self, done: Done, records: Iterator[Record], is_bad: Callable[[Record], bool]) -> bool:
        """Whether a finished shard can be kept. records: from its first one on; those that it dealt with are consumed."""
        marks, left_out = xxhash.xxh3_128(), dict(done.bad)
        tried_again = []
        for record, mark in ahead(image_mark, ((record, record.image) for record in itertools.islice(records, done.records))):
            _add_mark(marks, record.key, mark)
            if record.key in left_out:
                tried_again.append(record)
        return marks.hexdigest() == done.images and _whole(self._url, done.shard) and all(map(is_bad, tried_again))


def read_journal(url: Url, config_hash: str) -> list[Done]:
    """The finished shards of the unfinished split in folder `url`. ValueError if it is of another pack, or unreadable."""
    where, mend = storage.join(url, JOURNAL), f"delete {url} to pack the split from the start"
    if not storage.exists(where):
        return []
    lines = read_rows(where, mend)
    try:
        head, *rows = lines
        done = [
            Done(
                Shard(**row["shard"]), int(row["records"]), tuple((key, why) for key, why in row["bad"]), row["images"]
            )
            for row in rows
        ]
        found = head["config_hash"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is no journal of a pack ({error!r}): {mend}") from error
    if found != config_hash:
        raise ValueError(
            f"{url} holds {len(done)} shards of an unfinished pack of other data or with other settings: "
            f"go on with those of before, or {mend}"
        )
    return done


def load_finished(dest: Url, config_hash: str) -> dict[str, Manifest]:
    """Manifests in `dest` of an earlier run with the same settings, by split. ValueError when `dest` holds another set."""
    if storage.exists(storage.join(dest, MANIFEST_NAME)):
        raise ValueError(f"{dest} is itself a split of a packed set: name a new folder, or the folder above it")
    finished: dict[str, Manifest] = {}
    for name in storage.list_folder(dest):
        folder = storage.join(dest, name)
        if not storage.exists(storage.join(folder, MANIFEST_NAME)):
            read_journal(folder, config_hash)  # refuses that of another pack
            continue
        manifest = load_manifest(folder)
        if manifest.kind != "base":
            continue  # sidecars may lie beside the splits
        if manifest.config_hash != config_hash:
            raise ValueError(
                f"{dest} holds another set (split {name!r} of {manifest.dataset!r}, made from other data or with "
                "other settings): name a new folder, or remove this one first"
            )
        if storage.exists(journal := storage.join(folder, JOURNAL)):  # killed between the last two steps
            storage.remove(journal)
        finished[name] = manifest
    return finished


def read_quarantine(url: Url) -> list[Bad]:
    """The records that a finished split left out. ValueError for a damaged list."""
    where = storage.join(url, QUARANTINE)
    rows = read_rows(where, "pack the split again") if storage.exists(where) else []
    return [(str(row.get("key")), str(row.get("reason"))) for row in rows]


def _add_mark(marks: xxhash.xxh3_128, key: str, mark: str) -> None:
    marks.update(f"{key} {mark}\n".encode())


def _whole(url: Url, shard: Shard) -> bool:
    """Whether the files of a shard are there. A file appears whole, so the tar is not read: its size tells enough."""
    try:
        size = storage.file_size(storage.join(url, shard.path))
        index = storage.read_bytes(storage.join(url, shard.index))
    except FileNotFoundError:
        return False
    return size == shard.bytes and sha256(index).hexdigest() == shard.index_sha256
