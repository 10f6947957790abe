"""What identifies people is found and counted, what de-identification leaves is not; sets that hold it are refused, and no
content is ever told."""

from __future__ import annotations

import os
import tarfile
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from mmclip_shards import Record, load_manifest
from mmclip_shards.manifest import save_manifest
from mmclip_shards.pack import pack
from mmclip_shards.phi import _RULES, KINDS, SCAN_VERSION, phi_like
from mmclip_shards.schema import Box
from mmclip_shards.verify import verify
from PIL import Image

from tests.test_cli import call

KEY = b"k" * 32
FOUND = {
    "date of birth": [
        "DOB: 03/04/1951", "D.O.B. 3.4.51", "Date of birth 1951-04-03.", "born on 3 May 1951", "Born: May 3, 1951",
        "was born in 1951", "Date of Birth: April 3rd, 1951", "D.O.B.: 03-APR-1951", "DOB 19510403",
    ],
    "record number": [
        "MRN 0012345", "MRN: A-123456", "Medical record number 12 34 56", "Medical Record #: 998877", "Patient ID: 40123",
        "Accession number: CR1234567", "SSN 123456789", "078-05-1120", "NHS number 943476 5919",
        "Med Rec No: 1234567", "MR# 1234567", "MR #: 00123456", "Pt ID: 1234567", "Hospital No: H123456", "ID No. 8837465",
        "Account # 88374651", "CPF 123.456.789-09", "Case number: 998877",
    ],
    "phone number": [
        "(555) 123-4567", "call 555-123-4567", "1-555-123-4567", "555.123.4567", "+44 20 7946 0958", "+49 (0)30 1234567",
        "pager 12345", "Tel: 0201 234567", "phone number 5550199", "ext. 4321", "beeper #91234",
    ],
    "e-mail": ["jane.doe@example.org", "write to j_doe+x@mail.example.co.uk."],
    "name after a title": [
        "discussed with Dr. Smith", "Dr Mueller", "Mr. O'Brien", "Mrs. Smith-Jones", "Ms. Doe", "Dr. J. Doe",
        "Dr. McDonald at 3 pm", "DR. SMITH", "MRS. DOE", "Patient: Jane Doe", "PATIENT: DOE, JANE", "Patient name: Doe",
        "Name: Doe", "Referring physician: Smith", "Dictated by: Smith", "read by Jane Doe, M.D.", "SMITH, MD",
        "Dr. García", "Dra. Ñúñez", "Dr. Øst", "Dr. J.R. Smith", "Dr.Smith", "Dr. SMITH", "Dr. van der Berg", "Dr. de Souza",
        "John Smith M.D.", "Electronically signed by John Smith", "Electronically signed by: J. Smith", "Dictated by J. Smith",
        "Attending Radiologist: Jane Doe", "Radiologist: J. Doe", "Ordering physician: Doe", "Referring MD: Doe",
        "Reviewed by: Jane Doe", "Interpreted by: DOE", "SIGNED: JANE DOE",
    ],
}  # fmt: skip
CLEAN = [
    "A 3.5 cm mass at T12, 2.5 x 3.4 x 10 mm; C3-C4, ribs 4-6.", "Comparison: 12/03/2019, 2019-12-03 and 3 May 2018 at 10:30.",
    "Dr. ___ was called at ___ on ___.", "Dr. XXXX, Mrs. XXXX and XXXX, M.D.",
    "Dr. [**Last Name (NI) 123**], pager [**Numeric Identifier 9**]", "MRN: ___", "DOB: [**1951-4-3**]",
    "Patient: [REDACTED NAME] <NAME>", "Phone: ___-___-____", "[**2151-3-1**] [**Telephone/Fax (1) 555-123-4567**]",
    "Recommend MR. Comparison is made. MR. FURTHER STUDY", "Chest DR and CT.", "Discussed with the doctor. Heart normal.",
    "Dr. The lungs", "Patient: Rotated to the left", "Patient is a 90-year-old male, born abroad.", "Newborn, 1951 g.",
    "PA and lateral, PA view.", "Catheter tip 1234 mm; extension of the line.", "Accession number: none", "Mobile 12.03.2019",
    "St. Jude valve, Swan-Ganz", "Mild edema @ bases.", "on admission no change, 2019 film", "heart rate 120 140 160",
    "5-10-15 mm", "Mass. Nodule. Ms", "1. No effusion. 2. 120-130 degrees.",
    "Dr. ___ was notified at 10:32 AM by phone at 1530 on 5/4/2013.", "T12 fracture, compared to 2013-05-04.", "DOB ___",
    "Accession number: 12.03.2019", "ICU, MD notified. Called to SICU, RN at 10:30.", "PA View, MD aware", "Left PICC, RN aware",
    "Nurse Practitioner was notified.", "Doctor Visit", "Attending: Present", "extension 1234 mm", "Read by Radiology Team.",
    "Reviewed by the attending.", "Requested by: ED", "Exposure at 120 kVp 320 mAs 1234", "Radiologist: ___",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_each_kind_is_found(kind: str, text: str) -> None:
    assert phi_like(f"No effusion. {text}" if kind != "name after a title" else f"Clear.\n{text} .") == (kind,)


@pytest.mark.parametrize("text", CLEAN)
def test_what_is_plain_or_removed_is_none(text: str) -> None:
    assert phi_like(text) == ()


def test_a_hint_never_hides_what_its_pattern_would_find() -> None:
    texts = [text for texts in FOUND.values() for text in texts]
    found = [(rule, text) for rule in _RULES for text in texts if rule.pattern.search(text)]
    assert len(found) >= len(texts) and all(rule.hint.search(text) for rule, text in found)
    assert {rule.kind for rule in _RULES} == set(KINDS) == set(FOUND)


@pytest.mark.slow
def test_no_hit_in_the_3955_reports_of_open_i() -> None:
    if "MMCLIP_REAL_METADATA" not in os.environ:
        pytest.skip("REAL REPORTS ARE NOT TESTED: set MMCLIP_REAL_METADATA as tests/shards/test_real_metadata.py says")
    with tarfile.open(Path(os.environ["MMCLIP_REAL_METADATA"]) / "NLMCXR_reports.tgz") as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".xml")]
        reports = [ElementTree.fromstring(file.read()) for file in files if file is not None]
    texts = ["\n".join(part.text or "" for part in report.iter("AbstractText")) for report in reports]
    assert len(texts) == 3_955 and not any(map(phi_like, texts))


