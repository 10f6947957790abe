from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmclip_shards.datasets.prepared import split_name
from mmclip_shards.datasets.recipe import Skipped, recipe
from mmclip_shards.datasets.sections import clean_text
from mmclip_shards.datasets.upstream import find_file, read_age, read_csv
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Record
from mmclip_shards.textfiles import read_json

_SECTIONS = ("Indication", "Comparison", "Findings", "Impression")
_VIEWS = {"POSTERO_ANTERIOR": "PA", "ANTERO_POSTERIOR": "AP", "UNKNOWN": "", "N/A": "", "None": ""}


@recipe(
    licence="ReXGradient non-commercial data access agreement",
    access="gated on Hugging Face: agreement",
    source="https://huggingface.co/datasets/rajpurkarlab/ReXGradient-160K",
    official=True,
    private_paths=True,
)
def rexgradient(raw: RawPath) -> Iterator[Record | Skipped]:
    """ReXGradient-160K: 273,004 radiographs of 160,000 studies with reports in sections, no labels.

    RAW holds deid_png/ (the joined and unpacked archive) and metadata/ with {train,valid,test}_metadata.csv and
    {train,valid,test}_metadata_view_position.json.

    Quirks: a row is a study, and only the JSON names its images, as ../deid_png/...; `valid` is `val`; some studies are in
    one of the two alone and are left out, counted. Paths name patients, so keyed hashes are stored in their place.
    """
    metadata = raw / "metadata"
    for upstream in ("train", "valid", "test"):
        views = find_file(metadata, f"{upstream}_metadata_view_position.json")
        images = read_json(views, "download it again")
        if not isinstance(images, dict):
            raise ValueError(f"{views} holds no object of studies: download it again")
        for row in read_csv(find_file(metadata, f"{upstream}_metadata.csv"), "id", *_SECTIONS):
            study = images.pop(row["id"], None)
            if study is None:
                yield Skipped("a study without images")
                continue
            if (found := _images(study)) is None:
                raise ValueError(
                    f"{views}: the study of {row.place} must have ImagePath (../deid_png/PATIENT/...) and ImageViewPosition, "
                    "equally long: download it again"
                )
            sections = {name.lower(): text for name in _SECTIONS if (text := clean_text(row[name]))}
            for source, view in found:
                yield Record(
                    key=source, image=raw / source, patient=source.split("/")[1], source=source,
                    view=_VIEWS.get(view, view) or None, split=split_name(upstream), sections=sections,
                    age=read_age(row.get("PatientAge", "")),
                )  # fmt: skip
        yield from (Skipped("images without a study") for _ in images)


def _images(study: Any) -> list[tuple[str, str]] | None:
    """(path below RAW, upstream's view) of each image of a study; None if the entry is none."""
    try:
        pairs = list(zip(study["ImagePath"], study["ImageViewPosition"], strict=True))
    except (TypeError, KeyError, ValueError):
        return None
    found = [(str(path).removeprefix("../"), str(view)) for path, view in pairs]
    return found if all(path.startswith("deid_png/") and path.count("/") > 1 for path, _ in found) else None
