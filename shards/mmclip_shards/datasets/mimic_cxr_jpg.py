from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Iterator, Mapping

from mmclip_shards.datasets.chexpert import FINDINGS
from mmclip_shards.datasets.prepared import key_of, split_name
from mmclip_shards.datasets.recipe import recipe
from mmclip_shards.datasets.sections import split_report
from mmclip_shards.datasets.upstream import StudyLabels, find_file, find_optional, label_value, read_csv
from mmclip_shards.rawpath import RawPath, ahead, read_optional, seekable
from mmclip_shards.schema import Record

_VIEW_CODES = {
    "postero-anterior": "PA", "antero-posterior": "AP", "lateral": "LATERAL", "left lateral": "LL", "right lateral": "RL",
}  # fmt: skip


@recipe(
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    access="PhysioNet credentialed access: training course and signed agreement",
    source="https://physionet.org/content/mimic-cxr-jpg/",
    official=True,
    private_paths=True,
    same_images=("mimic-cxr",),
    patients="mimic-cxr",
)
def mimic_cxr_jpg(raw: RawPath) -> Iterator[Record]:
    """MIMIC-CXR-JPG 2.0.0 or 2.1.0: 377,110 radiographs of 227,835 studies, with CheXpert's labels and the reports of MIMIC-CXR.

    RAW is the folder that holds files/ and mimic-cxr-2.0.0-metadata.csv.gz, -split.csv.gz and -chexpert.csv.gz (plain CSV is
    read, too). Reports are a download of their own: put mimic-cxr-reports.zip into RAW, or its files/ tree as
    mimic-cxr-reports/files. Without them all images are unpaired.

    Quirks: labels are of studies, and the split's `validate` is `val`; where ViewPosition is empty, ViewCodeSequence tells
    the view. Sections follow the rules of the data set's own parser (`sections.split_report`), without its lists of 46
    hand-made exceptions, and an empty header does not swallow the next one. Paths name patients, so keyed hashes are stored
    in their place.
    """
    yield from mimic_records(raw, "jpg", _metadata(raw))


def _metadata(raw: RawPath) -> Iterator[tuple[str, str, str, str]]:
    table = find_file(raw, "mimic-cxr-2.0.0-metadata.csv")
    for row in read_csv(table, "dicom_id", "subject_id", "study_id", "ViewPosition"):
        yield row["subject_id"], row["study_id"], row["dicom_id"], view_of(row)


def view_of(row: Mapping[str, str]) -> str:
    """The view in a row of the metadata, or an empty text."""
    return row["ViewPosition"] or _VIEW_CODES.get(row.get("ViewCodeSequence_CodeMeaning", "").lower(), "")


def mimic_records(raw: RawPath, suffix: str, images: Iterator[tuple[str, str, str, str]]) -> Iterator[Record]:
    """Records of MIMIC-CXR's tree. suffix: of the image files; images: (subject, study, image, view or "")."""
    split_of: dict[str, str] = {}
    if (table := find_optional(raw, "mimic-cxr-2.0.0-split.csv")) is not None:
        for row in read_csv(table, "study_id", "split"):
            split_of[row["study_id"]] = split_name(row["split"])
    labels = StudyLabels(FINDINGS)
    if (table := find_optional(raw, "mimic-cxr-2.0.0-chexpert.csv")) is not None:
        for row in read_csv(table, "study_id", *FINDINGS):
            labels.add(row["study_id"], {name: label_value(row[name]) for name in FINDINGS})
    studies = (
        ((study, list(of_study)), raw / f"files/p{subject[:2]}/p{subject}/s{study}.txt")
        for (subject, study), of_study in itertools.groupby(images, key=lambda each: each[:2])
    )
    for ((study, of_study), place), report in ahead(_reports(raw), (((tag, place), place) for tag, place in studies)):
        folder, sections = place.relative_to(raw).with_suffix("").as_posix(), split_report(report)
        for subject, _, image, view in of_study:
            source = f"{folder}/{image}.{suffix}"
            yield Record(
                key=key_of(source), image=raw / source, patient=subject, source=source, view=view or None, labels=labels[study],
                split=split_of.get(study), sections=sections,
            )  # fmt: skip


def _reports(raw: RawPath) -> Callable[[RawPath], str]:
    """A report's place beside its images -> its text, empty if there is none."""
    archive = find_optional(raw, "mimic-cxr-reports.zip")
    if archive is not None:
        packed = zipfile.ZipFile(seekable(archive))
        names = set(packed.namelist())
    roots = [root for root in (raw / "mimic-cxr-reports", raw) if archive is None and (root / "files").is_dir()]

    def read(place: RawPath) -> str:
        path = place.relative_to(raw).as_posix()
        if archive is not None:
            data = packed.read(path) if path in names else None
        else:
            found = (read_optional(root / path) for root in roots)
            data = next((data for data in found if data is not None), None)
        return "" if data is None else data.decode("utf-8", "replace")

    return read
