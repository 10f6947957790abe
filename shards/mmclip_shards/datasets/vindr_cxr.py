from __future__ import annotations

from collections.abc import Iterator

from mmclip_shards.datasets.prepared import key_of
from mmclip_shards.datasets.recipe import DICOM, recipe
from mmclip_shards.datasets.upstream import Row, find_file, find_optional, is_present, make_box, read_csv, read_numbers
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Box, Record

_NOT_LABELS = {"image_id", "rad_id"}
_RENAMED = {"Other disease": "Other diseases"}


@recipe(
    licence="PhysioNet Credentialed Health Data License 1.5.0 (Kaggle's copy: competition rules)",
    access="PhysioNet credentialed access: training course and signed agreement",
    source="https://physionet.org/content/vindr-cxr/",
    official=True,
    unlisted_absent=True,
    needs=DICOM,
)
def vindr_cxr(raw: RawPath) -> Iterator[Record]:
    """VinDr-CXR 1.0.0: 18,000 frontal radiographs (DICOM), 28 labels, boxes of several readers.

    RAW holds annotations/ and train/ and test/ (*.dicom), as on PhysioNet, or Kaggle's train.csv and train/ (15,000 images,
    all `train`).

    Quirks: three readers of 17 saw each training image, a consensus each test image. A label is present if any reader says
    so, and all readers' boxes are kept; No finding makes all absent. The test tables have no rad_id, and some copies say
    `Other disease`. No patient ids: an image is a patient. Views are unknown. Files are MONOCHROME1 and 2 with 10 to 16 bits.
    """
    annotations = raw / "annotations"
    if not annotations.is_dir():
        rows = read_csv(find_file(raw, "train.csv"), "image_id", "class_name", "x_min", "y_min", "x_max", "y_max")
        yield from _records(raw, "train", {}, rows)
        return
    for split in ("train", "test"):
        present: dict[str, set[str]] = {}
        for row in read_csv(find_file(annotations, f"image_labels_{split}.csv"), "image_id"):
            names = present.setdefault(row["image_id"], set())
            names.update(_name(column) for column in row if column not in _NOT_LABELS and is_present(row, column))
        table = find_optional(annotations, f"annotations_{split}.csv")
        rows = read_csv(table, "image_id", "class_name", "x_min", "y_min", "x_max", "y_max") if table is not None else iter(())
        yield from _records(raw, split, present, rows)


def _records(raw: RawPath, split: str, present: dict[str, set[str]], rows: Iterator[Row]) -> Iterator[Record]:
    """present: image -> labels of any reader; the rows add their own, and their boxes."""
    boxes: dict[str, list[Box]] = {}
    for row in rows:
        name, image = _name(row["class_name"]), row["image_id"]
        present.setdefault(image, set()).add(name)
        if row["x_min"]:
            left, top, right, bottom = read_numbers(row, "x_min", "y_min", "x_max", "y_max")
            boxes.setdefault(image, []).append(make_box(row, name, left, top, right - left, bottom - top))
    for image, names in present.items():
        labels = dict.fromkeys(sorted(names - {"No finding"}) or ["No finding"], 1)
        source = f"{split}/{image}.dicom"
        yield Record(
            key=key_of(source), image=raw / source, patient=image, source=source, labels=labels,
            boxes=tuple(boxes.get(image, ())), split=split,
        )  # fmt: skip


def _name(text: str) -> str:
    return _RENAMED.get(text, text)
