"""Near duplicates: found exactly, without comparing all pairs; counted across sets, splits and patients; left out by a list."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards.duplicates import BITS, Groups, find_duplicates, image_mark_of, near_groups, write_list
from mmclip_shards.manifest import Manifest, load_manifest, save_manifest
from mmclip_shards.pack import pack
from mmclip_shards.reader import iterate
from mmclip_shards.rewrite import merge, select
from mmclip_shards.schema import Record
from mmclip_shards.split import hash_patient
from PIL import Image

KEY = b"one key"


def picture(seed: int, size: int = 128) -> Image.Image:
    """Smooth and unlike that of any other seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (9, 9), dtype=np.uint8)
    return Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def build(url: Path, name: str, rows: list[tuple[str, str, str, bytes, str]], key: bytes = KEY) -> str:
    """rows: key, split, patient, image, report."""
    records = [Record(key=k, image=image, patient=patient, source=k, report=report) for k, _, patient, image, report in rows]
    pack(
        records, url, dataset=name, splits=None, split_of_record={row[0]: row[1] for row in rows}, samples_per_shard=2,
        config_hash="c", patient_key=key,
    )  # fmt: skip
    return str(url)


def brute(marks: np.ndarray, distance: int) -> np.ndarray:
    """Groups by comparing all pairs."""
    bits = np.unpackbits(marks.view(np.uint8).reshape(len(marks), -1), axis=1).astype(int)
    near = (bits[:, None] != bits[None]).sum(2) <= distance
    group = np.arange(len(marks))
    for _ in range(len(marks)):
        group = np.array([group[row].min() for row in near])
    return group


@pytest.mark.parametrize("distance", [0, 1, 8, 13])
def test_near_groups_are_those_of_all_pairs(distance: int) -> None:
    random = np.random.default_rng(distance)
    bits = np.repeat(random.integers(0, 2, (20, BITS), dtype=np.uint8), 6, axis=0)
    for row in bits:  # up to twice the distance from its neighbours, anywhere
        row[random.choice(BITS, random.integers(0, distance + 2), replace=False)] ^= 1
    marks = np.packbits(random.permutation(bits), axis=1).view(np.uint64)
    found = near_groups(marks, distance)
    assert np.array_equal(found, brute(marks, distance))
    assert 20 < len(np.unique(found)) < len(marks) or distance == 0


def test_near_groups_of_none_one_and_equal_marks() -> None:
    assert near_groups(np.empty((0, 4), np.uint64), 8).tolist() == []
    assert near_groups(np.zeros((1, 4), np.uint64), 8).tolist() == [0]
    assert near_groups(np.full((5, 4), 7, np.uint64), 0).tolist() == [0] * 5


@pytest.mark.slow
def test_the_search_is_not_quadratic() -> None:
    def seconds(count: int) -> float:
        marks = np.random.default_rng(0).integers(0, 1 << 63, (count, 4)).astype(np.uint64)
        started = time.process_time()
        assert near_groups(marks, 8).tolist() == list(range(count))
        return time.process_time() - started

    assert seconds(200_000) < 20 * seconds(20_000)  # 100 times, were it quadratic


def test_the_mark_stays_when_an_image_is_resized_and_compressed() -> None:
    def differing(a: np.ndarray, b: np.ndarray) -> int:
        return int(np.unpackbits((a ^ b).view(np.uint8)).sum())

    for seed in range(8):
        image = picture(seed)
        mark = image_mark_of(image)
        recoded = Image.open(io.BytesIO(jpeg(image, 75)))
        for copy in (image.resize((64, 64)), recoded, image.point(lambda v: int(v * 0.9 + 9))):
            assert differing(mark, image_mark_of(copy)) <= 8
        assert differing(mark, image_mark_of(picture(seed + 100))) > 40