# -- Packing and verify ------------------------------------------------------------------------------------------------------


def records(*reports: str) -> list[Record]:
    return [
        Record(f"k{number}", np.zeros((4, 4), np.uint8), f"p{number}", f"{number}.png", report=report)
        for number, report in enumerate(reports)
    ]


def pack_to(dest: Path, of: list[Record], **changes):  # type: ignore[no-untyped-def]
    return pack(of, dest, dataset="toy", splits={"train": 1.0}, config_hash="c", patient_key=KEY, **changes)


def draw() -> tuple[np.ndarray, tuple[Box, ...]]:
    return np.zeros((4, 4), np.uint8), ()


SECRETS = ("Call Dr. Zebra at 555-123-4567.", "Clear.", "Dr. Yak was told. Dr. Xerus, too.")


def test_packing_refuses_before_it_writes_and_tells_counts_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pack with --allow-phi-like") as caught:
        pack_to(tmp_path / "set", records(*SECRETS))
    told = str(caught.value)
    assert "1 x phone number (first in record 1), 2 x name after a title (first in record 1)" in told
    assert not any(secret in told for secret in ("Zebra", "Yak", "555"))
    assert not (tmp_path / "set").exists()
    hidden = [replace(record, report="", impression=record.report) for record in records(*SECRETS)]
    with pytest.raises(ValueError, match="1 x phone number"):  # sections are stored, too
        pack_to(tmp_path / "set", hidden)


