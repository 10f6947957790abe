"""Shards that another program wrote: a manifest and offset indexes, so that our reader takes them where they lie."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import xxhash

from mmclip_shards import storage
from mmclip_shards.document import json_fields, legal_labels
from mmclip_shards.manifest import MANIFEST_NAME, Manifest, Member, Shard, check_relative, index_bytes, save_manifest
from mmclip_shards.schema import IMAGE_SUFFIXES, canonical_json, check_suffix, make_key, member_name
from mmclip_shards.split import check_split_name
from mmclip_shards.storage import Url
from mmclip_shards.tarwalk import Entry, TarFault, TarWalk

DEFAULT_SPLIT = "train"

_FOREIGN = "foreign-"  # how the config_hash of such a set begins
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset's rule: the basename's first dot divides
_METADATA = re.compile(r"__[^/]*__(?:$|/)")  # names that webdataset passes over
_JSON_LIMIT = 16 << 20  # bytes; a larger one holds no labels
_MOST_SUFFIXES = 256  # of one shard: the reader keeps a byte a member for it


@dataclass(frozen=True)
class Indexed:
    """What `index_set` made of a folder. left_out: what was not taken up -> how often."""

    manifest: Manifest
    left_out: Counter[str]


@dataclass(frozen=True)
class _Tar:
    shard: Shard
    index: bytes
    labels: set[str]


def index_set(
    url: Url,
    *,
    dataset: str | None = None,
    split: str = DEFAULT_SPLIT,
    progress: Callable[[int, int], None] | None = None,
) -> Indexed:
    """Write a manifest, and an index NAME.index.json beside each NAME.tar, into the folder `url`. No tar is changed.

    Only what may be decoded is taken up (`schema.ALLOWED_SUFFIXES`), of samples that have a jpg or png; the rest is counted.
    Keys are mapped by `schema.make_key`, `jpeg` becomes `jpg`. dataset: the folder's name by default.
    progress(done, total): in shards. ValueError, with nothing written, for a folder that is indexed already, a damaged
    tar (names shard and offset), or a sample whose members come twice or apart (names shard and key).
    """
    check_split_name(split)
    names = _tar_names(url)
    shards: list[Shard] = []
    labels: set[str] = set()
    left_out: Counter[str] = Counter()
    written = [storage.join(url, MANIFEST_NAME)]
    try:
        for number, name in enumerate(names, 1):
            tar = _index_tar(url, name, left_out)
            if tar is None:
                left_out["shards without a sample"] += 1
            else:
                where = storage.join(url, tar.shard.index)
                _check_free(where)
                written.append(where)
                storage.write_atomic(where, tar.index)
                shards.append(tar.shard)
                labels |= tar.labels
            if progress is not None:
                progress(number, len(names))
        if not shards:
            raise ValueError(
                f"no sample with a jpg or png in the {len(names)} tars of {url}; left out: {listed(left_out)}"
            )
        manifest = Manifest(
            kind="base",
            dataset=dataset or _folder_name(url),
            split=split,
            shards=tuple(shards),
            config_hash=_FOREIGN + hashlib.sha256(canonical_json([shard.sha256 for shard in shards])).hexdigest(),
            labels=tuple(sorted(labels)),
        )
        save_manifest(url, manifest)
    except BaseException:
        for where in written:
            storage.remove(where)
        raise
    return Indexed(manifest, left_out)


def is_foreign(manifest: Manifest) -> bool:
    """Whether `index_set` made it: then members may be missing from the index, and JSON may have any fields."""
    return manifest.config_hash.startswith(_FOREIGN)


def foreign_member(name: str) -> tuple[str, str] | None:
    """(the other program's key, suffix as we store it) of a file in its tar; None if it is no part of a sample."""
    parts = _MEMBER.fullmatch(name)
    if parts is None or _METADATA.match(name) or name.startswith("/") or ".." in name.split("/"):
        return None
    before, dot, last = parts[2].lower().rpartition(".")
    return parts[1], before + dot + ("jpg" if last == "jpeg" else last)


def may_hold(suffix: str) -> bool:
    """Whether members with this suffix are taken up."""
    try:
        check_suffix(suffix)
    except ValueError:
        return False
    return True


def listed(left_out: Counter[str], most: int = 12) -> str:
    """The counts as one line."""
    parts = [f"{count} {what}" for what, count in left_out.most_common(most)]
    return ", ".join([*parts, *(["..."] if len(left_out) > most else [])]) or "nothing"


def _tar_names(url: Url) -> list[str]:
    names = storage.list_folder(url)
    if MANIFEST_NAME in names:
        raise ValueError(f"{url} has a {MANIFEST_NAME} already: read it as it is, or remove that file to index again")
    tars = [name for name in names if name.endswith(".tar")]
    if not tars:
        packed = [name for name in names if name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"))]
        hint = f"unpack {packed[0]} and the like first" if packed else "name the folder that holds the shards"
        raise ValueError(f"no *.tar in {url} ({len(names)} entries there): {hint}")
    for name in tars:
        try:
            check_relative(name)
        except ValueError as error:
            raise ValueError(
                f"{url} holds {name!r}: rename it with A-Z a-z 0-9 _ - and . only, not beginning with a dot"
            ) from error
    return tars


def _folder_name(url: Url) -> str:
    path = storage.local_path(url)
    return path.resolve().name if path else str(url).rstrip("/").rpartition("/")[2]


def _check_free(where: str) -> None:
    """ValueError if another program's file has the name of our index; one that an interrupted run left is replaced."""
    if not storage.exists(where):
        return
    try:
        ours = {"version", "sha256", "members"} <= json_fields(storage.read_bytes(where)).keys()
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(f"{where} is in the way, a file that is no index of ours: move it elsewhere")


def _index_tar(url: Url, path: str, left_out: Counter[str]) -> _Tar | None:
    """Index one tar; None if it holds no sample."""
    where = storage.join(url, path)
    try:
        walk = TarWalk(where)
        rows: list[tuple[str, Member]] = []
        seen: set[str] = set()
        suffixes: set[str] = set()
        labels: set[str] = set()
        samples = 0
        for raw_key, entries in groupby(_named_entries(walk, left_out), key=itemgetter(0)):
            key = make_key(raw_key)
            if key in seen:
                raise ValueError(
                    f"key {raw_key!r} comes twice: the members of a sample must lie together, so sort the tar by name, "
                    "and two samples cannot share a key"
                )
            seen.add(key)
            members, names = _sample(walk, raw_key, entries, left_out)
            if members.keys().isdisjoint(IMAGE_SUFFIXES):
                left_out["samples without jpg or png"] += 1
                continue
            rows += [(member_name(key, suffix), member) for suffix, member in members.items()]
            suffixes |= members.keys()
            labels |= names
            samples += 1
        if len(suffixes) > _MOST_SUFFIXES:
            raise ValueError(f"its members have {len(suffixes)} different suffixes; {_MOST_SUFFIXES} can be indexed")
        if not samples:
            return None
        sha256 = walk.sha256()
    except TarFault as fault:
        raise ValueError(f"shard {where}, {fault}. Copy it again; nothing was written") from fault
    except ValueError as error:
        raise ValueError(f"shard {where}: {error}. Nothing was written") from error
    index = index_bytes(rows, sha256)
    index_name = path.removesuffix(".tar") + ".index.json"
    shard = Shard(path, samples, walk.size, sha256, index_name, hashlib.sha256(index).hexdigest())
    return _Tar(shard, index, labels)


def _named_entries(walk: TarWalk, left_out: Counter[str]) -> Iterator[tuple[str, str, Entry]]:
    """(key of the other program, our suffix, entry) of every file that is part of a sample."""
    for entry in walk.entries():
        if entry.kind == "folder":
            continue
        parts = foreign_member(entry.name) if entry.kind == "file" else None
        if parts is not None:
            yield *parts, entry
        elif entry.kind != "file":
            left_out["links, devices and the like"] += 1
        else:
            left_out["files whose name is unsafe or no KEY.SUFFIX"] += 1


def _sample(
    walk: TarWalk, raw_key: str, entries: Iterable[tuple[str, str, Entry]], left_out: Counter[str]
) -> tuple[dict[str, Member], set[str]]:
    """The members of one sample that are taken up, by suffix, and the names of its labels."""
    members: dict[str, Member] = {}
    labels: set[str] = set()
    met: set[str] = set()
    for _, suffix, entry in entries:
        if suffix in met:
            raise ValueError(f"key {raw_key!r} has two members .{suffix}: rename one of them")
        met.add(suffix)
        if not may_hold(suffix):
            left_out[f"members .{suffix}"] += 1
            continue
        digest, kept = xxhash.xxh3_64(), []
        for piece in walk.pieces():
            digest.update(piece)
            if suffix == "json" and entry.length <= _JSON_LIMIT:
                kept.append(piece)
        members[suffix] = Member(entry.offset, entry.length, digest.hexdigest())
        if suffix == "json":
            labels = _label_names(b"".join(kept), left_out)
    return members, labels


def _label_names(data: bytes, left_out: Counter[str]) -> set[str]:
    try:
        given = json_fields(data).get("labels")
    except ValueError:
        left_out["members .json that cannot be parsed, for labels"] += 1
        return set()
    labels = legal_labels(given)
    if labels is None and given is not None:
        left_out["`labels` in another form than {name: 1 | 0 | -1 | null}"] += 1
    return set(labels or ())
