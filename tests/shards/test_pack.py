"""Packing: what it writes, what it refuses before it writes, and that a failure leaves nothing behind."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmclip_shards.manifest import load_manifest, save_manifest
from mmclip_shards.pack import pack
from mmclip_shards.reader import iterate
from mmclip_shards.schema import Box, Record
from mmclip_shards.split import hash_patient, split_of
from PIL import Image

KEY = b"k" * 32
HALVES = {"train": 0.5, "test": 0.5}


def records(count: int = 12) -> list[Record]:
    """Two images a patient; in no order; labels differ from record to record."""
    found = [
        Record(
            key=f"s{number:02d}",
            image=np.full((20, 30), number, np.uint8),
            patient=f"RAW-{number // 2}",
            source=f"images/s{number:02d}.png",
            report=f"Report {number}." if number % 3 else "",
            labels={"Edema": 1} if number % 2 else {"Mass": 0, "Edema": None},
        )
        for number in range(count)
    ]
    return found[::-1]


def pack_to(dest: str | Path, of: list[Record] | None = None, **changes: object):  # type: ignore[no-untyped-def]
    options: dict = {"dataset": "toy", "splits": HALVES, "config_hash": "c", "patient_key": KEY, "samples_per_shard": 3}
    return pack(records() if of is None else of, dest, **(options | changes))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_written(tmp_path: Path, remote: bool) -> None:
    dest = f"memory://{tmp_path.name}-pack" if remote else str(tmp_path / "set")
    manifests = pack_to(dest)
    assert list(manifests) == ["train", "test"]
    seen: dict[str, str] = {}
    for split, manifest in manifests.items():
        assert manifest == load_manifest(f"{dest}/{split}")
        assert (manifest.kind, manifest.dataset, manifest.split) == ("base", "toy", split)
        assert manifest.labels == ("Edema", "Mass")
        samples = list(iterate(f"{dest}/{split}"))
        assert len(samples) == manifest.samples
        assert [key for key, _ in samples] == sorted(key for key, _ in samples)
        for key, files in samples:
            seen[key] = split
            number = int(key[1:])
            document = json.loads(files["json"])
            assert set(files) == {"png", "json"}
            assert np.asarray(Image.open(io.BytesIO(files["png"]))).tolist() == [[number] * 30] * 20
            assert document["report"] == ({"text": f"Report {number}."} if number % 3 else None)
            assert document["labels"] == ({"Edema": 1, "Mass": None} if number % 2 else {"Edema": None, "Mass": 0})
            assert document["patient"] == hash_patient(f"RAW-{number // 2}", KEY)
            assert (document["width"], document["height"]) == (30, 20)
            assert b"RAW" not in files["json"]
    assert seen == {record.key: split_of(record.patient, HALVES) for record in records()}


def test_a_rebuild_is_byte_identical_whatever_the_order_and_the_workers(tmp_path: Path) -> None:
    pack_to(tmp_path / "a")
    pack_to(tmp_path / "b", sorted(records(), key=lambda record: record.key), workers=2)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    assert len(files_in(tmp_path / "a")) >= 2 * 3


def test_boxes_and_big_images_are_scaled_together(tmp_path: Path) -> None:
    record = Record("a", np.zeros((100, 200), np.uint8), "p", "a.png", boxes=(Box("Mass", 10, 20, 30, 40),))
    pack_to(tmp_path / "set", [record], splits={"train": 1.0}, short_side=50)
    ((_, files),) = iterate(tmp_path / "set" / "train")
    document = json.loads(files["json"])
    assert (document["width"], document["height"]) == (100, 50)
    assert document["boxes"] == [{"label": "Mass", "x": 5, "y": 10, "width": 15, "height": 20}]


@settings(max_examples=15, deadline=None)
@given(
    patients=st.lists(st.sampled_from([f"p{n}" for n in range(8)]), min_size=1, max_size=30),
    seed=st.integers(0, 3),
    train=st.floats(0.1, 0.9),
)
def test_patients_never_cross_splits(
    tmp_path_factory: pytest.TempPathFactory, patients: list[str], seed: int, train: float
) -> None:
    dest = tmp_path_factory.mktemp("cross")
    of = [Record(f"k{n}", np.zeros((2, 2), np.uint8), patient, "s") for n, patient in enumerate(patients)]
    splits = {"train": train, "test": 1 - train}
    try:
        manifests = pack_to(dest / "set", of, splits=splits, seed=seed)
    except ValueError as error:
        assert "no patient fell in split" in str(error)
        assert len({split_of(patient, splits, seed) for patient in patients}) == 1
        return
    hashes = {s: {json.loads(f["json"])["patient"] for _, f in iterate(dest / "set" / s)} for s in manifests}
    assert hashes["train"] and hashes["test"] and not hashes["train"] & hashes["test"]
    assert sum(manifest.samples for manifest in manifests.values()) == len(patients)


def test_explicit_splits(tmp_path: Path) -> None:
    own = {record.key: "val" if record.patient == "RAW-2" else "train" for record in records()}
    manifests = pack_to(tmp_path / "set", splits=None, split_of_record=own)
    assert {split: manifest.samples for split, manifest in manifests.items()} == {"train": 10, "val": 2}
    own["s04"] = "train"
    with pytest.raises(ValueError, match=r"record 7 \(val\) and record 8 \(train\) belong to the same") as caught:
        pack_to(tmp_path / "other", splits=None, split_of_record=own)
    assert "RAW" not in str(caught.value)
    del own["s04"]
    with pytest.raises(ValueError, match="record 8 has no split"):
        pack_to(tmp_path / "other", splits=None, split_of_record=own)
    for splits in (None, HALVES):
        with pytest.raises(ValueError, match="not both"):
            pack_to(tmp_path / "other", splits=splits, split_of_record=own if splits else None)
    with pytest.raises(ValueError, match="split name"):
        pack_to(tmp_path / "other", splits=None, split_of_record=dict.fromkeys((r.key for r in records()), "../x"))
    assert not (tmp_path / "other").exists()


def test_everything_else_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    one = records()[0]
    bad: dict[str, list[Record]] = {
        "no records": [],
        "records 1 and 13 share the key": [*records(), replace(one, patient="RAW-9")],
        "record 13: sample key": [*records(), replace(one, key="a.b")],
        "record 13: a patient id is empty": [*records(), replace(one, key="new", patient=" ")],
        "record 13: label": [*records(), replace(one, key="new", labels={"Edema": 7})],
        "record 13: box": [*records(), replace(one, key="new", boxes=(Box("", 0, 0, 1, 1),))],
        "1 of 13 images are missing, the first one of record 13": [
            *records(),
            replace(one, key="new", image=tmp_path / "x.png"),
        ],
    }
    for message, of in bad.items():
        with pytest.raises(ValueError, match=message):
            pack_to(tmp_path / "set", of)
        assert not (tmp_path / "set").exists()
    with pytest.raises(
        ValueError, match=r"no patient fell in split 'val' \(fraction 0.01 of 6 patients\).*larger fraction"
    ):
        pack_to(tmp_path / "set", splits={"train": 0.5, "test": 0.49, "val": 0.01})
    assert list(pack_to(tmp_path / "zero", splits={**HALVES, "val": 0.0})) == ["train", "test"]
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_images_are_all_reported_and_nothing_is_left(tmp_path: Path, workers: int) -> None:
    of = records()
    for number in (1, 3, 4, 6, 8, 9, 11):
        path = tmp_path / f"broken{number}.jpg"
        path.write_bytes(b"not an image")
        of[number] = replace(of[number], image=path if number % 2 else b"not an image")
    dest = tmp_path / "set"
    seen: list[tuple[int, int]] = []
    published: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        published.append(len(list(dest.rglob("*.tar"))))

    with pytest.raises(ValueError, match=r"7 of 12 images cannot be read") as caught:
        pack_to(dest, of, samples_per_shard=1, workers=workers, progress=progress)
    assert published == [1] * 12, "after the first unreadable image, nothing more is written"
    assert str(caught.value).count("is not a usable") == 5
    assert seen == [(done, 12) for done in range(1, 13)]
    assert not dest.exists()
    dest.mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        pack_to(dest, of, samples_per_shard=1)
    assert list(dest.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 9:
            assert list((tmp_path / "set").rglob("*.tar"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_to(tmp_path / "set", samples_per_shard=1, progress=stop)
    assert not (tmp_path / "set").exists()


def test_packing_again_skips_and_another_set_is_refused(tmp_path: Path) -> None:
    dest = tmp_path / "set"
    first = pack_to(dest)
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*")}

    def never(done: int, total: int) -> None:
        raise AssertionError("an image was decoded again")

    assert pack_to(dest, progress=never) == first
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*")} == before
    for changes in (
        {"config_hash": "d"},
        {"seed": 1},
        {"short_side": 10},
        {"samples_per_shard": 2},
        {"patient_key": b"other"},
        {"splits": {"train": 1.0}},
    ):
        with pytest.raises(ValueError, match="holds another set"):
            pack_to(dest, **changes)
    with pytest.raises(ValueError, match="itself a split"):
        pack_to(dest / "train")
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*")} == before


def test_sidecars_beside_the_splits_are_no_other_set(tmp_path: Path) -> None:
    first = pack_to(tmp_path)
    base = {shard.path: shard.sha256 for shard in first["train"].shards}
    save_manifest(tmp_path / "entities", replace(first["train"], kind="entities", base=base, config_hash="e"))
    assert pack_to(tmp_path) == first


def test_a_split_that_is_missing_is_made_again(tmp_path: Path) -> None:
    first = pack_to(tmp_path / "set")
    whole = files_in(tmp_path / "set")
    (tmp_path / "set" / "test" / "manifest.json").unlink()
    (tmp_path / "set" / "test" / "000000.tar").write_bytes(b"half")
    seen: list[int] = []
    assert pack_to(tmp_path / "set", progress=lambda done, total: seen.append(total)) == first
    assert set(seen) == {first["test"].samples}
    assert files_in(tmp_path / "set") == whole


@pytest.mark.parametrize("name", ["workers", "short_side", "samples_per_shard"])
def test_numbers_must_be_positive(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        pack_to(tmp_path / "set", **{name: 0})
    assert not (tmp_path / "set").exists()
