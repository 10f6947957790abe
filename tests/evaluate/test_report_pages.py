"""Report pages as a reader meets them: several runs compared, the command, and a real browser at the width of a phone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmclip_dist.evaluate.classification import ROC_AT
from mmclip_dist.evaluate.report import build_comparison
from mmclip_dist.evaluate.report.compare import differing, names_of
from mmclip_dist.evaluate.zeroshot import save_result
from tests.evaluate.test_report import HOSTILE, read, result, row, write_run
from tests.test_cli import call


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    made = []
    for number, name in enumerate(("one", "two")):
        rows = [row(step, loss={"contrastive": 4.0 - number - step / 100}) for step in (1, 10, 20)]
        made.append(write_run(tmp_path / name, rows, **{"optim.lr": f"{1 + number}e-4"}))
        rates = (ROC_AT ** (1 / (2 + number))).round(4).tolist()
        save_result(result(auc_macro=0.7 + number / 10, roc={"macro": rates}), made[-1] / "zeroshot.json")
    return made


def test_runs_are_compared_side_by_side(runs: list[Path]) -> None:
    path = build_comparison(runs)
    assert path == runs[0] / "comparison.html"
    page, text = path.read_text(), read(path).text
    for words in (
        "Macro AUC, zero-shot 0.700 95% interval 0.654 to 0.765 0.800", "Steps 20", "AUC, Mass 0.825 0.825",
        "Evaluated on covid/test covid/test", "optim.lr 0.0001 0.0002", "Mean ROC curves: one AUC 0.700; two AUC 0.800",
        "Contrastive loss (nats) over training steps, at the end: one 3.80; two 2.80",
        "one 3.990 3.800 3.800 two 2.990 2.800 2.800",
    ):  # fmt: skip
        assert words in text, words
    settings = page.partition('id="settings"')[2]
    assert re.findall(r"<th scope=\"row\"><code>([^<]*)", settings) == ["optim.lr"]  # run_dir differs too, and does not matter
    assert "were not evaluated on the same sets" not in text
    for chart in re.findall(r'<svg class="chart".*?</svg>', page):
        assert "stroke: var(--s1)" in chart and "stroke: var(--s2)" in chart  # overlaid
    assert build_comparison(runs).read_text() == page


def test_what_does_not_compare_is_said(runs: list[Path]) -> None:
    save_result(result(datasets=("nih/test",), roc={}), runs[1] / "zeroshot.json")
    assert "The runs were not evaluated on the same sets: their scores do not compare." in read(build_comparison(runs)).text
    for run in runs:
        (run / "zeroshot.json").unlink()
        (run / "metrics.jsonl").write_text("")
    text = read(build_comparison(runs)).text
    assert "Not shown: no run has a zeroshot.json with curves." in text and "Not measured: no run has rows" in text


def test_settings_differ_where_any_run_has_another_value() -> None:
    one, two, three = {"x": 1, "y": 2, "run_dir": "p"}, {"x": 1, "y": 3, "run_dir": "q"}, {"x": 1, "y": 2, "z": 0}
    assert list(differing({"a": one, "b": two, "c": three})) == [("y", ["2", "3", "2"]), ("z", ["–", "–", "0"])]


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert names_of([Path("/a/x/train"), Path("/a/y/train")]) == ["x/train", "y/train"]
    assert names_of([Path("/a/x"), Path("/a/y")]) == ["x", "y"]


def test_names_in_a_comparison_cannot_become_markup(tmp_path: Path) -> None:
    rows = [row(1, loss={HOSTILE: 1.0})]
    made = [write_run(tmp_path / f"{n}<script>", rows, **{"deepspeed": json.dumps({"note": n})}) for n in "ab"]
    page = build_comparison(made).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["RUN", "RUN"], "is named twice: name each run once"),
        (["RUN", "OTHER", "--data", "sets/x"], "--data is for the page of one run"),
        (["RUN", *"abcdef"], "7 runs are too many for one page: name at most 6"),
        (["RUN", "nowhere"], "nowhere holds no run"),
        (["RUN", "--data", "nowhere"], "no manifest.json in nowhere"),
        (["RUN", "--out", "s3://bucket/x.html"], "is a URL: name a local path"),
    ],
)
def test_a_wrong_choice_is_one_line(
    tmp_path: Path, untrained: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    run, other = write_run(tmp_path / "run", [row(1)]), write_run(tmp_path / "other", [row(1)])
    shutil.copytree(untrained / "checkpoints", run / "checkpoints")
    code, _ = call("report", *(word.replace("RUN", str(run)).replace("OTHER", str(other)) for word in words))
    output, errors = capsys.readouterr()
    assert code == 2 and told in " ".join(errors.split()) and not output
    assert not list(tmp_path.rglob("*.html"))


def test_the_command_writes_the_page_where_it_is_told(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("report", str(runs[0]))[0] == 0
    assert call("report", *map(str, runs), "--out", str(tmp_path / "both.html"))[0] == 0
    assert capsys.readouterr().out.split() == [str(runs[0] / "report.html"), str(tmp_path / "both.html")]
    assert (runs[0] / "report.html").is_file() and (tmp_path / "both.html").is_file()


# -- In a browser -----------------------------------------------------------------------------------------------------


@contextmanager
def browser(*, dark: bool) -> Iterator[Any]:
    """Chromium on a phone, without JavaScript of the page."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


