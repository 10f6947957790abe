"""The HTML report: its figures are right, names cannot break out, and what is missing is said."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from mmclip_dist.checkpoint.folder import Meta, checkpoint_path, weights_hash
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.config import dump_config, load_config
from mmclip_dist.data.batch import collate
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.evaluate.classification import ROC_AT
from mmclip_dist.evaluate.report import build_report, examples
from mmclip_dist.evaluate.report.examples import attention_panels
from mmclip_dist.evaluate.report.held_out import HeldOut
from mmclip_dist.evaluate.report.pictures import heat_map
from mmclip_dist.evaluate.report.sources import read_job, training_seconds
from mmclip_dist.evaluate.zeroshot import ZeroShot, class_directions, save_result, zero_shot
from mmclip_dist.model.build import build_model

HOSTILE = '<script>alert("x")</script>&\'</td>'
COMMAND = ["train.py", "--local_rank=0", "recipes/small.yaml", "run_dir=a b"]


def row(step: int, **values: Any) -> dict[str, Any]:
    loss = {"contrastive": 4.0 - step / 100}
    found = {"step": step, "samples": 8 * step, "loss": loss, "lr": 1e-4, "temperature": 0.07}
    return found | {"samples_per_s": 40.0, "data_wait": 0.125, "memory_gib": 0.5} | values


def write_run(folder: Path, rows: Iterable[dict[str, Any]], **settings: str) -> Path:
    """A run folder as training leaves it, without checkpoints."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    overrides = [f"run_dir={folder}", *(f"{key}={value}" for key, value in settings.items())]
    (folder / "config.yaml").write_text(dump_config(load_config("quickstart", overrides)))
    versions = {"torch": "2.13.0", "numpy": None}
    environment = {"command": COMMAND, "world_size": 3, "python": "3.11.7", "machine": "M", "git": None}
    (folder / "environment.json").write_text(json.dumps(environment | {"versions": versions}))
    return folder


def result(**values: Any) -> ZeroShot:
    fields: dict[str, Any] = {
        "auc_macro": 0.71234, "auc_macro_ci95": (0.65432, 0.76543), "per_class": {"Edema": 0.6, "Mass": 0.82468},
        "left_out": (), "samples": 1234, "undecodable": (), "patients": 567, "datasets": ("covid/test",), "checkpoint": "ab" * 32,
    }  # fmt: skip
    return ZeroShot(**fields | values)


class _Reader(HTMLParser):
    """Collects what a browser would show or load; refuses tags that do not close in order."""

    VOID = ("meta", "br", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read(path: Path, *, reports: bool = False) -> _Reader:
    """reports: the page holds some, which may well say "None"."""
    page = path.read_text()
    reader = _Reader(page)
    assert not re.search(r"\b(nan|inf)\b" if reports else r"\b(nan|inf|None)\b", reader.text)
    return reader


# -- The page ---------------------------------------------------------------------------------------------------------


def test_a_run_shows_its_figures(tmp_path: Path) -> None:
    changed = {"log_every": "10", "optim.stop_at": "null", "optim.steps": "25"}
    run = write_run(tmp_path / "run", [row(1), row(10), row(20)], **changed)
    save_result(result(left_out=("Hernia",)), run / "zeroshot.json")
    path = build_report(run, [("warm-up", 30.0), ("train", 90.0)])
    assert path == run / "report.html"
    assert sorted(found.name for found in run.iterdir()) == [
        "config.yaml", "environment.json", "metrics.jsonl", "report.html", "zeroshot.json",
    ]  # fmt: skip
    page = read(path)
    for text in (
        "small", "Macro AUC, zero-shot 0.712 95% interval 0.654 to 0.765", "Steps 20 of 25 in the schedule",
        "Samples seen 160", "Samples per second 40.0 median", "Wall time 2 min 00 s all stages",
        "1,234 images of 567 patients", "negative images: Hernia.", "warm-up", "30 s · 25%", "1 min 30 s · 75%",
        "'run_dir=a b'", "torch 2.13.0", "numpy not measured", "ranks 3",
    ):  # fmt: skip
        assert text in page.text
    assert "run_dir: " in page.text  # the resolved configuration
    assert "clinical evidence" not in page.text  # only said of drawn images


def test_classes_are_sorted_by_their_auc(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(1)])
    save_result(result(), run / "zeroshot.json")
    text = read(build_report(run)).text
    assert "AUC by class, chance 0.5: Mass 0.825; Edema 0.600; Macro mean 0.712, 95% interval 0.654 to 0.765" in text
    assert "Not shown: this zeroshot.json holds none, as an earlier version wrote it" in text  # curves


