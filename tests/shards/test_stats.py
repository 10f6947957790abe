"""Counts that were worked out by hand, the patient check over splits, and nothing that names a patient."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards import storage
from mmclip_shards.foreign import index_set
from mmclip_shards.manifest import Manifest, load_manifest, manifest_hash, save_manifest
from mmclip_shards.pack import pack
from mmclip_shards.phi import SCAN_VERSION
from mmclip_shards.schema import Record
from mmclip_shards.split import hash_patient
from mmclip_shards.stats import LabelCounts, Spread, collect_stats, spread
from mmclip_shards.writer import write_shard

KEY = b"the key of these tests"
# patient, split, view, report, Edema, size [height, width]
ROWS = [
    ("Ann", "train", "PA", "one two three", 1, (20, 16)),
    ("Ann", "train", "AP", "one", 1, (20, 16)),
    ("Ann", "train", "PA", "", 0, (30, 40)),
    ("Bob", "train", None, "one two", -1, (20, 16)),
    ("Cid", "test", "PA", "a b c d e f g h", None, (64, 16)),
]


def build(url: str, rows: list[tuple] = ROWS) -> str:
    records = [
        Record(
            key=f"k{number}", image=np.full(size, number, np.uint8), patient=patient, source=f"{number}.png",
            report=report, view=view, labels={"Edema": edema, "Mass": int(edema == 1)}, age=40 + 30 * number if number else None,
        )
        for number, (patient, _, view, report, edema, size) in enumerate(rows)
    ]  # fmt: skip
    pack(
        records, url, dataset="toy", splits=None, split_of_record={f"k{number}": row[1] for number, row in enumerate(rows)},
        samples_per_shard=3, config_hash="c", patient_key=KEY, licence="CC BY 4.0",
    )  # fmt: skip
    return url


@pytest.mark.parametrize("remote", [False, True])
def test_counts_are_those_of_the_rows(tmp_path: Path, remote: bool) -> None:
    url = build(f"memory://{uuid.uuid4().hex}" if remote else str(tmp_path / "set"))
    seen: list[tuple[int, int]] = []
    found = collect_stats(url, lambda done, total: seen.append((done, total)))
    test, train = found.splits
    assert found.patients_in_several_splits == 0 and seen == [(number, 5) for number in range(1, 6)]
    assert (train.dataset, train.split, train.shards, train.samples) == ("toy", "train", 2, 4)
    assert (train.licence, train.access) == ("CC BY 4.0", None)
    assert train.bytes == sum(shard.bytes for shard in load_manifest(storage.join(url, "train")).shards)
    assert train.views == {"PA": 2, "AP": 1, "(unknown)": 1}
    assert train.labels == {"Edema": LabelCounts(2, 1, 1, 0), "Mass": LabelCounts(2, 2, 0, 0)}
    assert test.labels == {"Edema": LabelCounts(0, 0, 0, 1), "Mass": LabelCounts(0, 1, 0, 0)}
    assert train.together == {"Edema": {"Mass": 2}} and test.together == {}
    assert (train.ages, train.without_age, train.ages_of) == (Spread(70, 90, 90, 90), 1, {70: 1, 90: 2})  # 100 and 130 are 90
    assert train.report_words == {1: 1, 2: 1, 3: 1} and train.sizes == {"16 x 20": 3, "40 x 30": 1}
    assert train.manifest == manifest_hash(load_manifest(storage.join(url, "train")))
    assert train.phi_scan == {"version": SCAN_VERSION} and found.patients == 3
    assert (train.without_report, train.words) == (1, Spread(1, 2, 3, 3)) and test.words == Spread(8, 8, 8, 8)
    assert (train.widths, train.heights) == (Spread(16, 16, 40, 40), Spread(20, 20, 30, 30))
    assert (train.patients, train.without_patient, train.images_per_patient) == (2, 0, Spread(1, 1, 3, 3))
    assert (train.unreadable, train.undecodable) == (0, 0)
    assert collect_stats(storage.join(url, "test")).splits == (test,)


def test_patients_in_two_splits_are_counted_and_not_named(tmp_path: Path) -> None:
    build(str(tmp_path / "set"), ROWS[:4])
    build(str(tmp_path / "later"), [("Ann", "val", "PA", "", 1, (8, 8)), ("Dan", "val", "PA", "", 1, (8, 8))])
    (tmp_path / "later" / "val").rename(tmp_path / "set" / "val")
    found = collect_stats(tmp_path / "set")
    assert found.patients_in_several_splits == 1 and [split.patients for split in found.splits] == [2, 2]
    text = str(asdict(found))
    assert not any(name in text or hash_patient(name, KEY) in text for name in ("Ann", "Bob", "Dan"))


def test_spread_is_by_nearest_rank() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 3, 19, 20, 21, 400):
        values = random.integers(0, 50, size)
        expected = [int(np.quantile(values, q, method="inverted_cdf")) for q in (0, 0.5, 0.95, 1)]
        assert spread(Counter(values.tolist())) == Spread(*expected)
    assert spread({}) is None


def test_unreadable_samples_are_counted_not_fatal(tmp_path: Path) -> None:
    rows = [("a", {"jpg": b"no image", "json": b"{}"}), ("b", {"jpg": b"no image", "json": b"{"}), ("c", {"txt": b"x"})]
    save_manifest(tmp_path, Manifest("base", "toy", "train", (write_shard(tmp_path, 0, rows),), "c"))
    (split,) = collect_stats(tmp_path).splits
    assert (split.samples, split.undecodable, split.unreadable) == (3, 3, 1)
    assert (split.without_report, split.without_patient, split.widths) == (1, 2, None)


def test_foreign_sets_are_counted_too(tmp_path: Path) -> None:
    folder = Path(build(str(tmp_path)), "train")
    (folder / "manifest.json").unlink()
    index_set(folder, dataset="theirs")
    (split,) = collect_stats(folder).splits
    assert (split.dataset, split.samples, split.patients) == ("theirs", 4, 2)
    assert split.labels["Edema"] == LabelCounts(2, 1, 1, 0) and split.phi_scan is None


def test_sidecars_and_damage_are_user_errors(tmp_path: Path) -> None:
    build(str(tmp_path))
    row = write_shard(tmp_path / "side", 0, [("k", {"entities.json": b"[]"})])
    save_manifest(tmp_path / "side", Manifest("entities", "toy", "train", (row,), "c", base={"000000.tar": "0" * 64}))
    assert len(collect_stats(tmp_path).splits) == 2  # sidecars beside the splits are passed over
    with pytest.raises(ValueError, match="name the packed set"):
        collect_stats(tmp_path / "side")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        collect_stats(tmp_path / "nowhere")
    shard = tmp_path / "test" / "000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"a b c d", b"a b c e"))
    with pytest.raises(ValueError, match="damaged"):
        collect_stats(tmp_path)
