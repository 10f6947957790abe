"""Check one shard in one pass: the tar's structure, its index, and the content of every member."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mmclip_shards import storage
from mmclip_shards.document import check_fields, check_spans, decode_text, parse_json, report_texts
from mmclip_shards.foreign import foreign_member, is_foreign, may_hold
from mmclip_shards.images import ImageFacts, image_facts
from mmclip_shards.manifest import Manifest, Part, ShardIndex, load_index
from mmclip_shards.phi import phi_like
from mmclip_shards.schema import (
    ATTENTION_SUFFIX,
    ENTITIES_SUFFIX,
    IMAGE_SUFFIXES,
    decode_npy,
    make_key,
    member_name,
    split_member,
)
from mmclip_shards.tarwalk import Entry, TarFault, TarWalk

MEMBER_LIMIT = 256 << 20
"""Bytes of the largest member that is decoded in memory. Images within the pixel limit are far smaller."""

_SIDECAR_SUFFIX = {"entities": ENTITIES_SUFFIX, "attention": ATTENTION_SUFFIX}


class Finding(NamedTuple):
    """One fault. where: the file; member: the key or member that is at fault, "" for the file as a whole."""

    where: str
    member: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}{self.member and ', '}{self.member}: {self.problem}"


class ShardVerdict(NamedTuple):
    """The result of checking one shard. first_key, last_key: "" when it could not be read. phi: kind (`phi.KINDS`) -> samples
    whose reports seem to hold it."""

    findings: list[Finding]
    samples: int
    bytes: int
    first_key: str
    last_key: str
    phi: Counter[str]


class ShardPlace(NamedTuple):
    """A shard of the set in `folder`, by number. base, base_manifest: the set that a sidecar belongs to."""

    folder: str
    manifest: Manifest
    number: int
    base: str | None = None
    base_manifest: Manifest | None = None

    @property
    def url(self) -> str:
        return storage.join(self.folder, self.manifest.shards[self.number].path)

    @property
    def sorted(self) -> bool:
        """Whether keys must rise within the shard and from shard to shard, as in every set that we pack."""
        return self.manifest.kind == "base" and not is_foreign(self.manifest)


class _Row(NamedTuple):
    """A member, as the index describes it."""

    offset: int
    length: int
    xxh3: int
    name: str


def check_shard(place: ShardPlace) -> ShardVerdict:
    """Read a shard once. Faults of the data become findings, not exceptions."""
    return _Check(place).run()


class _Check:
    def __init__(self, place: ShardPlace) -> None:
        self.place, self.shard = place, place.manifest.shards[place.number]
        self.kind, self.foreign = place.manifest.kind, is_foreign(place.manifest)
        self.findings: list[Finding] = []
        self.index = self._load_index(place.folder, place.manifest)
        self.rows = _rows(self.index) if self.index else []
        self.by_name = {row.name: row for row in self.rows}
        self.met: set[str] = set()  # names of members
        self.keys: list[str] = []
        self.seen: set[str] = set()  # the same keys
        self.sample: dict[str, object] = {}  # of the current sample: suffix -> result of `_content`
        self.texts: list[str] = []  # of its report
        self.phi: Counter[str] = Counter()
        self.samples = self.bytes = self.faults = 0

    def run(self) -> ShardVerdict:
        try:
            self._read()
        except FileNotFoundError:
            self._find("", "the shard is missing: copy it again")
        except OSError as error:
            self._find("", f"cannot be read: {error}")
        keys = self.index.keys if self.index else self.keys
        self._compare_with_base(keys)
        ends = (keys[0], keys[-1]) if keys else ("", "")
        return ShardVerdict(self.findings, self.samples, self.bytes, *ends, self.phi)

    def _find(self, member: str, problem: str) -> None:
        self.findings.append(Finding(self.place.url, member, problem))

    def _load_index(self, folder: str, manifest: Manifest) -> ShardIndex | None:
        shard = manifest.shards[self.place.number]
        try:
            return load_index(folder, shard)
        except (ValueError, OverflowError, OSError) as error:
            self.findings.append(Finding(storage.join(folder, shard.index), "", str(error)))
            return None

    # -- The tar --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        walk = TarWalk(self.place.url)
        self.bytes = walk.size
        if walk.size != self.shard.bytes:
            self._find("", f"it has {walk.size} bytes, the manifest promises {self.shard.bytes}: copy it again")
        self._walk(walk)
        if walk.size == self.shard.bytes and walk.sha256() != self.shard.sha256:
            self._find("", "its sha256 is not the manifest's: copy it again")
        lost = [row.name for row in self.rows if row.name not in self.met]
        if lost:
            self._find(lost[0], f"the first of {len(lost)} members that the index names and the tar does not hold")
        if self.index is None and not self.faults and self.samples != self.shard.samples:
            self._find("", f"it has {self.samples} samples, the manifest promises {self.shard.samples}")

    def _walk(self, walk: TarWalk) -> None:
        while True:
            try:
                for entry in walk.entries():
                    self._entry(walk, entry)
                self._end_sample()
                return
            except TarFault as fault:
                self.faults += 1
                self._find("", str(fault))
            # Go on after the damage: the index says where the next member starts.
            at = bisect_left(self.rows, (walk.position,))
            if at == len(self.rows) or self.rows[at].offset + self.rows[at].length > walk.size:
                self._end_sample()
                return
            row = self.rows[at]
            walk.seek(row.offset, row.length)
            self._member(walk, row.name, row.length)

    def _entry(self, walk: TarWalk, entry: Entry) -> None:
        name = self._name(entry)
        if name is None:
            return
        row = self.by_name.get(name)
        if name in self.met:
            self._find(name, "it comes twice")
        elif row is None and self.index:
            key, _, suffix = name.partition(".")
            # In a foreign set, samples without an image are not indexed.
            if not self.foreign or key in self.index.rows or suffix in IMAGE_SUFFIXES:
                self._find(name, "the index does not name it")
        else:
            if row and (row.offset, row.length) != (entry.offset, entry.length):
                found = f"{entry.length} bytes at {entry.offset}"
                self._find(name, f"it has {found}, the index says {row.length} bytes at {row.offset}")
            self._member(walk, name, entry.length)

    def _name(self, entry: Entry) -> str | None:
        """The name of an entry in the index; None for an entry that is never read."""
        if self.foreign:
            parts = foreign_member(entry.name) if entry.kind == "file" else None
            return member_name(make_key(parts[0]), parts[1]) if parts and may_hold(parts[1]) else None
        if entry.kind != "file":
            self._find(repr(entry.name), f"a {entry.kind}: only plain files belong in a shard")
            return None
        try:
            return member_name(*split_member(entry.name))
        except ValueError as error:
            self._find(repr(entry.name), f"{error}; it was not read")
            return None

    # -- Samples and members --------------------------------------------------------------------------------------

    def _member(self, walk: TarWalk, name: str, length: int) -> None:
        self.met.add(name)
        key, _, suffix = name.partition(".")
        if not self.keys or key != self.keys[-1]:
            self._end_sample()
            self._begin_sample(key)
        self.sample[suffix] = None
        if length > MEMBER_LIMIT:
            self._find(name, f"it was not checked: {length} bytes are more than {MEMBER_LIMIT}")
            return
        data = walk.data()
        row = self.by_name.get(name)
        if row and xxhash.xxh3_64_intdigest(data) != row.xxh3:
            self._find(name, "its bytes are damaged, their hash is not that of the index: copy the shard again")
            return
        try:
            self.sample[suffix] = self._content(suffix, data)
        except ValueError as error:
            self._find(name, str(error))

    def _content(self, suffix: str, data: bytes) -> object:
        """What `_end_sample` must know of a member: facts of an image, fields of a json. ValueError when it cannot be used."""
        extension = suffix.rpartition(".")[2]
        packed = self.kind == "base" and not self.foreign
        if extension in IMAGE_SUFFIXES:
            facts = image_facts(data, decode=True)
            if packed and (facts.suffix, facts.mode) != (suffix, "RGB" if suffix == "webp" else "L"):
                raise ValueError(f"a {facts.suffix} of mode {facts.mode}, not an 8-bit single-channel {suffix}")
            return facts
        if extension == "npy":
            array = decode_npy(data)
            if suffix == ATTENTION_SUFFIX:
                _check_grid(array)
        elif extension == "txt":
            self.texts.append(decode_text(data))
        else:
            value = parse_json(data)
            if suffix == "json" and isinstance(value, dict):
                self.texts += report_texts(value)
            if suffix == ENTITIES_SUFFIX:
                check_spans(value)
            elif suffix == "json" and packed:
                part = _part_of(value, self.place.manifest.origins)
                check_fields(value, dataset=part.dataset, label_names=part.labels)
                return value
        return None

    def _begin_sample(self, key: str) -> None:
        if key in self.seen:
            self._find(key, "the key comes twice, or the members of the sample do not lie together")
        elif self.place.sorted and self.keys and key < self.keys[-1]:
            self._find(key, f"it comes after {self.keys[-1]!r}: keys must be sorted")
        self.keys.append(key)
        self.seen.add(key)

    def _end_sample(self) -> None:
        """Check that the members of the current sample belong together. After a damaged header they may be incomplete."""
        sample, self.sample = self.sample, {}
        texts, self.texts = self.texts, []
        self.phi.update(phi_like("\n".join(texts)))
        images = [suffix for suffix in sample if suffix in IMAGE_SUFFIXES]
        self.samples += bool(images) if self.foreign else bool(sample)
        if not sample or self.faults or self.foreign:
            return
        key = self.keys[-1]
        if self.kind != "base":
            if list(sample) != [_SIDECAR_SUFFIX[self.kind]]:
                self._find(key, f"its members are {', '.join(sample)}; a sidecar of kind {self.kind} has one")
            return
        if len(images) != 1 or "json" not in sample:
            self._find(key, f"its members are {', '.join(sample)}; it needs a json and one of {', '.join(IMAGE_SUFFIXES)}")
            return
        facts, fields = sample[images[0]], sample["json"]
        if isinstance(facts, ImageFacts) and isinstance(fields, dict):
            stated = fields["width"], fields["height"]
            if stated != (facts.width, facts.height):
                found = f"{facts.width} x {facts.height}"
                self._find(key, f"its image has {found} pixels, its json says {stated[0]} x {stated[1]}")

    def _compare_with_base(self, keys: list[str]) -> None:
        base, manifest = self.place.base, self.place.base_manifest
        if base is None or manifest is None or self.place.number >= len(manifest.shards):
            return
        index = self._load_index(base, manifest)
        if index is None or index.keys == keys:
            return
        ours = set(keys)
        missing = [key for key in index.keys if key not in ours]
        added = [key for key in keys if key not in index.rows]
        if missing:
            self._find(missing[0], f"the first of {len(missing)} samples of the base that have no row here")
        if added:
            self._find(added[0], f"the first of {len(added)} rows of samples that the base does not have")
        if not (missing or added):
            self._find("", "its keys are in another order than the base's: make the sidecar again")


def _part_of(fields: Any, parts: tuple[Part, ...]) -> Part:
    """The part of a set that a document with these fields is of, or the one that it comes nearest to."""
    if len(parts) == 1 or not isinstance(fields, dict):
        return parts[0]
    labels = fields.get("labels")
    names = set(labels) if isinstance(labels, dict) else set()
    return max(parts, key=lambda part: (part.dataset == fields.get("dataset"), set(part.labels) == names))


def _rows(index: ShardIndex) -> list[_Row]:
    """Every member, by rising offset."""
    return [
        _Row(offset, length, xxh3, f"{key}.{suffix}")
        for row, key in enumerate(index.keys)
        for suffix, offset, length, xxh3 in index.sample(row)
    ]


def _check_grid(scores: Any) -> None:
    if scores.ndim != 2 or not scores.size or scores.dtype != np.float16 or not np.isfinite(scores).all():
        raise ValueError(f"scores of shape {scores.shape} and type {scores.dtype}, not finite float16 [rows, cols]")
