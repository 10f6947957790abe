"""What each loss may see, and what guides the masks: changing the one thing changes the result, changing the other does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmclip_dist.data.batch import Batch
from mmclip_dist.model.masking import patch_pixels
from tests.batches import model_of

SCORES = torch.arange(16.0).reshape(1, 4, 4).expand(8, 4, 4)  # count up along the rows of the 4 x 4 patches


def changed(batch: Batch, **values: Tensor) -> Batch:
    return Batch(**(batch | values))


def test_entmlm_sees_the_masked_tokens_and_never_the_answer(sets, tokenizer, batch: Batch) -> None:
    model = model_of(sets.config("loss.contrastive=0", "loss.image=0"), tokenizer)
    hidden = batch["target_tokens"] >= 0
    visible = batch["token_mask"] & ~hidden
    other = torch.randint(5, len(tokenizer), batch["tokens"].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(batch)["entity"]
        answer = model(changed(batch, tokens=torch.where(hidden, other, batch["tokens"])))["entity"]
        rest = model(changed(batch, masked_tokens=torch.where(visible, other, batch["masked_tokens"])))["entity"]
        image = model(changed(batch, image=-batch["image"]))["entity"]
    assert torch.equal(loss, answer)
    assert not torch.isclose(loss, rest) and not torch.isclose(loss, image)  # both guide it


def test_attmim_is_scored_on_the_hidden_patches_alone(sets, tokenizer, batch: Batch) -> None:
    model = model_of(sets.config("attmim.hint=0", "loss.contrastive=0", "loss.entity=0"), tokenizer)
    rebuilt: list[Tensor] = []
    model.image_decoder.head.register_forward_hook(lambda module, args, output: rebuilt.append(output))
    with torch.no_grad():
        loss = model(changed(batch, attention=SCORES))["image"]
    error = (rebuilt[0] - patch_pixels(batch["image"], 8)).square().mean(2)
    torch.testing.assert_close(loss, error[:, 8:].mean())  # the half with the highest scores


def test_labels_guide_the_images_without_a_report(sets, tokenizer, batch: Batch) -> None:
    model = model_of(sets.config("loss.contrastive=0", "loss.entity=0"), tokenizer)
    paired = batch["report_id"] >= 0
    flipped = 1 - batch["labels"]
    with torch.no_grad():
        loss, of_paired, of_unpaired = (
            model(changed(batch, attention=SCORES, labels=labels))["image"]
            for labels in (
                batch["labels"], torch.where(paired[:, None], flipped, batch["labels"]),
                torch.where(paired[:, None], batch["labels"], flipped),
            )
        )  # fmt: skip
    assert torch.equal(loss, of_paired) and not torch.isclose(loss, of_unpaired)


def test_a_report_guides_its_image_alone(sets, tokenizer, batch: Batch) -> None:
    """The image decoder of an image with a report sees that report."""
    model = model_of(sets.config("loss.contrastive=0", "loss.entity=0"), tokenizer)
    features: list[Tensor] = []
    model.image_decoder.head.register_forward_hook(lambda module, args, output: features.append(args[0]))
    first = int((batch["report_id"] >= 0).nonzero()[0])
    tokens = batch["tokens"].clone()
    tokens[first, 1:-1] = torch.where(batch["token_mask"][first, 1:-1], tokens[first, 1:-1].flip(0), tokens[first, 1:-1])
    with torch.no_grad():
        model(changed(batch, attention=SCORES))
        model(changed(batch, attention=SCORES, tokens=tokens))
    others = torch.arange(8) != first
    torch.testing.assert_close(features[0][others], features[1][others])
    assert not torch.allclose(features[0][first], features[1][first])


def test_the_prompts_of_present_diseases_score_an_image_without_a_report(sets, tokenizer, batch: Batch) -> None:
    """Each prompt that scores adds one softmax over the patches: they are the present diseases, or all where none is."""
    model = model_of(sets.config(), tokenizer)
    labels = torch.tensor([[1, 0, -1, 0, 0, 0], [1, 1, 0, 0, -1, 1], [0, 0, 0, 0, 0, 0], [-1] * 6] * 2)
    bare = changed(batch, labels=labels, report_id=torch.full((8,), -1))
    with torch.no_grad():
        grids = model.attention_grid(bare)
        fewer = model.attention_grid(changed(bare, labels=torch.where(labels == 0, -1, labels)))
    torch.testing.assert_close(grids.sum((1, 2)), torch.tensor([1.0, 3, 6, 6] * 2))
    torch.testing.assert_close(grids, fewer)  # an absent disease scores no patch


def test_images_with_a_sidecar_use_it_in_a_mixed_batch(sets, tokenizer, batch: Batch) -> None:
    model = model_of(sets.config("attmim.hint=0"), tokenizer)
    known = torch.arange(8) % 2 == 0
    mixed = changed(batch, has_attention=known, attention=SCORES * known[:, None, None])
    queries: list[Tensor] = []
    model.image_decoder.register_forward_pre_hook(lambda _, args: queries.append(args[0].detach()))
    model(mixed)
    with torch.no_grad():
        scores = torch.where(known[:, None], SCORES.flatten(1), model.attention_grid(mixed).flatten(1))
    top = torch.zeros(8, 16, dtype=torch.bool).scatter(1, scores.argsort(1, descending=True)[:, :8], True)
    assert torch.equal((queries[0] == model.mask_token.detach()).all(2), top)
    assert not torch.equal(top[known], top[~known])


@pytest.mark.parametrize("mode", ["feature", "split"])
def test_the_hint_leaves_the_asked_share_of_the_chosen_patches_visible(sets, tokenizer, batch: Batch, mode: str) -> None:
    model = model_of(sets.config(f"attmim.mode={mode}", "attmim.hint=0.25"), tokenizer)
    queries: list[Tensor] = []
    model.image_decoder.register_forward_pre_hook(lambda _, args: queries.append(args[0].detach()))
    model(changed(batch, attention=SCORES))
    is_mask = (queries[0] == model.mask_token.detach()).all(2)
    if mode == "feature":  # 8 chosen, of which 2 give way to 2 others
        assert (is_mask.sum(1) == 8).all() and (is_mask[:, 8:].sum(1) == 6).all()
    else:  # 4 in the context view, one of them salient
        assert ((~is_mask).sum(1) == 4).all() and ((~is_mask)[:, 8:].sum(1) > 0).all()


@pytest.mark.parametrize("mode", ["feature", "split", "context"])
def test_masks_that_are_shown_are_those_of_training(sets, tokenizer, batch: Batch, mode: str) -> None:
    model = model_of(sets.config(f"attmim.mode={mode}"), tokenizer)
    queries: list[Tensor] = []
    model.image_decoder.register_forward_pre_hook(lambda _, args: queries.append(args[0].detach()))
    known = changed(batch, attention=SCORES, has_attention=torch.ones(8, dtype=torch.bool))
    with torch.no_grad():
        model(known)
        masked = model.image_masks(known)
        again = model.image_masks(changed(known, has_attention=torch.zeros(8, dtype=torch.bool)))
    assert torch.equal(masked, (queries[0] == model.mask_token.detach()).all(2))
    assert (masked.sum(1) == masked[0].sum()).all() and 0 < masked[0].sum() < 16
    assert mode == "split" or not torch.equal(masked, again)  # by scores of this very model
