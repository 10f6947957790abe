"""The manifest of a set and the offset index of each shard: read, check, write."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from mmclip_shards import storage
from mmclip_shards.faults import Tries
from mmclip_shards.schema import SCHEMA_VERSION, canonical_json, check_key, check_suffix
from mmclip_shards.storage import Url

MANIFEST_NAME = "manifest.json"

Kind = Literal["base", "entities", "attention"]

_PATH_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_XXH3 = re.compile(r"[0-9a-f]{16}")
_TAR_BLOCK = 512
_OPTIONAL: dict[str, object] = {
    "licence": None, "access": None, "patient_key_id": None, "parts": (), "phi_scan": None, "labels_by": None,
    "images": None, "guide": None,
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One tar of a set. path, index: relative to the manifest's folder; samples, bytes: counts; sha256: of the tar;
    index_sha256: of the index."""

    path: str
    samples: int
    bytes: int
    sha256: str
    index: str
    index_sha256: str

    def __post_init__(self) -> None:
        check_relative(self.path)
        check_relative(self.index)
        if not (_is_count(self.samples) and self.samples > 0 and _is_count(self.bytes)):
            raise ValueError(f"shard {self.path}: samples and bytes must be positive whole numbers")
        _check_sha256(self.sha256, f"shard {self.path}")
        _check_sha256(self.index_sha256, f"index {self.index}")


@dataclass(frozen=True)
class Part:
    """What a merged set holds of one data set: the name and the labels that its samples state, and its terms. ValueError when
    these are no texts."""

    dataset: str
    labels: tuple[str, ...]
    licence: str | None = None
    access: str | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) and name for name in (self.dataset, *self.labels)):
            raise ValueError("dataset and labels of a part must be non-empty texts")
        if not all(text is None or isinstance(text, str) for text in (self.licence, self.access)):
            raise ValueError("licence and access of a part must be texts or null")


@dataclass(frozen=True)
class Manifest:
    """A whole set: which shards, how many samples, and the hash of the configuration that made them.

    base: base shard path -> sha256 of the tar that a sidecar was made from (sidecars only).
    checkpoint: hash of the checkpoint; guide: `manifest_hash` of the entity sidecars that guided the scores (attention sidecars
    only). licence, access: the terms of the raw data set, if its recipe states them. patient_key_id: mark of the key of its
    patient hashes (`split.key_id`): sets that share it can be compared by patient. parts: of a merged set, whose licence and
    access tell those of each. phi_scan: what the scan of the reports found (`phi.PhiScan`): its version, and records by kind;
    None if they were not scanned. labels_by: the program that made the labels from the reports; None if they are the data set's
    own. images: how `pack` made the images: its short_side, and the fields of `images.Rendering`. ValueError when fields do not
    fit together.
    """

    kind: Kind
    dataset: str
    split: str
    shards: tuple[Shard, ...]
    config_hash: str
    labels: tuple[str, ...] = ()
    base: dict[str, str] | None = None
    checkpoint: str | None = None
    licence: str | None = None
    access: str | None = None
    patient_key_id: str | None = None
    parts: tuple[Part, ...] = ()
    phi_scan: dict[str, int] | None = None
    labels_by: str | None = None
    images: dict[str, Any] | None = None
    guide: str | None = None
    version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_version(self.version)
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind {self.kind!r} is unknown; it must be one of {', '.join(get_args(Kind))}")
        if not all(isinstance(text, str) and text for text in (self.dataset, self.split, self.config_hash)):
            raise ValueError("dataset, split and config_hash must be non-empty texts")
        if not self.shards:
            raise ValueError("it lists no shards")
        paths = [name for shard in self.shards for name in (shard.path, shard.index)]
        if len(set(paths)) != len(paths):
            raise ValueError("two of its shards share a path")
        if not all(isinstance(name, str) and name for name in self.labels):
            raise ValueError("labels must be non-empty texts")
        if (self.base is None) != (self.kind == "base"):
            raise ValueError("a sidecar needs `base`, the sha256 of each base shard, and a base set has none")
        for path, sha256 in (self.base or {}).items():
            check_relative(path)
            _check_sha256(sha256, f"base shard {path}")
        texts = self.checkpoint, self.guide, self.licence, self.access, self.patient_key_id, self.labels_by
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError("checkpoint, guide, licence, access, patient_key_id and labels_by must be texts or null")
        if self.phi_scan is not None and not (
            isinstance(self.phi_scan, dict) and "version" in self.phi_scan and all(map(_is_count, self.phi_scan.values()))
        ):
            raise ValueError("phi_scan must be null, or hold `version` and counts by kind")
        if not isinstance(self.images, dict | None):
            raise ValueError("images must be an object or null")

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def origins(self) -> tuple[Part, ...]:
        """The data sets that its samples come from: one, unless sets were merged."""
        return self.parts or (Part(self.dataset, self.labels, self.licence, self.access),)

    @property
    def datasets(self) -> tuple[str, ...]:
        """The names of these data sets, each once."""
        return tuple(dict.fromkeys(part.dataset for part in self.origins))


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a shard. offset: of its data in the tar, in bytes; xxh3: 64-bit hash of the data, in hex."""

    offset: int
    length: int
    xxh3: str


class MemberColumns(NamedTuple):
    """One entry for each member. suffix: number in the shard's list of suffixes; offset, length: bytes in the tar; xxh3: hash."""

    suffix: array[int]
    offset: array[int]
    length: array[int]
    xxh3: array[int]


