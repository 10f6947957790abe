"""Leaks: a test set that was packed anew, elsewhere, under another name or with another key is found all the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmclip_shards.datasets.synthetic import synthetic_records
from mmclip_shards.manifest import load_manifest
from mmclip_shards.pack import pack
from mmclip_shards.reader import ShardReader

from mmclip_dist.checkpoint.folder import Meta, checkpoint_path
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.data.seen import SEEN, Seen
from mmclip_dist.evaluate import tasks
from mmclip_dist.evaluate.encoders import open_encoder
from mmclip_dist.evaluate.leaks import check, families, share_images
from mmclip_dist.evaluate.protocol import load_protocol
from mmclip_dist.evaluate.zeroshot import zero_shot
from mmclip_dist.model.build import build_model

KEY, OTHER_KEY = b"the key of one clinic...........", b"the key of another clinic......."


def packed(folder: Path, *, key: bytes = KEY, seed: int = 3, size: int = 40, dataset: str = "clinic", count: int = 60) -> str:
    records = [replace(record, patient=f"{seed}-{record.patient}") for record in synthetic_records(count, seed=seed, size=40)]
    pack(
        records, str(folder), dataset=dataset, splits={"test": 1.0}, short_side=size, samples_per_shard=32, patient_key=key,
        config_hash=f"{seed}-{count}",
    )  # fmt: skip
    return str(folder / "test")


def reader_of(url: str) -> ShardReader:
    return ShardReader(url, load_manifest(url))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> str:
    return packed(tmp_path_factory.mktemp("train") / "set")


@pytest.fixture(scope="module")
def run(sets, tokenizer, train: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder, manifest = tmp_path_factory.mktemp("run"), load_manifest(train)
    checkpoint_path(folder, 3).mkdir(parents=True)
    shards = tuple(shard.sha256 for shard in manifest.shards)
    write_model(
        checkpoint_path(folder, 3), build_model(sets.config(), tokenizer, manifest.labels), tokenizer, sets.config(),
        Meta(3, 1, 1, manifest.labels, shards),
    )  # fmt: skip
    Seen.of([reader_of(train)]).save(checkpoint_path(folder, 3) / SEEN)
    return str(folder)


def test_the_same_patients_in_other_images_are_refused(run: str, train: str, tmp_path: Path) -> None:
    """Smaller images: other shards and other files, of the same patients by the same key."""
    again = packed(tmp_path / "again", size=32, count=24)
    patients = len({json.loads(members["json"])["patient"] for _, members in reader_of(again).samples(0)})
    told = rf"again/test: the model was trained on {patients} of its patients, so.*--allow-leak"
    with pytest.raises(ValueError, match=told) as error:
        zero_shot(run, [again])
    assert "\n" not in str(error.value) and "images" not in str(error.value).partition(", so")[0]
    with open_encoder(run) as encoder:
        found = tasks.zeroshot(tasks.Request(encoder, [again], load_protocol("own"), allow_leak=True))
    leak = found.document["leak"]
    assert (leak["patients"], leak["images"], leak["shards"], leak["allowed"]) == (patients, 0, 0, True)
    assert any("the model was trained on some of these patients" in line for line in found.notes)


def test_the_same_images_by_another_key_are_refused(run: str, tmp_path: Path) -> None:
    again = packed(tmp_path / "again", key=OTHER_KEY, count=24)
    count = len(np.unique(Seen.of([reader_of(again)]).images))
    with pytest.raises(ValueError, match=rf"the model was trained on {count} of its images"):
        zero_shot(run, [again])


def test_other_patients_pass_and_the_result_says_what_was_checked(run: str, train: str, tmp_path: Path) -> None:
    other = packed(tmp_path / "other", seed=4)
    with open_encoder(run) as encoder:
        leak = tasks.zeroshot(tasks.Request(encoder, [other], load_protocol("own"))).document["leak"]
    assert leak == {
        "checked": ["shards", "patients", "images", "data sets"], "shards": 0, "patients": 0, "images": 0, "data_sets": [],
        "allowed": False, "patients_unknown_of": [],
    }  # fmt: skip
    with pytest.raises(ValueError, match="was trained on, so its scores would say nothing"):
        zero_shot(run, [train])


def test_a_checkpoint_without_the_file_says_that_it_knows_no_patients(run: str, tmp_path: Path) -> None:
    other = packed(tmp_path / "other", seed=4)
    shutil.copytree(run, tmp_path / "older")
    (checkpoint_path(tmp_path / "older", 3) / SEEN).unlink()
    with open_encoder(str(tmp_path / "older")) as encoder:
        found = tasks.zeroshot(tasks.Request(encoder, [other], load_protocol("own")))
    assert found.document["leak"]["checked"] == ["shards"]
    assert any("does not tell which patients it was trained on" in line for line in found.notes)


def test_data_sets_that_share_images_are_refused(tmp_path: Path) -> None:
    seen = Seen(np.zeros(0, np.uint64), np.zeros(0, np.uint64), ("NIH_ChestX-ray14",))
    reader = reader_of(packed(tmp_path / "rsna", dataset="RSNA-pneumonia"))
    with pytest.raises(ValueError, match="trained on NIH_ChestX-ray14, which shares images with RSNA-pneumonia"):
        check([reader], (), seen)
    assert check([reader], (), seen, allow=True)["data_sets"] == [["RSNA-pneumonia", "NIH_ChestX-ray14"]]
    plain = reader_of(packed(tmp_path / "plain", dataset="clinic"))
    assert check([plain], (), seen)["data_sets"] == []
    with pytest.raises(ValueError, match="which shares images with covidx"):  # the protocol tells what a set's name does not
        check([plain], (), seen, dataset="covidx")


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("rsna", "nih", True), ("COVIDx-CXR-2", "RSNA", True), ("covidx", "nih", True), ("ms-cxr", "MIMIC-CXR", True),
        ("tbx11k", "shenzhen", True), ("google2019_nih", "nih", True), ("ChestX-Det10", "nih", True), ("nih", "NIH-14", False),
        ("chexpert", "CheXpert Plus", False), ("chexpert", "mimic", False), ("clinic", "nih", False), ("vindr", "rsna", False),
    ],
)  # fmt: skip
def test_the_table_of_data_sets(one: str, other: str, shared: bool) -> None:
    assert share_images(one, other) is share_images(other, one) is shared


def test_a_name_tells_its_family() -> None:
    assert families("nih_cxr1000") == {"nih"} and families("my-clinic") == set()
