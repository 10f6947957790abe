"""The tasks of `mmclip evaluate` on a small model: figures against ones made by hand, files, and what a set may lack."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmclip_shards.datasets.synthetic.set import pack_synthetic
from mmclip_shards.images import decode_image
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mmclip_dist.checkpoint.folder import Meta, checkpoint_path
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.cli import app
from mmclip_dist.cli import run as run_command
from mmclip_dist.evaluate import probe as probes
from mmclip_dist.evaluate import tasks
from mmclip_dist.evaluate.encoders import Trained, open_encoder
from mmclip_dist.evaluate.pointing import THRESHOLDS, covered, holds, pointed
from mmclip_dist.evaluate.probe import Featured, patients_share, probe
from mmclip_dist.evaluate.protocol import Columns, load_protocol
from mmclip_dist.evaluate.result import HARNESS
from mmclip_dist.evaluate.retrieval import hits, ranks
from mmclip_dist.evaluate.zeroshot import load_result, zero_shot
from mmclip_dist.model.build import build_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A set with reports, boxes and the splits train, val and test, of other patients than those of the fixture `sets`."""
    folder = str(tmp_path_factory.mktemp("tasks") / "set")
    splits = {"train": 0.5, "val": 0.25, "test": 0.25}
    pack_synthetic(folder, 160, seed=11, size=40, splits=splits, samples_per_shard=32)
    return folder


