"""One sample as tensors: what is evidence, what is masked, and that every draw follows from seed, epoch and key."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from mmclip_shards.schema import encode_npy
from PIL import Image
from transformers import PreTrainedTokenizerBase

from mmclip_dist.config import Augment, EntMLM
from mmclip_dist.data.example import ExampleMaker, _tokens_of_spans
from mmclip_dist.data.tokenizer import train_tokenizer
from mmclip_dist.data.transforms import PIXEL_DEVIATION, PIXEL_MEAN

REPORT = "No effusion. Small pneumothorax."


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    """One token a word."""
    return train_tokenizer([REPORT] * 2)


def maker(tokenizer: PreTrainedTokenizerBase, **options: Any) -> ExampleMaker:
    entmlm = EntMLM(probability=1.0)
    return ExampleMaker(tokenizer, ("A",), 16, 4, 32, entmlm, **({"augment": None} | options))


def members(report: str | None, spans: list[tuple[str, bool]] | None = None) -> dict[str, bytes]:
    """A sample with a ramp for an image. spans: (text, negated) of the entities, each found where it first occurs."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(buffer, "PNG")
    document = {"report": report and {"text": report}, "labels": {"A": 1}}
    found = {"png": buffer.getvalue(), "json": json.dumps(document).encode()}
    if spans is not None:
        places = [(str(report).index(text), text, negated) for text, negated in spans]
        entities = [{"start": at, "end": at + len(text), "text": text, "negated": negated} for at, text, negated in places]
        found["entities.json"] = json.dumps(entities).encode()
    return found


def named(tokenizer: PreTrainedTokenizerBase, example: dict[str, Any], which: torch.Tensor) -> list[str]:
    return tokenizer.convert_ids_to_tokens(example["tokens"][which])


def test_a_negated_finding_is_masked_but_is_no_evidence(words) -> None:
    example = maker(words)("key", members(REPORT, [("effusion", True), ("pneumothorax", False)]), 0)
    assert named(words, example, example["evidence"]) == ["pneumothorax"]
    assert named(words, example, example["target_tokens"] >= 0) == ["effusion", "pneumothorax"]
    hidden = example["target_tokens"] >= 0
    assert example["masked_tokens"][hidden].tolist() == [words.mask_token_id] * 2
    assert torch.equal(example["target_tokens"][hidden], example["tokens"][hidden])
    assert torch.equal(example["masked_tokens"][~hidden], example["tokens"][~hidden])


@pytest.mark.parametrize("mark", ["uncertain", "background"])
def test_a_doubtful_or_past_finding_is_masked_but_is_no_evidence(words, mark: str) -> None:
    sample = members(REPORT, [("effusion", False), ("pneumothorax", False)])
    spans = json.loads(sample["entities.json"])
    spans[0][mark] = True
    example = maker(words)("key", sample | {"entities.json": json.dumps(spans).encode()}, 0)
    assert named(words, example, example["evidence"]) == ["pneumothorax"]
    assert named(words, example, example["target_tokens"] >= 0) == ["effusion", "pneumothorax"]


@pytest.mark.parametrize("spans", [[("effusion", True)], []])
def test_without_a_finding_that_is_present_all_words_are_evidence(words, spans: list[tuple[str, bool]]) -> None:
    example = maker(words)("key", members(REPORT, spans), 0)
    assert named(words, example, example["evidence"]) == ["no", "effusion", ".", "small", "pneumothorax", "."]
    assert named(words, example, ~example["evidence"]) == ["[CLS]", "[SEP]"]


def test_a_span_takes_every_token_that_it_touches_and_no_neighbour(words) -> None:
    example = maker(words)("key", members(REPORT, [("Small pneumo", False)]), 0)
    assert named(words, example, example["evidence"]) == ["small", "pneumothorax"]
    letters = maker(words)("key", members("No xyz, small", [("xyz", False)]), 0)
    assert named(words, letters, letters["target_tokens"] >= 0) == ["[UNK]"]


