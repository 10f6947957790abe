from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from mmclip_shards.datasets.prepared import key_of
from mmclip_shards.datasets.recipe import Skipped, recipe
from mmclip_shards.datasets.sections import clean_text
from mmclip_shards.datasets.upstream import ImageIndex, find_optional
from mmclip_shards.rawpath import RawPath, ahead, matching
from mmclip_shards.schema import Record

SECTIONS = ("comparison", "indication", "findings", "impression")

_SPELT = {"Lymph nodes": "Lymph Nodes", "Thoracic vertebrae": "Thoracic Vertebrae"}


@recipe(
    licence="CC BY-NC-ND 4.0: no adaptation may be shared",
    access="free download",
    source="https://openi.nlm.nih.gov/faq (NLMCXR_png.tgz, NLMCXR_reports.tgz)",
    unlisted_absent=True,
)
def openi(raw: RawPath) -> Iterator[Record | Skipped]:
    """Open-i, Indiana University: 7,470 radiographs of 3,955 reports, with MeSH headings as labels.

    RAW holds NLMCXR_reports.tgz (or ecgen-radiology/*.xml, unpacked), and the PNGs in RAW, images/ or NLMCXR_png/.

    Quirks: image names have two forms, CXR1_1_IM-0001-3001 and CXR10_IM-0002-1001; 104 reports have no image and are left
    out, as are those without findings and impression from the report; `XXXX` stands for removed words. There is no patient
    id: a report is a patient. Labels are headings of MeSH/major up to the first slash, whole (`Opacity/lung/base` is
    Opacity); `normal` makes all absent, and of the 95 reports with `No Indexing` all are unknown. Some headings are spelt in
    two ways (`Lymph nodes`, `Subcutaneous  Emphysema`) and become one. The XML has no view of an image, and the DICOM
    headers' views are wrong too often, so views are unknown. No split is official.
    """
    images = ImageIndex(raw, ".", "images", "NLMCXR_png")
    for name, data in _reports(raw):
        try:
            report = ElementTree.fromstring(data)
        except ElementTree.ParseError:
            yield Skipped("a report that is no XML")
            continue
        texts = {str(part.get("Label")).lower(): clean_text(part.text or "") for part in report.iter("AbstractText")}
        headings = {_heading(major.text or "") for major in report.iterfind("MeSH/major")} - {"", "No Indexing"}
        parents = [image.get("id", "") for image in report.iter("parentImage")]
        if not parents:
            yield Skipped("a report without images")
        for image in parents:
            yield Record(
                key=key_of(image), image=images[f"{image}.png"], patient=name, source=f"{image}.png",
                labels=dict.fromkeys(sorted(headings), 1),
                sections={section: texts[section] for section in SECTIONS if texts.get(section)},
            )  # fmt: skip


def _heading(text: str) -> str:
    """`Lymph nodes/mediastinum` -> `Lymph Nodes`."""
    heading = " ".join(text.partition("/")[0].split())
    return _SPELT.get(heading, heading)


def _reports(raw: RawPath) -> Iterator[tuple[str, bytes]]:
    """(CXR number, XML) of each report, in the order of the names."""
    archive = find_optional(raw, "NLMCXR_reports.tgz")
    if archive is None:
        files = matching(raw, "ecgen-radiology/*.xml")
        if not files:
            raise ValueError(f"{raw} holds no NLMCXR_reports.tgz or ecgen-radiology/*.xml: download the reports, too")
        yield from ahead(lambda file: file.read_bytes(), ((file.stem, file) for file in files))
        return
    data = archive.read_bytes()
    try:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)  # 20 MB, and checked as a whole; a browser may have unpacked it before
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in sorted((m for m in tar if m.isfile() and m.name.endswith(".xml")), key=lambda m: m.name):
                if (report := tar.extractfile(member)) is not None:
                    yield Path(member.name).stem, report.read()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError):
        raise ValueError(f"{archive} is cut or damaged: download it again") from None