@pytest.fixture(scope="module")
def run(sets, tokenizer, data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(3)
    folder, diseases = tmp_path_factory.mktemp("run"), load_manifest(f"{data}/test").labels
    checkpoint_path(folder, 3).mkdir(parents=True)
    model = build_model(sets.config(), tokenizer, diseases)
    write_model(checkpoint_path(folder, 3), model, tokenizer, sets.config(), Meta(3, 1, 1, diseases, ()))
    return str(folder)


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `mmclip evaluate ...`."""
    monkeypatch.setattr("sys.argv", ["mmclip", "evaluate", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        code = run_command(app)
    except SystemExit as stop:
        code = int(stop.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


# -- Zero-shot --------------------------------------------------------------------------------------------------------


def test_zero_shot_writes_json_csv_and_a_table(run: str, data: str, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "result.json"
    code, said, error = call(monkeypatch, capsys, "zeroshot", run, "--data", data, "--validation", data, "--out", out)
    assert code == 0, error
    found, plain = json.loads(out.read_text()), zero_shot(run, [f"{data}/test"])
    assert found["auroc"] == plain.per_class and found["auroc_macro"] == plain.auc_macro
    assert tuple(found["ci95"]["auroc"]["macro"]) == plain.auc_macro_ci95 and found["roc"] == plain.roc
    assert (found["dataset"], found["split_name"], found["protocol"], found["task"]) == ("synthetic", "test", "own", "zeroshot")
    assert found["n"] == plain.samples and found["n_patients"] == plain.patients
    assert found["checkpoint_sha256"] == plain.checkpoint and len(found["prompts_hash"]) == 64
    assert set(found["f1_val_threshold"]) == set(found["f1_max_test"]) == {*plain.per_class, "macro"}
    assert all(found["f1_max_test"][name] >= value for name, value in found["f1_val_threshold"].items())
    assert "synthetic/val" in found["threshold_from"]
    assert load_result(out) == plain  # the report and the model card read either
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert tuple(rows[0]) == HARNESS and [row["label"] for row in rows] == list(found["auroc"])
    assert float(rows[0]["auroc"]) == found["auroc"][rows[0]["label"]] and float(rows[0]["threshold"]) == pytest.approx(
        found["thresholds"][rows[0]["label"]]
    )
    assert "macro" in said and "F1, best on test" in said and f"{plain.auc_macro:.3f}" in said
    assert sum(line.startswith("│") for line in said.splitlines()) == len(plain.per_class) + 1  # a row is a line, also in a log


def test_without_validation_columns_are_absent_and_it_is_said_why(run: str, data: str, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "result.json"
    code, said, _ = call(monkeypatch, capsys, "zeroshot", f"{data}/test", "--checkpoint", run, "--out", out)  # the older form
    found = json.loads(out.read_text())
    assert code == 0 and found["f1_val_threshold"] is None and found["thresholds"] is None
    assert "f1_val_threshold" not in found["ci95"]
    assert "without a validation set (--validation URL)" in found["threshold_from"] and "without a validation set" in said
    assert next(csv.DictReader(out.with_suffix(".csv").open()))["f1"] == ""


def test_a_named_protocol_scores_by_its_own_prompts(run: str, data: str) -> None:
    with open_encoder(run) as encoder:
        found = tasks.zeroshot(tasks.Request(encoder, [data], load_protocol("siim@cxrclip"))).document
        assert isinstance(encoder, Trained)
        with torch.no_grad():
            stated, denied = encoder.embed_texts(["Pneumothorax", "No Pneumothorax"])
            scores, labels = [], []
            for _, members in iterate(f"{data}/test"):
                image = encoder.embed_images(encoder.pixels(decode_image(members.get("png") or members["jpg"]))[None])[0]
                scores.append(float(image @ (stated - denied)))
                labels.append(json.loads(members["json"])["labels"]["Pneumothorax"])
    assert found["classes"] == ["Pneumothorax"]
    assert found["auroc"]["Pneumothorax"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert found["notes"][0].startswith("labels unknown to the protocol siim@cxrclip, left out: Atelectasis, Cardiomegaly")
    assert any(f"{found['n']} images, where siim@cxrclip has 1372" in line for line in found["notes"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["zeroshot", "RUN", "--data", "SET", "--protocol", "chexpert5@chexzero"], "lacks labels that protocol chexpert5"),
        (["zeroshot", "RUN", "--data", "SET", "--protocol", "siim@benchx"], "the class 'Pneumothorax' has no prompts"),
        (["zeroshot", "RUN", "--data", "SET", "--protocol", "siim@mavl"], "but the model reads 48"),
        (["zeroshot", "RUN", "--data", "SET/train", "--protocol", "siim@cxrclip"], "is the split 'train'"),
        (["zeroshot", "RUN", "--data", "SET", "--protocol", "nih"], "no protocol 'nih': the protocols are"),
        (["zeroshot", "RUN"], "name a set to evaluate on: --data URL"),
        (["zeroshot", "RUN", "SET", "--data", "SET"], "name one model, found 2 arguments"),
        (["probe", "RUN", "--data", "PAIRED"], "is one split, 'test', and the probe needs 'train' too"),
        (["retrieval", "RUN", "--data", "UNPAIRED", "--protocol", "TEST"], "have no report, which retrieval needs"),
        (["zeroshot", "hf:SET", "--data", "SET"], "has no config.json"),
        (["zeroshot", "RUN", "--data", "SET", "--validation", "SET/test"], "share"),
    ],
)
def test_what_a_set_lacks_is_one_line(
    sets, run: str, data: str, tmp_path: Path, monkeypatch, capsys, words: list[str], told: str
) -> None:
    (tmp_path / "any.yaml").write_text("source: any split\nsplit: train\nclasses: {}\n")
    names = {"RUN": run, "SET": data, "UNPAIRED": sets.unpaired, "PAIRED": sets.test, "TEST": str(tmp_path / "any.yaml")}
    for name, value in names.items():
        words = [word.replace(name, value) if name in word else word for word in words]
    code, _, error = call(monkeypatch, capsys, *words)
    error = error.strip("\n")  # a progress bar that is not on a terminal ends with an empty line
    assert code == 2 and error.startswith("error: ") and told in error and "\n" not in error, error


# -- Probe ------------------------------------------------------------------------------------------------------------


def featured(seed: int, count: int) -> Featured:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, (count, 2))
    features = random.normal(size=(count, 6)) + labels[:, :1] * np.array([2, 0, 0, 0, 0, 0])
    return Featured(features, labels, np.array([f"{seed}-{row // 2}" for row in range(count)]))


def test_the_probe_is_logistic_regression_with_c_from_validation() -> None:
    train, validation, test = featured(0, 400), featured(1, 100), featured(2, 100)
    found = probe(train, validation, test.features, 1.0)
    assert found.test.shape == (1, 100, 2) and found.n_train == (400,) and found.strengths[0] in probes.STRENGTHS
    middle, spread = train.features.mean(0), train.features.std(0) + 1e-6
    model = LogisticRegression(C=found.strengths[0], max_iter=300).fit((train.features - middle) / spread, train.labels[:, 0])
    np.testing.assert_allclose(found.test[0, :, 0], model.decision_function((test.features - middle) / spread), atol=1e-9)
    aucs = {}
    for strength in probes.STRENGTHS:
        one = replace(validation)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probes, "STRENGTHS", (strength,))
            scores = probe(train, one, test.features, 1.0).validation[0]
        aucs[strength] = np.mean([roc_auc_score(validation.labels[:, c], scores[:, c]) for c in (0, 1)])
    assert aucs[found.strengths[0]] == max(aucs.values())


def test_subsets_are_of_whole_patients_and_always_the_same() -> None:
    patients = featured(0, 400).patients
    for subset in range(3):
        rows = patients_share(patients, 0.1, subset)
        assert len(rows) == 40 and not set(patients[rows]) & set(np.delete(patients, rows))
        np.testing.assert_array_equal(rows, patients_share(patients, 0.1, subset))
    assert set(patients_share(patients, 0.1, 0)) != set(patients_share(patients, 0.1, 1))
    assert len(patients_share(patients, 0.0001, 0)) == 2


@pytest.mark.slow
def test_the_probe_of_a_model_and_its_cache(run: str, data: str, tmp_path: Path, monkeypatch) -> None:
    forwards: list[int] = []
    features = Trained.features
    monkeypatch.setattr(Trained, "features", lambda self, pixels: forwards.append(len(pixels)) or features(self, pixels))
    with open_encoder(run) as encoder:
        request = tasks.Request(encoder, [data], load_protocol("siim@cxrclip"))
        first = tasks.linear_probe(request, tmp_path)
        count = len(forwards)
        again = tasks.linear_probe(request, tmp_path)
        assert again.document == first.document and len(forwards) == count  # nothing went through the model again
        damaged = sorted(tmp_path.glob("*.npz"))[0]
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:50])
        with pytest.raises(ValueError, match=r"are damaged .*: delete that file"):
            tasks.linear_probe(request, tmp_path)
        damaged.write_bytes(whole)
        encoder.sha256 = "0" * 64
        probes.featured(encoder, request.test(), [Columns({}, ())], (), tmp_path)
        assert len(forwards) > count
    shares = {one["share"]: one for one in first.document["results"]}
    assert set(shares) == {0.01, 0.1, 1.0} and len(shares[0.01]["n_train"]) == 5
    assert shares[1.0]["n_train"] == [load_manifest(f"{data}/train").samples]
    assert shares[1.0]["f1_val_threshold"]["macro"] > 0 and "synthetic/val" in shares[1.0]["threshold_from"]
    assert shares[0.01]["one_kind_only"]  # one or two patients
    assert {row["seed"] for row in first.rows} == {0, 1, 2, 3, 4} and first.document["features"].startswith("mean of the patches")


def test_a_probe_on_patients_of_the_test_set_is_refused(run: str, data: str, tmp_path: Path) -> None:
    with open_encoder(run) as encoder:
        request = tasks.Request(encoder, [data], load_protocol("own"), train=f"{data}/test")
        with pytest.raises(ValueError, match=r"the probe's training set and the test set share \d+ patients"):
            tasks.linear_probe(request, tmp_path)


# -- Retrieval --------------------------------------------------------------------------------------------------------


def test_identical_reports_count_once_or_each() -> None:
    """Three samples; the first and the last have the same report, to which the second image is nearest as well."""
    texts = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    images = np.array([[1.0, 0.1], [1.0, 0.5], [0.2, 1.0]])
    reports = ["a", "b", "a"]
    by_image, by_text, rows = ranks(images, texts, reports, once=True)
    assert by_image.tolist() == [1, 2, 2] and rows.tolist() == [0, 1]
    assert by_text.tolist() == [2, 2]  # "a": the second image ties with the first, and a tie stands before
    by_image, by_text, rows = ranks(images, texts, reports, once=False)
    assert by_image.tolist() == [1, 3, 2] and by_text.tolist() == [2, 2, 2] and rows.tolist() == [0, 1, 2]
    assert hits(np.array([1, 5, 6, 11])).tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_a_model_that_gives_every_image_the_same_finds_nothing() -> None:
    same = np.ones((50, 2))
    by_image, by_text, _ = ranks(same, same, list(range(50)), once=False)
    assert by_image.tolist() == by_text.tolist() == [50] * 50


def test_retrieval_of_a_model(run: str, data: str, monkeypatch, capsys, tmp_path: Path) -> None:
    code, said, error = call(monkeypatch, capsys, "retrieval", run, "--data", data, "--out", tmp_path / "r.json")
    assert code == 0, error
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    count = load_manifest(f"{data}/test").samples
    assert set(results) == {f"{way}_{kind}" for way in ("image_to_text", "text_to_image") for kind in ("once", "each")}
    assert results["image_to_text_each"]["candidates"] == results["text_to_image_each"]["queries"] == count
    assert results["text_to_image_once"]["queries"] == results["image_to_text_once"]["candidates"] <= count
    for one in results.values():
        assert one["R@1"] <= one["R@5"] <= one["R@10"] and one["ci95"]["R@10"][0] <= one["R@10"] <= one["ci95"]["R@10"][1]
    assert "counted once" in said and not (tmp_path / "r.csv").exists()


# -- Pointing ---------------------------------------------------------------------------------------------------------


def test_the_share_of_a_patch_in_a_box() -> None:
    found = covered(np.array([[0.25, 0.0, 1.0, 0.75]]), 2).reshape(2, 2)
    assert found == pytest.approx(np.array([[0.5, 1.0], [0.25, 0.5]]))
    assert covered(np.array([[0, 0, 1, 1], [0, 0, 1, 1]]), 2).max() == 1
    corner = np.array([[0.5, 0.5, 1, 1]])
    assert holds(corner, 0.5, 0.75) and not holds(corner, 1.0, 0.75)


def test_pointing_by_hand() -> None:
    right = np.array([[0.5, 0.0, 1.0, 1.0]])  # the right half
    found = pointed(np.array([0.0, 0.6, 0.0, 0.3]), right)
    assert found.hit and found.box_share == 0.5
    weights = np.exp(np.array([0.0, 0.6, 0.0, 0.3]) / 0.1)
    assert found.attention == pytest.approx(weights[[1, 3]].sum() / weights.sum())
    assert found.iou == pytest.approx(np.mean([1 if value <= 0.3 else 0.5 for value in THRESHOLDS]))
    assert found.cnr == pytest.approx(0.45 / 0.15)
    assert not pointed(np.array([0.7, 0.6, 0.0, 0.3]), right).hit
    assert np.isnan(pointed(np.arange(4.0), np.array([[0, 0, 1, 1]])).cnr)


def test_pointing_of_a_model(run: str, data: str, monkeypatch, capsys, tmp_path: Path) -> None:
    code, said, error = call(monkeypatch, capsys, "pointing", run, "--data", data, "--out", tmp_path / "p.json")
    assert code == 0, error
    results = json.loads((tmp_path / "p.json").read_text())["results"]
    boxed = [{box["label"] for box in json.loads(members["json"]).get("boxes", [])} for _, members in iterate(f"{data}/test")]
    classes = {name for name in results if name != "macro"}
    assert classes == set().union(*boxed) and results["macro"]["findings"] == sum(map(len, boxed))
    for name in classes:
        assert results[name]["findings"] == sum(name in names for names in boxed)
    means = [results[name]["hit"] for name in classes]
    assert results["macro"]["hit"] == pytest.approx(np.mean(means)) and 0 < results["macro"]["attention"] < 1
    assert "maximum in box" in said


def test_a_set_without_boxes_cannot_be_pointed_at(run: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmclip_dist.evaluate.reading._boxes", lambda members, columns: {})
    with open_encoder(run) as encoder, pytest.raises(ValueError, match=r"has no boxes of Atelectasis, .*, which pointing needs"):
        tasks.pointing(tasks.Request(encoder, [data], load_protocol("own")))
