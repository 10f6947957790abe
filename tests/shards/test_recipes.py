"""The contract of recipes: found by name, run once, streamed through the ordinary pack, with their terms in the manifest."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards import Record, Skipped, load_manifest, recipe
from mmclip_shards.datasets import recipe as recipes
from mmclip_shards.datasets.check import check_recipe
from mmclip_shards.datasets.prepared import prepare_records, read_records, split_name
from mmclip_shards.datasets.recipe import BUILT_IN, Recipe, check_needs, find_recipe, recipe_names
from mmclip_shards.manifest import Manifest, Shard, manifest_hash, save_manifest
from mmclip_shards.pack import pack
from mmclip_shards.reader import iterate
from mmclip_shards.schema import Box
from PIL import Image

from tests.miniatures import call

KEY = b"k" * 32


def image(path: Path, seed: int = 0, size: tuple[int, int] = (12, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)


@recipe(licence="CC BY 4.0", access="ask", source="here", official=True, private_paths=True, unlisted_absent=True)
def toy(raw: Path) -> Iterator[Record | Skipped]:
    """Toy radiographs."""
    for number in range(12):
        source = f"PATIENT{number // 2}/{number}.png"
        labels = {0: {"Edema": 1}, 1: {"No Finding": 1}, 2: {}}[number % 3]
        yield Record(
            str(number), raw / source, f"PATIENT{number // 2}", source, labels=labels, view="PA",
            boxes=(Box("Edema", 2, 3, 4, 5),), split="train" if number < 8 else "test",
            sections={"findings": f"Finding {number % 4}.", "impression": "Well."},
        )  # fmt: skip
        if number % 5 == 0:
            yield Skipped("no film")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for number in range(12):
        image(tmp_path / "raw" / f"PATIENT{number // 2}" / f"{number}.png", number)
    return tmp_path / "raw"


def prepared(raw: Path, of: Recipe = toy, split: str | None = "official", **options):
    return prepare_records("toy", of, raw, split=split, patient_key=KEY, **options)


def test_records_are_read_in_any_order_and_again(raw: Path) -> None:
    found = prepared(raw)
    assert len(found.records) == 12 and found.skipped == {"no film": 3}
    again = list(found.records)
    assert [found.records[place] for place in (11, 0, 5, -1)] == [again[place] for place in (11, 0, 5, 11)]
    assert (found.without_report, found.same_report) == (0, 8)


def test_paths_that_name_patients_are_stored_as_keyed_hashes(raw: Path) -> None:
    first = prepared(raw).records[0]
    assert re.fullmatch(r"[0-9a-f]{32}", first.key) and first.source == f"toy/{first.key}"
    other = prepare_records("toy", toy, raw, split=None, patient_key=b"q" * 32).records[0]
    assert other.key != first.key  # whoever can guess a path cannot test the guess
    assert first.patient == "PATIENT0"  # raw: pack hashes it


def test_a_label_that_is_not_listed_is_absent_unless_nothing_is_known(raw: Path) -> None:
    assert [dict(r.labels) for r in prepared(raw).records[:3]] == [{"Edema": 1}, {"Edema": 0}, {"Edema": None}]


def test_sections_become_the_report_and_may_be_chosen(raw: Path) -> None:
    first = prepared(raw).records[0]
    assert (first.report, first.findings, first.impression) == ("Finding 0.\nWell.", "Finding 0.", "Well.")
    assert prepared(raw, sections=("impression",)).records[0].report == "Well."
    empty = prepared(raw, sections=("technique",))
    assert empty.without_report == 12 and empty.same_report == 0


def test_the_config_hash_changes_with_what_is_stored(raw: Path) -> None:
    hashes = {prepared(raw).config_hash, prepared(raw).config_hash, prepared(raw, sections=("impression",)).config_hash}
    hashes.add(prepared(raw, split=None).config_hash)
    assert len(hashes) == 3


def test_named_splits_are_lists_of_paths_or_of_ends_of_them(raw: Path) -> None:
    lists = raw / "splits" / "mine"
    lists.mkdir(parents=True)
    (lists / "train_list.txt").write_text("0.png 1 0 0\n1\n\nPATIENT1/2.png,3\n")
    (lists / "validate.txt").write_text("toy/4.png\n5.png\n")
    found = prepared(raw, split="mine")
    splits = Counter(record.split for record in found.records)
    assert splits == {"train": 3, "val": 1} and found.skipped["not in split mine"] == 8
    (lists / "test.txt").write_text("1.png\n")
    with pytest.raises(ValueError, match=r"names an image of split 'test', too"):
        prepared(raw, split="mine")
    with pytest.raises(ValueError, match=r"there is no split 'other': put its lists into .*splits/other/train.txt"):
        prepared(raw, split="other")


@pytest.mark.parametrize(
    ("found", "wanted"), [("validate", "val"), ("valid", "val"), ("val", "val"), ("test", "test"), ("validation", "val")]
)
def test_upstream_names_of_the_validation_split_are_one(found: str, wanted: str) -> None:
    assert split_name(found) == wanted


def test_a_record_that_cannot_be_stored_is_named_by_number_and_never_by_patient(raw: Path) -> None:
    @recipe(licence=None, access=None, source="")
    def bad(raw: Path) -> Iterator[Record]:
        yield Record("fine", raw / "a.png", "SECRET", "a.png")
        yield Record("", raw / "a.png", "SECRET", "a.png")

    with pytest.raises(ValueError, match="recipe toy, record 2: sample key") as error:
        prepared(raw, bad, split=None)
    assert "SECRET" not in str(error.value)


def test_keys_may_be_any_text_and_stay_different(raw: Path) -> None:
    @recipe(licence=None, access=None, source="")
    def dotted(raw: Path) -> Iterator[Record]:
        for key in ("1.2.840.1", "1.2.840.11", "x" * 90, "plain"):
            yield Record(key, raw / "PATIENT0" / "0.png", "p", "0.png")

    keys = [record.key for record in prepared(raw, dotted, split=None).records]
    assert len(set(keys)) == 4 and keys[3] == "plain" and not any("." in key or len(key) > 80 for key in keys)


def test_a_recipe_that_finds_nothing_says_why(raw: Path) -> None:
    @recipe(licence=None, access=None, source="")
    def none(raw: Path) -> Iterator[Record | Skipped]:
        yield Skipped("no film")

    with pytest.raises(ValueError, match=r"found no images in .*raw \(no film: 1\)"):
        prepared(raw, none, split=None)
    with pytest.raises(ValueError, match="there is no folder"):
        prepared(raw / "nowhere")


def test_all_built_in_recipes_load_state_their_terms_and_leak_both_ways() -> None:
    for name in BUILT_IN:
        found = find_recipe(name)
        assert found.title.endswith((".", "all modalities.")), name
        assert (found.licence is None) == (name in ("folder", "jsonl", "parquet"))
        for other in found.same_images:
            assert name in find_recipe(other).same_images or {name, other} == {"rsna", "covidx"}, (name, other)


def test_a_package_offers_a_recipe_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    offers = [EntryPoint("toy", f"{__name__}:toy", recipes.ENTRY_POINTS)]
    monkeypatch.setattr(recipes, "entry_points", lambda group: offers if group == "mmclip_shards.datasets" else [])
    monkeypatch.setattr(EntryPoint, "load", lambda self: toy if self.name == "toy" else Path)
    assert find_recipe("toy") is toy and "toy" in recipe_names()
    offers.append(EntryPoint("toy", "other:toy", recipes.ENTRY_POINTS))
    with pytest.raises(ValueError, match="several packages offer a recipe 'toy'"):
        find_recipe("toy")
    offers.append(EntryPoint("wrong", "other:toy", recipes.ENTRY_POINTS))
    with pytest.raises(ValueError, match="other:toy is not a recipe: make it with @"):
        find_recipe("wrong")
    with pytest.raises(ValueError, match=r"there is no recipe 'chexprt'; nearest: chexpert"):
        find_recipe("chexprt")


def test_what_a_recipe_needs_is_checked_first() -> None:
    check_needs(toy)
    with pytest.raises(ValueError, match=r'needs no_such_module: pip install "mmclip-dist\[extra\]"'):
        check_needs(Recipe(toy.read, "", None, None, "", needs=("no_such_module", "extra")))


def test_terms_are_in_the_manifest_and_older_manifests_are_read_and_hashed_as_before(tmp_path: Path) -> None:
    shard = Shard("000000.tar", 1, 1024, "0" * 64, "000000.index.json", "1" * 64)
    old = Manifest("base", "toy", "train", (shard,), "c")
    save_manifest(tmp_path, old)
    document = json.loads((tmp_path / "manifest.json").read_bytes())
    assert "licence" not in document and "access" not in document
    assert load_manifest(tmp_path) == old
    new = Manifest("base", "toy", "train", (shard,), "c", licence="CC BY 4.0", access="ask")
    save_manifest(tmp_path, new)
    assert load_manifest(tmp_path) == new and manifest_hash(new) != manifest_hash(old) == document["digest"]
    with pytest.raises(ValueError, match="licence"):
        Manifest("base", "toy", "train", (shard,), "c", licence=1)  # type: ignore[arg-type]


OUTSIDE = (Path(__file__).parents[2] / "shards" / "README.md").read_text().split("### A new data set")[1].split("```")[1]
"""The recipe that the documentation shows, as it is written there."""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMCLIP_PATIENT_KEY", "k" * 32)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(OUTSIDE.removeprefix("python\n"))
    rows = ["name,patient,text,edema,split", "a,1,Clear.,0,train", "b,1,Oedema.,1,train", "c,2,,0,train", "d,3,Clear.,0,test"]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "reports.csv").write_text("\n".join(rows) + "\n")
    for number, name in enumerate("abcd"):
        image(tmp_path / "raw" / "images" / f"{name}.png", number)
    return tmp_path


def test_a_file_of_ones_own_packs_with_its_terms_first(
    outside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = call(capsys, monkeypatch, "example.py", "raw", "set")
    assert code == 0, err
    assert out.splitlines()[:4] == [
        "example: Example Hospital: chest radiographs with reports.", "licence: CC BY 4.0", "access: free download",
        "source: https://example.org/cxr",
    ]  # fmt: skip
    assert "3 images; 0 without a report, 1 with that of another image" in out and "left out: 1 (no report)" in out
    train = load_manifest("set/train")
    assert (train.dataset, train.samples, train.licence, train.access) == ("example", 2, "CC BY 4.0", "free download")
    assert load_manifest("set/test").samples == 1
    before = Path("set/train/manifest.json").read_bytes()
    assert call(capsys, monkeypatch, "example.py", "raw", "set")[0] == 0  # again: nothing to do
    assert Path("set/train/manifest.json").read_bytes() == before
    Path("raw/reports.csv").write_text(Path("raw/reports.csv").read_text().replace("Oedema.", "Edema."))
    code, _, err = call(capsys, monkeypatch, "example.py", "raw", "set")
    assert code == 2 and "holds another set" in err


def test_an_installed_package_packs_by_its_name(
    outside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = outside / "site" / "example_cxr-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-cxr\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmclip_shards.datasets]\nexample = example_cxr:example\n")
    (outside / "example.py").rename(outside / "site" / "example_cxr.py")
    monkeypatch.syspath_prepend(str(outside / "site"))
    code, out, err = call(capsys, monkeypatch, "example", "raw", "set")
    assert code == 0, err
    assert "licence: CC BY 4.0" in out and load_manifest("set/train").dataset == "example"
    code, out, _ = call(capsys, monkeypatch, "--help")
    assert code == 0 and "Example Hospital: chest radiographs" in out and "PadChest: 160,861" in out
    (outside / "site" / "example_cxr.py").write_text("import no_such_module\n")
    sys.modules.pop("example_cxr")
    code, _, err = call(capsys, monkeypatch, "example", "raw", "set")
    assert code == 2 and "recipe 'example' cannot be loaded from example_cxr:example: No module" in err
    assert call(capsys, monkeypatch, "--help")[0] == 0  # the others are still there


def test_check_packs_nothing_and_draws_a_sheet(
    outside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("raw/images/b.png").write_bytes(b"")
    code, out, err = call(capsys, monkeypatch, "example.py", "raw", "set", "--check")
    assert code == 0, err
    assert "  1: 16 x 12 png, view unknown, 1 words, present: nothing" in out
    assert "  2: cannot be used: " in out and "left out: no report 1" in out and "splits: train 2, test 1" in out
    assert "Oedema" not in out and "Clear" not in out  # no text of a report
    assert not Path("set").exists()
    with Image.open("set-check.png") as sheet:
        assert sheet.size == (5 * 224, 224 + 14)


def test_a_sheet_of_twenty_shows_boxes_where_they_are(raw: Path) -> None:
    lines, sheet = check_recipe(toy, raw, split="official", sections=None, short_side=512)
    assert lines[0] == "looked at 12 records of 6 patients, and at 12 images"
    assert "  1: 16 x 12 png, view PA, 3 words, present: Edema, 1 boxes" in lines
    assert "reports that seem to identify people: none" in lines
    (raw.parent / "sheet.png").write_bytes(sheet)
    pixels = np.asarray(Image.open(raw.parent / "sheet.png"))
    assert pixels.shape == (3 * 238, 5 * 224, 3)
    assert tuple(pixels[14 + 3, 2]) == (255, 255, 0)  # a box of (2, 3): the top left corner of the first tile's


def test_only_the_first_records_are_read_for_a_check(raw: Path) -> None:
    read = []

    @recipe(licence=None, access=None, source="")
    def endless(raw: Path) -> Iterator[Record]:
        for number in range(100_000):
            read.append(number)
            yield Record(str(number), raw / "PATIENT0" / "0.png", "p", "0.png", report="Dr. Zebra was told.")

    lines, _ = check_recipe(endless, raw, split=None, sections=None, short_side=8)
    assert len(read) == 2000 and sum(" 10 x 8 png" in line or " 11 x 8 png" in line for line in lines) == 20
    assert "reports that seem to identify people: name after a title 2000" in lines and not any("Zebra" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch", "raw", "set"], "there is no recipe 'nosuch'; nearest: "),
        (["nosuch.py", "raw", "set"], "there is no recipe file nosuch.py"),
        (["example.py", "nowhere", "set"], "there is no folder nowhere"),
        (["example.py", "raw", "set", "--split", "official", "--splits", "a=1"], "give one of them"),
        (["example.py", "raw", "set", "--sections", "findigs"], "there is no section 'findigs'; the sections are findings, "),
        (["folder", "raw", "set", "--split", "official"], "not in split official"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(
    outside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    code, _, err = call(capsys, monkeypatch, *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert not Path("set").exists()


@pytest.mark.slow
def test_bytes_are_equal_for_any_number_of_workers_and_after_a_pack_that_failed(
    raw: Path, tmp_path: Path
) -> None:
    def run(dest: Path, workers: int) -> dict[str, bytes]:
        found = prepared(raw)
        pack(
            found.records, dest, dataset="toy", splits=None, split_of_record=found.split_of, config_hash=found.config_hash,
            patient_key=KEY, samples_per_shard=3, workers=workers, licence="L",
        )  # fmt: skip
        return {str(p.relative_to(dest)): p.read_bytes() for p in sorted(dest.rglob("*")) if p.is_file()}

    one = run(tmp_path / "one", 1)
    assert len(one) == 5 * 2 + 2 and run(tmp_path / "three", 3) == one
    content = b"".join(one.values())
    assert b"PATIENT" not in content
    last = raw / "PATIENT5" / "11.png"
    whole = last.read_bytes()
    last.write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 12 images cannot be used"):
        run(tmp_path / "again", 1)
    last.write_bytes(whole)
    assert run(tmp_path / "again", 2) == one
    sample = next(iterate(str(tmp_path / "one" / "train")))
    document = json.loads(sample[1]["json"])
    assert document["report"].keys() == {"text", "findings", "impression"} and document["labels"].keys() == {"Edema"}


def test_read_records_streams(raw: Path) -> None:
    stream = read_records(toy, raw, split=None, sections=None, skipped=Counter())
    assert next(stream).split is None
