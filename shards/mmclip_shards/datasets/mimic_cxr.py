from __future__ import annotations

from collections.abc import Iterator

from mmclip_shards.datasets.mimic_cxr_jpg import mimic_records, view_of
from mmclip_shards.datasets.recipe import DICOM, recipe
from mmclip_shards.datasets.upstream import find_file, find_optional, read_csv, read_path
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Record


@recipe(
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    access="PhysioNet credentialed access: training course and signed agreement",
    source="https://physionet.org/content/mimic-cxr/",
    official=True,
    private_paths=True,
    same_images=("mimic-cxr-jpg",),
    patients="mimic-cxr",
    needs=DICOM,
)
def mimic_cxr(raw: RawPath) -> Iterator[Record]:
    """MIMIC-CXR 2.0.0: the DICOM files of MIMIC-CXR-JPG, with reports.

    RAW is the folder that holds files/, cxr-record-list.csv.gz, and mimic-cxr-reports.zip. The official split, labels and
    views are files of MIMIC-CXR-JPG: put mimic-cxr-2.0.0-split.csv.gz (needed unless --splits is given), -chexpert.csv.gz and
    -metadata.csv.gz into RAW. Quirks are those of `mimic-cxr-jpg`. Files may be packed (.dcm.gz), as the list names them.
    """
    views: dict[str, str] = {}
    if (table := find_optional(raw, "mimic-cxr-2.0.0-metadata.csv")) is not None:
        views = {row["dicom_id"]: view_of(row) for row in read_csv(table, "dicom_id", "ViewPosition")}
    records = read_csv(find_file(raw, "cxr-record-list.csv"), "subject_id", "study_id", "dicom_id", "path")
    images = ((r["subject_id"], r["study_id"], str(read_path(r, "path")), views.get(r["dicom_id"], "")) for r in records)
    yield from mimic_records(raw, images)
