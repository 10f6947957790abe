"""Zero-shot scores: the metric against scikit-learn, the interval, leaks, and a model whose answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader, iterate
from sklearn.metrics import roc_auc_score

from mmclip_dist.checkpoint.folder import Meta, checkpoint_path, weights_hash
from mmclip_dist.checkpoint.model_files import load_model, write_model
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.prompts import load_prompts
from mmclip_dist.evaluate import reading
from mmclip_dist.evaluate.classification import auc_intervals, per_class_auc
from mmclip_dist.evaluate.encoders import Trained
from mmclip_dist.evaluate.protocol import OWN, load_protocol
from mmclip_dist.evaluate.zeroshot import Evaluation, labelled_sets, load_result, save_result, zero_shot
from mmclip_dist.model.build import build_model


def roc_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    return float(per_class_auc(scores[:, None], positive[:, None].astype(int))[0])


def random(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_that_of_scikit_learn(seed: int) -> None:
    scores = np.round(random(seed).normal(size=200), 1)  # with ties
    positive = random(seed + 9).random(200) < 0.3
    assert roc_auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


@pytest.mark.parametrize("positive", [True, False])
def test_one_kind_of_sample_has_no_auc(positive: bool) -> None:
    assert np.isnan(roc_auc(np.arange(3.0), np.full(3, positive)))


def test_unknown_labels_do_not_count() -> None:
    scores = np.array([[0.1], [0.9], [0.5], [0.0]])
    assert per_class_auc(scores, np.array([[0], [1], [-1], [1]]))[0] == 0.5
    assert per_class_auc(scores, np.array([[0], [-1], [1], [0]]))[0] == 1.0  # 0.9 as a negative would give 2/3
    assert per_class_auc(scores, np.array([[0], [1], [1], [-1]]))[0] == 1.0  # 0.0 as a positive would give 2/3


def test_the_interval_draws_patients_not_images() -> None:
    """Ten copies of every image of a patient must not make the interval narrower."""
    scores, labels = random().normal(size=(60, 1)), (random(1).random((60, 1)) < 0.5).astype(int)
    patients = np.arange(60).astype(str)
    once = auc_intervals(scores, labels, patients).macro
    copied = auc_intervals(scores.repeat(10, 0), labels.repeat(10, 0), patients.repeat(10)).macro
    alone = auc_intervals(scores.repeat(10, 0), labels.repeat(10, 0), np.arange(600).astype(str)).macro
    assert once[0] < roc_auc(scores[:, 0], labels[:, 0] == 1) < once[1]
    assert copied == pytest.approx(once, abs=1e-9)
    assert alone[1] - alone[0] < 0.5 * (once[1] - once[0])


def test_the_interval_is_as_wide_as_hanley_and_mcneil_say() -> None:
    """95%: 3.92 standard errors of an AUC of 0.76 (two normal distributions, one standard deviation apart)."""
    labels = (np.arange(600) % 3 == 0).astype(int)
    scores = random().normal(size=600) + labels
    low, high = auc_intervals(scores[:, None], labels[:, None], np.arange(600).astype(str)).macro
    auc, positives, negatives = roc_auc(scores, labels == 1), 200, 400
    one, two = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (one - auc**2) + (negatives - 1) * (two - auc**2)
    assert high - low == pytest.approx(3.92 * (variance / positives / negatives) ** 0.5, rel=0.08)
    assert (low + high) / 2 == pytest.approx(auc, abs=0.01)


def test_a_class_that_loses_its_positives_leaves_the_mean_of_that_resample() -> None:
    """The second class has one positive, in a third of the resamples none: the others' AUC is not spoiled by it."""
    scores, labels = random().normal(size=(40, 2)), np.zeros((40, 2), int)
    labels[:20, 0] = labels[0, 1] = 1
    scores[:20, 0] += 50
    scores[0, 1] = 50
    assert auc_intervals(scores, labels, np.arange(40).astype(str)).macro == (1.0, 1.0)
    nothing = auc_intervals(scores, np.zeros((40, 2), int), np.arange(40).astype(str)).macro
    assert np.isnan(nothing).all() and len(nothing) == 2


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
    assert sorted([*result.per_class, *result.left_out]) == sorted(manifest.labels)
    assert result.auc_macro == pytest.approx(np.mean(list(result.per_class.values())))
    assert zero_shot(str(run), [sets.test]) == result  # nothing random is left
    save_result(result, tmp_path / "result.json")
    assert load_result(tmp_path / "result.json") == result
    assert json.loads((tmp_path / "result.json").read_text())["auc_macro"] == result.auc_macro


