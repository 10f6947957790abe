"""The whole tables that the data sets publish, as the wheel torchxrayvision 1.5.7 holds them (torchxrayvision/data).

Set MMCLIP_REAL_METADATA to that folder. MMCLIP_REAL_NIH may name 1,000 radiographs of NIH ChestX-ray14 as JPEG.
"""

from __future__ import annotations

import gzip
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from mmclip_shards.datasets.chexpert import FINDINGS
from mmclip_shards.datasets.prepared import Prepared, prepare_records
from mmclip_shards.datasets.recipe import find_recipe
from mmclip_shards.datasets.upstream import read_csv
from mmclip_shards.pack import pack
from PIL import Image

KEY = b"k" * 32

pytestmark = pytest.mark.slow


@pytest.fixture
def real() -> Path:
    if "MMCLIP_REAL_METADATA" not in os.environ:
        pytest.skip(
            "REAL METADATA ARE NOT TESTED: pip install --no-deps --target DIR torchxrayvision==1.5.7; "
            "MMCLIP_REAL_METADATA=DIR/torchxrayvision/data"
        )
    return Path(os.environ["MMCLIP_REAL_METADATA"])


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Prepared]:
    monkeypatch.setattr("mmclip_shards.datasets.prepared.check_needs", lambda found: None)
    return lambda name: prepare_records(name, find_recipe(name), tmp_path, split=None, patient_key=KEY)


def counts(found: Prepared) -> Counter[str]:
    return Counter(name for record in found.records for name, value in record.labels.items() if value == 1)


def test_nih(real: Path, tmp_path: Path, prepare: Callable[[str], Prepared]) -> None:
    shutil.copy(real / "Data_Entry_2017_v2020.csv.gz", tmp_path)
    shutil.copy(real / "BBox_List_2017.csv.gz", tmp_path)
    (tmp_path / "images").mkdir()
    found = prepare("nih")
    assert len(found.records) == 112_120 and len({record.patient for record in found.records}) == 30_805
    assert Counter(record.view for record in found.records) == {"PA": 67_310, "AP": 44_810}
    assert all(record.age is not None and record.age <= 100 for record in found.records)
    assert counts(found) == {
        "Atelectasis": 11_559, "Cardiomegaly": 2_776, "Consolidation": 4_667, "Edema": 2_303, "Effusion": 13_317,
        "Emphysema": 2_516, "Fibrosis": 1_686, "Hernia": 227, "Infiltration": 19_894, "Mass": 5_782, "Nodule": 6_331,
        "Pleural_Thickening": 3_385, "Pneumonia": 1_431, "Pneumothorax": 5_302,
    }  # fmt: skip
    assert sum(not any(record.labels.values()) for record in found.records) == 60_361
    boxes = Counter(box.label for record in found.records for box in record.boxes)
    assert sum(boxes.values()) == 984 and boxes["Infiltration"] == 123
    assert sum(bool(record.boxes) for record in found.records) == 880


