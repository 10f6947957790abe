"""Index the shards that another program wrote, so that our reader can read them where they are."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from mmclip_shards import storage
from mmclip_shards.document import json_fields, legal_labels
from mmclip_shards.manifest import MANIFEST_NAME, Manifest, Member, Shard, check_relative, index_bytes, save_manifest
from mmclip_shards.schema import IMAGE_SUFFIXES, canonical_json, check_suffix, make_key, member_name
from mmclip_shards.split import check_split_name
from mmclip_shards.storage import Url
from mmclip_shards.tarwalk import Entry, TarFault, TarWalk
from mmclip_shards.webdataset_extra import webdataset_module

DEFAULT_SPLIT = "train"

FOREIGN = "foreign-"
"""The config_hash of such a set, and of those made of it, begins with this."""

_TARITERATORS = "webdataset.tariterators"
_METADATA = re.compile(r"__[^/]*__(?:$|/)")  # names that webdataset skips
_HIDDEN = re.compile(r"(?:.*/)?\.[^/]*", re.DOTALL)
_JSON_LIMIT = 16 << 20  # bytes; labels are not read from a larger member
_MOST_SUFFIXES = 256  # of one shard: the reader stores a suffix's number in one byte


@dataclass(frozen=True)
class Indexed:
    """The result of `index_set`. left_out: kind of thing that was left out -> how many."""

    manifest: Manifest
    left_out: Counter[str]


@dataclass(frozen=True)
class _Tar:
    shard: Shard
    index: bytes
    labels: set[str]


class _Content(NamedTuple):
    """A file that was read. json: the bytes of `KEY.json`, unless it is too large; b"" for all other files."""

    member: Member
    json: bytes


def index_set(
    url: Url,
    *,
    dataset: str | None = None,
    split: str = DEFAULT_SPLIT,
    progress: Callable[[int, int], None] | None = None,
) -> Indexed:
    """Write a manifest, and an index NAME.index.json beside each NAME.tar, into the folder `url`. No tar is changed.

    Indexes the members that may be decoded (`schema.ALLOWED_SUFFIXES`), of samples that have a jpg or png; counts the rest.
    Keys are mapped by `schema.make_key`, `jpeg` becomes `jpg`. dataset: the folder's name by default.
    progress(done, total): in shards. ValueError, and nothing is written, for a folder that is indexed already, a damaged tar
    (names shard and offset), or a sample whose members come twice or do not lie together (names shard and key).
    Needs the `webdataset` package.
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
            config_hash=FOREIGN + hashlib.sha256(canonical_json([shard.sha256 for shard in shards])).hexdigest(),
            labels=tuple(sorted(labels)),
        )
        save_manifest(url, manifest)
    except BaseException:
        for where in written:
            storage.remove(where)
        raise
    return Indexed(manifest, left_out)


def is_foreign(manifest: Manifest) -> bool:
    """Whether `index_set` made the manifest. Then the index may leave out members, and JSON may have any fields."""
    return manifest.config_hash.startswith(FOREIGN)


def foreign_member(name: str) -> tuple[str, str] | None:
    """(key in the foreign tar, suffix in our index) of a file's name; None if the file is not part of a sample.

    webdataset divides the name. Unsafe names and those that webdataset skips are None, and so are hidden files (such as
    `a/._k.jpg`, which macOS adds): webdataset would take their folder for the key.
    """
    if _METADATA.match(name) or _HIDDEN.fullmatch(name) or name.startswith("/") or ".." in name.split("/"):
        return None
    key, suffix = webdataset_module(_TARITERATORS).base_plus_ext(name)
    # webdataset stores its own facts in a sample under names like `__key__`.
    return None if key is None or suffix.startswith("__") else (key, _our_suffix(suffix))


def may_hold(suffix: str) -> bool:
    """Whether members with this suffix are indexed."""
    try:
        check_suffix(suffix)
    except ValueError:
        return False
    return True