def test_the_figures_are_those_of_the_scores_image_by_image(sets, run: Path) -> None:
    """Each image alone, against each template's two prompts; AUC by scikit-learn; labels as they are stored."""
    result = zero_shot(str(run), [sets.test])
    model, tokenizer, config, _ = load_model(checkpoint_path(run, 3))
    stored = [(key, members, json.loads(members["json"])) for key, members in iterate(sets.test)]
    names = load_manifest(sets.test).labels
    prompts = load_prompts(names).texts
    maker = ExampleMaker(tokenizer, names, config.model.image.size, config.model.image.grid, 48, config.entmlm, augment=None)
    scores = np.zeros((len(stored), len(names)))
    with torch.no_grad():
        for row, (key, members, _) in enumerate(stored):
            image = model.embed_images(maker(key, members, 0)["image"][None])[0]
            for texts in prompts:
                encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
                similar = model.embed_texts(encoded["input_ids"], encoded["attention_mask"].bool()) @ image
                scores[row] += (similar[: len(names)] - similar[len(names) :]).numpy() / len(prompts)
    assert len(result.per_class) > 2
    for column, name in enumerate(names):
        present = np.array([about["labels"][name] for *_, about in stored]) == 1
        if name in result.per_class:
            assert result.per_class[name] == pytest.approx(roc_auc_score(present, scores[:, column]), abs=1e-9)
        else:
            assert name in result.left_out and (present.all() or not present.any())
    assert result.patients == len({about["patient"] for *_, about in stored}) < result.samples
    assert result.auc_macro_ci95[0] < result.auc_macro < result.auc_macro_ci95[1]
    assert result.datasets == ("synthetic/test",) and result.checkpoint == weights_hash(checkpoint_path(run, 3))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_batches_and_run_the_same_rounds(sets, run: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    model, tokenizer, _, _ = load_model(checkpoint_path(run, 3))
    evaluation, encoder = Evaluation(labelled_sets([sets.test], ()), load_protocol(OWN), None), Trained(model, tokenizer)
    (alone,), *_ = evaluation.rounds(encoder, 0, 1)
    monkeypatch.setattr(reading, "BATCH", 5)
    by_rank = [list(evaluation.rounds(encoder, rank, world)) for rank in range(world)]
    batches = -(-evaluation.samples // 5)
    assert {len(rounds) for rounds in by_rank} == {-(-batches // world)}  # ranks without a batch take part, too
    scored = [batch for of_round in zip(*by_rank, strict=True) for of_rank in of_round for batch in of_rank]
    assert [len(batch.known.labels) for batch in scored[:-1]] == [5] * (batches - 1)
    assert [patient for batch in scored for patient in batch.known.patients] == alone.known.patients
    np.testing.assert_array_equal(np.concatenate([batch.known.labels for batch in scored]), alone.known.labels)
    np.testing.assert_allclose(np.concatenate([batch.scores for batch in scored]), alone.scores, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_model_in_its_mode(sets, run: Path, training: bool) -> None:
    model, tokenizer, _, _ = load_model(checkpoint_path(run, 3))
    model.train(training)
    modes: list[bool] = []
    model.image.embeddings.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    list(Evaluation(labelled_sets([sets.test], ()), load_protocol(OWN), None).rounds(Trained(model, tokenizer), 0, 1))
    assert modes == [False] and model.training is training and model.image.training is training


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