def test_curves_are_shown_by_class_and_for_their_mean(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(1)])
    rates = np.sqrt(ROC_AT).round(4).tolist()
    save_result(result(roc=dict.fromkeys(("Edema", "Mass", "macro"), rates)), run / "zeroshot.json")
    found = re.findall(r"ROC curve of ([^:]*): AUC ([\d.]*)", build_report(run).read_text())
    assert found == [("Macro mean", "0.712"), ("Mass", "0.825"), ("Edema", "0.600")]


def test_a_quick_start_joins_its_phases_on_one_axis(tmp_path: Path) -> None:
    write_run(tmp_path / "warmup", [row(1), row(20, samples_per_s=80.0)], **{"log_every": "20"})
    both = {"contrastive": 3.0, "image": 0.5, "entity": 2.5}
    write_run(tmp_path / "train", [row(40, loss=both), row(60, loss=both)], **{"log_every": "20"})
    (tmp_path / "summary.json").write_text(json.dumps({"stages": [{"name": "entities", "seconds": 12.0}]}))
    job = read_job(tmp_path)
    assert job.boundary == 20
    assert [entry["step"] for entry in job.rows] == [1, 20, 40, 60]
    # 8 samples a step: 1 step at 40/s, 19 at 80/s, 40 at 40/s
    assert training_seconds(job.phases) == pytest.approx(8 * (1 / 40 + 19 / 80 + 40 / 40))
    page = build_report(tmp_path).read_text()
    x = 44 + 306 * 20 / 60  # of the plotting area
    assert page.count(f'<path d="M {x:.0f} 182 L {x:.0f} 34"') == 8  # the end of the warm-up, in every chart
    reader = read(tmp_path / "report.html")
    for text in ("until step 20", "Entity loss (EntMLM)", "Image reconstruction loss (AttMIM)", "12 s · 100%"):
        assert text in reader.text
    assert "warm-up: config.yaml" in reader.text
    assert "MMCLIP: config.yaml" in reader.text


def test_a_run_that_starts_from_a_checkpoint_does_not_count_the_steps_before_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(110), row(120)], **{"log_every": "10"})
    assert training_seconds(read_job(run).phases) == pytest.approx(20 * 8 / 40)


def test_names_from_data_and_config_cannot_become_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(1, loss={HOSTILE: 1.0})], **{"deepspeed": json.dumps({"note": HOSTILE})})
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"command": ["x", HOSTILE], "machine": HOSTILE}))
    hostile = result(per_class={HOSTILE: 0.5}, left_out=(HOSTILE,), datasets=(HOSTILE,), checkpoint=HOSTILE)
    save_result(hostile, run / "zeroshot.json")
    path = build_report(run, [(HOSTILE, 1.0)])
    assert "<script" not in path.read_text()
    assert read(path).text.count('<script>alert("x")</script>') >= 7  # shown, as text


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(step) for step in range(1, 3000)])
    save_result(result(), run / "zeroshot.json")
    path = build_report(run)
    page = path.read_text()
    assert len(page) < 1_000_000
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", page)
    reader = read(path)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in reader.tags}
    for _, attributes in reader.tags:
        assert not {"src", "srcset", "data", "action"} & set(attributes)
        assert (attributes.get("href") or "#").startswith(("#", "data:image/"))


def test_every_chart_has_a_title_and_a_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(step) for step in range(1, 200)])
    page = build_report(run).read_text()
    assert page.count('<svg class="chart"') == page.count("<summary>Table (34 of 199 rows)</summary>") == 6
    assert len(re.findall(r"<svg [^>]*><title>", page)) == page.count("<svg")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(1), row(2)])
    save_result(result(), run / "zeroshot.json")
    assert build_report(run).read_bytes() == build_report(run).read_bytes()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    (run / "environment.json").unlink()
    (run / "config.yaml").unlink()
    text = read(build_report(run)).text
    for expected in (
        "Not measured: this folder has no zeroshot.json", "metrics.jsonl is missing or has no rows yet",
        "environment.json is missing", "config.yaml is missing", "Steps not measured", "Wall time not measured",
        "no durations were given", "Not shown: no set was named. mmclip report RUN --data URL",
        f"mmclip evaluate zeroshot {run} --data URL --out {run}/zeroshot.json",
    ):  # fmt: skip
        assert expected in text
    assert "Attention" not in text


