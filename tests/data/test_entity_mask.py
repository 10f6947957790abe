"""Which tokens EntMLM masks: whole entities, whole words, never a special token."""

import numpy as np
import pytest

from mmclip_dist.data.entity_mask import masked_tokens


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


WORDS = np.array([-1, 0, 1, 1, 2, 3, 3, 4, -1])
DRAWS = 3000  # the standard error of a share is below 0.01


def test_entities_are_masked_whole_and_at_least_one() -> None:
    entities = [np.array([1]), np.array([2, 3]), np.array([5, 6])]
    counts = np.zeros(3)
    for seed in range(DRAWS):
        mask = masked_tokens(WORDS, entities, generator(seed), probability=0.5, word_probability=0.15)
        assert mask.any() and not mask[[0, 4, 7, 8]].any()
        for number, entity in enumerate(entities):
            assert mask[entity].all() or not mask[entity].any()
            counts[number] += mask[entity].all()
    # If none is drawn (1/8), one of the three is taken.
    assert counts / DRAWS == pytest.approx(0.5 + 0.5**3 / 3, abs=0.04)


def test_a_report_without_entities_loses_whole_words() -> None:
    masked = np.zeros(9)
    for seed in range(DRAWS):
        mask = masked_tokens(WORDS, [], generator(seed), probability=0.5, word_probability=0.15)
        assert mask.any() and not mask[[0, 8]].any()
        assert mask[2] == mask[3] and mask[5] == mask[6]
        masked += mask
    # If none of the five words is drawn, one of them is taken.
    assert masked[1:8] / DRAWS == pytest.approx(0.15 + 0.85**5 / 5, abs=0.04)


def test_every_entity_is_masked_at_probability_one_and_one_alone_when_none_is_drawn() -> None:
    entities = [np.array([1]), np.array([2, 3]), np.array([5, 6])]
    whole = masked_tokens(WORDS, entities, generator(0), probability=1.0, word_probability=0.15)
    assert np.flatnonzero(whole).tolist() == [1, 2, 3, 5, 6]
    for seed in range(50):
        mask = masked_tokens(WORDS, entities, generator(seed), probability=1e-12, word_probability=0.15)
        assert np.flatnonzero(mask).tolist() in ([1], [2, 3], [5, 6])


def test_a_text_of_special_tokens_is_left_alone() -> None:
    assert not masked_tokens(np.array([-1, -1]), [], generator(0), probability=0.5, word_probability=0.15).any()