_SEEN = """
const root = document.documentElement, charts = [...document.querySelectorAll('svg.chart')];
const sizes = charts.map(one => one.getBoundingClientRect()).filter(box => box.width);
const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number); return 0.3 * r + 0.6 * g + 0.1 * b };
const paper = light(getComputedStyle(document.body).backgroundColor);
const least = (query, kind) => Math.min(...[...document.querySelectorAll(query)].map(one =>
  Math.abs(light(getComputedStyle(one)[kind(one)]) - paper)));
return {
  width: root.scrollWidth, narrow: sizes.filter(box => box.width < 100).length, wide: sizes.filter(box => box.right > 390).length,
  charts: charts.length, broken: [...document.images].filter(one => !one.naturalWidth).length, images: document.images.length,
  contrast: least('svg.chart text', () => 'fill'),
  lines: least('svg.chart path[style*="--s1"]', one => one.style.stroke ? 'stroke' : 'fill'),
  headings: [...document.querySelectorAll('h2')].map(one => one.textContent),
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs the Debian packages chromium and chromium-driver")
def test_a_phone_shows_the_pages_without_scripts(runs: list[Path], untrained: Path, sets: Any) -> None:
    from mmclip_dist.evaluate.report import build_report

    shutil.copytree(untrained / "checkpoints", runs[0] / "checkpoints")
    rates = np.sqrt(ROC_AT).round(4).tolist()
    classes = dict.fromkeys(("Enlarged Cardiomediastinum", "Pleural Effusion"), 0.7)
    save_result(result(per_class=classes, roc=dict.fromkeys((*classes, "macro"), rates)), runs[0] / "zeroshot.json")
    pages = build_report(runs[0], [("warm-up", 3.0)], data=[sets.test]), build_comparison(runs)
    for dark in (False, True):
        with browser(dark=dark) as driver:
            for page, charts, images in zip(pages, (12, 7), (40, 0), strict=True):
                driver.get(page.as_uri())
                seen = driver.execute_script(_SEEN)
                assert seen["width"] <= 390 and not seen["wide"] and not seen["narrow"], seen
                assert seen["charts"] == charts and seen["images"] >= images and not seen["broken"], seen
                assert seen["contrast"] > 60 and seen["lines"] > 60, seen
                assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
                wanted = ["Zero-shot classification", "Training", "Stage durations", "Held-out samples", "Attention",
                          "Rebuilt images (AttMIM)", "Rebuilt reports (EntMLM)", "Retrieval", "Worst errors",
                          "Similarity of a batch", "The run"]  # fmt: skip
                assert not images or seen["headings"] == wanted
