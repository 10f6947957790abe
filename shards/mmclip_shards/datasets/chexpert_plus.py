from __future__ import annotations

import json
from collections.abc import Iterator

from mmclip_shards.datasets.chexpert import FINDINGS
from mmclip_shards.datasets.prepared import split_name
from mmclip_shards.datasets.recipe import DICOM, recipe
from mmclip_shards.datasets.sections import clean_text
from mmclip_shards.datasets.upstream import (
    FilesBelow,
    StudyLabels,
    find_file,
    find_optional,
    read_age,
    read_csv,
    read_path,
)
from mmclip_shards.document import legal_labels
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Record

SECTIONS = {
    "section_findings": "findings",
    "section_impression": "impression",
    "section_clinical_history": "indication",
    "section_comparison": "comparison",
    "section_technique": "technique",
}


@recipe(
    licence="Stanford University Dataset Research Use Agreement: research only, no sharing",
    access="registration",
    source="https://stanfordaimi.azurewebsites.net/datasets/5158c524-d3ab-4e02-96e9-6ee9efc110a1",
    official=True,
    private_paths=True,
    same_images=("chexpert",),
    patients="chexpert",
    needs=DICOM,
)
def chexpert_plus(raw: RawPath) -> Iterator[Record]:
    """CheXpert Plus: 223,462 radiographs with reports in sections, and CheXbert's 14 observations.

    RAW holds df_chexpert_plus_240401.csv, images below PNG/, DICOM/Uncompressed/ or RAW itself, and report_fixed.json (JSON
    lines; also in chexbert_labels/). Splits are those of the column `split` (valid is `val`).

    Quirks: path_to_image ends in .jpg whatever the files are, so .png is tried, too; cells hold line breaks and are long;
    about a quarter of the reports have findings, nearly all an impression. Paths are those of CheXpert: patients are the
    same, and keyed hashes are stored in place of paths. That PNGs lie below PNG/ is remembered, not read.
    """
    roots = [FilesBelow(root) for root in (raw / "PNG", raw / "DICOM" / "Uncompressed", raw) if root.is_dir()]
    labels = StudyLabels(FINDINGS)
    labelled = find_optional(raw, "report_fixed.json", "chexbert_labels/report_fixed.json")
    if labelled is not None:
        for path, found in _labels(labelled):
            labels.add(path, found)
    table = find_file(raw, "df_chexpert_plus_240401.csv")
    for row in read_csv(table, "path_to_image", "frontal_lateral", "ap_pa", "split", *SECTIONS):
        image = read_path(row, "path_to_image", 2)
        source = str(image)
        files = ((root, image.with_suffix(suffix)) for root in roots for suffix in (".png", ".dcm", ".jpg"))
        yield Record(
            key=source, image=next((root.folder / path for root, path in files if path in root), raw / image),
            patient=image.parts[1], source=source, labels=labels[source],
            view=row["ap_pa"] or row["frontal_lateral"].upper() or None, split=split_name(row["split"]),
            age=read_age(row.get("age", "")),
            sections={name: text for column, name in SECTIONS.items() if (text := clean_text(row[column]))},
        )  # fmt: skip


def _labels(path: RawPath) -> Iterator[tuple[str, dict[str, int | None]]]:
    """(path of an image, its labels) of each line."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"{path}, line {number}, is no JSON: download it again") from None
            whole = isinstance(row, dict) and row.keys() >= {"path_to_image", *FINDINGS}
            if not whole or (labels := legal_labels({name: row[name] for name in FINDINGS})) is None:
                raise ValueError(f"{path}, line {number}, lacks path_to_image or labels of 1, 0, -1 or null: download it again")
            yield str(row["path_to_image"]), labels
