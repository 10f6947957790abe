"""The page of samples: what it shows is what the set holds, and a broken sample is shown as one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
from mmclip_shards.document import read_document
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from mmclip_shards.writer import ShardWriter

from mmclip_dist.config import Source
from mmclip_dist.evaluate.report.view import Piece, build_view, pieces
from tests.test_cli import call

HOSTILE = '<script>alert("x")</script>&\'</p>'


def source(sets) -> Source:
    return Source(url=sets.paired, entities=sets.sidecar("entities"), attention=sets.sidecar("attention"))


def test_samples_lie_evenly_over_the_set_and_their_reports_are_whole(sets, tmp_path: Path) -> None:
    out, held = tmp_path / "view.html", dict(iterate(sets.paired))
    keys = build_view(source(sets), out, count=5)
    order = list(held)
    places = [order.index(key) for key in keys]
    assert places == [(2 * part + 1) * len(order) // 10 for part in range(5)]
    page = out.read_text()
    shown = [unescape(re.sub(r"<[^>]+>", "", text)) for text in re.findall(r'<p class="report">(.*?)</p>', page, re.DOTALL)]
    assert shown == [read_document(held[key]).report for key in keys]
    assert page.count('class="heat"') == 5 and "4 × 4 patches" in page
    assert "://" not in page and "<script" not in page
    build_view(source(sets), tmp_path / "again.html", count=5)
    assert (tmp_path / "again.html").read_text() == page


def test_more_samples_than_there_are(sets, tmp_path: Path) -> None:
    keys = build_view(source(sets), tmp_path / "view.html", count=10_000)
    assert keys == [key for key, _ in iterate(sets.paired)]


def test_samples_with_a_label_and_samples_by_key(sets, tmp_path: Path) -> None:
    labels = {key: read_document(members).labels for key, members in iterate(sets.paired)}
    name = next(name for name in load_manifest(sets.paired).labels if sum(of[name] == 1 for of in labels.values()) > 2)
    having = [key for key, of in labels.items() if of[name] == 1]
    assert build_view(source(sets), tmp_path / "label.html", count=2, label=name) == having[:2]
    assert f"{escape(name)}: present" in (tmp_path / "label.html").read_text()
    assert build_view(source(sets), tmp_path / "keys.html", count=1, keys=[having[2], having[0]]) == [having[2], having[0]]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--key", "nobody"], "has no sample 'nobody'"),
        (["--label", "Foo"], "has no label 'Foo'; it has: "),
        (["--label", "Foo", "--key", "a"], "give one of them"),
        (["--entities", "OTHER"], "no manifest.json in OTHER"),
    ],
)
def test_a_wrong_choice_is_one_line(
    sets, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    code, _ = call("view", sets.paired, "--out", str(tmp_path / "view.html"), *options)
    output, errors = capsys.readouterr()
    assert code == 2 and told in errors and errors.count("\n") == 1 and not output
    assert not (tmp_path / "view.html").exists()


def test_boxes_and_names_that_would_break_out(sets, tmp_path: Path) -> None:
    report = f"No effusion. {HOSTILE}"
    document = {
        "report": {"text": report}, "labels": {HOSTILE: 1}, "view": HOSTILE,
        "boxes": [{"label": HOSTILE, "x": 1, "y": 2, "width": 3, "height": 4}],
    }  # fmt: skip
    png = next(members["png"] for _, members in iterate(sets.paired))
    with ShardWriter(
        str(tmp_path / "set"), kind="base", dataset="own", split="train", config_hash="x", labels=(HOSTILE,)
    ) as writer:
        writer.add("a-good", {"png": png, "json": json.dumps(document).encode()})
        writer.add("b-bad", {"png": b"no image", "json": json.dumps(document).encode()})
    out = tmp_path / "view.html"
    assert build_view(Source(url=str(tmp_path / "set")), out, count=2) == ["a-good", "b-bad"]
    page = out.read_text()
    assert "<script" not in page and page.count(escape(HOSTILE, quote=False).split("alert")[0]) >= 4
    assert 'x="1.0" y="2.0" width="3.0" height="4.0"' in page
    assert "This sample cannot be shown: " in page


def test_a_report_is_cut_at_its_entities() -> None:
    spans = [
        {"start": 9, "end": 13, "label": "ANATOMY", "negated": False, "uncertain": True, "cui": "C1"},
        {"start": 3, "end": 8, "label": "FINDING", "negated": True},
        {"start": 4, "end": 6, "label": "FINDING", "negated": False},  # inside another one
    ]
    assert list(pieces("No edema lung.", spans)) == [
        Piece("No "), Piece("edema", "FINDING", "negated", "FINDING, negated"), Piece(" "),
        Piece("lung", "ANATOMY", "uncertain", "ANATOMY, uncertain, C1"), Piece("."),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the Debian package chromium")
def test_a_browser_hides_the_attention_without_a_script(sets, tmp_path: Path) -> None:
    out = tmp_path / "view.html"
    build_view(source(sets), out, count=1)
    pages = {"on": out.read_text(), "off": out.read_text().replace('id="attention" checked', 'id="attention"')}
    pictures = {}
    for name, page in pages.items():
        (tmp_path / f"{name}.html").write_text(page)
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={tmp_path / name}.png"]
        subprocess.run([*command, f"file://{tmp_path / name}.html"], check=True, capture_output=True, timeout=60)
        pictures[name] = (tmp_path / f"{name}.png").read_bytes()
    assert pictures["on"] != pictures["off"]