@pytest.fixture
def sets(tmp_path: Path) -> tuple[str, str]:
    images = [jpeg(picture(seed), 95) for seed in range(8)]
    copy = jpeg(picture(0).resize((100, 100)), 80)
    a = build(tmp_path / "a", "a", [
        ("a0", "train", "p0", images[0], "No  finding."), ("a1", "train", "p1", images[1], "Edema."),
        ("a2", "train", "p1", images[2], "edema."), ("a3", "train", "p3", images[3], ""), ("a4", "test", "p4", copy, ""),
    ])  # fmt: skip
    b = build(tmp_path / "b", "b", [
        ("b0", "train", "p5", images[1], "no finding."), ("b1", "train", "p4", images[5], "Mass."),
        ("b2", "val", "p7", images[6], "Nodule."), ("b3", "train", "p4", images[7], "Other."),
    ])  # fmt: skip
    return a, b


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_counted_and_what_could_go(sets: tuple[str, str], tmp_path: Path, workers: int) -> None:
    a, b = sets
    seen: list[tuple[int, int]] = []
    found = find_duplicates([a, b], workers=workers, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 6) for number in range(1, 7)]
    assert (found.samples, found.sets, found.undecodable, found.notes) == (9, 4, 0, ())
    assert found.images == Groups(groups=2, samples=4, across_sets=2, across_splits=1, across_patients=2)
    assert found.reports == Groups(groups=2, samples=4, across_sets=1, across_splits=0, across_patients=1)
    assert found.patients == {(f"{a}/test", f"{b}/train"): 1}
    assert {(spare.key, spare.kind, spare.like[1]) for spare in found.spare} == {
        ("a0", "images", "a4"), ("b0", "images", "a1"), ("b0", "reports", "a0"), ("b1", "patients", "a4"),
        ("b3", "patients", "a4"),
    }  # fmt: skip
    assert find_duplicates([b, a]).images == found.images
    assert ("a1", "b0") in {(spare.key, spare.like[1]) for spare in find_duplicates([b, a]).spare}  # the first set stays


def test_the_list_leaves_out_and_then_nothing_is_left_to_find(sets: tuple[str, str], tmp_path: Path) -> None:
    a, b = sets
    listed = tmp_path / "list.jsonl"
    found = find_duplicates([a, b])
    assert write_list(listed, found) == 4  # a0, b0, b1, b3
    with pytest.raises(ValueError, match="1 patients would be in two splits"):
        merge([a, b], tmp_path / "m")
    select(a, tmp_path / "a2", None, leave_out=listed)
    (note,) = select(b, tmp_path / "b2", 'view is None and key != "zzz"', leave_out=listed).notes
    assert f"{b}/train: no sample matches" in note
    assert [key for key, _ in iterate(tmp_path / "a2" / "train")] == ["a1", "a2", "a3"]
    again = find_duplicates([tmp_path / "a2", tmp_path / "b2"])
    assert again.images.groups == 0 and again.patients == {} and not [one for one in again.spare if one.kind != "reports"]
    merge([tmp_path / "a2", tmp_path / "b2"], tmp_path / "m")
    text = listed.read_text()
    assert not any(hash_patient(patient, KEY) in text for patient in ("p0", "p4"))
    with pytest.raises(ValueError, match="lists no sample of"):
        select(tmp_path / "a2", tmp_path / "x", None, leave_out=listed)
    with pytest.raises(ValueError, match="there is no list"):
        select(a, tmp_path / "x", None, leave_out=tmp_path / "none")
    listed.write_text("{}\nno json\n")
    with pytest.raises(ValueError, match="line 2"):
        select(a, tmp_path / "x", None, leave_out=listed)
    write_list(listed, found, ["reports"])
    assert [json.loads(line)["key"] for line in listed.read_text().splitlines()] == ["b0"]


def test_patients_under_different_keys_are_not_compared_silently(sets: tuple[str, str], tmp_path: Path) -> None:
    a, _ = sets
    c = build(tmp_path / "c", "c", [("c0", "test", "p1", jpeg(picture(50), 90), "")], key=b"another key")
    (note,) = find_duplicates([a, c]).notes
    assert "cannot be compared: their hashes have different keys" in note
    manifest = load_manifest(f"{c}/test")
    save_manifest(f"{c}/test", Manifest(**{**vars(manifest), "patient_key_id": None}))
    (note,) = find_duplicates([a, c]).notes
    assert f"which some manifests do not tell: {c}/test" in note


def test_an_image_that_cannot_be_decoded_is_counted_and_like_no_other(tmp_path: Path) -> None:
    from mmclip_shards.writer import write_shard

    url = Path(build(tmp_path / "a", "a", [("a0", "train", "p0", jpeg(picture(0), 95), "")]))
    (_, members), = iterate(url / "train")  # fmt: skip
    rows = [("a0", members), ("a1", {**members, "jpg": b"no image"}), ("a2", {**members, "jpg": b""})]
    manifest = load_manifest(url / "train")
    save_manifest(url / "train", Manifest(**{**vars(manifest), "shards": (write_shard(url / "train", 0, rows),)}))
    found = find_duplicates([url])
    assert (found.samples, found.undecodable, found.images.groups) == (3, 2, 0)
    with pytest.raises(ValueError, match="must be 0 to 64"):
        find_duplicates([url], distance=65)
