"""What a report shows of held-out samples: it is what the model makes of them, and what there is not is said."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmclip_shards.document import read_document
from mmclip_shards.reader import iterate
from mmclip_shards.writer import ShardWriter
from PIL import Image

from mmclip_dist.checkpoint.folder import checkpoint_path
from mmclip_dist.evaluate.report import rebuilt
from mmclip_dist.evaluate.report.answers import embedded_pairs, retrieval, similarity, worst_errors
from mmclip_dist.evaluate.report.held_out import HeldOut, NotShown
from mmclip_dist.evaluate.report.page import build_report
from mmclip_dist.evaluate.report.rebuilt import rebuilt_images, rebuilt_reports
from mmclip_dist.model.masking import patch_pixels


@pytest.fixture(scope="module")
def held(untrained: Path, sets: Any) -> HeldOut:
    return HeldOut(checkpoint_path(untrained, 3), [sets.test])


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_scores_are_those_of_the_samples_in_order(held: HeldOut, sets: Any) -> None:
    stored = [read_document(members) for _, members in iterate(sets.test)]
    assert [sample.document for sample in held.samples] == stored
    known = [[document.labels[name] for name in held.classes] for document in stored]
    assert held.labels.tolist() == [[value if value in (0, 1) else -1 for value in values] for values in known]
    with torch.inference_mode():
        image = held.batch([held.members(5)])["image"]
        np.testing.assert_allclose(held.model.embed_images(image)[0], held.images[5], atol=1e-5)


def test_a_rebuilt_image_is_its_own_where_nothing_was_hidden(held: HeldOut) -> None:
    shown = rebuilt_images(held)
    assert len(shown) == 4
    batch = held.batch([held.members(row) for row in range(4)])
    with torch.inference_mode():
        masked = held.model.image_masks(batch)
        error = (held.model.rebuild_images(batch, masked) - patch_pixels(batch["image"], 8)).square().mean(2)
    for row, one in enumerate(shown):
        hidden = masked[row].reshape(4, 4).numpy().repeat(8, 0).repeat(8, 1)
        original, visible, again = pixels(one.original), pixels(one.visible), pixels(one.rebuilt)
        assert (pixels(one.mask) == np.where(hidden, 0, 255)).all()
        assert (visible[~hidden] == original[~hidden]).all() and (visible[hidden] == 96).all()
        assert (again[~hidden] == original[~hidden]).all() and (again[hidden] != original[hidden]).any()
        assert one.loss == pytest.approx(float(error[row][masked[row]].mean()), rel=1e-4)
        assert (pixels(one.error)[~hidden] == 0).all() and (pixels(one.error)[hidden].sum(-1) > 0).all()
        assert one.hidden == pytest.approx(0.5, abs=0.1) and one.guide == "its report"
    grey = 255 * (batch["image"][0, 0].numpy() * rebuilt.PIXEL_DEVIATION + rebuilt.PIXEL_MEAN)
    assert np.abs(pixels(shown[0].original) - grey).max() <= 0.51


def test_guesses_are_of_the_masked_entities_and_the_report_stays_whole(held: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows every token guesses right everywhere; one that always says the same is wrong everywhere."""
    true: list[torch.Tensor] = []
    logits = torch.nn.functional.one_hot

    def knowing(batch: Any, plan: Any, seen: torch.Tensor) -> torch.Tensor:
        true.append(batch["target_tokens"].flatten()[plan.masked])
        return logits(true[0], len(held.tokenizer))

    monkeypatch.setattr(held.model, "rebuild_entities", knowing)
    shown = rebuilt_reports(held)
    for number, one in enumerate(shown):
        report = held.samples[int(held.with_reports[number])].document.report
        assert "".join(guess.piece.text for guess in one.guesses) == report
        right, masked = one.counts
        assert right == masked > 0
        assert all(guess.piece.kind for guess in one.guesses if guess.guess is not None)
    monkeypatch.setattr(held.model, "rebuild_entities", lambda *_: logits(torch.full_like(true[0], 5), len(held.tokenizer)))
    assert [one.counts[0] for one in rebuilt_reports(held)] == [0] * len(shown)
    half = torch.where(torch.arange(len(true[0])) % 2 == 0, true[0], 5)  # every other token is wrong
    monkeypatch.setattr(held.model, "rebuild_entities", lambda *_: logits(half, len(held.tokenizer)))
    right = [guess.piece.text for one in rebuilt_reports(held) for guess in one.guesses if guess.right]
    assert right and all(len(held.tokenizer.tokenize(text)) == 1 for text in right)


