"""Each recipe on a miniature of the published tree, with the traps that its files set."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards.datasets.chexpert import FINDINGS
from mmclip_shards.datasets.padchest import read_list
from mmclip_shards.datasets.prepared import Prepared, prepare_records
from mmclip_shards.datasets.recipe import find_recipe
from mmclip_shards.datasets.siim_acr import box_of_runs
from mmclip_shards.datasets.upstream import Row, StudyLabels, label_value, read_age, read_csv
from mmclip_shards.images import decode_image, prepare_image
from mmclip_shards.pack import pack
from mmclip_shards.schema import Box, Record
from PIL import Image

from tests import miniatures
from tests.miniatures import dicom_file, images, write

KEY = b"k" * 32
FORM = dict.fromkeys(FINDINGS)


@pytest.fixture(autouse=True)
def no_need_of_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are read without pydicom and pyarrow; test_dicom_sets_pack decodes."""
    monkeypatch.setattr("mmclip_shards.datasets.prepared.check_needs", lambda found: None)


def prepare(name: str, raw: Path, split: str | None = None, **options) -> Prepared:
    return prepare_records(name, find_recipe(name), raw, split=split, patient_key=KEY, **options)


def read(name: str, raw: Path, split: str | None = None, **options) -> list[Record]:
    return list(prepare(name, raw, split, **options).records)


def present(record: Record) -> set[str]:
    return {name for name, value in record.labels.items() if value == 1}


# -- tables of others --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,b\n1,2\n3\n", "t.csv: row 3 has 1 cells, the header 2"),
        ("a,b\nß,2\n".encode("latin-1"), "t.csv is not UTF-8"),
        (b"a,c\n1,2\n", "t.csv has no column 'b'"),
        (b"b,b\n1,2\n", "t.csv has two columns 'b'|t.csv has no column 'a'"),
        (b'a,b\n1,"2\n', "t.csv"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    if data.endswith(b'"2\n'):
        assert [row["b"] for row in read_csv(tmp_path / "t.csv", "a", "b")] == ["2"]  # the csv module ends an open quote
        return
    with pytest.raises(ValueError, match=message):
        list(read_csv(tmp_path / "t.csv", "a", "b"))


def test_a_cut_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 9999)[:60])
    with pytest.raises(ValueError, match=r"t.csv.gz cannot be unpacked .*download it again"):
        list(read_csv(tmp_path / "t.csv.gz", "a"))


def test_long_cells_with_line_breaks_are_whole(tmp_path: Path) -> None:
    text = "Line.\n" * 50_000
    (tmp_path / "t.csv").write_text(f'a,b\n"{text}",2\n')
    assert [len(row["a"]) for row in read_csv(tmp_path / "t.csv", "a")] == [len(text) - 1]


def test_label_cells() -> None:
    cells = ("1.0", "0.0", "-1.0", "", "-1", "nan")
    rows = [Row({"Edema": cell}, Path("t.csv"), number) for number, cell in enumerate((*cells, "2"), 2)]
    assert [label_value(row, "Edema") for row in rows[:-1]] == [1, 0, -1, None, -1, None]
    with pytest.raises(ValueError, match=r"t\.csv, row 8: Edema is '2'; 1\.0, 0\.0, -1\.0 or an empty cell"):
        label_value(rows[-1], "Edema")
    labels = StudyLabels(("a", "b"))
    labels.add("s", {"a": -1})
    assert labels["s"] == {"a": -1, "b": None} and labels["t"] == {} and len(labels) == 1


