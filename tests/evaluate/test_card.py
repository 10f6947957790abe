"""The data card: its numbers are those of the set, it holds no script, and names cannot break out of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards import Record
from mmclip_shards.manifest import load_manifest, manifest_hash
from mmclip_shards.pack import pack
from mmclip_shards.stats import LabelCounts, collect_stats

from mmclip_dist.evaluate.report.card import TILES, binned, build_card, co_occurrence
from tests.test_cli import call

KEY = b"k" * 32
HOSTILE = '<script>alert("x")</script>'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    labels = [{"Edema": 1, HOSTILE: 1}, {"Edema": 1, HOSTILE: 0}, {"Edema": -1, HOSTILE: None}, {"Edema": 0, HOSTILE: 1}]
    records = [
        Record(
            f"k{n:02d}", np.full((8 + n % 2, 12), n, np.uint8), f"RAW-{n // 2}", f"{n}.png", report="one two three" * (n % 3),
            labels=labels[n % 4], view=HOSTILE if n % 5 else None, age=(3, 47, 48, 97)[n % 4],
        )
        for n in range(40)
    ]  # fmt: skip
    pack(
        records, tmp_path / "set", dataset="toy", splits={"train": 0.6, "test": 0.4}, config_hash="c0ffee", patient_key=KEY,
        licence="CC BY 4.0", samples_per_shard=10,
    )  # fmt: skip
    return tmp_path / "set"


def test_the_card_holds_what_the_set_holds_and_is_the_same_again(folder: Path, tmp_path: Path) -> None:
    code, _ = call("stats", str(folder), "--html", str(tmp_path / "card.html"))
    assert code == 0
    page = (tmp_path / "card.html").read_text()
    assert "<script" not in page and "://" not in page and "RAW-" not in page
    assert page.count("&lt;script&gt;alert") >= 4 * 2
    train = collect_stats(folder / "train").splits[0]
    assert train.labels["Edema"].present and f'title="present {train.labels["Edema"].present}, uncertain' in page
    for wanted in ("CC BY 4.0", "Access: not stated", manifest_hash(load_manifest(folder / "train")), train.config_hash,
                   load_manifest(folder / "train").shards[-1].sha256, "nothing found", "none in more than one"):  # fmt: skip
        assert wanted in page, wanted
    assert page.count("data:image/jpeg;base64,") == sum(
        min(TILES, load_manifest(folder / split).samples) for split in ("train", "test")
    )
    build_card(collect_stats(folder), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_what_a_set_lacks_is_said(tmp_path: Path) -> None:
    records = [Record("a", lambda: (np.zeros((4, 4), np.uint8), ()), "1", "a.png")]
    pack(records, tmp_path / "set", dataset="toy", splits={"train": 1}, config_hash="c", patient_key=KEY)
    build_card(collect_stats(tmp_path / "set"), tmp_path / "card.html")
    page = (tmp_path / "card.html").read_text()
    for said in ("It has no labels.", "holds no ages", "holds no reports", "were not scanned", "Licence: not stated"):
        assert said in page


def test_patients_in_two_splits_and_reports_that_identify_stand_out(tmp_path: Path) -> None:
    for split in ("train", "val"):
        records = [Record(split, np.zeros((4, 4), np.uint8), "1", "a.png", report="Dr. Zebra was told.")]
        pack(records, tmp_path / split, dataset="toy", splits={split: 1}, config_hash="c", patient_key=KEY, allow_phi_like=True)
    (tmp_path / "set").mkdir()
    for split in ("train", "val"):
        (tmp_path / split / split).rename(tmp_path / "set" / split)
    build_card(collect_stats(tmp_path / "set"), tmp_path / "card.html")
    page = re.sub(r"\s+", " ", (tmp_path / "card.html").read_text())
    assert "1 patients are in more than one split" in page and '<dd class="value">1</dd>' in page
    assert "1 × name after a title" in page and "Zebra" not in page


def test_json_and_html_are_two_things(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = call("stats", str(folder), "--json", "--html", str(tmp_path / "card.html"))
    assert code == 2 and "give one of them" in capsys.readouterr().err and not (tmp_path / "card.html").exists()


def test_bins_keep_every_count_and_gather_the_long_tail() -> None:
    assert binned({}) == []
    assert binned({3: 1, 4: 2, 11: 5}, 5) == [("0–4", 3), ("5–9", 0), ("10–14", 5)]
    assert binned({1: 2, 3: 1}) == [("1", 2), ("2", 0), ("3", 1)]
    long = binned(dict.fromkeys(range(20, 120), 10) | {5000: 1})
    assert len(long) <= 26 and sum(count for _, count in long) == 1001 and long[-1][0].endswith("or more")


def test_labels_together_are_shares_of_the_row() -> None:
    counts = {"A": LabelCounts(4, 0, 0, 6), "B": LabelCounts(2, 0, 0, 8), "C": LabelCounts(0, 0, 0, 10)}
    found = co_occurrence(counts, {"A": {"B": 1}})
    assert found is not None and found.names == ("A", "B") and found.cells == ((None, 0.25), (0.5, None)) and not found.left_out
    assert co_occurrence({"A": counts["A"]}, {}) is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Debian package chromium")
def test_the_card_fits_a_phone(folder: Path, tmp_path: Path) -> None:
    build_card(collect_stats(folder), tmp_path / "card.html")
    frame = f'<iframe id="f" width="390" height="900" srcdoc="{escape((tmp_path / "card.html").read_text())}"></iframe>'
    measure = "onload = () => { document.title = 'width ' + f.contentDocument.documentElement.scrollWidth }"
    (tmp_path / "phone.html").write_text(f"<!doctype html><title></title>{frame}<script>{measure}</script>")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path / 'phone.html'}"]
    page = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    width = re.search(r"<title>width (\d+)</title>", page)
    assert width and int(width[1]) <= 390
