"""Packed reports: the same features and gradients as padded ones, with fewer tokens computed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    FNetConfig,
    FNetModel,
    LongformerConfig,
    LongformerModel,
    RobertaConfig,
    RobertaModel,
)

from mmclip_dist.config import Decoder as DecoderShape
from mmclip_dist.config import TextEncoder
from mmclip_dist.data.batch import Batch
from mmclip_dist.model.decoders import CrossDecoder
from mmclip_dist.model.encoders import TextTower
from mmclip_dist.model.packing import Packing
from tests.batches import model_of

LENGTHS = {
    "odd": [7, 1, 12, 3, 3, 9, 5, 12, 2],
    "one": [5],
    "equal": [6, 6, 6, 6],
    "longest allowed": [40, 3, 9, 1, 22],
    "some without a token": [4, 0, 3, 0, 0, 9],
}
SHAPE = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def mask_of(lengths: list[int], columns: int | None = None) -> Tensor:
    return torch.arange(columns or max(lengths)) < torch.tensor(lengths).reshape(-1, 1)


def tokens_like(mask: Tensor) -> Tensor:
    return torch.randint(4, 60, mask.shape, generator=torch.Generator().manual_seed(1)).where(mask, 1)


def encoder() -> TextTower:
    torch.manual_seed(0)
    return TextTower(TextEncoder(width=32, depth=2, heads=2, max_tokens=40), 60)


def padded(module: TextTower, tokens: Tensor, mask: Tensor) -> Tensor:
    """What packing must equal: transformers' own way with padding."""
    features = module.bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    return torch.where(mask[:, :, None], features, 0)


def gradients(module: nn.Module, features: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * weight).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LENGTHS)
def test_features_and_gradients_equal_the_padded_ones(name: str) -> None:
    mask, module = mask_of(LENGTHS[name]), encoder()
    tokens = tokens_like(mask)
    features = module(tokens, mask)
    assert features.shape == (*mask.shape, 32) and (features[~mask] == 0).all()
    ours, expected_features = gradients(module, features), padded(module, tokens, mask)
    torch.testing.assert_close(features, expected_features, rtol=1e-5, atol=1e-5)
    expected = gradients(module, expected_features)
    assert ours.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, at=parameter: f"{at}: {m}")


def test_a_mask_with_holes_keeps_the_places_of_its_tokens() -> None:
    mask, module = mask_of([7, 5, 6]), encoder()
    mask[0, 2] = mask[2, :2] = False
    tokens = tokens_like(mask)
    torch.testing.assert_close(module(tokens, mask), padded(module, tokens, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (3, 4), (0, 0)])
def test_without_a_token_every_weight_still_has_a_gradient_of_zero(shape: tuple[int, int]) -> None:
    module, nothing = encoder(), torch.zeros(*shape, dtype=torch.int64)
    features = module(nothing, nothing.bool())
    assert features.shape == (*shape, 32) and (features == 0).all()
    found = gradients(module, features)
    assert found.keys() == dict(module.named_parameters()).keys()  # ranks that reduce different parameters hang
    assert all((gradient == 0).all() for gradient in found.values())


def test_texts_of_a_row_do_not_see_each_other() -> None:
    mask, module = mask_of([9, 4, 5, 3, 6]), encoder()
    tokens = tokens_like(mask)
    changed = tokens.clone()
    changed[1, 0] = 4 + (tokens[1, 0] - 3) % 56
    with torch.no_grad():
        before, after = module(tokens, mask), module(changed, mask)
    others = torch.arange(5) != 1
    assert torch.equal(before[others], after[others]) and not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("name", LENGTHS)
def test_every_token_has_a_slot_of_its_own_and_comes_back(name: str) -> None:
    mask = mask_of(LENGTHS[name], 41)
    packing, again = Packing.of(mask, 32), Packing.of(mask.clone(), 32)
    assert packing.rows * packing.length <= max(LENGTHS[name]) * sum(length > 0 for length in LENGTHS[name])
    assert len(packing.slot.unique()) == len(packing.slot) == mask.sum()
    values = torch.rand(*mask.shape, 3)
    rows = packing.pack(values)
    assert rows.shape == (packing.rows, packing.length, 3)
    assert torch.equal(packing.unpack(rows), values * mask[:, :, None])
    for row in packing.segment.tolist():  # a text lies in one piece, and room is left at the end alone
        runs = [row[0]] + [b for a, b in pairwise(row) if a != b]
        assert len(runs) == len(set(runs)) and -1 not in runs[:-1]
    for field in ("place", "slot", "segment", "column"):
        assert torch.equal(getattr(packing, field), getattr(again, field))


