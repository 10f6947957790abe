"""What recipes say of published trees that are damaged or odd: one line that names the file and the row, or a count; never a
traceback, a wrong label, or a path that holds a patient's id."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards.datasets.prepared import Prepared, describe, prepare_records
from mmclip_shards.datasets.recipe import find_recipe
from mmclip_shards.datasets.table import read_table
from mmclip_shards.datasets.upstream import read_csv
from mmclip_shards.pack import pack
from mmclip_shards.schema import Record
from mmclip_shards.split import hash_patient

from tests.miniatures import MINIATURES, NIH_HEADER, call, dicom_file, images, write

KEY = b"k" * 32
METADATA, LABELS = "mimic-cxr-2.0.0-metadata.csv.gz", "mimic-cxr-2.0.0-chexpert.csv.gz"
PATIENTS = ("10000032", "patient0", "PATIENT9", "00013118", "id_77")


@pytest.fixture(autouse=True)
def no_need_of_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmclip_shards.datasets.prepared.check_needs", lambda found: None)


def prepare(name: str, raw: Path, split: str | None = None) -> Prepared:
    return prepare_records(name, find_recipe(name), raw, split=split, patient_key=KEY)


def change(path: Path, old: str, new: str) -> None:
    """Replace a text that is there once or more; the file may be gzip."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    assert old in text
    changed = text.replace(old, new).encode()
    path.write_bytes(gzip.compress(changed) if path.suffix == ".gz" else changed)


def damaged_gzip(raw: Path) -> None:
    data = bytearray((raw / METADATA).read_bytes())
    data[60:90] = bytes(byte ^ 255 for byte in data[60:90])
    (raw / METADATA).write_bytes(data)


def archive(raw: Path, prefix: str = "", damage: bool = False) -> None:
    """The reports of the MIMIC miniature as mimic-cxr-reports.zip."""
    with zipfile.ZipFile(raw / "mimic-cxr-reports.zip", "w") as packed:
        for path in sorted(raw.glob("mimic-cxr-reports/files/*/*/*.txt")):
            packed.write(path, prefix + path.relative_to(raw / "mimic-cxr-reports").as_posix())
    if damage:
        data = (raw / "mimic-cxr-reports.zip").read_bytes()
        (raw / "mimic-cxr-reports.zip").write_bytes(data.replace(b"FINDINGS: ", b"findings: "))


