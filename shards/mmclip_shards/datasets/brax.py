from __future__ import annotations

from collections.abc import Iterator

from mmclip_shards.datasets.chexpert import FINDINGS
from mmclip_shards.datasets.recipe import recipe
from mmclip_shards.datasets.upstream import find_file, label_value, read_age, read_csv, read_path
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Record

_VIEWS = {"L": "LATERAL"}


@recipe(
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    access="PhysioNet credentialed access: training course and signed agreement",
    source="https://physionet.org/content/brax/",
    private_paths=True,
)
def brax(raw: RawPath) -> Iterator[Record]:
    """BRAX 1.1.0: 40,967 radiographs of 19,351 patients, CheXpert's 14 observations, no reports.

    RAW holds master_spreadsheet_update.csv (or master_spreadsheet.csv) and images/: the PNGs are packed, not the DICOM files.

    Quirks: cells are empty, 1, 0 or -1, as in CheXpert. Ages are in groups of five years; `85 or more` is 85. Paths name
    patients, so keyed hashes are stored in their place. The columns PngPath and PatientID are partly remembered, not read. No
    split is official.
    """
    table = find_file(raw, "master_spreadsheet_update.csv", "master_spreadsheet.csv")
    for row in read_csv(table, "PngPath", "PatientID", "ViewPosition", *FINDINGS):
        source = str(read_path(row, "PngPath"))
        yield Record(
            key=source, image=raw / source, patient=row["PatientID"], source=source,
            labels={name: label_value(row, name) for name in FINDINGS},
            view=_VIEWS.get(row["ViewPosition"], row["ViewPosition"]) or None,
            age=read_age(row.get("PatientAge", "").removesuffix(" or more")),
        )  # fmt: skip
