"""The decoder by itself: what it may see of the other modality."""

from __future__ import annotations

import torch
from torch import nn

from mmclip_dist.config import Decoder
from mmclip_dist.model.decoders import CrossDecoder


def decoder() -> CrossDecoder:
    torch.manual_seed(0)
    built = CrossDecoder(Decoder(depth=2, width=32, heads=2), query_width=16, memory_width=24, output_width=8, max_length=10)
    nn.init.normal_(built.nothing)
    return built


def test_what_is_not_present_in_the_memory_changes_nothing() -> None:
    module, query, memory = decoder(), torch.randn(3, 10, 16), torch.randn(3, 5, 24)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        features = module(query, memory, mask)
        hidden = module(query, torch.where(mask[:, :, None], memory, 7.0), mask)
        seen = module(query, torch.where(mask[:, :, None], 7.0, memory), mask)
        short = module(query[:1], memory[:1, :2], None)
    torch.testing.assert_close(features, hidden)
    assert not any(torch.allclose(features[row], seen[row]) for row in range(3))
    torch.testing.assert_close(features[:1], short)


def test_without_any_memory_the_empty_slot_is_seen() -> None:
    module, query, memory = decoder(), torch.randn(2, 10, 16), torch.randn(2, 5, 24)
    features = module(query, memory, torch.zeros(2, 5, dtype=torch.bool))
    assert features.isfinite().all()
    (gradient,) = torch.autograd.grad(features[..., 0].sum(), module.nothing)
    assert gradient.abs().max() > 0