@pytest.mark.parametrize("mean", [45, 60, 80, 90])
def test_rows_are_nearly_full(mean: int) -> None:
    """256 reports: little room is left, also where no two of them fit into a row as long as the longest."""
    lengths = (mean + 15 * torch.randn(256, generator=torch.Generator().manual_seed(0))).clamp(8, 112).long()
    packing = Packing.of(mask_of(lengths.tolist(), 112), 768)
    assert packing.rows * packing.length < 1.05 * int(lengths.sum())


@pytest.mark.parametrize(("family", "config"), [(BertModel, BertConfig), (RobertaModel, RobertaConfig)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_families_count_positions_in_their_own_way(tmp_path: Path, family, config, attention: str) -> None:
    family(config(**SHAPE), add_pooling_layer=False).save_pretrained(tmp_path)
    module = TextTower(TextEncoder(pretrained=str(tmp_path)), 60)
    module.bert.set_attn_implementation(attention)
    mask = mask_of(LENGTHS["odd"])
    tokens = tokens_like(mask)  # padded with 1: RoBERTa tells its padding by that id
    torch.testing.assert_close(module(tokens, mask), padded(module, tokens, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "config"),
    [(FNetModel, FNetConfig(**SHAPE)), (LongformerModel, LongformerConfig(**SHAPE, attention_window=4))],
)
def test_encoders_that_cannot_share_a_row_are_refused(tmp_path: Path, family, config) -> None:
    family(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.text\.pretrained=.*{family.__name__}"):
        TextTower(TextEncoder(pretrained=str(tmp_path)), 60)


@pytest.mark.parametrize("name", ["odd", "one", "equal", "some without a token"])
def test_the_decoder_answers_packed_queries_as_it_does_single_ones(name: str) -> None:
    torch.manual_seed(0)
    shape = DecoderShape(depth=2, width=32, heads=2)
    decoder = CrossDecoder(shape, query_width=16, memory_width=24, output_width=8, max_length=40)
    nn.init.normal_(decoder.nothing)
    mask = mask_of(LENGTHS[name])
    query, memory = torch.randn(*mask.shape, 16), torch.randn(len(mask), 5, 24)
    packing = Packing.of(mask, 16)
    packed = packing.unpack(decoder(packing.pack(query), memory, None, packing))
    rows = [(row, count) for row, count in enumerate(LENGTHS[name]) if count]
    single = torch.cat([decoder(query[r : r + 1, :count], memory[r : r + 1], None)[0] for r, count in rows])
    torch.testing.assert_close(packed[mask], single, rtol=1e-5, atol=1e-5)
    ours, expected = gradients(decoder, packed[mask]), gradients(decoder, single)
    assert ours.keys() == expected.keys() == {n for n, _ in decoder.named_parameters() if not n.startswith("head.")}
    for parameter, gradient in expected.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, at=parameter: f"{at}: {m}")


def test_a_step_computes_fewer_tokens_than_padding_has(sets, tokenizer, batch: Batch) -> None:
    """Counted where they are computed, in both passes over the reports and in the decoder."""
    mask = batch["token_mask"].clone()
    paired = (batch["report_id"] >= 0).nonzero().flatten()
    for place, row in enumerate(paired.tolist()):
        mask[row, 4 + 3 * place :] = False  # the reports of this set are nearly equal in length
    cut = {"token_mask": mask, "target_tokens": batch["target_tokens"].where(mask, -100), "evidence": batch["evidence"] & mask}
    model = model_of(sets.config(), tokenizer)
    seen: list[tuple[int, ...]] = []
    for layer in (model.text.layers[0], model.text_decoder.layers[0]):
        layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    model(Batch(**(batch | cut)))
    real, whole = int(mask[paired].sum()), len(paired) * int(mask.sum(1).max())
    prompts, plain, masked, decoded = (rows * columns for rows, columns in seen)
    assert real <= plain == masked == decoded <= 0.8 * whole
    assert prompts <= model.prompt_tokens[0].numel()
