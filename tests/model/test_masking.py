"""What patches are ranked by, and what AttMIM must rebuild."""

import torch

from mmclip_dist.model.masking import patch_pixels, ranked_or_drawn


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
