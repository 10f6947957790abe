"""What is masked: by score, in the asked amount, repeatably, and never by a word that does not count."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmclip_dist.model.masking import attention_scores, masked_tokens, patch_pixels, split_views, top_patches


def scores_and_noise(rows: int, patches: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, patches, generator=generator), torch.rand(rows, patches, generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 50), st.floats(0.05, 0.95), st.floats(0, 0.9), st.integers(0, 9))
def test_the_asked_number_is_masked_most_of_it_from_the_top(patches: int, ratio: float, hint: float, seed: int) -> None:
    scores, noise = scores_and_noise(5, patches, seed)
    count = round(ratio * patches)
    masked = top_patches(scores, count, noise, hint)
    assert (masked.sum(1) == count).all()
    top = torch.zeros_like(masked).scatter(1, scores.argsort(1, descending=True)[:, :count], True)
    swapped = round(hint * min(count, patches - count))
    assert ((top & ~masked).sum(1) == swapped).all()


def test_without_hint_the_mask_is_a_stable_sort() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.9, 0.1]])
    assert top_patches(scores, 3, torch.rand(1, 5), 0.0).tolist() == [[True, True, False, True, False]]


def test_flat_scores_are_masked_at_random_not_from_the_corner() -> None:
    _, noise = scores_and_noise(64, 16)
    masked = top_patches(torch.zeros(64, 16), 8, noise, 0.0)
    assert (masked.sum(1) == 8).all()
    assert (masked.float().mean(0) - 0.5).abs().max() < 0.25


def test_views_are_disjoint_ascending_and_salient_first() -> None:
    scores, noise = scores_and_noise(7, 20)
    salient, context = split_views(scores, 10, 5, noise, 0.0)
    for row in range(7):
        chosen, rest = salient[row].tolist(), context[row].tolist()
        assert chosen == sorted(set(chosen)) and rest == sorted(set(rest)) and not set(chosen) & set(rest)
        assert min(scores[row, chosen]) > max(scores[row, rest])
    assert salient.shape == (7, 10) and context.shape == (7, 5)


def test_scores_rank_patches_by_the_words_that_count() -> None:
    patches = torch.eye(4)[None]
    words = torch.stack([torch.eye(4)[2], torch.eye(4)[0]])[None]
    both = attention_scores(words, patches, torch.tensor([[True, True]]), 0.1)
    one = attention_scores(words, patches, torch.tensor([[True, False]]), 0.1)
    none = attention_scores(words, patches, torch.tensor([[False, False]]), 0.1)
    assert one[0].argmax() == 2 and one[0].sum() == pytest.approx(1)
    assert sorted(both[0].topk(2).indices.tolist()) == [0, 2] and both[0].sum() == pytest.approx(2)
    assert none.abs().max() == 0


def test_scores_carry_no_gradient() -> None:
    words, patches = torch.rand(1, 3, 4, requires_grad=True), torch.rand(1, 5, 4, requires_grad=True)
    assert not attention_scores(words, patches, torch.ones(1, 3, dtype=torch.bool), 0.1).requires_grad


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
