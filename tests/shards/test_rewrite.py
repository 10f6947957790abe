"""reshard, merge, split, filter: the samples' bytes, true manifests, sidecars, patients, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards import rewrite, storage
from mmclip_shards.foreign import index_set
from mmclip_shards.manifest import Manifest, Part, load_index, load_manifest, manifest_hash, save_manifest
from mmclip_shards.pack import pack
from mmclip_shards.reader import iterate
from mmclip_shards.rewrite import count_matches, merge, reshard, select, split_again
from mmclip_shards.schema import Record, canonical_json, encode_npy
from mmclip_shards.split import hash_patient, key_id, split_of
from mmclip_shards.verify import verify
from mmclip_shards.writer import write_shard

KEY, OTHER_KEY = b"one key", b"another key"


def build(
    url: str, name: str = "a", *, patients: str = "abcdefgh", labels: tuple[str, ...] = ("Edema",), key: bytes = KEY,
    test: str = "gh", licence: str | None = "CC0", keys: str = "{name}{number:02d}", sidecars: bool = True,
) -> str:  # fmt: skip
    """Two images a patient; those of `test` in that split, the others in train; three samples a shard; sidecars inside."""
    rows = [
        Record(
            key=keys.format(name=name, number=number), image=np.full((20, 16), number, np.uint8), patient=patient,
            source=f"{name}/{number}.png", report=f"Report {number} of {name}." if number % 3 else "",
            labels=dict.fromkeys(labels, number % 2), view="PA" if number % 2 else "AP",
        )
        for number, patient in enumerate(sorted([*patients, *patients]))
    ]  # fmt: skip
    splits = {row.key: "test" if row.patient in test else "train" for row in rows}
    manifests = pack(
        rows, url, dataset=name, splits=None, split_of_record=splits, samples_per_shard=3, config_hash="c", patient_key=key,
        licence=licence,
    )  # fmt: skip
    for split in manifests if sidecars else ():
        for kind in ("entities", "attention"):
            add_sidecar(f"{url}/{split}", kind)
    return url


def add_sidecar(base: str, kind: str, made: str = "made", checkpoint: str = "0" * 64) -> None:
    """Rows that name their sample."""
    manifest = load_manifest(base)

    def row(key: str) -> dict[str, bytes]:
        if kind == "attention":
            return {"attention.npy": encode_npy(np.full((2, 2), len(key) + ord(key[-1]), np.float16))}
        return {"entities.json": canonical_json([{"start": 0, "end": len(key), "text": key, "label": "F", "negated": False}])}

    rows = tuple(
        write_shard(f"{base}/{kind}", number, [(key, row(key)) for key in load_index(base, shard).keys])
        for number, shard in enumerate(manifest.shards)
    )
    save_manifest(
        f"{base}/{kind}",
        Manifest(
            kind=kind, dataset=manifest.dataset, split=manifest.split, shards=rows, config_hash=made,  # type: ignore[arg-type]
            base={shard.path: shard.sha256 for shard in manifest.shards},
            checkpoint=checkpoint if kind == "attention" else None,
            guide=manifest_hash(load_manifest(f"{base}/entities")) if kind == "attention" else None,
        ),
    )  # fmt: skip


def samples(*folders: str) -> dict[str, dict[str, bytes]]:
    return {key: members for folder in folders for key, members in iterate(folder)}


def clean(url: str) -> None:
    assert not (found := verify(url).findings), found


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("remote", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_reshard_keeps_every_byte_and_the_sidecars_follow(tmp_path: Path, remote: bool) -> None:
    root = f"memory://{uuid.uuid4().hex}" if remote else str(tmp_path)
    source, dest = build(f"{root}/old"), f"{root}/new"
    seen: list[tuple[int, int]] = []
    made = reshard(source, dest, samples_per_shard=5, progress=lambda done, total: seen.append((done, total)))
    assert made.notes == () and seen == [(number, 16) for number in range(1, 17)]
    clean(dest)
    for split, count in (("train", 12), ("test", 4)):
        old, new = load_manifest(f"{source}/{split}"), load_manifest(f"{dest}/{split}")
        assert new == made.manifests[split]
        assert [shard.samples for shard in new.shards] == ([5, 5, 2] if count == 12 else [4])
        for field in ("kind", "dataset", "split", "labels", "licence", "access", "patient_key_id", "parts", "samples"):
            assert getattr(new, field) == getattr(old, field)
        assert new.config_hash != old.config_hash
        for kind in ("", "/entities", "/attention"):
            assert list(iterate(f"{dest}/{split}{kind}")) == list(iterate(f"{source}/{split}{kind}"))
        for kind in ("entities", "attention"):
            side = load_manifest(f"{dest}/{split}/{kind}")
            assert (side.config_hash, side.checkpoint) == ("made", "0" * 64 if kind == "attention" else None)
    assert reshard(source, dest, samples_per_shard=5).manifests == made.manifests  # again: nothing is left to do
    if not remote:
        before = files_in(tmp_path / "new")
        reshard(f"{source}/train", tmp_path / "alone", samples_per_shard=5)
        assert list((tmp_path / "alone").iterdir()) == [tmp_path / "alone" / "train"]
        reshard(source, tmp_path / "second", samples_per_shard=5)
        assert files_in(tmp_path / "second") == before


def test_merge_keeps_the_terms_and_labels_of_each(tmp_path: Path) -> None:
    a = build(f"{tmp_path}/a", "a", licence="CC BY 4.0")
    b = build(f"{tmp_path}/b", "b", patients="stuvw", labels=("Mass", "Edema"), test="w", licence=None)
    made = merge([b, a], tmp_path / "new", samples_per_shard=7)
    assert made.notes == ()
    train = load_manifest(tmp_path / "new" / "train")
    assert (train.dataset, train.labels, train.samples) == ("b+a", ("Edema", "Mass"), 20)
    assert train.licence == "b: not stated; a: CC BY 4.0" and train.access is None
    assert train.parts == (Part("b", ("Edema", "Mass")), Part("a", ("Edema",), "CC BY 4.0")) and train.datasets == ("b", "a")
    assert train.patient_key_id == key_id(KEY)
    clean(f"{tmp_path}/new")
    for split in ("train", "test"):
        for kind in ("", "/entities", "/attention"):
            assert samples(f"{tmp_path}/new/{split}{kind}") == samples(f"{a}/{split}{kind}", f"{b}/{split}{kind}")
        keys = [key for key, _ in iterate(f"{tmp_path}/new/{split}")]
        assert keys == sorted(keys)
    named = merge([f"{a}/train", f"{b}/train"], tmp_path / "named", dataset="both").manifests["train"]
    assert named.dataset == "both" and named.datasets == ("a", "b")
    again = merge([tmp_path / "named", f"{a}/test"], tmp_path / "again").manifests["test"]
    assert (again.dataset, again.parts) == ("a", ())
    clean(f"{tmp_path}/again")
    # equal terms are told once
    c = build(f"{tmp_path}/c", "c", patients="xyz", test="z", licence="CC BY 4.0")
    assert merge([a, c], tmp_path / "equal").manifests["train"].licence == "CC BY 4.0"


def test_every_field_of_a_manifest_is_known_here() -> None:
    """A new field is carried over if all sources agree on it. What counts samples must not be: see `rewrite._described`."""
    assert {field.name for field in fields(Manifest)} == {
        "kind", "dataset", "split", "shards", "config_hash", "labels", "base", "checkpoint", "licence", "access",
        "patient_key_id", "parts", "phi_scan", "labels_by", "images", "guide", "version",
    }  # fmt: skip


def test_what_scans_found_adds_up() -> None:
    """`verify` allows a set what its manifest says, so a part of it is allowed no less."""
    one, other = {"version": 1, "e-mail": 2}, {"version": 1, "e-mail": 1, "phone number": 1}
    assert rewrite._scanned([one, other]) == {"version": 1, "e-mail": 3, "phone number": 1}
    assert rewrite._scanned([one]) == one
    assert rewrite._scanned([one, None]) is None and rewrite._scanned([one, {"version": 2}]) is None


def test_a_document_of_no_part_is_found(tmp_path: Path) -> None:
    a, b = build(f"{tmp_path}/a", "a"), build(f"{tmp_path}/b", "b", patients="st", labels=("Mass",), test="")
    merge([f"{a}/train", f"{b}/train"], tmp_path / "new", samples_per_shard=100)
    folder = tmp_path / "new" / "train"
    manifest, rows = load_manifest(folder), list(iterate(folder))
    document = json.loads(rows[-1][1]["json"])
    assert document["dataset"] == "b"
    rows[-1][1]["json"] = canonical_json(document | {"labels": {"Edema": 1}})
    save_manifest(folder, Manifest(**{**vars(manifest), "shards": (write_shard(folder, 0, rows),)}))
    assert any("`labels` must give" in finding.problem for finding in verify(folder).findings)


def test_patients_never_cross_splits_by_a_merge(tmp_path: Path) -> None:
    a, b = build(f"{tmp_path}/a", "a"), build(f"{tmp_path}/b", "b", patients="abz", test="ab")
    with pytest.raises(ValueError, match=r"^2 patients would be in two splits, 2 of .* in \S+/b/test and \S+/a/train: ") as told:
        merge([a, b], tmp_path / "new")
    assert hash_patient("a", KEY) not in str(told.value)
    assert not (tmp_path / "new").exists()
    merge([f"{a}/train", f"{b}/train"], tmp_path / "new")  # within a split a patient may be in both


def test_sets_of_different_patient_keys_are_refused_and_unknown_ones_told(tmp_path: Path) -> None:
    a, b = build(f"{tmp_path}/a", "a"), build(f"{tmp_path}/b", "b", patients="st", test="", key=OTHER_KEY)
    with pytest.raises(ValueError, match=r"packed with different patient keys.*MMCLIP_PATIENT_KEY"):
        merge([a, b], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    old = load_manifest(f"{b}/train")
    save_manifest(f"{b}/train", Manifest(**{**vars(old), "patient_key_id": None}))
    made = merge([a, b], tmp_path / "new")
    assert any("as if all sets had one patient key" in note and f"{b}/train" in note for note in made.notes)
    assert made.manifests["train"].patient_key_id is None and made.manifests["test"].patient_key_id == key_id(KEY)


def test_keys_that_sets_share(tmp_path: Path) -> None:
    a = build(f"{tmp_path}/a", "a", keys="k{number}x")
    b = build(f"{tmp_path}/b", "b", patients="stu", test="", keys="k{number}x")
    with pytest.raises(ValueError, match="both hold the key 'k0x': leave out one of the sets, or give --prefix-keys"):
        merge([a, b], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    merge([a, b], tmp_path / "new", prefix_keys=True)
    clean(f"{tmp_path}/new")
    found, entities = samples(f"{tmp_path}/new/train"), samples(f"{tmp_path}/new/train/entities")
    for name, source in (("a", a), ("b", b)):
        for key, members in samples(f"{source}/train").items():
            assert found.pop(f"{name}-{key}") == members
            assert json.loads(entities[f"{name}-{key}"]["entities.json"])[0]["text"] == key
    assert not found
    with pytest.raises(ValueError, match="are the same set"):
        merge([a, f"{a}/train"], tmp_path / "twice")


def test_sidecars_that_cannot_follow_are_named(tmp_path: Path) -> None:
    a, b = build(f"{tmp_path}/a", "a", test=""), build(f"{tmp_path}/b", "b", patients="st", test="", sidecars=False)
    notes = merge([a, b], tmp_path / "1").notes
    assert len(notes) == 2 and f"entities sidecars did not follow to {tmp_path}/1/train ({b}/train has none)" in notes[0]
    assert f"make them with `mmclip entities {tmp_path}/1/train --out {tmp_path}/1/train/entities`" in notes[0]
    assert not (tmp_path / "1" / "train" / "entities").exists()
    assert merge([a, b], tmp_path / "1").notes == notes  # told again
    add_sidecar(f"{b}/train", "entities", made="otherwise")
    add_sidecar(f"{b}/train", "attention", made="of other entities")
    first, second = merge([a, b], tmp_path / "2").notes
    assert "made in different ways" in first and "made from entities that did not follow" in second
    add_sidecar(f"{b}/train", "entities")
    (note,) = merge([a, b], tmp_path / "old").notes
    assert "attention" in note and "made from entities that did not follow" in note  # it has the hash of the others still
    add_sidecar(f"{b}/train", "attention", made="in bf16")
    (note,) = merge([a, b], tmp_path / "bf16").notes
    assert "attention" in note and "made in different ways" in note
    add_sidecar(f"{b}/train", "attention")
    assert merge([a, b], tmp_path / "3").notes == ()
    clean(f"{tmp_path}/3")
    attention, entities = (load_manifest(f"{tmp_path}/3/train/{kind}") for kind in ("attention", "entities"))
    assert attention.guide == manifest_hash(entities)
    add_sidecar(f"{b}/train", "attention", made="by another", checkpoint="1" * 64)
    (note,) = merge([a, b], tmp_path / "4").notes
    assert "attention" in note and "different checkpoints" in note
    manifest = load_manifest(f"{a}/train/entities")
    stale = dict.fromkeys(manifest.base or {}, "f" * 64)
    save_manifest(f"{a}/train/entities", Manifest(**{**vars(manifest), "base": stale}))
    first, _ = reshard(a, tmp_path / "5", samples_per_shard=2).notes, None
    assert len(first) == 1 and "are stale" in first[0] and (tmp_path / "5/train/attention/manifest.json").exists()


def test_split_is_by_patient_and_pools_the_old_splits(tmp_path: Path) -> None:
    source = build(f"{tmp_path}/a", patients="abcdefghijklmnop", test="ab")
    shares = {"train": 0.5, "val": 0.25, "test": 0.25}
    made = split_again(source, tmp_path / "new", splits=shares, seed=1, samples_per_shard=4)
    clean(f"{tmp_path}/new")
    found = {split: samples(f"{tmp_path}/new/{split}") for split in made.manifests}
    assert list(found) == ["train", "val", "test"]
    every = samples(f"{source}/train", f"{source}/test")
    assert {key: members for part in found.values() for key, members in part.items()} == every
    assert sum(map(len, found.values())) == len(every) == 32
    for split, part in found.items():
        assert {split_of(json.loads(members["json"])["patient"], shares, 1) for members in part.values()} == {split}
        assert samples(f"{tmp_path}/new/{split}/entities").keys() == part.keys()
    with pytest.raises(ValueError, match="no patient fell in split 'val'"):
        split_again(source, tmp_path / "none", splits={"train": 0.999, "val": 0.001})
    assert not (tmp_path / "none").exists()


def test_filter_keeps_what_matches(tmp_path: Path) -> None:
    source = build(f"{tmp_path}/a")
    expression = 'view == "PA" and labels["Edema"] == 1 and len(report) > 0'
    assert count_matches(source, expression) == {"test": (1, 4), "train": (4, 12)}
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    made = select(source, tmp_path / "new", expression, samples_per_shard=3)
    clean(f"{tmp_path}/new")
    assert {split: manifest.samples for split, manifest in made.manifests.items()} == {"test": 1, "train": 4}
    for split in ("train", "test"):
        old = samples(f"{source}/{split}")
        wanted = {key: members for key, members in old.items() if int(key[1:]) % 2 and int(key[1:]) % 3}
        assert samples(f"{tmp_path}/new/{split}") == wanted
        assert samples(f"{tmp_path}/new/{split}/attention").keys() == wanted.keys()
    with pytest.raises(ValueError, match="there is no label 'Oedema'; nearest: 'Edema'"):
        select(source, tmp_path / "x", 'labels["Oedema"] == 1')
    with pytest.raises(ValueError, match=r"no sample of .* matches: nothing was written"):
        select(source, tmp_path / "x", "width > 16")
    with pytest.raises(ValueError, match="give an expression, or a list"):
        select(source, tmp_path / "x", None)
    assert not (tmp_path / "x").exists()
    (note,) = select(source, tmp_path / "x", f'patient == "{hash_patient("a", KEY)}"').notes
    assert note == f"{source}/test: no sample matches, so there is no such split in {tmp_path}/x"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["train"]


def test_an_indexed_set_of_another_program_is_rewritten_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    rows = [(key, {"png": b"x", "json": canonical_json({"text": f"Report {key}."})}) for key in "dbca"]
    for number in (0, 1):
        write_shard(folder, number, rows[2 * number : 2 * number + 2])
        (folder / f"{number:06d}.index.json").unlink()
    index_set(folder, dataset="theirs")
    reshard(folder, tmp_path / "new", samples_per_shard=3)
    assert [key for key, _ in iterate(tmp_path / "new" / "train")] == list("dbca")  # it had no order
    problems = {finding.problem.partition(":")[0] for finding in verify(tmp_path / "new").findings}
    assert problems == {"not a usable JPEG, PNG or WebP"}
    with pytest.raises(ValueError, match="4 samples have no patient"):
        split_again(folder, tmp_path / "s", splits={"train": 0.5, "val": 0.5})
    with pytest.raises(ValueError, match="indexed, not packed"):
        merge([folder, build(f"{tmp_path}/a", test="")], tmp_path / "m")
    assert count_matches(folder, '"Report b" in report') == {"train": (1, 4)}


def test_another_set_sidecars_and_damage_are_refused(tmp_path: Path) -> None:
    source = build(f"{tmp_path}/a")
    with pytest.raises(ValueError, match="holds another set"):
        reshard(source, source, samples_per_shard=5)
    with pytest.raises(ValueError, match="is itself a split"):
        reshard(source, f"{source}/train", samples_per_shard=5)
    with pytest.raises(ValueError, match="holds entities sidecars: name the packed set"):
        reshard(f"{source}/train/entities", tmp_path / "x", samples_per_shard=5)
    reshard(source, tmp_path / "x", samples_per_shard=5)
    with pytest.raises(ValueError, match="holds another set"):
        reshard(source, tmp_path / "x", samples_per_shard=6)
    build(f"{tmp_path}/changed", licence="other terms")
    (tmp_path / "a").rename(tmp_path / "before")
    (tmp_path / "changed").rename(tmp_path / "a")
    with pytest.raises(ValueError, match="holds another set"):  # the source is no longer what it was
        reshard(source, tmp_path / "x", samples_per_shard=5)
    shard = Path(source) / "train" / "000003.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="are damaged"):
        reshard(source, tmp_path / "y", samples_per_shard=5)
    assert not (tmp_path / "y" / "train" / "manifest.json").exists()


def test_a_manifest_cannot_name_a_place_outside_the_destination(tmp_path: Path) -> None:
    source = build(f"{tmp_path}/a", test="")
    save_manifest(f"{source}/train", Manifest(**{**vars(load_manifest(f"{source}/train")), "split": "../../evil"}))
    with pytest.raises(ValueError, match="split name"):
        reshard(source, tmp_path / "deep" / "new", samples_per_shard=5)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


KILLED = """
import os, signal, sys
from mmclip_shards import storage
from mmclip_shards.rewrite import reshard
write, left = storage.write_atomic, int(sys.argv[3])
def counted(url, data):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    write(url, data)
storage.write_atomic = counted
reshard(sys.argv[1], sys.argv[2], samples_per_shard=5)
"""


def test_a_run_that_fails_at_any_write_leaves_no_half_set_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(f"{tmp_path}/a", patients="abc", test="", sidecars=False)
    add_sidecar(f"{source}/train", "entities")
    reshard(source, tmp_path / "whole", samples_per_shard=5)
    whole = files_in(tmp_path / "whole")
    write, writes = storage.write_atomic, 0

    def counted(url: str, data: bytes) -> None:
        nonlocal writes
        if writes == stop:
            raise OSError("no space left on device")
        writes += 1
        write(url, data)

    monkeypatch.setattr(storage, "write_atomic", counted)
    stop = -1
    reshard(source, tmp_path / "count", samples_per_shard=5)
    total = writes
    assert total == 12  # two shards, indexes and states of the journal; the sidecar's shards, indexes and manifest; the manifest
    for stop in range(total):
        dest, writes = tmp_path / f"stopped{stop}", 0
        with pytest.raises(OSError, match="no space"):
            reshard(source, dest, samples_per_shard=5)
        assert not (dest / "train" / "manifest.json").exists()  # it promises everything, sidecars too
        monkeypatch.setattr(storage, "write_atomic", write)
        reshard(source, dest, samples_per_shard=5)
        assert files_in(dest) == whole
        monkeypatch.setattr(storage, "write_atomic", counted)


def test_a_killed_run_goes_on_after_its_last_finished_shard(tmp_path: Path) -> None:
    source, dest = build(f"{tmp_path}/a"), tmp_path / "new"
    killed = subprocess.run([sys.executable, "-c", KILLED, source, str(dest), "14"], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert (dest / "test" / "entities" / "manifest.json").exists() and not list(dest.glob("*/manifest.json"))
    first = dest / "train" / "000000.tar"
    inode = first.stat().st_ino
    reshard(source, dest, samples_per_shard=5)
    assert first.stat().st_ino == inode  # kept, not written again
    reshard(source, tmp_path / "whole", samples_per_shard=5)
    assert files_in(dest) == files_in(tmp_path / "whole")
