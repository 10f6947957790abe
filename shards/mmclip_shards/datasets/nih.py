from __future__ import annotations

from collections.abc import Iterator

from mmclip_shards.datasets.prepared import key_of
from mmclip_shards.datasets.recipe import Skipped, recipe
from mmclip_shards.datasets.upstream import (
    ImageIndex,
    find_file,
    find_optional,
    make_box,
    read_age,
    read_csv,
    read_lines,
    read_numbers,
)
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Box, Record

BOX_LABELS = {"Infiltrate": "Infiltration"}
"""Where the table of boxes has another name than the table of labels."""


@recipe(
    licence="no restrictions; cite Wang et al., CVPR 2017, and acknowledge the NIH Clinical Center",
    access="free download",
    source="https://nihcc.app.box.com/v/ChestXray-NIHCC",
    official=True,
    private_paths=True,
    unlisted_absent=True,
    same_images=("rsna", "siim-acr", "covidx"),
)
def nih(raw: RawPath) -> Iterator[Record | Skipped]:
    """NIH ChestX-ray14: 112,120 frontal radiographs of 30,805 patients, 14 labels, 984 boxes, no reports.

    RAW holds Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv), the images in images_001/images ... or in one images/, and
    for the official split train_val_list.txt (`train`, 86,524) and test_list.txt (`test`, 25,596). BBox_List_2017.csv is
    optional. `--split nih@mrm` (78,468 / 11,219 / 22,433) takes the lists of MRM from RAW/splits/mrm/train_list.txt and so
    on.

    Quirks: header names with commas in brackets split into more columns; the table of boxes has a header of nine names over
    rows of six cells, and says Infiltrate for Infiltration; boxes are in pixels of the 1024 x 1024 images. File names begin
    with the patient's number, so keyed hashes are stored in their place.
    """
    boxes = _boxes(raw)
    split_of: dict[str, str] = {}
    for split, listed in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        path = find_optional(raw, listed)
        for number, line in enumerate([] if path is None else read_lines(path), 1):
            if line.strip() and split_of.setdefault(line.split()[0], split) != split:
                raise ValueError(f"{path}, line {number}, names an image of train_val_list.txt: download both again")
    images = ImageIndex(raw, "images", "images_*/images")
    table = find_file(raw, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    for row in read_csv(table, "Image Index", "Finding Labels", "Patient ID", "View Position"):
        name = row["Image Index"]
        yield Record(
            key=key_of(name), image=images[name], patient=row["Patient ID"], source=name, view=row["View Position"] or None,
            labels=dict.fromkeys(filter(None, map(str.strip, row["Finding Labels"].split("|"))), 1),
            boxes=tuple(boxes.pop(name, ())), split=split_of.get(name), age=read_age(row.get("Patient Age", "")),
        )  # fmt: skip
    yield from (Skipped("boxes of an image that is not in the table") for _ in boxes)


def _boxes(raw: RawPath) -> dict[str, list[Box]]:
    path = find_optional(raw, "BBox_List_2017.csv")
    boxes: dict[str, list[Box]] = {}
    for row in [] if path is None else read_csv(path, header=("name", "label", "x", "y", "w", "h"), ragged=True):
        if row["name"] != "Image Index":
            label = BOX_LABELS.get(row["label"], row["label"])
            boxes.setdefault(row["name"], []).append(make_box(row, label, *read_numbers(row, "x", "y", "w", "h")))
    return boxes