def test_padchest(real: Path, tmp_path: Path, prepare: Callable[[str], Prepared]) -> None:
    shutil.copy(real / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", tmp_path)
    found = prepare("padchest")
    assert len(found.records) + sum(found.skipped.values()) == 160_861
    views = Counter(record.view for record in found.records)
    assert 88_000 < views["PA"] < 91_728 and 45_000 < views["LATERAL"] <= 49_579  # fewer: some are left out
    labels = counts(found)
    assert "" not in labels and all(name == name.strip() for name in labels)
    assert sum(record.age is None for record in found.records) <= 6
    assert 185 <= len(labels) <= 193 and "normal" not in labels and "exclude" not in labels
    assert sum(value is None for value in (next(iter(record.labels.values())) for record in found.records)) >= 90


def test_chexpert(real: Path, tmp_path: Path, prepare: Callable[[str], Prepared]) -> None:
    shutil.copy(real / "chexpert_train.csv.gz", tmp_path / "train.csv.gz")
    (tmp_path / "valid.csv").write_text(f"Path,Frontal/Lateral,AP/PA,{','.join(FINDINGS)}\n")
    found = prepare("chexpert")
    assert len(found.records) == 223_414 and len({record.patient for record in found.records}) == 64_540
    views = Counter(record.view for record in found.records)
    assert views == {"AP": 161_590, "PA": 29_420, "LATERAL": 32_387, "LL": 16, "RL": 1}
    cells = Counter(record.labels["Atelectasis"] for record in found.records)
    assert cells == {None: 154_971, -1: 33_739, 1: 33_376, 0: 1_328}
    assert {record.labels["No Finding"] for record in found.records} == {1, None}


def test_rsna(real: Path, tmp_path: Path, prepare: Callable[[str], Prepared]) -> None:
    with zipfile.ZipFile(real / "kaggle_stage_2_train_labels.csv.zip") as archive:
        (tmp_path / "stage_2_train_labels.csv").write_bytes(archive.read(archive.namelist()[0]))
    found = prepare("rsna")
    boxes = Counter(len(record.boxes) for record in found.records)
    assert len(found.records) == 26_684 and sum(count * number for count, number in boxes.items()) == 9_555
    assert boxes[0] == 20_672 and counts(found) == {"Pneumonia": 6_012}


def test_siim(real: Path, tmp_path: Path, prepare: Callable[[str], Prepared]) -> None:
    with gzip.open(real / "siim-pneumothorax-train-rle.csv.gz") as table:
        (tmp_path / "train-rle.csv").write_bytes(table.read())
    found = prepare("siim-acr")
    assert len(found.records) == 12_047 and sum(len(record.boxes) for record in found.records) == 12_954 - 9_378
    sides = [(b.x, b.y, b.x + b.width, b.y + b.height) for record in found.records for b in record.boxes]
    assert min(min(four) for four in sides) >= 0 and max(max(four) for four in sides) <= 1024


def test_vindr(real: Path, tmp_path: Path, prepare: Callable[[str], Prepared]) -> None:
    shutil.copy(real / "vinbigdata-train.csv.gz", tmp_path / "train.csv.gz")
    found = prepare("vindr-cxr")
    assert len(found.records) == 15_000 and len(found.records[0].labels) == 14
    assert sum(row["x_min"] != "" for row in read_csv(tmp_path / "train.csv.gz", "x_min")) == sum(
        len(record.boxes) for record in found.records
    )


def test_openi(real: Path, tmp_path: Path, prepare: Callable[[str], Prepared]) -> None:
    shutil.copy(real / "NLMCXR_reports.tgz", tmp_path)
    found = prepare("openi")
    assert len(found.records) == 7_470 and found.skipped == {"a report without images": 104}
    assert len({record.patient for record in found.records}) == 3_955 - 104
    assert not any("XXXX" in record.report for record in found.records)
    names = set(found.records[0].labels)
    assert "No Indexing" not in names and len({" ".join(name.lower().split()) for name in names}) == len(names)
    nobody_indexed = {record.patient for record in found.records if set(record.labels.values()) == {None}}
    assert 85 <= len(nobody_indexed) <= 95  # some of the 95 reports have no image
    assert len({record.key for record in found.records}) == 7_470


def test_real_nih_radiographs_pack_alike_by_one_and_by_four_workers(real: Path, tmp_path: Path) -> None:
    if "MMCLIP_REAL_NIH" not in os.environ:
        pytest.skip("REAL RADIOGRAPHS ARE NOT TESTED: set MMCLIP_REAL_NIH to a folder with labels.csv and images/")
    source = Path(os.environ["MMCLIP_REAL_NIH"])
    raw = tmp_path / "raw"
    (raw / "images_001" / "images").mkdir(parents=True)
    names = sorted(path.stem for path in (source / "images").glob("*.jpg"))[:120]
    for name in names:
        with Image.open(source / "images" / f"{name}.jpg") as image:
            image.save(raw / "images_001" / "images" / f"{name}.png")  # as published
    with gzip.open(real / "Data_Entry_2017_v2020.csv.gz", "rt") as table:
        header, *rows = table.read().splitlines()
    kept = [row for row in rows if row.partition(".")[0] in set(names)]
    (raw / "Data_Entry_2017_v2020.csv").write_text("\n".join([header, *kept]))
    shutil.copy(real / "BBox_List_2017.csv.gz", raw)
    made = []
    for workers in (1, 4):
        found = prepare_records("nih", find_recipe("nih"), raw, split=None, patient_key=KEY)
        made.append(
            pack(
                found.records, tmp_path / str(workers), dataset="nih", splits={"train": 0.8, "val": 0.2}, patient_key=KEY,
                config_hash=found.config_hash, short_side=64, samples_per_shard=40, workers=workers, licence="x",
            )
        )  # fmt: skip
    assert made[0] == made[1] and sum(manifest.samples for manifest in made[0].values()) == len(names) == len(kept)