def test_values_that_are_no_numbers_are_not_measured(tmp_path: Path) -> None:
    lost = row(2, loss={"contrastive": math.nan}, temperature=math.inf, samples_per_s=0.0)
    run = write_run(tmp_path / "run", [row(1, loss={"contrastive": math.nan}), lost])
    save_result(result(auc_macro_ci95=(math.nan, math.nan), per_class={"A": math.nan, "B": 0.4}), run / "zeroshot.json")
    text = read(build_report(run)).text
    assert "95% interval not measured" in text
    assert "Contrastive loss Not measured: no row has a finite value." in text
    assert "Wall time not measured" in text


def test_waiting_for_data_is_in_percent(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(step, data_wait=0.5) for step in (1, 2, 3)])
    table = read(build_report(run)).text.partition("Waiting for data")[2].partition("Host memory")[0]
    assert "50.0" in table and "0.500" not in table


def test_findings_that_are_present_come_first() -> None:
    """A panel has room for a few rows; those of its findings are never cut."""
    rows = examples._scores({"A": 0, "B": 1, "C": -1, "D": 1}, {"A": 0.9, "B": 0.1, "C": 0.8, "D": 0.2})
    assert [(row.name, row.label) for row in rows] == [("D", 1), ("B", 1), ("A", 0), ("C", None)]