def listed(left_out: Counter[str], most: int = 12) -> str:
    """The largest `most` counts in one line."""
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
    """ValueError if a file of another program has the name of our index. An index that an interrupted run left is no fault."""
    if not storage.exists(where):
        return
    try:
        ours = {"version", "sha256", "members"} <= json_fields(storage.read_bytes(where)).keys()
    except ValueError:
        ours = False
    if not ours:
        raise ValueError(f"{where} is in the way: it is a file of another program; move it elsewhere")


def _index_tar(url: Url, path: str, left_out: Counter[str]) -> _Tar | None:
    """Index one tar; None if it holds no sample with an image."""
    where = storage.join(url, path)
    try:
        walk = TarWalk(where)
        rows: list[tuple[str, Member]] = []
        seen: set[str] = set()
        suffixes: set[str] = set()
        labels: set[str] = set()
        samples = 0
        for sample in webdataset_module(_TARITERATORS).group_by_keys(_files(walk, where, left_out)):
            raw_key = sample["__key__"]
            key = make_key(raw_key)
            if key in seen:
                raise ValueError(
                    f"key {raw_key!r} comes twice: the members of a sample must lie together, so sort the tar by name, "
                    "and two samples cannot share a key"
                )
            seen.add(key)
            members, names = _members(sample, left_out)
            if members.keys().isdisjoint(IMAGE_SUFFIXES):
                left_out["samples without jpg or png"] += 1
                continue
            rows += [(member_name(key, suffix), member) for suffix, member in members.items()]
            suffixes |= members.keys()
            labels |= names
            samples += 1
        if len(suffixes) > _MOST_SUFFIXES:
            raise ValueError(
                f"its members have {len(suffixes)} different suffixes; {_MOST_SUFFIXES} can be indexed at most"
            )
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


def _files(walk: TarWalk, where: str, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Every file that may be part of a sample, in the form of webdataset's tar iteration: `fname`, `data`, `__url__`.

    data: a `_Content` in place of the bytes; None for a member that is not indexed. ValueError when a sample has two
    members with one suffix.
    """
    key, met = "", set[str]()
    for entry in walk.entries():
        if entry.kind == "folder":
            continue
        parts = foreign_member(entry.name) if entry.kind == "file" else None
        if parts is not None:
            if parts[0] != key:
                key, met = parts[0], set()
            if parts[1] in met:
                raise ValueError(f"key {key!r} has two members .{parts[1]}: rename one of them")
            met.add(parts[1])
            content = _content(walk, entry, parts[1]) if may_hold(parts[1]) else None
            yield {"fname": entry.name, "data": content, "__url__": where}
        elif entry.kind != "file":
            left_out["links, devices and the like"] += 1
        else:
            left_out["files whose name is unsafe or no KEY.SUFFIX"] += 1


def _content(walk: TarWalk, entry: Entry, suffix: str) -> _Content:
    digest, kept = xxhash.xxh3_64(), []
    for piece in walk.pieces():
        digest.update(piece)
        if suffix == "json" and entry.length <= _JSON_LIMIT:
            kept.append(piece)
    return _Content(Member(entry.offset, entry.length, digest.hexdigest()), b"".join(kept))


def _members(sample: dict[str, Any], left_out: Counter[str]) -> tuple[dict[str, Member], set[str]]:
    """The indexed members of one sample, by our suffix, and the names of its labels. Counts the other members."""
    members: dict[str, Member] = {}
    labels: set[str] = set()
    for theirs, content in sample.items():
        if theirs.startswith("__"):
            continue
        suffix = _our_suffix(theirs)
        if content is None:
            left_out[f"members .{suffix}"] += 1
            continue
        members[suffix] = content.member
        if suffix == "json":
            labels = _label_names(content.json, left_out)
    return members, labels


def _our_suffix(suffix: str) -> str:
    """A suffix as our index holds it: lower case, and `jpg` for `jpeg`."""
    before, dot, last = suffix.lower().rpartition(".")
    return before + dot + ("jpg" if last == "jpeg" else last)


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