def test_a_token_without_characters_belongs_to_no_span() -> None:
    """Some tokenizers give a token of length 0 before a word; special tokens are (0, 0)."""
    offsets = np.array([(0, 0), (0, 2), (3, 3), (3, 11), (0, 0)])
    overlaps = _tokens_of_spans(offsets, [{"start": 0, "end": 2}, {"start": 2, "end": 11}])
    assert overlaps.tolist() == [[False, True, False, False, False], [False, False, False, True, False]]
    assert _tokens_of_spans(offsets, []).shape == (0, 5)


def test_an_entity_behind_the_longest_report_is_left_out(words) -> None:
    short = replace(maker(words), max_tokens=5)
    example = short("key", members(REPORT, [("effusion", False), ("pneumothorax", False)]), 0)
    assert named(words, example, example["token_mask"]) == ["[CLS]", "no", "effusion", ".", "[SEP]"]
    assert named(words, example, example["evidence"]) == ["effusion"]


def test_equal_reports_share_an_id_and_a_sample_without_one_has_none(words) -> None:
    make = maker(words)
    first, again, other = (make(key, members(text), 0) for key, text in (("a", REPORT), ("b", REPORT), ("c", "Small.")))
    assert first["report_id"] == again["report_id"] != other["report_id"]
    assert all(0 <= example["report_id"] < 2**63 for example in (first, again, other))
    bare = make("d", members(None), 0)
    assert bare["report_id"] == -1 and bare["tokens"].tolist() == [words.pad_token_id]
    assert not bare["token_mask"].any() and not bare["evidence"].any() and bare["target_tokens"].tolist() == [-100]


def test_every_draw_follows_from_seed_epoch_and_key(words) -> None:
    make, sample = maker(words, augment=Augment(crop_area=(0.3, 0.9), flip=0.5)), members(REPORT)
    first = make("key", sample, 0)
    again = make("key", sample, 0)
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["noise"], again["noise"])
    for other in (make("key", sample, 1), make("other", sample, 0), replace(make, seed=1)("key", sample, 0)):
        assert not torch.equal(first["image"], other["image"]) and not torch.equal(first["noise"], other["noise"])


def test_evaluation_sees_the_whole_image_unmirrored(words) -> None:
    example = maker(words)("key", members(REPORT), 0)
    pixels = example["image"][0] * PIXEL_DEVIATION + PIXEL_MEAN
    torch.testing.assert_close(pixels * 255, torch.arange(256.0).reshape(16, 16), atol=1e-3, rtol=0)


def test_attention_is_cropped_with_its_image(words) -> None:
    """The grid is the image itself, coarser: after any crop and flip it still is."""
    image = np.add.outer(np.arange(16), 2.0 * np.arange(16)).astype(np.uint8) * 4
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    grid = image.reshape(4, 4, 4, 4).mean((1, 3)).astype(np.float16)
    sample = members(REPORT) | {"png": buffer.getvalue(), "attention.npy": encode_npy(grid)}
    make = maker(words, augment=Augment(crop_area=(0.4, 0.6), flip=0.5))
    for epoch in range(8):
        example = make("key", sample, epoch)
        assert example["has_attention"]
        seen = (example["image"][0] * PIXEL_DEVIATION + PIXEL_MEAN).reshape(4, 4, 4, 4).mean((1, 3)) * 255
        # Grey values of 0 to 180. The grid of the whole image is off by 8 to 54.
        assert (seen - example["attention"]).abs().mean() < 2
    without = make("key", members(REPORT), 0)
    assert not without["has_attention"] and without["attention"].shape == (4, 4) and not without["attention"].any()


def test_a_sample_without_an_image_is_a_value_error(words) -> None:
    with pytest.raises(ValueError, match="key has no image"):
        maker(words)("key", {"json": members(REPORT)["json"]}, 0)