def test_a_negated_entity_is_marked_whether_masked_or_not(held: HeldOut, untrained: Path, sets: Any, monkeypatch: Any) -> None:
    assert any(guess.piece.mark == "negated" for one in rebuilt_reports(held) for guess in one.guesses)
    page = build_report(copied(untrained, sets), data=[sets.test]).read_text()
    section = page.partition('id="rebuilt-reports"')[2].partition("</section>")[0]
    masked = r'class="guess wrong" title="[A-Z]+, negated[^>]*><del>[^<]+</del><i> → [^<]+</i></span>'
    assert re.search(masked, section)
    assert re.search(r'<mark class="negated" title="[^"]*"><del>', section)


def copied(untrained: Path, sets: Any) -> Path:
    """The untrained run with the configuration that makes it a run to the report."""
    from mmclip_dist.config import dump_config

    (untrained / "config.yaml").write_text(dump_config(sets.config(run_dir=str(untrained))))
    return untrained


def test_in_a_report_without_entities_words_are_guessed(held: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_extract", lambda reports: [[] for _ in reports])
    masked = [guess for one in rebuilt_reports(held) for guess in one.guesses if guess.guess is not None]
    assert masked and all(guess.piece.kind == "word" and " " not in guess.piece.text for guess in masked)


def test_the_worst_errors_are_the_most_confident_ones(held: HeldOut) -> None:
    for one in worst_errors(held):
        column = held.classes.index(one.name)
        scores, labels = held.scores[:, column], held.labels[:, column]
        assert one.false_positive.score == pytest.approx(max(scores[labels == 0]))
        assert one.false_negative.score == pytest.approx(min(scores[labels == 1]))
        assert one.false_positive.share == pytest.approx((scores[labels == 1] < max(scores[labels == 0])).mean())
        row = int(np.flatnonzero((labels == 0) & (scores == max(scores[labels == 0])))[0])
        assert one.false_positive.picture == held.picture(row, 176)


def test_retrieval_answers_are_the_nearest_and_marked_if_their_own(held: HeldOut) -> None:
    pairs = embedded_pairs(held)
    found = retrieval(held, pairs)
    similar = held.images @ pairs.texts.T
    for query in found.by_image:
        row = next(n for n in range(len(held.samples)) if held.picture(n, 176) == query.content)
        assert [answer.place for answer in query.answers[:3]] == [1, 2, 3] and len(query.answers) <= 4
        falling = sorted(dict(zip(pairs.reports, similar[row].tolist(), strict=True)).values(), reverse=True)
        expected = [falling[answer.place - 1] for answer in query.answers]
        assert [answer.cosine for answer in query.answers] == pytest.approx(expected, abs=1e-6)
        assert [answer.right for answer in query.answers] == [answer.content == pairs.reports[row] for answer in query.answers]
        assert any(answer.right for answer in query.answers)
    owns = [next(answer.place for answer in query.answers if answer.right) for query in found.by_image]
    assert owns == sorted(owns)
    assert all(answer.content.startswith("data:image/jpeg") for query in found.by_text for answer in query.answers)
    assert found.reports == len(set(pairs.reports)) and list(found.image_recall) == [1, 5, 10]


def test_the_similarity_matrix_is_of_different_reports(held: HeldOut) -> None:
    pairs = embedded_pairs(held)
    found = similarity(held, pairs)
    places = [pairs.reports.index(report) for report in list(dict.fromkeys(pairs.reports))[:16]]
    matrix = pairs.images[places] @ pairs.texts[places].T
    assert found.size == len(places) and found.first == (matrix.argmax(1) == np.arange(len(places))).sum()
    assert f"Cosine similarity of {found.size} images" in found.svg


def test_what_a_set_or_a_run_does_not_have_is_said(
    held: HeldOut, sets: Any, tmp_path: Path, untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    png = next(members["png"] for _, members in iterate(sets.test))
    with ShardWriter(str(tmp_path / "set"), kind="base", dataset="own", split="test", config_hash="x", labels=()) as writer:
        for name, data in (("a", png), ("b", png), ("c", b"no image")):
            writer.add(name, {"png": data, "json": json.dumps({"report": None, "labels": {}}).encode()})
    page = build_report(copied(untrained, sets), data=[str(tmp_path / "set")]).read_text()
    for line in (
        "on all 3 samples of own/test, 1 that cannot be read left out", "Not shown: own/test has no labels.",
        "Not shown: own/test has no reports.", "Not shown: own/test has no reports to retrieve.",
        "Not shown: no label of own/test has both positive and negative samples here.",
        "text: the prompts of its findings", "This file now holds images and reports of own/test",
    ):  # fmt: skip
        assert line in page, line
    without = held.config.model_copy(update={"loss": held.config.loss.model_copy(update={"image": 0.0, "entity": 0.0})})
    monkeypatch.setattr(held, "config", without)
    assert rebuilt_images(held) == NotShown("the run was trained without the image term (loss.image=0)")
    assert rebuilt_reports(held) == NotShown("the run was trained without the entity term (loss.entity=0)")
