from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from mmclip_shards.datasets.recipe import Skipped, recipe
from mmclip_shards.datasets.upstream import (
    Row,
    StudyLabels,
    find_file,
    find_optional,
    label_value,
    read_age,
    read_csv,
    read_path,
)
from mmclip_shards.rawpath import RawPath, matching
from mmclip_shards.schema import Record

FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
"""The 14 observations of CheXpert, MIMIC-CXR-JPG and BRAX."""


@recipe(
    licence="Stanford University Dataset Research Use Agreement: research only, no sharing",
    access="registration",
    source="https://stanfordmlgroup.github.io/competitions/chexpert",
    official=True,
    private_paths=True,
    same_images=("chexpert-plus",),
    patients="chexpert",
)
def chexpert(raw: RawPath) -> Iterator[Record | Skipped]:
    """CheXpert v1.0 or v1.0-small: 223,414 training radiographs of 64,540 patients, 14 observations, no reports.

    RAW is the folder that holds train.csv (`train`), valid.csv (`val`, 234 images) and their images; of the separate test set
    test/ and groundtruth.csv (`test`; 668 images of 500 studies, remembered, not measured).

    Quirks: cells are empty (not mentioned), 1, 0 or -1 (uncertain), and -1 is kept: mapping it to 0 or 1 is the training's
    choice. Paths in the tables begin with the folder's published name, which is taken off. Laterals have no AP/PA; their view
    is LATERAL. The test labels are of studies: all images of a study get them. The 5x200 list cannot be made again (it was
    drawn without a seed): give it as RAW/splits/NAME. Paths name patients, so keyed hashes are stored in their place.
    """
    for table, split in (("train.csv", "train"), ("valid.csv", "val")):
        for row in read_csv(find_file(raw, table), "Path", "Frontal/Lateral", "AP/PA", *FINDINGS):
            yield _record(
                raw, "/".join(read_path(row, "Path", 4).parts[1:]), row["AP/PA"] or row["Frontal/Lateral"].upper(),
                _labels(row), split, read_age(row.get("Age", "")),
            )  # fmt: skip
    truth = find_optional(raw, "groundtruth.csv", "test_labels.csv")
    labels = StudyLabels(FINDINGS)
    for row in [] if truth is None else read_csv(truth, "Study", *FINDINGS):
        labels.add("/".join(read_path(row, "Study", 1).parts[-2:]), _labels(row))
    for path in matching(raw, "test/*/*/*.jpg"):
        source = path.relative_to(raw).as_posix()
        if "/".join(path.parts[-3:-1]) not in labels:
            yield Skipped("a test image whose study is not in groundtruth.csv")
            continue
        view = "LATERAL" if path.stem.endswith("lateral") else "FRONTAL"
        yield _record(raw, source, view, labels["/".join(path.parts[-3:-1])], "test")


def _labels(row: Row) -> dict[str, int | None]:
    return {name: label_value(row, name) for name in FINDINGS}


def _record(raw: RawPath, source: str, view: str, labels: dict[str, int | None], split: str, age: int | None = None) -> Record:
    patient = PurePosixPath(source).parts[1]
    return Record(source, raw / source, patient, source, labels=labels, view=view, split=split, age=age)
