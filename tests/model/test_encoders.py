"""The encoders: pretrained weights keep their meaning, and what cannot be used is refused when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from mmclip_dist.config import ImageEncoder, TextEncoder
from mmclip_dist.model.encoders import ImageTower, TextTower, pool


def test_pretrained_vit_keeps_its_meaning_on_one_channel_and_another_size(tmp_path: Path) -> None:
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8)
    ViTModel(ViTConfig(image_size=32, num_channels=3, **shape), add_pooling_layer=False).save_pretrained(tmp_path)
    original = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    grey = torch.randn(2, 1, 32, 32)
    ours = ImageTower(ImageEncoder(pretrained=str(tmp_path), size=32, patch=8)).eval()
    with torch.no_grad():
        theirs = original.embeddings(grey.expand(-1, 3, -1, -1))[:, 1:]
        torch.testing.assert_close(ours.embed(grey), theirs, rtol=1e-4, atol=1e-5)
        larger = ImageTower(ImageEncoder(pretrained=str(tmp_path), size=64, patch=8)).eval()
        assert larger.encode(larger.embed(torch.randn(2, 1, 64, 64))).shape == (2, 64, 32)
        # Each place of the 8 x 8 grid lies in a place of the 4 x 4 grid: their four neighbours' mean is about its position.
        before, after = (tower.vit.embeddings.position_embeddings[0, 1:] for tower in (ours, larger))
        means = after.reshape(4, 2, 4, 2, 32).mean((1, 3)).reshape(16, 32)
        assert torch.nn.functional.cosine_similarity(means, before).min() > 0.9
        assert torch.equal(ours.vit.embeddings.position_embeddings, original.embeddings.position_embeddings)
    with pytest.raises(ValueError, match="patches of 8"):
        ImageTower(ImageEncoder(pretrained=str(tmp_path), size=64, patch=16))
    with pytest.raises(ValueError, match="no folder"):
        ImageTower(ImageEncoder(pretrained=str(tmp_path / "missing")))


def test_pretrained_text_encoder_must_know_the_tokenizer(tmp_path: Path) -> None:
    BertModel(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    ).save_pretrained(tmp_path)
    encoder = TextTower(TextEncoder(pretrained=str(tmp_path)), 50)
    assert encoder(torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)).shape == (2, 5, 32)
    with pytest.raises(ValueError, match="embeds 50"):
        TextTower(TextEncoder(pretrained=str(tmp_path)), 60)


def test_pooling_is_the_mean_over_the_tokens_that_are_there() -> None:
    features = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [100.0], [100.0]], [[100.0], [100.0], [100.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert pool(features, mask).flatten().tolist() == [2, 5, 0]


def test_random_weights_spread_with_the_width_and_nothing_drops_out(tmp_path: Path) -> None:
    """0.02 at width 768, in proportion to 1 / sqrt(width), and no dropout, whoever configured the encoder."""
    torch.manual_seed(0)
    towers = [
        ImageTower(ImageEncoder(size=32, patch=8, width=192, depth=1, heads=2)),
        TextTower(TextEncoder(width=192, depth=1, heads=2), 50),
    ]
    for tower in towers:
        weights = torch.cat([p.flatten() for p in tower.layers.parameters() if p.ndim == 2])
        assert float(weights.detach().std()) == pytest.approx(0.04, rel=0.02)
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=50, hidden_dropout_prob=0.3, **shape)).save_pretrained(tmp_path)
    towers.append(TextTower(TextEncoder(pretrained=str(tmp_path)), 50))
    rates = [module.p for tower in towers for module in tower.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates and not any(rates)
    tokens, mask = torch.randint(0, 50, (3, 6)), torch.ones(3, 6, dtype=torch.bool)
    assert torch.equal(*(towers[2].train()(tokens, mask) for _ in range(2)))
