from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from mmclip_shards.datasets.prepared import key_of
from mmclip_shards.datasets.recipe import DICOM, recipe
from mmclip_shards.datasets.upstream import find_file, find_optional, is_present, make_box, read_csv, read_numbers
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Box, Record
from mmclip_shards.textfiles import read_json


@recipe(
    licence="Kaggle competition rules: non-commercial and academic use",
    access="Kaggle account",
    source="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge",
    same_images=("nih", "siim-acr", "covidx"),
    patients="nih",  # an image's id, where the patient is unknown, is no number of NIH
    needs=DICOM,
)
def rsna(raw: RawPath) -> Iterator[Record]:
    """RSNA Pneumonia Detection Challenge, stage 2: 26,684 frontal radiographs (DICOM), 9,555 boxes of opacities.

    RAW holds stage_2_train_labels.csv and stage_2_train_images/. The 3,000 test images have no labels and are left out.

    Quirks: an image has a row for each box. `patientId` is an image's id. With
    RAW/pneumonia-challenge-dataset-mappings_2018.json the patient is that of NIH ChestX-ray14, whose images these are (by its
    fields subset_img_id and img_id, read in other programs); without it each image counts as a patient, and a patient may
    cross splits. Boxes are in pixels of the 1024 x 1024 images. Views are unknown: they are in the DICOM headers alone. No
    split is official; published ones (GLoRIA, BenchX, MRM, MAVL) go in as lists.
    """
    boxes: dict[str, list[Box]] = {}
    for row in read_csv(find_file(raw, "stage_2_train_labels.csv"), "patientId", "x", "y", "width", "height", "Target"):
        found = boxes.setdefault(row["patientId"], [])
        if is_present(row, "Target"):
            found.append(make_box(row, "Pneumonia", *read_numbers(row, "x", "y", "width", "height")))
    patients = _nih_patients(raw)
    for image, found in boxes.items():
        source = f"stage_2_train_images/{image}.dcm"
        yield Record(
            key=key_of(image), image=raw / source, patient=patients.get(image, image), source=source,
            labels={"Pneumonia": int(bool(found))}, boxes=tuple(found),
        )  # fmt: skip


def _nih_patients(raw: RawPath) -> dict[str, str]:
    """Image -> the patient's number as the table of NIH ChestX-ray14 has it (`13`, of 00000013_004.png)."""
    path = find_optional(raw, "pneumonia-challenge-dataset-mappings_2018.json")
    rows = read_json(path, "download it again") if path is not None else []
    try:
        return {row["subset_img_id"]: str(int(PurePosixPath(row["img_id"]).name.partition("_")[0])) for row in rows}
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path} is no list of subset_img_id and img_id (00000013_004.png): download it again") from None