class ShardIndex:
    """Where each sample of a shard lies, in compact arrays: about 150 bytes a sample.

    keys: of the samples, in the order of the tar; rows: key -> number of the sample.
    """

    def __init__(self, keys: list[str], suffixes: tuple[str, ...], first: array[int], columns: MemberColumns) -> None:
        self.keys = keys
        self.rows = {key: row for row, key in enumerate(keys)}
        self._suffixes, self._first, self._columns = suffixes, first, columns

    def sample(self, row: int) -> list[tuple[str, int, int, int]]:
        """(suffix, offset, length, xxh3 as a number) of each member of a sample, in the order of the tar."""
        suffix, offset, length, xxh3 = self._columns
        return [
            (self._suffixes[suffix[m]], offset[m], length[m], xxh3[m])
            for m in range(self._first[row], self._first[row + 1])
        ]  # fmt: skip

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """(offset, length) from the first byte of sample `first` to the last of sample `stop` - 1."""
        _, offset, length, _ = self._columns
        begin, last = offset[self._first[first]], self._first[stop] - 1
        return begin, offset[last] + length[last] - begin


def load_manifest(url: Url) -> Manifest:
    """The checked manifest in folder `url`. ValueError when it is missing, malformed, or of another version."""
    where = storage.join(url, MANIFEST_NAME)

    def parse(data: bytes) -> Manifest:
        try:
            return _parse_manifest(json.loads(data))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where} is not a usable manifest: {_cause(error)}") from error

    try:
        return storage.read_parsed(where, parse)
    except (FileNotFoundError, NotADirectoryError) as error:
        splits: list[str] = []
        with suppress(OSError):  # keys that may read need not be allowed to list
            splits = _splits(url)
        if splits:
            raise ValueError(f"{url} is the folder of several splits: name one of {', '.join(splits)} below it") from error
        raise ValueError(
            f"no {MANIFEST_NAME} in {url}: make it with `mmclip pack` (or `mmclip index`, for shards of another program), "
            "or correct the path"
        ) from error


def save_manifest(url: Url, manifest: Manifest) -> None:
    """Write the manifest into folder `url`, atomically. The same manifest is the same bytes."""
    document = _document(manifest)
    storage.write_atomic(storage.join(url, MANIFEST_NAME), canonical_json({**document, "digest": _digest(document)}))


def manifest_hash(manifest: Manifest) -> str:
    """sha256 of a set's content: its manifest holds the hash of every shard and index. 64 hex digits."""
    return _digest(_document(manifest))


def find_split(url: Url, split: str) -> str:
    """The folder that holds a split: `url` itself, or its sub-folder `split`. ValueError when neither has a manifest."""
    for folder in (str(url), storage.join(url, split)):
        if storage.exists(storage.join(folder, MANIFEST_NAME)):
            return folder
    names = storage.list_folder(url)
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    raise ValueError(
        f"no {MANIFEST_NAME} in {url} or {storage.join(url, split)} (found: {found}): "
        f"name a folder made by `mmclip pack` that has a split {split!r}, or run `mmclip pack`"
    )


def find_sets(url: Url) -> list[str]:
    """The folders of the sets at `url`: itself, or the sub-folders that have a manifest. ValueError when there is none."""
    if storage.exists(storage.join(url, MANIFEST_NAME)):
        return [str(url)]
    if found := _splits(url):
        return [storage.join(url, name) for name in found]
    names = storage.list_folder(url)
    there = f"{len(names)} entries there" if names else "nothing is there"
    raise ValueError(
        f"no {MANIFEST_NAME} in {url} or a folder of it ({there}): make a set with `mmclip pack` "
        "(or `mmclip index`, for shards of another program), or correct the path"
    )


def _splits(url: Url) -> list[str]:
    """The names of the sub-folders that have a manifest."""
    names = [name for name in storage.list_folder(url) if not name.endswith((".tar", ".json"))]
    return [name for name in names if storage.exists(storage.join(url, name, MANIFEST_NAME))]


def index_bytes(members: list[tuple[str, Member]], sha256: str) -> bytes:
    """The content of a shard's index file. members: (name, Member), in the order of the tar; sha256: of the tar."""
    rows = [[name, member.offset, member.length, member.xxh3] for name, member in members]
    return canonical_json({"version": SCHEMA_VERSION, "sha256": sha256, "members": rows})


