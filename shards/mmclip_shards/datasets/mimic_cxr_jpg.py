from __future__ import annotations

import itertools
import zipfile
import zlib
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
    hand-made exceptions, and an empty header does not swallow the next one. The radiologists' labels of 2.1.0
    (test-set-labeled.csv, 687 studies) are not read. Paths name patients, so keyed hashes are stored in their place.
    """
    yield from mimic_records(raw, _metadata(raw))


def _metadata(raw: RawPath) -> Iterator[tuple[str, str, str, str]]:
    table = find_file(raw, "mimic-cxr-2.0.0-metadata.csv")
    for row in read_csv(table, "dicom_id", "subject_id", "study_id", "ViewPosition"):
        subject, study = row["subject_id"], row["study_id"]
        yield subject, study, f"{_folder(subject, study)}/{row['dicom_id']}.jpg", view_of(row)


def _folder(subject: str, study: str) -> str:
    return f"files/p{subject[:2]}/p{subject}/s{study}"


def view_of(row: Mapping[str, str]) -> str:
    """The view in a row of the metadata, or an empty text."""
    return row["ViewPosition"] or _VIEW_CODES.get(row.get("ViewCodeSequence_CodeMeaning", "").lower(), "")


def mimic_records(raw: RawPath, images: Iterator[tuple[str, str, str, str]]) -> Iterator[Record]:
    """Records of MIMIC-CXR's tree. images: (subject, study, path of the image, view or "")."""
    split_of: dict[str, str] = {}
    if (table := find_optional(raw, "mimic-cxr-2.0.0-split.csv")) is not None:
        for row in read_csv(table, "study_id", "split"):
            split_of[row["study_id"]] = split_name(row["split"])
    labels = StudyLabels(FINDINGS)
    if (table := find_optional(raw, "mimic-cxr-2.0.0-chexpert.csv")) is not None:
        for row in read_csv(table, "study_id", *FINDINGS):
            labels.add(row["study_id"], {name: label_value(row, name) for name in FINDINGS})
    studies = (
        ((study, list(of_study)), raw / f"{_folder(subject, study)}.txt")
        for (subject, study), of_study in itertools.groupby(images, key=lambda each: each[:2])
    )
    for (study, of_study), report in ahead(_reports(raw), studies):
        sections = split_report(report)
        for subject, _, source, view in of_study:
            yield Record(
                key=key_of(source), image=raw / source, patient=subject, source=source, view=view or None, labels=labels[study],
                split=split_of.get(study), sections=sections,
            )  # fmt: skip


def _reports(raw: RawPath) -> Callable[[RawPath], str]:
    """A report's place beside its images -> its text, empty if there is none."""
    archive = find_optional(raw, "mimic-cxr-reports.zip")
    if archive is not None:
        try:
            packed = zipfile.ZipFile(seekable(archive))
        except zipfile.BadZipFile:
            raise ValueError(f"{archive} is cut or is no zip archive: download it again") from None
        names = set(packed.namelist())
        if not any(name.startswith("files/") for name in names):
            raise ValueError(f"{archive} holds no files/: put the archive into RAW as it is published")
    roots = [root for root in (raw / "mimic-cxr-reports", raw) if archive is None and (root / "files").is_dir()]

    def read(place: RawPath) -> str:
        path = place.relative_to(raw).as_posix()
        if archive is not None:
            try:
                data = packed.read(path) if path in names else None
            except (zipfile.BadZipFile, zlib.error, EOFError):  # no name: it holds the patient's number
                raise ValueError(f"{archive} is damaged: download it again") from None
        else:
            found = (read_optional(root / path) for root in roots)
            data = next((data for data in found if data is not None), None)
        return "" if data is None else data.decode("utf-8", "replace")

    return read
