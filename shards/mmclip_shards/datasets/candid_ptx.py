from __future__ import annotations

from collections.abc import Iterator

from mmclip_shards.datasets.prepared import key_of
from mmclip_shards.datasets.recipe import DICOM, recipe
from mmclip_shards.datasets.sections import split_report
from mmclip_shards.datasets.upstream import ImageIndex, find_file, find_optional, read_csv
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Record

_OTHERS = {"chest_tube.csv": "Chest Tube", "acute_rib_fracture.csv": "Acute Rib Fracture"}


@recipe(
    licence="University of Otago data use agreement: research only, no sharing",
    access="request form and ethics course",
    source="https://doi.org/10.17608/k6.auckland.14173982",
    needs=DICOM,
)
def candid_ptx(raw: RawPath) -> Iterator[Record]:
    """CANDID-PTX: 19,237 frontal radiographs with reports; pneumothorax, chest tubes, acute rib fractures.

    RAW holds Pneumothorax_reports.csv, chest_tube.csv, acute_rib_fracture.csv and chest_radiographs/ (files named by
    SOPInstanceUID, .dcm, .png or without suffix).

    Quirks: an image has a row for each mask; `-1` is no pneumothorax, and an empty cell leaves it unknown. Masks are not made
    into boxes: the order of their run lengths is not documented where we could read it. Ids have dots. No patient ids: an
    image is a patient. No split is official. The count of images is remembered, not measured.
    """
    images = ImageIndex(raw, "chest_radiographs")
    others = {label: _marked(raw, name) for name, label in _OTHERS.items()}
    rows: dict[str, tuple[str, str]] = {}
    for row in read_csv(find_file(raw, "Pneumothorax_reports.csv"), "SOPInstanceUID", "Report", "EncodedPixels"):
        image = row["SOPInstanceUID"]
        before = rows.get(image, ("", ""))[1]
        rows[image] = row["Report"], row["EncodedPixels"] if before in ("", "-1") and row["EncodedPixels"] else before
    for image, (report, mask) in rows.items():
        name = next((found for suffix in (".dcm", ".png", "") if (found := image + suffix) in images), f"{image}.dcm")
        labels: dict[str, int | None] = {"Pneumothorax": None if not mask else int(mask != "-1")}
        yield Record(
            key=key_of(f"{image}.dcm"), image=images[name], patient=image, source=name, view="FRONTAL",
            labels=labels | {label: int(image in marked) for label, marked in others.items() if marked is not None},
            sections=split_report(report),
        )  # fmt: skip


def _marked(raw: RawPath, name: str) -> set[str] | None:
    """The images that have a mask in a table, or None without the table."""
    path = find_optional(raw, name)
    if path is None:
        return None
    return {r["SOPInstanceUID"] for r in read_csv(path, "SOPInstanceUID", "mask_rle") if r["mask_rle"] not in ("", "-1")}
