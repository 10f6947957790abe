"""Labels from reports: what each sentence says of the 14 observations, and sets that are packed with them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from mmclip_shards.datasets.chexpert import FINDINGS
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from PIL import Image

from mmclip_dist.bench.entities import Report
from mmclip_dist.bench.labeller import Agreement, agreement, has_heading
from mmclip_dist.offline.clinical_text import Entity, load_lexicon
from mmclip_dist.offline.labels import OBSERVATIONS_PATH, Labeller, build_labeller, label_once, labeller_hash, labels_of
from tests.test_cli import call

pytest.importorskip("scispacy")

GOLD = [
    ("No pleural effusion or pneumothorax.", {"Pleural Effusion": 0, "Pneumothorax": 0, "No Finding": 1}),
    ("Small left pleural effusion.", {"Pleural Effusion": 1}),
    ("Possible pneumonia.", {"Pneumonia": -1}),
    ("Pneumonia cannot be excluded.", {"Pneumonia": -1}),
    ("Atelectasis versus consolidation.", {"Atelectasis": -1, "Consolidation": -1}),
    ("No effusion. Later a small effusion.", {"Pleural Effusion": 1}),  # present wins
    ("No edema. Possible interstitial edema.", {"Edema": -1}),  # uncertain wins over absent
    ("Heart size is normal.", {"Cardiomegaly": 0, "No Finding": 1}),
    ("The cardiomediastinal silhouette is unremarkable.", {"Cardiomegaly": 0, "Enlarged Cardiomediastinum": 0, "No Finding": 1}),
    ("Heart size is at the upper limits of normal.", {"Cardiomegaly": -1}),
    ("The heart is not normal.", {"No Finding": 1}),  # which says nothing of its size
    ("The heart is enlarged.", {"Cardiomegaly": 1}),
    ("Enlargement of the heart and normal hila.", {"Cardiomegaly": 1}),
    ("No enlargement of the mediastinum.", {"Enlarged Cardiomediastinum": 0, "No Finding": 1}),
    ("Widened mediastinum.", {"Enlarged Cardiomediastinum": 1}),
    ("Apical pleural scarring.", {"Pleural Other": 1}),
    ("Scarring in the left lung.", {}),  # a finding, and none of the 14
    ("No acute pulmonary disease.", {"No Finding": 1}),  # not an absent opacity
    ("Patchy opacity in the left lower lobe.", {"Lung Opacity": 1}),
    ("A rounded density.", {}),  # of a bone, perhaps
    ("Right upper lobe nodule.", {"Lung Lesion": 1}),
    ("Healed rib fractures.", {"Fracture": 1}),
    ("Endotracheal tube and right PICC line in place.", {"Support Devices": 1, "No Finding": 1}),
    ("Surgical clips.", {"No Finding": 1}),
    ("Indication: pneumonia. Findings: The lungs are clear.", {"No Finding": 1}),  # a question is no mention
    ("History of pneumothorax.", {"No Finding": 1}),
    ("Scoliosis.", {}),
    ("Low lung volumes.", {"No Finding": 1}),
    ("Congestive heart failure.", {"Edema": 1}),
    ("", {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def labeller() -> Labeller:
    return build_labeller()


def test_each_sentence_is_labelled(labeller: Labeller) -> None:
    found = labeller([report for report, _ in GOLD])
    wrong = [
        (report, {name: value for name, value in labels.items() if value is not None}, wanted)
        for (report, wanted), labels in zip(GOLD, found, strict=True)
        if labels != dict.fromkeys(FINDINGS) | wanted
    ]
    assert not wrong


def test_the_rules_name_terms_of_the_lexicon_and_observations_of_chexpert() -> None:
    import yaml

    rules = yaml.safe_load(OBSERVATIONS_PATH.read_text())
    terms = {term for of in load_lexicon()["entities"].values() for term in of}
    named = [term for of in rules["terms"].values() for term in of]
    assert len(named) == len(set(named))
    named += [*rules["except"], *rules["words"], *rules["neutral"], *(name for row in rules["near"] for name in row[:2])]
    assert set(named) <= terms
    observations = {*rules["terms"], *rules["normal"], *(row[-1] for row in [*rules["near"], *rules["words"].values()])}
    assert observations == set(FINDINGS) - {"No Finding"}


def test_the_nearest_anatomy_of_the_sentence_decides() -> None:
    report = "The aorta is normal and the heart enlarged"
    entities = [
        Entity(4, 9, "aorta", "ANATOMY", term="aorta"), Entity(28, 33, "heart", "ANATOMY", term="heart"),
        Entity(34, 42, "enlarged", "FINDING", term="enlargement"),
    ]  # fmt: skip
    assert labels_of(report, entities)["Cardiomegaly"] == 1
    assert labels_of(report, [entities[0], entities[2]])["Cardiomegaly"] == 0  # "normal", in a sentence of the heart


def test_a_report_that_comes_again_is_labelled_once() -> None:
    calls: list[list[str]] = []

    def label(reports):  # type: ignore[no-untyped-def]
        calls.append(list(reports))
        return [{"Edema": len(report)} for report in reports]

    reports = ["a", "bb", "a"] + ["bb"] * 300 + ["ccc"]
    assert [labels["Edema"] for labels in label_once(reports, label)] == [len(report) for report in reports]
    assert calls == [["a", "bb"], ["ccc"]]


def test_agreement_counts_present_against_headings() -> None:
    assert has_heading(["Opacity/lung/base"], ["Opacity"]) and not has_heading(["Opacity/lung"], ["Opacit", "Lung"])
    reports = [Report(n, {}, [heading]) for n, heading in enumerate(("Pneumonia", "normal", "Pneumonia/left", "normal"))]
    labels = [{"Pneumonia": value} for value in (1, 1, -1, 0)]
    found = agreement(reports, labels, "Pneumonia")
    assert found == Agreement(both=1, rules_alone=1, headings_alone=1, uncertain=1)
    assert (found.precision, found.recall, found.f1) == (0.5, 0.5, 0.5)


def test_a_set_is_packed_with_labels_from_its_reports_and_listed_as_a_table(
    labeller: Labeller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mmclip_dist.offline.labels.build_labeller", lambda: labeller)
    monkeypatch.setenv("MMCLIP_PATIENT_KEY", "k" * 32)
    monkeypatch.chdir(tmp_path)
    reports = ["No pneumothorax.", "Possible edema.", ""]
    rows = [
        {"image": "a.png", "patient": str(n), "key": f"k{n}", "report": text, "labels": {"Mass": 1}}
        for n, text in enumerate(reports)
    ]  # fmt: skip
    Image.new("L", (8, 8)).save("a.png")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["pack", "jsonl", ".", "set", "--splits", "train=1"]
    assert call(*command, "--labels-from-reports")[0] == 0
    manifest = load_manifest("set/train")
    assert set(manifest.labels) == set(FINDINGS) and labeller_hash()[:12] in str(manifest.labels_by)
    stored = [json.loads(members["json"])["labels"] for _, members in iterate("set/train")]
    assert stored == [
        dict.fromkeys(FINDINGS) | {"Pneumothorax": 0, "No Finding": 1}, dict.fromkeys(FINDINGS) | {"Edema": -1},
        dict.fromkeys(FINDINGS),
    ]  # fmt: skip
    assert call(*command, "--labels-from-reports")[0] == 0  # again: nothing to do
    assert call(*command)[0] == 2  # other labels are another set
    assert "holds another set" in capsys.readouterr().err
    Path("bare").mkdir()
    Path("bare/rows.jsonl").write_text(json.dumps({"image": "a.png", "patient": "1"}) + "\n")
    assert call("pack", "jsonl", "bare", "other", "--splits", "train=1", "--labels-from-reports")[0] == 2
    assert "--labels-from-reports needs reports" in capsys.readouterr().err
    assert call("labels", "set/train", "--out", "labels.csv")[0] == 0
    assert "Pneumothorax: 0 present, 0 uncertain, 1 absent" in capsys.readouterr().out
    with Path("labels.csv").open() as table:
        (first, second, third) = csv.DictReader(table)
    assert list(first) == ["key", *FINDINGS]
    assert (first["key"], first["Pneumothorax"], first["No Finding"]) == ("k0", "0.0", "1.0")
    assert second["Edema"] == "-1.0" and not any(third[name] for name in FINDINGS)
