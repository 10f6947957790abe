"""Tables of images: the real ones, and the mistakes that people make in theirs."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards.datasets.rows import Rows
from mmclip_shards.datasets.table import read_table, splits_of, table_hash
from mmclip_shards.pack import pack
from mmclip_shards.reader import iterate
from mmclip_shards.schema import Record
from PIL import Image

COLUMNS = {"image_column": "image", "patient_column": "patient", "text_column": "report"}
HEADER = "image,patient,report,labels,split\n"


def make(folder: Path, rows: str, header: str = HEADER, name: str = "table.csv", encoding: str = "utf-8") -> Path:
    """A table and an image a.png, b.png, c.png, sub/a.png in folder/images."""
    for image in ("a.png", "b.png", "c.png", "sub/a.png"):
        path = folder / "images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    (folder / name).write_bytes((header + rows).encode(encoding))
    return folder / name


def read(folder: Path, rows: str, header: str = HEADER, **options: str) -> list[Record]:
    return read_table(make(folder, rows, header), folder / "images", **(COLUMNS | options))  # type: ignore[arg-type]


def test_rows_become_records(tmp_path: Path) -> None:
    rows = 'a.png,SECRET1,"Clear, no\neffusion.",Edema | Mass,train\r\n\r\n'
    rows += "images/b.png,SECRET2, Big heart. ,No Finding,val\r\n"
    first, second = read(tmp_path, rows, labels_column="labels", split_column="split")
    assert first == Record(
        key="a",
        image=tmp_path / "images" / "a.png",
        patient="SECRET1",
        source="a.png",
        report="Clear, no\neffusion.",
        labels={"Edema": 1, "Mass": 1},
        split="train",
    )
    assert (second.image, second.report) == (tmp_path / "images" / "b.png", "Big heart.")
    assert second.labels == {"Edema": 0, "Mass": 0}
    assert splits_of([first, second]) == {"a": "train", "b": "val"}


def test_ages_are_years_as_recipes_read_them_and_what_is_none_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header = "image,patient,age\n"
    options = {"text_column": None, "age_column": "age"}
    found = read(tmp_path, "a.png,1,034Y\nb.png,2,45.0\nc.png,3,\nsub/a.png,4,45\n", header, **options)
    assert [record.age for record in found] == [34, 45, None, 45] and not caplog.records
    found = read(tmp_path, "a.png,SECRET,58\nb.png,2,414\nc.png,3,F\n", header, **options)
    assert [record.age for record in found] == [58, None, None]
    assert "2 of 3 cells of 'age'" in caplog.text and "the first is of row 3" in caplog.text and "414" not in caplog.text
    with pytest.raises(ValueError, match=r"no row of 'age' holds an age in years .*: check --age-column"):
        read(tmp_path, "a.png,1,F\nb.png,2,M\n", header, **options)
    assert [record.age for record in read(tmp_path, "a.png,1,\n", header, **options)] == [None]


def test_findings_and_impression_are_joined_to_the_report(tmp_path: Path) -> None:
    header = "image,patient,found,says\n"
    options = {"text_column": None, "findings_column": "found", "impression_column": "says"}
    rows = "a.png,1,Big heart.,Cardiomegaly.\nb.png,2,,No acute disease.\n"
    first, second = read(tmp_path, rows, header, **options)
    assert (first.report, first.findings, first.impression) == ("Big heart.\nCardiomegaly.", "Big heart.", "Cardiomegaly.")
    assert (second.report, second.findings, second.impression) == ("No acute disease.", None, "No acute disease.")
    with pytest.raises(ValueError, match=r"1 of 3 rows .* have an empty 'found' and 'says', the first is row 4"):
        read(tmp_path, rows + "c.png,3,,\n", header, **options)
    with pytest.raises(ValueError, match="name one or the other"):
        read(tmp_path, rows, header, **{**options, "text_column": "says"})


def test_byte_order_mark_tabs_and_other_separators(tmp_path: Path) -> None:
    header = "\ufeffimage\tpatient\treport\tlabels\n"
    table = make(tmp_path, "a.png\t1\tClear, fine.\tEdema;Mass\nb.png\t2\tBig\t\n", header, name="table.tsv")
    first, second = read_table(table, tmp_path / "images", labels_column="labels", labels_separator=";", **COLUMNS)  # type: ignore[arg-type]
    assert (first.report, first.labels) == ("Clear, fine.", {"Edema": 1, "Mass": 1})
    assert second.labels == {"Edema": None, "Mass": None}


def test_a_table_of_a_german_spreadsheet(tmp_path: Path) -> None:
    """Semicolons, Windows-1252 and decimal commas."""
    header = "Bild;Patient;Befund;Alter;Diagnose\n"
    rows = "a.png;1;Größe normal, kein Erguss.;54,5;o. B.\nb.png;2;Erguß;7;Erguß\n"
    table = make(tmp_path, rows, header, encoding="windows-1252")
    names = {"image_column": "Bild", "patient_column": "Patient", "text_column": "Befund", "age_column": "Alter"}

    def found(**options: str) -> list[Record]:
        return list(read_table(table, tmp_path / "images", **names, **options))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"header has no ',' and 4 ';': name the separator of cells, --delimiter ';'"):
        found()
    with pytest.raises(ValueError, match=r"not UTF-8 \(byte 45\): name its encoding, such as --encoding windows-1252, or save"):
        found(delimiter=";")
    first, second = found(encoding="windows-1252", delimiter=";", labels_column="Diagnose", normal_label="O. B.")
    assert (first.report, first.age, first.labels) == ("Größe normal, kein Erguss.", 54, {"Erguß": 0})
    assert (second.report, second.age, second.labels) == ("Erguß", 7, {"Erguß": 1})
    assert found(encoding="cp1252", delimiter=";", labels_column="Diagnose")[0].labels == {"o. B.": 1, "Erguß": 0}
    for options, message in (
        ({"encoding": "latin-0"}, "encoding 'latin-0' is unknown to Python: use for example windows-1252"),
        ({"encoding": "utf-16"}, "encoding 'utf-16' has no lines of bytes: convert the table to UTF-8 .iconv."),
        ({"encoding": "ascii", "delimiter": ";"}, r"is not ASCII \(byte 45\)"),
        ({"delimiter": "::"}, "delimiter '::' is not one character: use for example ';'"),
    ):
        with pytest.raises(ValueError, match=message):
            found(**options)


@pytest.mark.parametrize("encoding", ["windows-1252", "shift_jis", "gb18030", "utf-8-sig"])
def test_rows_are_found_again_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    text = "é" if encoding in ("windows-1252", "utf-8-sig") else "表ソ"  # in Shift JIS the second byte of both is a backslash
    (tmp_path / "table.csv").write_bytes(f'number,text\r\n1,"{text}\r{text}"\r\n2,{text}\n'.encode(encoding))
    found = Rows(tmp_path / "table.csv", ["text"], encoding=encoding)
    assert [found[place][1]["text"] for place in (1, 0)] == [text, f"{text}\r{text}"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_rows_are_found_again_whatever_ends_their_lines(tmp_path: Path, end: str, mark: str) -> None:
    rows = [["1", "Befund: unauffällig"], ["2", f'two{end}lines, "quoted"'], ["3", ""], ["4", "☢"]]
    quoted = [f'{number},"{text.replace(chr(34), chr(34) * 2)}"' for number, text in rows]
    table = tmp_path / "table.csv"
    table.write_bytes(f"{mark}number,text{end}{end.join(quoted[:2])}{end}{end}{end.join(quoted[2:])}".encode())
    found = Rows(table, ["number"])
    wanted = [(number, {"number": n, "text": text}) for number, (n, text) in zip((2, 3, 5, 6), rows, strict=True)]
    assert list(found) == wanted
    assert [found[place] for place in (3, 0, 2, 1)] == [wanted[place] for place in (3, 0, 2, 1)]


def test_a_table_that_changes_while_it_is_packed_is_noticed(tmp_path: Path) -> None:
    found = read(tmp_path, "a.png,1,One.,,\nb.png,2,Two.,,\n")
    assert [record.report for record in found[:]] == ["One.", "Two."]
    (tmp_path / "table.csv").write_bytes((tmp_path / "table.csv").read_bytes().replace(b"Two", b"Six"))
    assert found[0].report == "One."
    with pytest.raises(ValueError, match=r"table.csv was changed while it was read: start again"):
        found[-1]


def test_keys_are_stems_whole_paths_where_stems_collide_or_a_column(tmp_path: Path) -> None:
    assert [r.key for r in read(tmp_path, "a.png,1,x,,\nb.png,1,x,,\n")] == ["a", "b"]
    keys = [r.key for r in read(tmp_path, "a.png,1,x,,\nsub/a.png,1,x,,\n")]
    assert len(set(keys)) == 2 and keys[1].startswith("sub-a-png-")
    keys = [r.key for r in read(tmp_path, "a.png,1,1.2.840,,\nb.png,1,1.2-840,,\n", key_column="report")]
    assert len(set(keys)) == 2 and all("." not in key for key in keys)


@pytest.mark.parametrize(
    ("rows", "key_column"),
    [("a.png,SECRET,x,,\nb.png,2,y,,\na.png,SECRET,z,,\n", None), ("a.png,SECRET,x,,\nb.png,2,y,,\nx.png,1,x,,\n", "report")],
)
def test_rows_that_repeat_a_key_are_left_to_pack(tmp_path: Path, rows: str, key_column: str | None) -> None:
    found = read(tmp_path, rows, key_column=key_column)
    options: dict = {"dataset": "d", "splits": {"train": 1.0}, "config_hash": "c", "patient_key": b"k"}
    with pytest.raises(ValueError, match=r"1 of 3 records .* \(records 1 and 3 share the key\)") as told:
        pack(found, tmp_path / "set", **options)
    assert "SECRET" not in str(told.value) and not (tmp_path / "set").exists()
    assert pack(found, tmp_path / "set", max_bad_fraction=0.34, **options)["train"].samples == 2


def test_empty_reports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "a.png,1,text,,\nb.png,2, ,,\nc.png,3,,,\n"
    with pytest.raises(ValueError, match=r"2 of 3 rows .* row 3: .*--empty-reports drop"):
        read(tmp_path, rows)
    assert not caplog.records
    assert [r.key for r in read(tmp_path, rows, empty_reports="drop")] == ["a"]
    assert "2 of 3 rows" in caplog.text
    assert [r.report for r in read(tmp_path, rows, empty_reports="unpaired")] == ["text", "", ""]
    with pytest.raises(ValueError, match="no rows"):
        read(tmp_path, "b.png,2, ,,\n", empty_reports="drop")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ("", {}, "has no rows"),
        ("a.png,SECRET,SECRET,,\n", {"image_column": "imge"}, r"no column 'imge'; its columns, nearest first: image, "),
        ("a.png,SECRET,SECRET,,\n../images/a.png,SECRET,SECRET,,\n", {}, "row 3 names an image outside"),
        ("/etc/passwd,SECRET,SECRET,,\n", {}, "row 2 names an image outside"),
        ("images/../../a.png,SECRET,SECRET,,\n", {}, "row 2 names an image outside"),
        ("images,SECRET,SECRET,,\n", {}, "none of the 1 images .*: check the image column"),
        ("a.png,SECRET,SECRET,,\nb.png, ,SECRET,,\n", {}, "1 rows .* no 'patient', the first is row 3"),
        (",SECRET,SECRET,,\n", {}, "no 'image'"),
        ("a.png,SECRET,SECRET,,\n", {"split_column": "split"}, "no 'split'"),
        ("a.png,SECRET,SECRET,,\nb.png,SECRET\n", {}, "row 3 has 2 cells, the header 5"),
        ("a.png,SECRET,SECRET,SECRET,,,\n", {}, "row 2 has 7 cells"),
        ('a.png,SECRET,"SECRET" x,,\n', {}, "line 2 cannot be read"),
        ('a.png,SECRET,"SECRET', {}, "cannot be read"),
        ("a.png,SECRET,SECRET,Normal,\n", {"labels_column": "labels"}, "names a disease"),
        ("a.png,SECRET,SECRET,x,\n", {"labels_column": "labels", "labels_separator": ""}, "labels_separator"),
        ("a.png,SECRET,SECRET,,\n", {"empty_reports": "skip"}, "empty_reports is 'skip'"),
    ],
)
def test_mistakes_are_one_clear_line_without_patients_or_reports(
    tmp_path: Path, rows: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, rows, **options)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_images_are_warned_of_and_left_to_pack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = read(tmp_path, "a.png,SECRET,x,,\nimages/gone.png,SECRET,x,,\nx.png,1,x,,\n")
    assert re.search(r"2 of 3 images of .* are not in .*, the first is of row 3", caplog.text)
    assert "SECRET" not in caplog.text
    options: dict = {"dataset": "d", "splits": {"train": 1.0}, "config_hash": "c", "patient_key": b"k"}
    with pytest.raises(ValueError, match=r"2 of 3 images are missing, the first one of record 2 \(images/gone.png\)"):
        pack(found, tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()
    assert pack(found, tmp_path / "set", max_bad_fraction=0.667, **options)["train"].samples == 1


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no table"):
        read_table(tmp_path / "gone.csv", tmp_path, image_column="a", patient_column="b")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_table(make(tmp_path, "a.png,1,é,,\n", encoding="latin-1"), tmp_path / "images", **COLUMNS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no image folder"):
        read_table(make(tmp_path, "a.png,1,x,,\n"), tmp_path / "pictures", **COLUMNS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two columns 'image'"):
        read(tmp_path, "a.png,1,x,a.png\n", header="image,patient,report,image\n")
    with pytest.raises(ValueError, match="no column 'image'; its columns, nearest first: none"):
        read(tmp_path, "", header="")


def test_the_hash_covers_table_and_options(tmp_path: Path) -> None:
    table = make(tmp_path, "a.png,1,x,,\n")
    first = table_hash(table, **COLUMNS)
    assert first == table_hash(table, **COLUMNS, labels_separator="|", view_column=None)
    # That of packs from before there were columns for ages and sections: they go on.
    assert first == "41db9ae2a5df87972de7bc4b14a8ff23b6379ea255ea0fb5d2946ae4774a503c"
    hashes = {
        first,
        table_hash(table, **COLUMNS, key_column="patient"),
        table_hash(table, **COLUMNS, empty_reports="drop"),
        table_hash(table, **COLUMNS, age_column="patient"),
        table_hash(table, **COLUMNS, encoding="cp1252"),
        table_hash(table, **COLUMNS, delimiter=";"),
        table_hash(table, **COLUMNS, normal_label="o. B."),
    }
    make(tmp_path, "a.png,1,y,,\n")
    assert len(hashes | {table_hash(table, **COLUMNS)}) == 8
    with pytest.raises(TypeError):
        table_hash(table, **COLUMNS, unknown="x")


def test_records_without_a_split_cannot_be_packed_by_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 1 records have no split"):
        splits_of(read(tmp_path, "a.png,1,x,,\n"))


# ---- the real tables


def test_covid_cxr_as_it_is(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "covid_cxr"
    columns = {"image_column": "image", "patient_column": "patientid", "text_column": "clinical_notes"}
    found = read_table(folder / "pairs.csv", folder / "images", view_column="view", **columns)  # type: ignore[arg-type]
    assert len(found) == 296
    assert len({record.patient for record in found}) == 148
    assert len({record.report for record in found}) == 238  # of 240 raw cells; two differ in outer blanks alone
    splits = {"train": 0.8, "val": 0.1, "test": 0.1}
    manifests = pack(
        found, tmp_path / "set", dataset="covid_cxr", splits=splits, config_hash="c", patient_key=b"k", short_side=64
    )
    assert sum(manifest.samples for manifest in manifests.values()) == 296
    read_back = [sample for split in splits for sample in iterate(tmp_path / "set" / split)]
    assert {key for key, _ in read_back} == {record.key for record in found}
    for _, files in read_back:
        with Image.open(io.BytesIO(files["jpg"])) as image:
            assert (image.mode, min(image.size)) == ("L", 64)


def test_nih_cxr1000_as_it_is(real_data: Path) -> None:
    folder = real_data / "nih_cxr1000"
    found = read_table(
        folder / "labels.csv",
        folder / "images",
        image_column="image",
        patient_column="patient_id",
        labels_column="finding_labels",
        view_column="view",
    )
    assert len(found) == 1000
    assert len({record.patient for record in found}) == 682
    counts = Counter(name for record in found for name, value in record.labels.items() if value == 1)
    assert len(counts) == 14
    assert (counts["Pneumonia"], counts["Infiltration"], counts["Hernia"]) == (500, 187, 3)
    assert sum(not any(record.labels.values()) for record in found) == 500
    assert {value for record in found for value in record.labels.values()} == {0, 1}
