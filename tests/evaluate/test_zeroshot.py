"""Zero-shot scores: the metric against scikit-learn, the interval, leaks, and a model whose answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader
from sklearn.metrics import roc_auc_score

from mmclip_dist.checkpoint.folder import Meta, checkpoint_path
from mmclip_dist.checkpoint.model_files import load_model, write_model
from mmclip_dist.evaluate.metrics import macro_auc_interval, per_class_auc, roc_auc
from mmclip_dist.evaluate.zeroshot import load_result, save_result, zero_shot
from mmclip_dist.model.build import build_model


def random(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_that_of_scikit_learn(seed: int) -> None:
    scores = np.round(random(seed).normal(size=200), 1)  # with ties
    positive = random(seed + 9).random(200) < 0.3
    assert roc_auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


def test_one_kind_of_sample_has_no_auc() -> None:
    assert np.isnan(roc_auc(np.arange(3.0), np.zeros(3, bool)))


def test_unknown_labels_do_not_count() -> None:
    scores = np.array([[0.1], [0.9], [0.5], [0.0]])
    assert per_class_auc(scores, np.array([[0], [1], [-1], [1]]))[0] == 0.5
    assert per_class_auc(scores, np.array([[0], [1], [0], [-1]]))[0] == 1.0


def test_the_interval_draws_patients_not_images() -> None:
    """Ten copies of every image of a patient must not make the interval narrower."""
    scores, labels = random().normal(size=(60, 1)), (random(1).random((60, 1)) < 0.5).astype(int)
    patients = np.arange(60).astype(str)
    once = macro_auc_interval(scores, labels, patients)
    copied = macro_auc_interval(scores.repeat(10, 0), labels.repeat(10, 0), patients.repeat(10))
    alone = macro_auc_interval(scores.repeat(10, 0), labels.repeat(10, 0), np.arange(600).astype(str))
    assert once[0] < roc_auc(scores[:, 0], labels[:, 0] == 1) < once[1]
    assert copied == pytest.approx(once, abs=1e-9)
    assert alone[1] - alone[0] < 0.5 * (once[1] - once[0])


@pytest.fixture(scope="module")
def run(sets, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = sets.config(f"run_dir={tmp_path_factory.mktemp('run')}")
    diseases = load_manifest(sets.test).labels
    folder = checkpoint_path(Path(config.run_dir), 3)
    folder.mkdir(parents=True)
    trained_on = tuple(shard.sha256 for shard in load_manifest(sets.paired).shards)
    model = build_model(config, tokenizer, diseases)
    write_model(folder, model, tokenizer, config, Meta(3, 1, 1, diseases, trained_on), model.state_dict())
    return Path(config.run_dir)


def test_the_average_is_evaluated_when_asked_for(sets, tokenizer, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train with optim\.ema"):
        zero_shot(str(run), [sets.test], average=True)
    last, other = (build_model(sets.config(f"seed={seed}"), tokenizer, load_manifest(sets.test).labels) for seed in (0, 1))
    meta = Meta(3, 1, 1, load_manifest(sets.test).labels, ())
    for name, weights in (("both", (last.state_dict(), other.state_dict())), ("other", (other.state_dict(),))):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, last, tokenizer, sets.config(), meta, *weights)
    of_average = zero_shot(str(tmp_path / "both"), [sets.test], average=True)
    assert of_average == zero_shot(str(tmp_path / "other"), [sets.test])
    assert of_average.checkpoint != zero_shot(str(tmp_path / "both"), [sets.test]).checkpoint


def test_the_result_covers_every_image_and_class(sets, run: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = zero_shot(str(run), [sets.test], report=lambda done, total: seen.append((done, total)))
    manifest = load_manifest(sets.test)
    assert result.samples == manifest.samples == seen[-1][0] == seen[-1][1]
    assert set(result.per_class) | set(result.left_out) == set(manifest.labels)
    assert result.auc_macro == pytest.approx(np.mean(list(result.per_class.values())))
    assert zero_shot(str(run), [sets.test]) == result  # nothing random is left
    save_result(result, tmp_path / "result.json")
    assert load_result(tmp_path / "result.json") == result
    assert json.loads((tmp_path / "result.json").read_text())["auc_macro"] == result.auc_macro


def test_an_undecodable_image_is_listed_and_the_rest_scored(sets, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil_one(reader: ShardReader, number: int, key: str) -> dict[str, bytes]:
        members = read(reader, number, key)
        return members if key != bad else members | {"png": b"no image", "jpg": b"no image"}

    read, whole = ShardReader.read, zero_shot(str(run), [sets.test])
    manifest = load_manifest(sets.test)
    bad = ShardReader(sets.test, manifest).keys(0)[1]
    monkeypatch.setattr(ShardReader, "read", spoil_one)
    result = zero_shot(str(run), [sets.test])
    assert result.undecodable == (bad,) and result.samples == manifest.samples - 1
    assert whole.undecodable == () and whole.samples == manifest.samples


def test_a_set_that_was_trained_on_is_refused(sets, run: Path) -> None:
    with pytest.raises(ValueError, match=r"was trained on.*--allow-leak"):
        zero_shot(str(run), [sets.paired])
    assert zero_shot(str(run), [sets.paired], allow_leak=True).samples == load_manifest(sets.paired).samples


def test_a_checkpoint_needs_nothing_but_itself(sets, run: Path, tmp_path: Path) -> None:
    """Moved elsewhere, it loads with its own tokenizer, prompts and shapes."""
    moved = tmp_path / "moved"
    checkpoint_path(run, 3).rename(moved)
    try:
        model, tokenizer, config, meta = load_model(moved)
        assert not model.training and meta.step == 3 and len(tokenizer) == model.text_decoder.head.out_features
        assert config.prompts.file == str(moved / "prompts.yaml")
        assert zero_shot(str(moved), [sets.test]).samples > 0
    finally:
        moved.rename(checkpoint_path(run, 3))


def test_a_set_without_labels_is_refused(sets, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mmclip_dist.evaluate.zeroshot.load_manifest", lambda url: replace(load_manifest(url), labels=())
    )
    with pytest.raises(ValueError, match="no labels"):
        zero_shot(str(run), [sets.test])
