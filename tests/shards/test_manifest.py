"""Manifests and offset indexes: round trips, and everything a damaged or hostile one may try."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mmclip_shards import storage
from mmclip_shards.manifest import Manifest, Shard, find_split, load_index, load_manifest, save_manifest
from mmclip_shards.writer import write_shard

SHARD = Shard("000000.tar", 3, 4096, "a" * 64, "000000.index.json", "b" * 64)
BASE = Manifest("base", "toy", "train", (SHARD,), "cafe", labels=("Edema", "Mass"))


def test_round_trip_is_byte_identical(tmp_path: Path) -> None:
    sidecar = replace(BASE, kind="attention", base={"000000.tar": "b" * 64}, checkpoint="beef")
    for name, manifest in (("base", BASE), ("sidecar", sidecar)):
        save_manifest(tmp_path / name, manifest)
        first = (tmp_path / name / "manifest.json").read_bytes()
        assert load_manifest(tmp_path / name) == manifest
        save_manifest(tmp_path / name, load_manifest(tmp_path / name))
        assert (tmp_path / name / "manifest.json").read_bytes() == first
    assert json.loads(first)["samples"] == BASE.samples == 3


def test_it_works_on_a_remote_store() -> None:
    save_manifest("memory://manifests/train", BASE)
    assert load_manifest("memory://manifests/train") == BASE
    assert find_split("memory://manifests", "train") == "memory://manifests/train"
    assert find_split("memory://manifests/train", "train") == "memory://manifests/train"


def _write_changed(folder: Path, change: dict[str, Any], shard_change: dict[str, Any] | None = None) -> None:
    save_manifest(folder, BASE)
    document = json.loads((folder / "manifest.json").read_text()) | change
    if shard_change:
        document["shards"][0] |= shard_change
    (folder / "manifest.json").write_text(json.dumps(document))


ATTACKS = [
    "/etc/passwd",
    "../other/000000.tar",
    "a/../../000000.tar",
    "pipe:curl http://x/000000.tar",
    "s3://bucket/000000.tar",
    "file:///000000.tar",
    "C:\\000000.tar",
    "a\\..\\000000.tar",
    "",
    ".",
    "a//b.tar",
    "-x/./b.tar",
    "a|b.tar",
    "a.tar\n",
    "%2e%2e/a.tar",
    5,
    None,
]


@pytest.mark.parametrize("path", ATTACKS)
@pytest.mark.parametrize("name", ["path", "index"])
def test_paths_out_of_the_folder_and_commands_are_refused(tmp_path: Path, name: str, path: object) -> None:
    _write_changed(tmp_path, {}, {name: path})
    with pytest.raises(ValueError, match="is refused"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "shard_change", "message"),
    [
        ({"version": 2}, None, "schema version 2"),
        ({"version": "1"}, None, "schema version '1'"),
        ({"kind": "other"}, None, "kind 'other'"),
        ({"shards": []}, None, "lists no shards"),
        ({"samples": 4}, None, "promises 4"),
        ({"labels": "Edema"}, None, "not a JSON object with"),
        ({"extra": 1}, None, "extra"),
        ({"config_hash": ""}, None, "config_hash"),
        ({"base": {"000000.tar": "b" * 64}}, None, "a base set has none"),
        ({"kind": "entities"}, None, "a sidecar needs `base`"),
        ({"kind": "entities", "base": {"../x.tar": "b" * 64}}, None, "is refused"),
        ({"kind": "entities", "base": {"x.tar": "b"}}, None, "sha256"),
        ({}, {"sha256": "xyz"}, "sha256"),
        ({}, {"samples": True}, "whole numbers"),
        ({}, {"samples": 0}, "whole numbers"),
        ({}, {"bytes": -1}, "whole numbers"),
        ({}, {"bytes": "9"}, "whole numbers"),
        ({}, {"index": "000000.tar"}, "share a path"),
    ],
)
def test_malformed_manifests_are_refused(
    tmp_path: Path, change: dict[str, Any], shard_change: dict[str, Any] | None, message: str
) -> None:
    _write_changed(tmp_path, change, shard_change)
    with pytest.raises(ValueError, match=message):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"), [(b"Edema", b"Edemb"), (b"aaaa", b"aaab"), (b"train", b"trein"), (b"4096", b"4097")]
)
def test_a_flipped_byte_that_leaves_a_legal_manifest_is_noticed(tmp_path: Path, old: bytes, new: bytes) -> None:
    save_manifest(tmp_path, BASE)
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match="digest"):
        load_manifest(tmp_path)
    document = json.loads(path.read_text())
    del document["digest"]  # as after an edit on purpose
    path.write_text(json.dumps(document))
    assert load_manifest(tmp_path) != BASE


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"version": 1}', b"\xff", b"[" * 100_000])
def test_other_content_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(ValueError, match="not a usable manifest"):
        load_manifest(tmp_path)


def test_a_missing_manifest_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mmclip pack"):
        load_manifest(tmp_path / "nowhere")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"found: val\).*mmclip pack"):
        find_split(tmp_path, "train")


# ---- the offset index


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    samples = [(f"k{n}", {"jpg": b"x" * (n + 1), "json": b"{}"}) for n in range(3)]
    return write_shard(tmp_path, 0, samples)


def test_index_round_trip(tmp_path: Path, shard: Shard) -> None:
    index = load_index(tmp_path, shard)
    assert index.keys == ["k0", "k1", "k2"]
    tar = (tmp_path / shard.path).read_bytes()
    assert index.rows == {"k0": 0, "k1": 1, "k2": 2}
    (suffix, offset, length, _), _ = index.sample(2)
    assert (suffix, tar[offset : offset + length]) == ("jpg", b"xxx")
    start, length = index.span(1, 3)
    assert tar[start : start + 2] == b"xx" and tar[start + length - 2 : start + length] == b"{}"


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (0, ["k0.pkl", 512, 1, "0" * 16], "suffix"),
        (0, ["a.b.c.jpg", 512, 1, "0" * 16], "suffix"),
        (0, ["../k0.jpg", 512, 1, "0" * 16], "key"),
        (0, ["k0.jpg", 0, 1, "0" * 16], "is not in"),
        (0, ["k0.jpg", 513, 1, "0" * 16], "is not in"),
        (0, ["k0.jpg", 512, 10**9, "0" * 16], "is not in"),
        (0, ["k0.jpg", -512, 1, "0" * 16], "no usable offset"),
        (0, ["k0.jpg", 512, 1, "z"], "no usable offset"),
        (0, ["k0.jpg", 512.0, 1, "0" * 16], "no usable offset"),
        (0, ["k0.jpg", 512], "not enough values"),
        (0, ["k9.jpg", 512, 1, "0" * 16], "4 samples, but the manifest promises 3"),
        (0, ["k2.jpg", 512, 1, "0" * 16], "a key comes twice"),
        (1, ["k0.jpg", 1536, 2, "0" * 16], "comes twice"),
        (1, ["k0.json", 512, 2, "0" * 16], "is not in"),
        (2, ["k1x.jpg", 2560, 2, "0" * 16], "4 samples, but the manifest promises 3"),
        (2, ["k1.jpg", 2560, 2, "1" * 16], "sha256 is not the manifest's"),
        (4, ["k11.jpg", 4608, 3, "0" * 16], "4 samples, but the manifest promises 3"),
    ],
)
def test_indexes_that_do_not_fit_are_refused(
    tmp_path: Path, shard: Shard, row: int, value: list[Any], message: str
) -> None:
    document = json.loads((tmp_path / shard.index).read_text())
    document["members"][row] = value
    (tmp_path / shard.index).write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        load_index(tmp_path, shard)


def test_short_missing_and_other_version_indexes_are_refused(tmp_path: Path, shard: Shard) -> None:
    document = json.loads((tmp_path / shard.index).read_text())
    (tmp_path / shard.index).write_text(json.dumps(document | {"members": document["members"][:4]}))
    with pytest.raises(ValueError, match="2 samples, but the manifest promises 3"):
        load_index(tmp_path, shard)
    (tmp_path / shard.index).write_text(json.dumps(document | {"version": 7}))
    with pytest.raises(ValueError, match="version 7"):
        load_index(tmp_path, shard)
    storage.remove(tmp_path / shard.index)
    with pytest.raises(ValueError, match="is missing"):
        load_index(tmp_path, shard)
