"""What is masked: by score, in the asked amount, repeatably, and never by a word that does not count."""

import numpy as np
import torch

from mmclip_dist.model.masking import masked_tokens, patch_pixels, ranked_or_drawn


def test_flat_scores_are_masked_at_random_not_from_the_corner() -> None:
    scores, noise = torch.rand(64, 16), torch.rand(64, 16, generator=torch.Generator().manual_seed(0))
    ranked = ranked_or_drawn(torch.cat([torch.zeros(63, 16), scores[:1]]).half(), noise)
    assert torch.equal(ranked[:63], noise[:63]) and torch.equal(ranked[63], scores[0].half().float())


def test_patch_pixels_are_normalised_and_in_patch_order() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    pixels = patch_pixels(image, 4)
    assert pixels.shape == (1, 4, 16)
    torch.testing.assert_close(pixels.mean(2), torch.zeros(1, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.var(2, correction=0), torch.ones(1, 4), atol=1e-4, rtol=0)
    second = image[0, 0, :4, 4:].reshape(-1)
    torch.testing.assert_close(pixels[0, 1], (second - second.mean()) / second.std(correction=0), atol=1e-4, rtol=1e-4)


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