def test_the_manifest_says_what_the_scan_found_in_its_split(tmp_path: Path) -> None:
    found = pack_to(tmp_path / "set", records(*SECRETS), allow_phi_like=True)["train"]
    assert found.phi_scan == {"version": SCAN_VERSION, "phone number": 1, "name after a title": 2}
    assert load_manifest(tmp_path / "set" / "train") == found
    clean = pack(
        records(*SECRETS), tmp_path / "two", dataset="toy", splits=None, config_hash="c", patient_key=KEY, allow_phi_like=True,
        split_of_record={"k0": "train", "k1": "test", "k2": "train"},
    )["test"]  # fmt: skip
    assert clean.phi_scan == {"version": SCAN_VERSION}
    drawn = [replace(record, image=draw) for record in records(*SECRETS)]
    none = pack_to(tmp_path / "drawn", drawn)["train"]  # a program wrote these
    assert none.phi_scan is None and b"phi_scan" not in (tmp_path / "drawn" / "train" / "manifest.json").read_bytes()
    for wrong in ({"phone number": 1}, {"version": "1"}, [1]):
        with pytest.raises(ValueError, match="phi_scan must be null"):
            replace(none, phi_scan=wrong)


def test_verify_finds_what_the_manifest_does_not_allow(tmp_path: Path) -> None:
    manifest = pack_to(tmp_path / "set", records(*SECRETS), allow_phi_like=True)["train"]
    folder = tmp_path / "set" / "train"
    assert not verify(folder).findings
    save_manifest(folder, replace(manifest, phi_scan={"version": SCAN_VERSION, "phone number": 1, "name after a title": 1}))
    (finding,) = verify(folder).findings
    assert finding.problem.startswith("reports seem to identify people: 2 x name after a title: ")
    save_manifest(folder, replace(manifest, phi_scan=None))  # of a release without the scan, or of another program
    (finding,) = verify(folder).findings
    assert "1 x phone number, 2 x name after a title" in finding.problem and "Zebra" not in str(finding)
    assert not verify(folder, allow_phi_like=True).findings


def test_the_command_ends_with_one_line_and_goes_on_when_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMCLIP_PATIENT_KEY", "k" * 32)
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("a.png")
    Path("rows.jsonl").write_text('{"image": "a.png", "patient": "1", "report": "Dr. Zebra was told."}\n')
    arguments = ["jsonl", ".", "set", "--splits", "train=1"]
    for more, wanted in (([], 2), (["--allow-phi-like"], 0)):
        code, _ = call("pack", *arguments, *more)
        told = capsys.readouterr()
        assert code == wanted and "Zebra" not in told.err + told.out
        assert ("1 x name after a title (first in record 1)" in told.err) == bool(wanted)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_paths_of_ones_own_that_name_patients_are_counted_and_hashed_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("MMCLIP_PATIENT_KEY", "k" * 32)
    monkeypatch.chdir(tmp_path)
    Path("PAT77").mkdir()
    for name in ("PAT77/a.png", "b.png"):
        Image.new("L", (8, 8)).save(name)
    Path("rows.jsonl").write_text('{"image": "PAT77/a.png", "patient": "PAT77"}\n{"image": "b.png", "patient": "PAT78"}\n')
    Path("rows.csv").write_text("image,patient\nPAT77/a.png,PAT77\nb.png,PAT78\n")
    options = ["--table", "rows.csv", "--images", ".", "--image-column", "image", "--patient-column", "patient"]
    for name, more in (("plain", []), ("hashed", ["--private-paths"])):
        own = [form, *(["."] if form == "jsonl" else []), name, *(options if form == "csv" else []), "--splits", "train=1", *more]
        assert call("pack", *own)[0] == 0
    told = capsys.readouterr().out
    assert told.count("1 of 2 paths hold the patient's id") == 1
    tars = {name: Path(name, "train", "000000.tar").read_bytes() for name in ("plain", "hashed")}
    assert b"PAT77" in tars["plain"] and b"PAT7" not in tars["hashed"]