def load_index(url: Url, shard: Shard, tries: Tries | None = None) -> ShardIndex:
    """The checked index of one shard of the set in folder `url`. ValueError when it is missing or does not fit.

    tries: as in `storage.read_parsed`.
    """
    where = storage.join(url, shard.index)

    def parse(data: bytes) -> ShardIndex:
        try:
            index = _parse_index(json.loads(data), shard)
            if hashlib.sha256(data).hexdigest() != shard.index_sha256:
                raise ValueError("its sha256 is not the manifest's: copy or pack the set again")
            return index
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"index {where} does not fit shard {shard.path}: {_cause(error)}") from error

    try:
        return storage.read_parsed(where, parse, tries)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"index {where} is missing: pack the set again or copy it again") from error


def check_relative(path: str) -> None:
    """ValueError unless `path` is a plain relative path: no root, `..`, scheme, command (`pipe:`) or hidden name."""
    if not isinstance(path, str) or not all(_PATH_PART.fullmatch(part) for part in path.split("/")):
        raise ValueError(f"path {path!r} is refused: a set may only name files below its own folder")


def _document(manifest: Manifest) -> dict[str, Any]:
    """The fields of a manifest and the number of its samples. Optional ones that are not stated are left out: a manifest of a set
    without any, and its hash, are those of releases that did not know them."""
    fields = {name: value for name, value in asdict(manifest).items() if name not in _OPTIONAL or value != _OPTIONAL[name]}
    return {**fields, "samples": manifest.samples}


def _parse_manifest(document: dict[str, Any]) -> Manifest:
    if not isinstance(document, dict) or not isinstance(document.get("labels"), list):
        raise ValueError("it is not a JSON object with the fields of a manifest")
    _check_version(document["version"])  # first: another version may have other fields
    fields = {name: value for name, value in document.items() if name not in ("samples", "digest")}
    fields["shards"] = tuple(Shard(**row) for row in document["shards"])
    fields["labels"] = tuple(document["labels"])
    fields["parts"] = tuple(Part(**{**row, "labels": tuple(row["labels"])}) for row in document.get("parts", ()))
    manifest = Manifest(**fields)
    if manifest.samples != document["samples"]:
        raise ValueError(f"its shards hold {manifest.samples} samples, but it promises {document['samples']}")
    if document.get("digest", digest := _digest(document)) != digest:
        raise ValueError(
            "its digest is not that of its content: it is damaged, or was edited (then leave out `digest`)"
        )
    return manifest


def _digest(document: dict[str, Any]) -> str:
    """Hash of a manifest's content, so that one wrong byte from an object store is noticed."""
    content = {name: value for name, value in document.items() if name != "digest"}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _parse_index(document: dict[str, Any], shard: Shard) -> ShardIndex:
    _check_version(document["version"])
    # A shard and an index that were replaced together agree with each other, but not with the manifest.
    if document["sha256"] != shard.sha256:
        raise ValueError("it was written for another build of the shard than the manifest: copy or pack the set again")
    keys: list[str] = []
    suffixes: dict[str, int] = {}
    first, columns, end = array("Q"), MemberColumns(array("B"), array("Q"), array("Q"), array("Q")), 0
    for name, offset, length, xxh3 in document["members"]:
        key, _, suffix = name.partition(".")
        if not (_is_count(offset) and _is_count(length) and _XXH3.fullmatch(xxh3)):
            raise ValueError(f"{name} has no usable offset, length and hash")
        if offset < end + _TAR_BLOCK or offset % _TAR_BLOCK or offset + length > shard.bytes:
            raise ValueError(f"{name} lies at {offset} to {offset + length}, which is not in the {shard.bytes} bytes")
        new = not keys or key != keys[-1]
        if new:
            check_key(key)
        if suffix not in suffixes:
            check_suffix(suffix)
            suffixes[suffix] = len(suffixes)
        number = suffixes[suffix]
        if new:
            first.append(len(columns.suffix))
            keys.append(key)
        elif number in columns.suffix[first[-1] :]:
            raise ValueError(f"{name} comes twice")
        for column, value in zip(columns, (number, offset, length, int(xxh3, 16)), strict=True):
            column.append(value)
        end = offset + length
    first.append(len(columns.suffix))
    index = ShardIndex(keys, tuple(suffixes), first, columns)
    if len(index.rows) != len(keys):
        raise ValueError("a key comes twice, or the members of a sample do not lie together")
    if len(keys) != shard.samples:
        raise ValueError(f"it has {len(keys)} samples, but the manifest promises {shard.samples}")
    return index


def _check_version(version: object) -> None:
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ValueError(
            f"schema version {version!r}, but this program reads version {SCHEMA_VERSION}: "
            "pack again, or use the release of mmclip_dist that wrote it"
        )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0  # no bool


def _check_sha256(value: object, of_what: str) -> None:
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise ValueError(f"{of_what}: sha256 must be 64 lower-case hex digits")


def _cause(error: Exception) -> str:
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)
