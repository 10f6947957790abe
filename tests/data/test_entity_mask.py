"""Which tokens EntMLM masks: whole entities, whole words, never a special token."""

import numpy as np

from mmclip_dist.data.entity_mask import masked_tokens


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


WORDS = np.array([-1, 0, 1, 1, 2, 3, 3, 4, -1])


def test_entities_are_masked_whole_and_at_least_one() -> None:
    entities = [np.array([1]), np.array([2, 3]), np.array([5, 6])]
    counts = np.zeros(3)
    for seed in range(400):
        mask = masked_tokens(WORDS, entities, generator(seed), probability=0.5, word_probability=0.15)
        assert mask.any() and not mask[[0, 4, 7, 8]].any()
        for number, entity in enumerate(entities):
            assert mask[entity].all() or not mask[entity].any()
            counts[number] += mask[entity].all()
    assert np.abs(counts / 400 - 0.5).max() < 0.12


def test_a_report_without_entities_loses_whole_words() -> None:
    masked = np.zeros(9)
    for seed in range(600):
        mask = masked_tokens(WORDS, [], generator(seed), probability=0.5, word_probability=0.15)
        assert mask.any() and not mask[[0, 8]].any()
        assert mask[2] == mask[3] and mask[5] == mask[6]
        masked += mask
    assert 0.1 < masked[1] / 600 < 0.35  # 0.15, and the one that is masked if none was drawn


def test_a_text_of_special_tokens_is_left_alone() -> None:
    assert not masked_tokens(np.array([-1, -1]), [], generator(0), probability=0.5, word_probability=0.15).any()