def openi_archive(raw: Path, spoil: Callable[[bytes], bytes]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        noise = np.random.default_rng(0).integers(97, 122, 200_000, dtype=np.uint8).tobytes()
        entry = tarfile.TarInfo("ecgen-radiology/9.xml")
        entry.size = len(noise)
        packed.addfile(entry, io.BytesIO(noise))
    (raw / "NLMCXR_reports.tgz").write_bytes(spoil(buffer.getvalue()))


def lists(raw: Path, data: bytes) -> None:
    (raw / "train_val_list.txt").write_bytes(data)


TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
VIEWS = "metadata/train_metadata_view_position.json"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("mimic-cxr-jpg", damaged_gzip, r"metadata\.csv\.gz cannot be unpacked \(.*\): download it again"),
        ("mimic-cxr-jpg", lambda raw: (raw / "mimic-cxr-reports.zip").write_bytes(b"x"),
         r"reports\.zip is cut or is no zip archive"),
        ("mimic-cxr-jpg", lambda raw: archive(raw, damage=True), r"mimic-cxr-reports\.zip is damaged: download it again"),
        ("mimic-cxr-jpg", lambda raw: archive(raw, "mimic-cxr-reports/"), r"mimic-cxr-reports\.zip holds no files/"),
        ("mimic-cxr-jpg", lambda raw: change(raw / LABELS, "-1.0", "-2.0"),
         r"chexpert\.csv\.gz, row 3: Edema is '-2\.0'; 1\.0, 0\.0"),
        ("mimic-cxr", lambda raw: change(raw / "cxr-record-list.csv.gz", "files/p19/", "../p19/"),
         r"row 6: path: .* leads out of"),
        ("chexpert", lambda raw: change(raw / "train.csv", "CheXpert-v1.0-small/train/patient00001/study1/", ""),
         r"row 2: Path must be"),
        ("chexpert", lambda raw: change(raw / "train.csv", "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg", ""),
         r"train\.csv, row 2: Path: the image's path is empty"),
        ("chexpert", lambda raw: change(raw / "valid.csv", "1.0", "yes"), r"valid\.csv, row 2: Support Devices is 'yes'"),
        ("chexpert-plus", lambda raw: change(raw / "report_fixed.json", "Fracture", "Fractures"),
         r"line 1, lacks path_to_image or labels"),
        ("chexpert-plus", lambda raw: change(raw / "report_fixed.json", "null", "2"), r"report_fixed\.json, line 1, lacks"),
        ("chexpert-plus", lambda raw: (raw / "report_fixed.json").write_text("[1]\n"), r"report_fixed\.json, line 1, lacks"),
        ("chexpert-plus", lambda raw: change(raw / "df_chexpert_plus_240401.csv", "valid/patient64541/study1/", ""),
         r"row \d: path_to_image must be a path of 2 folders"),
        ("nih", lambda raw: lists(raw, b"\xff\xfe1\x00"),
         r"train_val_list\.txt is not UTF-8 .*: download it again, or convert it"),
        ("nih", lambda raw: lists(raw, b"00000001_000.png\n00000002_000.png\n"),
         r"test_list\.txt, line 1, names an image of train_val"),
        ("nih", lambda raw: change(raw / "BBox_List_2017.csv", "1,2,3,4", "1,2,0,4"),
         r"BBox_List_2017\.csv, row 3: box .* above 0"),
        ("nih", lambda raw: change(raw / "BBox_List_2017.csv", "1,2,3,4", "1,x,3,4"),
         r"BBox_List_2017\.csv, row 3: x, y, w, h are not"),
        ("openi", lambda raw: openi_archive(raw, lambda data: data[: len(data) // 2]), r"NLMCXR_reports\.tgz is cut or damaged"),
        ("openi", lambda raw: openi_archive(raw, lambda data: data[:50_000] + bytes(40) + data[50_040:]),
         r"\.tgz is cut or damaged"),
        ("openi", lambda raw: openi_archive(raw, lambda data: b"no"),
         r"NLMCXR_reports\.tgz is cut or damaged: download it again"),
        ("padchest", lambda raw: change(raw / TABLE, "\"['breast mass']\"", "['breast' 'mass']"),
         r"row 4: a cell of Labels is no list"),
        ("padchest", lambda raw: change(raw / TABLE, "\"['breast mass']\"", "[['breast mass']]"),
         r"row 4: a cell of Labels is no list"),
        ("rsna", lambda raw: change(raw / "stage_2_train_labels.csv", ",1\n", ",2\n"), r"row 3: Target is '2'"),
        ("rsna", lambda raw: (raw / MAPPING).write_text('[{"a": 1}]'), r"2018\.json is no list of subset_img_id and img_id"),
        ("rsna", lambda raw: (raw / MAPPING).write_text('{"a": 1}'), r"2018\.json is no list of subset_img_id and img_id"),
        ("siim-acr", lambda raw: change(raw / "train-rle.csv", ",0 1\n", ",0 1 2\n"),
         r"train-rle\.csv, row 4: a cell of EncodedPixels"),
        ("siim-acr", lambda raw: change(raw / "train-rle.csv", ",0 1\n", ",5 0\n"),
         r"train-rle\.csv, row 4: a cell of EncodedPixels"),
        ("vindr-cxr", lambda raw: change(raw / "annotations/image_labels_train.csv", "a,R2,1", "a,R2,x"),
         r"row 3: Atelectasis is 'x'"),
        ("vindr-cxr", lambda raw: change(raw / "annotations/annotations_train.csv", "10,20,40,60", "40,20,10,60"),
         r"row 2: box .* above 0"),
        ("rexgradient", lambda raw: change(raw / VIEWS, ', null]', "]"),
         r"position\.json: the study of .*csv, row 2 must have ImagePath"),
        ("rexgradient", lambda raw: change(raw / VIEWS, "ImageView", "View"),
         r"position\.json: the study of .*csv, row 2 must have"),
        ("rexgradient", lambda raw: change(raw / VIEWS, "../deid_png/PATIENT9/s1/", "../"),
         r"position\.json: the study of .*row 2 must"),
        ("rexgradient", lambda raw: (raw / VIEWS).write_text("[1]"), r"position\.json holds no object of studies"),
        ("rexgradient", lambda raw: change(raw / VIEWS, "/s1/", "/../../../s1/"), r"record 1 of the recipe: .* leads out of"),
        ("brax", lambda raw: change(raw / "master_spreadsheet_update.csv", "images/id_77/Study_1.2.3/Series_4.5/image-6.7.png",
           ""),
         r"master_spreadsheet_update\.csv, row 2: PngPath: the image's path is empty"),
        ("covidx", lambda raw: (raw / "test.txt").unlink(), r"holds no test\.txt: name the folder"),
        ("folder", lambda raw: (raw / "train/PNEUMONIA/a.2.txt").write_bytes(b"Coraz\xf3n"), r"a\.2\.txt is not UTF-8"),
    ],
)  # fmt: skip
def test_a_damaged_tree_is_told_in_one_line(tmp_path: Path, name: str, spoil: Callable[[Path], object], message: str) -> None:
    MINIATURES[name](tmp_path)
    prepare(name, tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        prepare(name, tmp_path)
    told = str(error.value).replace(str(tmp_path), "")
    assert "\n" not in told and not any(patient in told for patient in PATIENTS)


def test_lists_of_nih_may_begin_with_a_mark_and_end_lines_as_windows_does(tmp_path: Path) -> None:
    MINIATURES["nih"](tmp_path)
    (tmp_path / "train_val_list.txt").write_bytes(b"\xef\xbb\xbf00000001_000.png\r\n00000001_001.png\r\n")
    assert [record.split for record in prepare("nih", tmp_path, "official").records] == ["train", "train", "test", "test"]


def test_nih_labels_are_stripped_and_boxes_without_an_image_are_counted(tmp_path: Path) -> None:
    MINIATURES["nih"](tmp_path)
    change(tmp_path / "Data_Entry_2017_v2020.csv", "Cardiomegaly|Emphysema", "Cardiomegaly | Emphysema|")
    change(tmp_path / "BBox_List_2017.csv", "00013118_008.png,Infiltrate", "00000009_000.png,Infiltrate")
    found = prepare("nih", tmp_path)
    assert {name for name, value in found.records[1].labels.items() if value} == {"Cardiomegaly", "Emphysema"}
    assert found.skipped == {"boxes of an image that is not in the table": 1}


def test_openi_headings_of_two_spellings_are_one_and_what_nobody_indexed_is_unknown(tmp_path: Path) -> None:
    MINIATURES["openi"](tmp_path)
    change(tmp_path / "ecgen-radiology/10.xml", "<major>Mass/breast/left",
           "<major>Lymph nodes/x</major><major>Subcutaneous  Emphysema")
    change(tmp_path / "ecgen-radiology/1.xml", "<major>normal", "<major>No Indexing")
    records = {record.patient: record for record in prepare("openi", tmp_path).records}
    assert records["10"].labels == {"Lymph Nodes": 1, "Subcutaneous Emphysema": 1, "Breast Mass": 1}
    assert set(records["1"].labels.values()) == {None}


def test_named_lists_may_hold_longer_paths_and_names_without_an_image_are_counted(tmp_path: Path) -> None:
    MINIATURES["chexpert"](tmp_path)
    write(tmp_path, {"splits/5x200/test.txt": "Path\nCheXpert-v1.0/train/patient00002/study2/view1_frontal.jpg\n"
                                              "CheXpert-v1.0/train/patient00009/study1/view1_frontal.jpg\n"})  # fmt: skip
    found = prepare("chexpert", tmp_path, "5x200")
    assert [(record.split, record.labels["Cardiomegaly"]) for record in found.records] == [("test", -1)]
    assert found.skipped["named in split 5x200, but not among the images"] == 2  # with the header
    MINIATURES["nih"](tmp_path / "nih")
    write(tmp_path / "nih", {"splits/mrm/train_list.txt": "images_001/images/00000001_000.png 1\n000_000.png\n"})
    assert [record.split for record in prepare("nih", tmp_path / "nih", "mrm").records].count("train") == 1
    (tmp_path / "nih/splits/mrm/train_list.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(ValueError, match=r"train_list\.txt is not UTF-8"):
        prepare("nih", tmp_path / "nih", "mrm")


def test_chexpert_test_images_without_labels_of_their_study_are_left_out_and_counted(tmp_path: Path) -> None:
    MINIATURES["chexpert"](tmp_path)
    (tmp_path / "groundtruth.csv").unlink()
    assert prepare("chexpert", tmp_path).skipped == {"a test image whose study is not in groundtruth.csv": 2}


def test_what_is_printed_counts_images_of_which_no_label_is_known(tmp_path: Path) -> None:
    MINIATURES["mimic-cxr-jpg"](tmp_path)
    (tmp_path / LABELS).unlink()
    (line,) = describe(prepare("mimic-cxr-jpg", tmp_path))
    assert line == "6 images; 1 without a report, 2 with that of another image; 6 without labels"


def test_a_mask_of_candid_counts_wherever_its_row_stands(tmp_path: Path) -> None:
    MINIATURES["candid-ptx"](tmp_path)
    change(tmp_path / "Pneumothorax_reports.csv", "1.2.3,Small apical.,5 6", "1.2.3,Small apical.,-1")
    assert prepare("candid-ptx", tmp_path).records[0].labels["Pneumothorax"] == 1


def test_a_source_of_covidx_is_one_however_it_is_spelt(tmp_path: Path) -> None:
    MINIATURES["covidx"](tmp_path)
    change(tmp_path / "test.txt", "6 e.png pneumonia RSNA", "3 e.png pneumonia rnsa")
    by = {Path(record.image).name: record.patient for record in prepare("covidx", tmp_path).records}
    assert by["b.png"] == by["e.png"] != by["a.jpg"]


def test_a_patient_of_nih_is_the_same_in_rsna(tmp_path: Path) -> None:
    """Else one key would not keep him in one split of both."""
    MINIATURES["rsna"](tmp_path)
    (record, _) = prepare("rsna", tmp_path).records
    here, there = find_recipe("rsna").numbering("rsna"), find_recipe("nih").numbering("nih")
    assert hash_patient(record.patient, KEY, here) == hash_patient("13", KEY, there)


def test_sets_that_were_drawn_from_nih_say_so() -> None:
    assert "nih" in find_recipe("siim-acr").same_images and "siim-acr" in find_recipe("nih").same_images


def test_packed_dicom_files_of_mimic_are_read_as_the_list_names_them(tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason='DICOM IS NOT TESTED: pip install "mmclip-dist[dicom]"')
    raw = MINIATURES["mimic-cxr"](tmp_path / "raw")
    change(raw / "cxr-record-list.csv.gz", ".dcm", ".dcm.gz")
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    records = list(prepare("mimic-cxr", raw).records)
    for record in records:
        assert isinstance(record.image, Path) and record.image.name.endswith(".dcm.gz")
        dicom_file(record.image, "MONOCHROME2", pixels)
        record.image.write_bytes(gzip.compress(record.image.read_bytes()))
    first = records[0].image
    assert isinstance(first, Path)
    first.write_bytes(first.read_bytes()[:50])
    manifests = pack(records, tmp_path / "set", dataset="m", splits={"train": 1.0}, config_hash="c", patient_key=KEY,
                     max_bad_fraction=0.2)  # fmt: skip
    assert manifests["train"].samples == len(records) - 1
    assert "gzip file that is cut" in (tmp_path / "set/train/quarantine.jsonl").read_text()


# -- your own files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"age": 414}, r"line 1: 'age' must be years"),
        ({"age": "old"}, r"line 1: 'age' must be years"),
        ({"age": -3}, r"line 1: 'age' must be years"),
        ({"age": True}, r"line 1: 'age' must be years"),
        ({"age": [1]}, r"line 1: 'age' must be years"),
        ({"sections": {"Findings": "a"}}, r"line 1: there is no section 'Findings'; the sections are findings, impression"),
        ({"report": "\ud800"}, r"record 1: a text holds half a surrogate pair"),
        ({"split": "a b"}, r"record 1: split name 'a b' may hold only"),
    ],
)
def test_a_field_that_would_be_lost_is_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    write(tmp_path, {"a.jsonl": json.dumps({"image": "a.png", "patient": "1", **fields}) + "\n"})
    with pytest.raises(ValueError, match=message):
        prepare("jsonl", tmp_path, "official" if "split" in fields else None)


def test_a_parquet_file_that_is_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason='PARQUET IS NOT TESTED: pip install "mmclip-dist[parquet]"')
    import pyarrow.parquet

    table = pyarrow.table({"image": ["a.png"] * 900, "patient": ["1"] * 900, "report": ["x" * 5000] * 900})
    pyarrow.parquet.write_table(table, tmp_path / "part.parquet", use_dictionary=False)
    data = bytearray((tmp_path / "part.parquet").read_bytes())
    data[30:90] = bytes(60)
    (tmp_path / "part.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"part\.parquet is no Parquet file, or damaged \(.*\): write it again"):
        prepare("parquet", tmp_path)


def test_a_packed_table_is_told_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(gzip.compress(b"image,patient\na.png,1\n"))
    with pytest.raises(ValueError, match=r"t\.csv is a gzip file: unpack it"):
        read_table(tmp_path / "t.csv", tmp_path, image_column="image", patient_column="patient")


def test_class_folders_count_what_they_pass_over_and_follow_links(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    images(raw, ["A/1.png", "A/2.PNG"])
    images(tmp_path, ["elsewhere/3.png"])
    write(raw, {"A/._1.png": "macOS", "A/1.TXT": "Clear.", "A/lost.txt": "Whose?"})
    (raw / "B").symlink_to(tmp_path / "elsewhere")
    (raw / "A" / "loop").symlink_to(raw)
    found = prepare("folder", raw)
    assert [(record.source, record.report) for record in found.records] == [
        ("A/1.png", "Clear."), ("A/2.PNG", ""), ("B/3.png", ""),
    ]  # fmt: skip
    assert found.skipped == {"hidden file": 1, "a text without an image": 1}


def record(image: Path, **fields: str) -> Record:
    return Record(image.stem, image, fields.pop("patient", image.stem), image.name, **fields)


def test_images_that_are_all_missing_are_no_matter_of_a_share(tmp_path: Path) -> None:
    records = [record(tmp_path / f"{number}.png") for number in range(3)]
    with pytest.raises(ValueError, match=r"none of 3 images is there, the first one 0\.png: check the folder"):
        pack(records, tmp_path / "set", dataset="d", splits={"train": 1.0}, config_hash="c", patient_key=KEY)


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    images(tmp_path, ["a.png"])
    (tmp_path / "b.png").write_bytes(b"")
    pack([record(tmp_path / "a.png"), record(tmp_path / "b.png")], tmp_path / "set", dataset="d", splits={"train": 1.0},
         config_hash="c", patient_key=KEY, max_bad_fraction=0.5)  # fmt: skip
    assert "the file is empty" in (tmp_path / "set/train/quarantine.jsonl").read_text()


def test_patients_in_two_splits_are_counted(tmp_path: Path) -> None:
    images(tmp_path, [f"{number}.png" for number in range(6)])
    records = [record(tmp_path / f"{number}.png", patient=str(number // 2)) for number in range(6)]
    splits = {str(number): ("train", "test")[number % 2] for number in range(5)} | {"5": "train"}
    with pytest.raises(ValueError, match=r"2 of 3 patients are in two splits: record 1 \(train\) and record 2 \(test\)"):
        pack(records, tmp_path / "set", dataset="d", splits=None, split_of_record=splits, config_hash="c", patient_key=KEY)


@pytest.mark.parametrize("field", ["../a.png", "/etc/a.png", "x/../../a.png", ""])
def test_no_recipe_leads_out_of_its_tree(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValueError, match="the image's path"):
        pack([Record("a", tmp_path / "a.png", "1", field)], tmp_path / "set", dataset="d", splits={"train": 1.0}, config_hash="c")


def test_a_full_disk_is_named_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMCLIP_PATIENT_KEY", "k" * 32)
    images(tmp_path, ["raw/A/1.png"])
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    code, _, err = call(capsys, monkeypatch, "folder", str(tmp_path / "raw"), str(tmp_path / "set"), "--splits", "train=1")
    assert code == 1
    assert f"{tmp_path}/set/train/000000.tar: No space left on device: make room, then give the same command again" in err


def test_a_table_knows_its_rows(tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": f"{NIH_HEADER}\n" + "a" + "," * 10 + "\n"})
    (row,) = read_csv(tmp_path / "t.csv")
    assert row.place == f"{tmp_path}/t.csv, row 2" and row["Image Index"] == "a"