# -- your own files ----------------------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    miniatures.folder(tmp_path)
    found = prepare("folder", tmp_path)
    assert found.skipped == {"no image: .db": 1, "no image: no suffix": 1}
    by = {record.source: record for record in found.records}
    assert by["train/NORMAL/a.1.png"].labels == {"PNEUMONIA": 0}
    assert (by["train/PNEUMONIA/a.2.png"].labels, by["train/PNEUMONIA/a.2.png"].report) == ({"PNEUMONIA": 1}, "Opacity.")
    assert len({record.key for record in found.records}) == 4 and not any("." in record.key for record in found.records)
    assert Counter(record.split for record in read("folder", tmp_path, "official")) == {"train": 2, "test": 2}
    images(tmp_path, ["x.png"])
    assert {r.source: r for r in read("folder", tmp_path)}["x.png"].labels == {"PNEUMONIA": None}


def test_dicom_files_of_an_archive_have_no_suffix(tmp_path: Path) -> None:
    """As they are exported: numbered, or named by their UIDs, with a DICOMDIR that lists them."""
    (tmp_path / "Edema").mkdir()
    mark = bytes(128) + b"DICM"
    for name, data in {"IM0001": mark, "1.2.840.7": mark, "DICOMDIR": mark, "README": b"text", "LOCK.1": b""}.items():
        (tmp_path / "Edema" / name).write_bytes(data)
    (tmp_path / "Edema" / "1.2.840.7.txt").write_text("Oedema.")
    found = prepare("folder", tmp_path)
    assert {record.source: record.report for record in found.records} == {"Edema/1.2.840.7": "Oedema.", "Edema/IM0001": ""}
    assert found.skipped == {"no image: DICOMDIR": 1, "no image: no suffix": 1, "no image: .1": 1}