def test_half_a_quick_start_is_reported_as_such(tmp_path: Path) -> None:
    write_run(tmp_path / "warmup", [row(1)])
    assert "There is no train/ run in this folder yet" in read(build_report(tmp_path)).text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(ValueError, match=r"holds no run \(found: holiday.txt\).*metrics.jsonl.*warmup/ and train/"):
        build_report(tmp_path)
    with pytest.raises(ValueError, match="holds no run"):
        build_report(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "{oops\n", "metrics.jsonl, line 1, is cut or is not a JSON object: delete that line"),
        ("environment.json", '{"cut', "environment.json is cut or is not JSON"),
        ("metrics.jsonl", '{"step": 1}\n', "line 1, lacks data_wait"),
        ("environment.json", "[]", "must hold an object"),
        ("zeroshot.json", '{"auc": 1}', "run that again"),
        ("config.yaml", "a: [", "not valid YAML"),
        ("summary.json", '{"stages": [{}]}', "no usable `stages`"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    run = write_run(tmp_path / "run", [row(1)])
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        build_report(run)
    assert str(run / name) in str(caught.value)


@pytest.mark.parametrize("rates", [[0.1, 0.5], ["a"] * 101, [math.nan] * 101, 3])
def test_a_damaged_curve_is_named(tmp_path: Path, rates: Any) -> None:
    run = write_run(tmp_path / "run", [row(1)])
    save_result(result(roc={"Edema": rates}), run / "zeroshot.json")
    with pytest.raises(ValueError, match=r"zeroshot.json is no result .*; run that again"):
        build_report(run)


# -- Examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sets: Any, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A run on the synthetic sets with one (untrained) checkpoint, whose classes are not in the set's order."""
    run = write_run(tmp_path_factory.mktemp("examples") / "run", [row(1), row(7)])
    config = sets.config(run_dir=str(run))
    (run / "config.yaml").write_text(dump_config(config))
    diseases = load_manifest(sets.test).labels[::-1][:3]
    folder = checkpoint_path(run, 7)
    folder.mkdir(parents=True)
    model = build_model(config, tokenizer, diseases)
    write_model(folder, model, tokenizer, config, Meta(7, 1, 1, diseases, ()), model.state_dict())
    return run


@pytest.fixture(scope="module")
def held(trained: Path, sets: Any) -> HeldOut:
    return HeldOut(checkpoint_path(trained, 7), [sets.test])


def test_panels_show_the_first_positives(held: HeldOut, sets: Any) -> None:
    panels = attention_panels(held)
    positives = [json.loads(members["json"]) for _, members in iterate(sets.test)]
    positives = [about for about in positives if 1 in about["labels"].values()][:4]
    assert len(panels) == 4
    for panel, about in zip(panels, positives, strict=True):
        assert set(panel.guides) == {name for name, value in about["labels"].items() if value == 1}
        assert {score.name for score in panel.scores} == set(about["labels"])
        assert [vars(box) for box in panel.boxes] == about["boxes"]
        assert (panel.width, panel.height) == (about["width"], about["height"])
        assert panel.picture.startswith("data:image/jpeg;base64,")


def test_scores_and_attention_are_those_of_a_model_made_for_the_set(
    held: HeldOut, trained: Path, sets: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The checkpoint was trained on other classes; the same weights, built with the set's own, must agree."""
    checkpoint, classes = checkpoint_path(trained, 7), load_manifest(sets.test).labels
    config = sets.config(run_dir=str(trained))
    model = build_model(config, tokenizer, classes).eval()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    maker = ExampleMaker(tokenizer, classes, 32, 4, 48, config.entmlm, augment=None)
    key, members = next((k, m) for k, m in iterate(sets.test) if 1 in json.loads(m["json"])["labels"].values())
    batch = collate([maker(key, members, epoch=0)], 0, tokenizer.pad_token_id)
    batch["report_id"] = torch.tensor([-1])  # guided by its disease prompts
    with torch.inference_mode():
        wanted = model.embed_images(batch["image"]) @ class_directions(model, model.prompt_tokens, model.prompt_mask).T
        heat = heat_map(model.attention_grid(batch)[0].numpy())
    panel = attention_panels(held)[0]
    scores = {score.name: score.value for score in panel.scores}
    assert scores == pytest.approx(dict(zip(classes, wanted[0].tolist(), strict=True)), abs=1e-6)
    shown = Image.open(io.BytesIO(base64.b64decode(panel.heat.partition(",")[2])))
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(heat).astype(int)).max() <= 1


def test_the_page_of_a_set_holds_no_patient_and_no_key(trained: Path, sets: Any) -> None:
    save_result(zero_shot(str(trained), [sets.test]), trained / "zeroshot.json")
    path = build_report(trained, data=[sets.test])
    page, reader = path.read_text(), read(path, reports=True)
    assert f"checkpoint of step 7 on all {load_manifest(sets.test).samples} samples of synthetic/test" in reader.text
    assert "other ones than those" not in reader.text  # the zero-shot figures are of the same weights
    assert "ROC curve of Macro mean" in reader.text
    assert page.count('<rect class="box"') > 0
    assert "Not clinical evidence. synthetic-unpaired/train, synthetic/test, synthetic/train" in reader.text
    for key, members in iterate(sets.test):
        assert key not in page
        assert json.loads(members["json"])["patient"] not in page
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "embed"}
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)", re.sub(r"data:image/[^\"]*", "", page))
    assert build_report(trained, data=[sets.test]).read_text() == page


def test_without_a_named_set_no_image_and_no_report_is_shown(trained: Path, sets: Any) -> None:
    page = build_report(trained).read_text()
    assert "data:image" not in page
    assert not [key for key, members in iterate(sets.test) if json.loads(members["json"])["report"]["text"][:40] in page]


def test_examples_of_other_weights_say_so(trained: Path, sets: Any) -> None:
    save_result(result(checkpoint="0" * 64), trained / "zeroshot.json")
    text = read(build_report(trained, data=[sets.test]), reports=True).text
    assert f"These panels show weights {weights_hash(checkpoint_path(trained, 7))[:16]}" in text


def test_images_without_a_checkpoint_are_said_to_be_missing(tmp_path: Path, sets: Any) -> None:
    run = write_run(tmp_path / "run", [row(1)])
    assert "the run has no checkpoint yet" in read(build_report(run, data=[sets.test])).text


def test_heat_goes_from_purple_to_yellow() -> None:
    heat = np.asarray(heat_map(np.array([[1.0, 2.0], [3.0, 1.0]], np.float32)))
    assert heat.shape == (2, 2, 4)
    assert heat[0, 0].tolist() == [68, 1, 84, 38]
    assert heat[1, 0].tolist() == [253, 231, 37, 166]
    flat = np.asarray(heat_map(np.ones((3, 3), np.float32)))
    assert (flat == flat[0, 0]).all()
