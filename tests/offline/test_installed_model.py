"""What is left of a statistical spaCy pipeline for entities, and that nothing else changes what it finds."""

from __future__ import annotations

import pytest

pytest.importorskip("scispacy", reason="needs the extra nlp")

import spacy

from mmclip_dist.bench.entities_speed import NAME, agreement, rate, steps, train
from mmclip_dist.offline.clinical_text import build_extractor, installed_pipeline

TEXTS = 24 * ["No pleural effusion. Mild cardiomegaly.", "There is a nodule in the left lung. No pneumothorax."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("installed")
    train(TEXTS, folder, rounds=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield NAME


def test_parts_without_use_are_left_out_and_the_entities_stay(model: str) -> None:
    assert spacy.load(model).pipe_names == ["tok2vec", "tagger", "parser", "ner"]
    nlp = installed_pipeline(model)
    assert nlp.pipe_names == ["ner"]
    assert not any(node.ops.use_blis for node in nlp.get_pipe("ner").model.walk())  # type: ignore[attr-defined]
    found = [[[(span.text, span.label_) for span in ents] for ents in find(TEXTS[:2])] for find in steps(model).values()]
    # An entity never crosses the parser's sentences, which are random here.
    (naive, pipe), without_parser = found[:2], found[2:]
    assert naive == pipe and len(without_parser) == 3 and all(ents == without_parser[0] for ents in without_parser)
    assert ("pneumothorax", "FINDING") in without_parser[0][1]


def test_a_models_entities_get_the_rules_marks_and_are_found_sentence_by_sentence(model: str) -> None:
    entities = build_extractor(model)(TEXTS[:2])
    marks = {entity.text.split()[-1]: entity.negated for found in entities for entity in found}
    assert marks["effusion"] and marks["pneumothorax"] and not marks["nodule"]
    assert 0.8 < agreement(model, TEXTS[:2]) <= 1
    assert rate(TEXTS[:2], lambda texts: texts) > 0