def test_jsonl(tmp_path: Path) -> None:
    miniatures.jsonl(tmp_path)
    first, second = read("jsonl", tmp_path)
    assert (first.image, first.report, first.labels, first.view) == (
        tmp_path / "i/a.png", "Clear.", {"Edema": 1, "Mass": None}, "PA",
    )  # fmt: skip
    assert (second.key, second.report, second.impression, second.boxes) == ("b", "Edema.", "Edema.", (Box("Mass", 1, 2, 3, 4),))
    assert [record.split for record in read("jsonl", tmp_path, "official")] == ["val"]
    ages = ("045Y", 58, 58.0, float("nan"), "", None)
    rows = [json.dumps({"image": f"i/{age}.png", "patient": "3", "age": age}) for age in ages]
    write(tmp_path, {"a.jsonl": "\n".join(rows)})
    assert [record.age for record in read("jsonl", tmp_path)] == [45, 58, 58, None, None, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, is no JSON"),
        ("[]", "line 2, is no object"),
        ('{"image": "a.png", "patient": "SECRET", "lables": {}}', "unknown field 'lables'; the fields are age, boxes, image"),
        ('{"image": "a.png"}', "line 2: 'patient' must be a text and be there"),
        ('{"image": "../a.png", "patient": "SECRET"}', "names an image outside"),
        ('{"image": "a.png", "patient": "SECRET", "labels": {"Edema": 2}}', "'labels' must be like"),
        ('{"image": "a.png", "patient": "SECRET", "boxes": [{"label": "Mass"}]}', "'boxes' must be a list of"),
        ('{"image": "a.png", "patient": "SECRET", "sections": {"findings": 1}}', "'sections' must be like"),
    ],
)
def test_jsonl_names_the_line_and_the_field_and_no_content(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, {"a.jsonl": '{"image": "b.png", "patient": "1"}\n' + line + "\n"})
    with pytest.raises(ValueError, match=message) as error:
        read("jsonl", tmp_path)
    assert "SECRET" not in str(error.value)
    with pytest.raises(ValueError, match=r"holds no \*.jsonl"):
        read("jsonl", tmp_path.parent)


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason='PARQUET IS NOT TESTED: pip install "mmclip-dist[parquet]"')
    miniatures.parquet(tmp_path)
    first, second = read("parquet", tmp_path)
    assert (first.image, first.report, first.source) == (miniatures.embedded_png(), "Clear.", "part/1")
    assert (second.image, second.report) == (tmp_path / "i/b.png", "")
    (tmp_path / "part.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"part\.parquet is no Parquet file"):
        read("parquet", tmp_path)


# -- NIH ChestX-ray14 --------------------------------------------------------------------------------------------------------

@pytest.fixture
def nih(tmp_path: Path) -> Path:
    return miniatures.nih(tmp_path)


def test_nih(nih: Path) -> None:
    records = read("nih", nih, "official")
    assert [record.split for record in records] == ["train", "train", "test", "test"]
    assert [present(r) for r in records] == [
        {"Cardiomegaly"}, {"Cardiomegaly", "Emphysema"}, set(), {"Infiltration", "Pleural_Thickening"},
    ]  # fmt: skip
    assert records[2].labels == dict.fromkeys(records[0].labels, 0)  # No Finding is no label
    assert records[3].image == nih / "images_002/images/00013118_008.png"
    assert [box.label for box in records[3].boxes] == ["Atelectasis", "Infiltration"]
    assert records[3].boxes[1] == Box("Infiltration", 1, 2, 3, 4)
    assert [(r.patient, r.view) for r in records] == [("1", "PA"), ("1", "PA"), ("2", "AP"), ("13118", "PA")]
    assert [record.age for record in records] == [57, 58, 80, 69]
    assert not any("0000" in record.key + record.source for record in records)
    assert [record.split for record in read("nih", nih, "mrm")] == ["train", "train", "val", "test"]


def test_nih_of_2017_has_an_empty_last_column_and_may_lie_flat(nih: Path) -> None:
    table = nih / "Data_Entry_2017_v2020.csv"
    (nih / "Data_Entry_2017.csv").write_text("".join(f"{line},\n" for line in table.read_text().splitlines()))
    table.unlink()
    for path in nih.glob("images_*/images/*"):
        (nih / "images").mkdir(exist_ok=True)
        path.rename(nih / "images" / path.name)
    records = read("nih", nih)
    assert len(records) == 4 and all(record.image.is_file() and record.split is None for record in records)


def test_nih_without_its_lists_says_what_to_do(nih: Path) -> None:
    for name in ("train_val_list.txt", "test_list.txt"):
        (nih / name).unlink()
    with pytest.raises(ValueError, match=r"not in split official: 4.*needs its list in the raw folder; or .* --splits"):
        read("nih", nih, "official")
    (nih / "Data_Entry_2017_v2020.csv").unlink()
    with pytest.raises(ValueError, match=r"holds no Data_Entry_2017_v2020.csv or Data_Entry_2017.csv: name the folder"):
        read("nih", nih)


# -- Open-i ------------------------------------------------------------------------------------------------------------------


def test_openi(tmp_path: Path) -> None:
    miniatures.openi(tmp_path)
    found = prepare("openi", tmp_path)
    first, second, third = found.records
    assert found.skipped == {"a report without images": 1, "a report that is no XML": 1}
    assert first.report == "There are no ___ of an effusion.\nNormal chest x-___."
    assert (first.patient, second.patient, first.key) == ("1", "1", "CXR1_1_IM-0001-3001")
    assert first.image == tmp_path / "NLMCXR_png/CXR1_1_IM-0001-3001.png" and not second.image.exists()
    assert third.labels == {"Mass": 1, "Breast Mass": 1} and first.labels == {"Mass": 0, "Breast Mass": 0}
    assert (third.report, third.findings, third.image.is_file()) == ("Mass.", None, True)
    assert read("openi", tmp_path, sections=("indication",))[0].report == "Positive TB test"
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as tar:
        tar.add(tmp_path / "ecgen-radiology", "ecgen-radiology")
    assert [r.report for r in read("openi", tmp_path)] == [r.report for r in found.records]


# -- CheXpert, CheXpert Plus, BRAX -------------------------------------------------------------------------------------------

@pytest.fixture
def chexpert(tmp_path: Path) -> Path:
    return miniatures.chexpert(tmp_path)


def test_chexpert(chexpert: Path) -> None:
    records = read("chexpert", chexpert, "official")
    assert Counter(record.split for record in records) == {"train": 3, "val": 1, "test": 2}
    assert records[0].labels == FORM | {"No Finding": 1, "Pneumothorax": 0, "Support Devices": 1}
    assert records[1].labels["Cardiomegaly"] == -1 and records[1].labels["No Finding"] is None  # uncertain is kept
    assert records[2].labels == FORM
    assert [record.view for record in records] == ["AP", "AP", "LATERAL", "PA", "FRONTAL", "LATERAL"]
    assert [record.patient for record in records[:3]] == ["patient00001", "patient00002", "patient00002"]
    assert records[0].image == chexpert / "train/patient00001/study1/view1_frontal.jpg"  # without the published folder's name
    assert records[4].labels == records[5].labels == dict.fromkeys(FINDINGS, 0) | {"Support Devices": 1}  # of the study
    assert not any("patient" in record.key + record.source for record in records)
    assert len({record.key for record in records}) == 6


def test_chexpert_takes_a_list_such_as_5x200(chexpert: Path) -> None:
    write(chexpert, {"splits/5x200/test.txt": "Path\nother/patient00002/study2/view1_frontal.jpg,1\n"})
    with pytest.raises(ValueError, match="not in split 5x200: 6"):
        read("chexpert", chexpert, "5x200")
    write(chexpert, {"splits/5x200/test.txt": "Path\ntrain/patient00002/study2/view1_frontal.jpg,1\n"})
    (record,) = read("chexpert", chexpert, "5x200")
    assert record.split == "test" and record.labels["Cardiomegaly"] == -1


def test_chexpert_plus(tmp_path: Path) -> None:
    miniatures.chexpert_plus(tmp_path)
    first, second, third = read("chexpert-plus", tmp_path, "official")
    assert first.report == "1. Edema. 2. No pneumothorax." and first.findings is None
    assert first.labels == FORM | {"Edema": 1, "Pneumothorax": 0} and second.labels == {}
    assert second.report == "Clear\nNormal"
    assert (first.split, third.split, second.view) == ("train", "val", "LATERAL")
    assert first.image.suffix == ".png" and first.image.is_file() and not third.image.is_file()
    assert first.patient == "patient42142"  # as in CheXpert: one key keeps a patient in one split of both
    assert "patient" not in first.key + first.source


def test_brax(tmp_path: Path) -> None:
    miniatures.brax(tmp_path)
    (record,) = read("brax", tmp_path)
    assert record.labels == FORM | {"Edema": 1, "Consolidation": -1, "Pneumonia": 0}
    assert (record.view, record.patient, record.age) == ("LATERAL", "77", 40) and "77" not in record.source.split("/")[0]
    assert record.image == tmp_path / "images/id_77/Study_1.2.3/Series_4.5/image-6.7.png"
    table = tmp_path / "master_spreadsheet_update.csv"
    table.write_text(table.read_text().replace(",F,40,", ",F,85 or more,"))
    assert read("brax", tmp_path)[0].age == 85


# -- MIMIC-CXR ---------------------------------------------------------------------------------------------------------------

@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    return miniatures.mimic(tmp_path)


@pytest.mark.parametrize("name", ["mimic-cxr-jpg", "mimic-cxr"])
def test_mimic(mimic: Path, name: str) -> None:
    found = prepare(name, mimic, "official")
    records = list(found.records)
    assert [record.split for record in records] == ["train", "train", "train", "val", "test", "test"]
    assert [record.view for record in records] == ["PA", "LATERAL", "AP", "AP", "AP", None]
    assert [record.labels.get("Edema") for record in records] == [1, 1, -1, 0, None, None]  # of the study
    assert records[4].labels == FORM and records[5].labels == {}
    assert records[0].findings == "Cardiac size cannot be evaluated. Large left pleural effusion is new."
    assert records[0].report == f"{records[0].findings}\nLarge left pleural effusion"
    assert records[2].report == records[0].report  # without the addendum above it
    assert (records[3].report, records[4].report, records[5].report) == ("No change.", "Frontal view. The heart is large.", "")
    assert (found.without_report, found.same_report) == (1, 2)
    assert not any("1000" in r.key + r.source or "5041" in r.key + r.source for r in records)
    assert all(record.image.suffix == (".jpg" if name == "mimic-cxr-jpg" else ".dcm") for record in records)
    assert read(name, mimic, sections=("addendum",))[2].report == "the effusion is on the right."


def test_mimic_reports_may_be_the_archive_and_without_a_split_file_patients_are_split(mimic: Path) -> None:
    wanted = [record.report for record in read("mimic-cxr-jpg", mimic)]
    with zipfile.ZipFile(mimic / "mimic-cxr-reports.zip", "w") as archive:
        for path in sorted(mimic.glob("mimic-cxr-reports/files/*/*/*.txt")):
            archive.write(path, path.relative_to(mimic / "mimic-cxr-reports").as_posix())
            path.unlink()
    assert [record.report for record in read("mimic-cxr-jpg", mimic)] == wanted
    (mimic / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"not in split official: 6.*--splits"):
        read("mimic-cxr", mimic, "official")
    assert len(read("mimic-cxr", mimic)) == 6


# -- PadChest ----------------------------------------------------------------------------------------------------------------


def test_padchest(tmp_path: Path) -> None:
    miniatures.padchest(tmp_path)
    found = prepare("padchest", tmp_path)
    assert found.skipped == {"labelled suboptimal study": 1, "projection EXCLUDE": 1, "labelled exclude": 1}
    first, second, third, fourth = found.records
    assert first.labels == {"mass": 0, "pneumonia": 0, "breast mass": 0}
    assert present(second) == {"mass", "pneumonia"} and present(third) == {"breast mass"}  # whole names
    assert fourth.labels == {"mass": None, "pneumonia": None, "breast mass": None}
    assert [record.view for record in found.records] == ["PA", "LATERAL", "AP SUPINE", None]
    assert (first.report, third.report) == ("sin hallazg patolog .", "")
    assert third.image == tmp_path / "54/3_c.png"


def test_padchest_gives_years_of_birth_and_of_the_study(tmp_path: Path) -> None:
    header = ",ImageID,ImageDir,StudyDate_DICOM,PatientID,PatientBirth,Projection,Report,Labels"
    rows = ["0,1_a.png,0,20140915,839,1930.0,PA,x,['normal']", "1,2_b.png,0,20140915,840,,PA,x,['normal']"]
    write(tmp_path, {"PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv": "\n".join([header, *rows])})
    assert [record.age for record in read("padchest", tmp_path)] == [84, None]


@pytest.mark.parametrize(
    ("cell", "age"), [("58", 58), ("058Y", 58), ("58.0", 58), ("018M", 1), ("003D", 0), ("414", None), ("", None), ("old", None)]
)
def test_ages_are_whole_years(cell: str, age: int | None) -> None:
    assert read_age(cell) == age


def test_a_list_of_labels_is_a_python_list_and_nothing_else() -> None:
    assert read_list("['a', ' b', '']") == {"a", "b"}
    for cell in ("['C0034069' 'C0742362'", "__import__('os')", "('a',)"):
        with pytest.raises(ValueError, match="a cell of Labels is no list"):
            read_list(cell)


def test_padchest_images_of_12_bits_in_16_keep_their_grey_levels(tmp_path: Path) -> None:
    deep = (np.arange(256, dtype=np.uint16) * 16).reshape(16, 16)
    images(tmp_path, ["0/1_a.png"], deep)
    header = ",ImageID,ImageDir,PatientID,Projection,Report,Labels"
    write(tmp_path, {"PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv": f"{header}\n0,1_a.png,0,839,PA,x,['normal']\n"})
    (record,) = read("padchest", tmp_path)
    np.testing.assert_array_equal(np.asarray(decode_image(record.image)), np.arange(256).reshape(16, 16))


# -- RSNA, SIIM-ACR, VinDr-CXR, CANDID-PTX: rows that share an image ---------------------------------------------------------


def test_rsna(tmp_path: Path) -> None:
    """The rows are real."""
    miniatures.rsna(tmp_path)
    first, second = read("rsna", tmp_path)
    assert (first.labels, first.boxes, first.patient) == ({"Pneumonia": 0}, (), "13")
    assert (second.labels, second.patient) == ({"Pneumonia": 1}, "00436515-870c-4b36-a041-de91049b9ab4")
    assert second.boxes == (Box("Pneumonia", 264, 152, 213, 379), Box("Pneumonia", 562, 152, 256, 453))
    assert first.image == tmp_path / "stage_2_train_images/0004cfab-14fd-4e49-80ba-63a80b6bddd6.dcm"


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("rsna", {"stage_2_train_labels.csv": "patientId,x,y,width,height,Target\na,1,2,x,4,1\n"}, "row 2: x, y, width, height"),
        ("rsna", {"stage_2_train_labels.csv": "patientId,x,y,width,height,Target\na,1,2,0,4,1\n"}, "row 2: box .* above 0"),
        ("rsna", {"stage_2_train_labels.csv": "patientId,x,y,width,height,Target\na,,,,,0\n",
                  "pneumonia-challenge-dataset-mappings_2018.json": "[{"}, "2018.json is cut or is not JSON"),
        ("chexpert-plus", {"report_fixed.json": "{}x\n"}, "report_fixed.json, line 1, is no JSON: download it again"),
        ("rexgradient", {"metadata/train_metadata_view_position.json": "{"}, "position.json is cut or is not JSON"),
        ("padchest", {"PADCHEST_chest_x_ray_images_labels_160K.csv": "ImageID,ImageDir,PatientID,Projection,Report,Labels\n"},
         "the recipe found no images in"),
        ("siim-acr", {}, "holds no stage_2_train.csv or train-rle.csv: name the folder that was downloaded, unpacked"),
        ("openi", {}, "holds no NLMCXR_reports.tgz or ecgen-radiology"),
        ("covidx", {}, "holds no train.txt: name the folder"),
    ],
)  # fmt: skip
def test_damaged_trees_are_one_line(tmp_path: Path, name: str, files: Mapping[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(name, write(tmp_path, files))
    assert "\n" not in str(error.value)


def test_siim(tmp_path: Path) -> None:
    miniatures.siim_acr(tmp_path)
    folder, names = tmp_path / "dicom-images-train/study/series", miniatures.SIIM_NAMES
    first, second = read("siim-acr", tmp_path)
    assert (first.labels, first.boxes, first.image) == ({"Pneumothorax": 0}, (), folder / f"{names[0]}.dcm")
    assert second.labels == {"Pneumothorax": 1}
    assert second.boxes == (Box("Pneumothorax", 1, 2, 2, 3), Box("Pneumothorax", 0, 0, 1, 1))
    assert first.key != second.key and "." not in first.key + second.key
    (tmp_path / "train-rle.csv").rename(tmp_path / "stage_2_train.csv")
    assert len(read("siim-acr", tmp_path)) == 2


def test_a_box_holds_the_mask_that_its_run_lengths_draw() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        mask = np.zeros((32, 32), bool)  # [y, x]
        y, x, height, width = (int(generator.integers(low, high)) for low, high in ((0, 16), (0, 16), (1, 17), (1, 17)))
        mask[y : y + height, x : x + width] = generator.random((height, width)) < 0.5
        if not mask.any():
            continue
        flat = np.flatnonzero(mask.T.ravel())  # down the columns
        starts = flat[np.insert(np.diff(flat) > 1, 0, True)]
        ends = flat[np.append(np.diff(flat) > 1, True)] + 1
        skips = starts - np.insert(ends[:-1], 0, 0)  # from the end of the run before
        cell = " ".join(f"{skip} {length}" for skip, length in zip(skips, ends - starts, strict=True))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        wanted = Box("a", columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
        assert box_of_runs(cell, "a", side=32) == wanted
    assert box_of_runs("30 4", "a", side=32) == Box("a", 0, 0, 2, 32)  # a run that goes on in the next column


@pytest.mark.parametrize("cell", ["1 2 3", "a b", "-3 4", "", "1048570 10"])
def test_run_lengths_that_are_none_are_refused(cell: str) -> None:
    with pytest.raises(ValueError, match="a cell of EncodedPixels"):
        box_of_runs(cell, "a")


def test_vindr(tmp_path: Path) -> None:
    miniatures.vindr_cxr(tmp_path)
    a, b, c = read("vindr-cxr", tmp_path, "official")
    assert present(a) == {"Atelectasis", "Nodule/Mass"}  # one reader is enough, whatever another says
    assert b.labels == {"Atelectasis": 0, "Nodule/Mass": 0, "Other diseases": 0}
    assert present(c) == {"Other diseases"} and c.boxes[0].label == "Other diseases"
    assert a.boxes == (Box("Nodule/Mass", 10, 20, 30, 40), Box("Atelectasis", 1, 2, 2, 2.5)) and b.boxes == ()
    assert [(r.split, r.image.name) for r in (a, c)] == [("train", "a.dicom"), ("test", "c.dicom")]


def test_vindr_of_kaggle(tmp_path: Path) -> None:
    table = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n"
    table += "50a4,No finding,14,R11,,,,\n50a4,No finding,14,R7,,,,\n9a50,Cardiomegaly,3,R10,691,1375,1653,1831\n"
    write(tmp_path, {"train.csv": table})
    first, second = read("vindr-cxr", tmp_path, "official")
    assert (first.labels, second.labels) == ({"Cardiomegaly": 0}, {"Cardiomegaly": 1})
    assert second.boxes == (Box("Cardiomegaly", 691, 1375, 962, 456),)


def test_candid(tmp_path: Path) -> None:
    miniatures.candid_ptx(tmp_path)
    records = read("candid-ptx", tmp_path)
    assert [r.labels for r in records] == [
        {"Pneumothorax": 1, "Chest Tube": 1}, {"Pneumothorax": 0, "Chest Tube": 0}, {"Pneumothorax": None, "Chest Tube": 0},
    ]  # fmt: skip
    assert [record.image.name for record in records] == ["1.2.3.dcm", "1.2.4", "1.2.5.dcm"]
    assert records[0].report == "Small apical." and len({record.key for record in records}) == 3


def test_a_damaged_dicom_file_is_a_bad_image_and_never_ends_a_pack(tmp_path: Path) -> None:
    """Without this, 70 of 1,379 damaged files of pydicom's ended a pack by other errors than those of a bad image."""
    pytest.importorskip("pydicom", reason='DICOM IS NOT TESTED: pip install "mmclip-dist[dicom]"')
    dicom_file(tmp_path / "a.dcm", "MONOCHROME2", np.arange(64, dtype=np.uint8).reshape(8, 8))
    whole = (tmp_path / "a.dcm").read_bytes()
    generator = np.random.default_rng(0)
    cut = [whole[:length] for length in range(132, len(whole), 3)]
    changed = [bytearray(whole) for _ in range(200)]
    for data in changed:
        for place in generator.integers(132, len(whole) - 64, 4):
            data[place] = generator.integers(256)
    refused = 0
    for data in [*cut, *map(bytes, changed)]:
        try:
            prepare_image(data, 8)
        except ValueError:
            refused += 1
    assert len(cut) < refused + 1 < len(cut) + 200


def test_dicom_sets_pack(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason='DICOM IS NOT TESTED: pip install "mmclip-dist[dicom]"')
    ramp = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    for name, photometric in (("a", "MONOCHROME2"), ("b", "MONOCHROME1")):
        dicom_file(tmp_path / "stage_2_train_images" / f"{name}.dcm", photometric, ramp)
    (tmp_path / "stage_2_train_images" / "c.dcm").write_bytes((tmp_path / "stage_2_train_images" / "a.dcm").read_bytes()[:600])
    write(tmp_path, {"stage_2_train_labels.csv": "patientId,x,y,width,height,Target\na,8,16,32,8,1\nb,,,,,0\nc,,,,,0\n"})
    found = prepare("rsna", tmp_path)
    manifests = pack(
        found.records, tmp_path / "set", dataset="rsna", splits={"train": 1.0}, config_hash=found.config_hash, patient_key=KEY,
        short_side=32, max_bad_fraction=0.34,
    )  # fmt: skip
    assert manifests["train"].samples == 2
    (bad,) = (json.loads(line) for line in (tmp_path / "set/train/quarantine.jsonl").read_text().splitlines())
    assert bad["key"] == "c" and "DICOM" in bad["reason"] and str(tmp_path) not in bad["reason"]
    with tarfile.open(tmp_path / "set/train/000000.tar") as tar:
        data = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert b"SECRET" not in b"".join(data.values())
    a, b = (np.asarray(Image.open(io.BytesIO(data[f"{name}.png"])), int) for name in "ab")
    assert a.shape == (32, 32) and a[0, 0] < 10 and a[0, -1] > 240
    assert np.abs(a + b - 255).max() <= 1  # MONOCHROME1 is inverted
    assert json.loads(data["a.json"])["boxes"] == [{"label": "Pneumonia", "x": 4.0, "y": 8.0, "width": 16.0, "height": 4.0}]


# -- COVIDx, ReXGradient, ROCOv2 ---------------------------------------------------------------------------------------------


def test_covidx(tmp_path: Path) -> None:
    """The lists have no header: their first line is an image, too."""
    miniatures.covidx(tmp_path)
    found = prepare("covidx", tmp_path, "official")
    assert found.skipped == {"class odd": 1}
    assert [(record.split, record.labels) for record in found.records] == [
        ("train", {"COVID-19": 1}), ("train", {"COVID-19": 0}), ("train", {"COVID-19": 1, "Pneumonia": 1}),
        ("val", {"COVID-19": 0, "Pneumonia": 0}), ("test", {"COVID-19": 0, "Pneumonia": 1}),
    ]  # fmt: skip
    assert found.records[0].patient != found.records[1].patient  # number 3 of two sources
    assert found.records[0].image == tmp_path / "train/a.jpg"
    assert not any("RICORD" in record.key + record.source for record in found.records)  # such names hold the patient
    write(tmp_path, {"splits/mavl/test.txt": "3 a.jpg positive cohen\n"})
    with pytest.raises(ValueError, match="not in split mavl"):
        read("covidx", tmp_path, "mavl")


def test_rexgradient(tmp_path: Path) -> None:
    miniatures.rexgradient(tmp_path)
    found = prepare("rexgradient", tmp_path, "official")
    assert found.skipped == {"a study without images": 1, "images without a study": 1}
    assert Counter(record.split for record in found.records) == {"train": 2, "val": 2, "test": 2}
    first, second = found.records[:2]
    assert (first.report, first.view, second.view) == ("Clear. Stable.\nNormal.", "PA", None)
    assert first.image == tmp_path / "deid_png/PATIENT9/s1/studies/1.2/series/3.4/instances/5.6.png"
    assert (first.patient, first.age) == ("PATIENT9", 7) and "PATIENT9" not in first.key + first.source
    assert first.key != second.key  # whose names differ only after a dot


def test_rocov2(tmp_path: Path) -> None:
    miniatures.rocov2(tmp_path)
    records = read("rocov2", tmp_path, "official")
    assert [(r.split, r.report) for r in records] == [("train", "CT, axial."), ("val", "CT, axial."), ("test", "CT, axial.")]
    assert records[1].image == tmp_path / "valid/ROCOv2_2023_valid_000001.jpg"
