"""The model: every loss in both modes, what reaches what, and inference on whole images."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from mmclip_kernels import reference
from torch import Tensor

from mmclip_dist.data.batch import Batch
from mmclip_dist.engine.schedule import learning_rate
from mmclip_dist.model.losses import prompt_contrastive
from tests.batches import loader, model_of


@pytest.mark.parametrize("mode", ["feature", "split", "context"])
def test_every_parameter_learns_from_the_whole_objective(sets, tokenizer, batch: Batch, mode: str) -> None:
    model = model_of(sets.config(f"attmim.mode={mode}"), tokenizer)
    losses = model(batch)
    assert set(losses) == {"contrastive", "image", "entity"}
    assert all(loss.ndim == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # The [CLS] token goes unused (features are pooled over patches), and BERT's unused rows have no gradient to show.
    assert set(idle) <= {"image.vit.embeddings.cls_token"}, idle


@pytest.mark.parametrize("mode", ["feature", "split", "context"])
def test_a_few_steps_lower_every_loss(sets, tokenizer, batch: Batch, mode: str) -> None:
    model = model_of(sets.config(f"attmim.mode={mode}"), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        losses = model(batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in losses.items()})
    for name in history[0]:
        assert history[-1][name] < 0.9 * history[0][name], (name, history[0][name], history[-1][name])


@pytest.mark.parametrize(("mode", "sidecars"), [("split", "all"), ("context", "all"),
                                                ("feature", "all"), ("feature", "some"), ("feature", "none")])
def test_losses_and_gradients_agree_between_the_kernels(sets, tokenizer, batch: Batch, mode: str, sidecars: str) -> None:
    """impl=triton (interpreted without a card) and impl=torch: the same masks, losses and gradients."""
    if sidecars != "all":
        missing = torch.arange(8) < (4 if sidecars == "some" else 8)
        batch = Batch(**(batch | {"has_attention": ~missing, "attention": batch["attention"] * ~missing[:, None, None]}))
    results = []
    for impl in ("torch", "triton"):
        model = model_of(sets.config(f"attmim.mode={mode}", f"loss.impl={impl}"), tokenizer)
        losses = model(batch)
        torch.stack(list(losses.values())).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({name: value.detach() for name, value in losses.items()} | gradients)
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_term_without_weight_is_not_computed(sets, tokenizer, batch: Batch) -> None:
    assert set(model_of(sets.config("loss.image=0", "loss.entity=0"), tokenizer)(batch)) == {"contrastive"}
    assert set(model_of(sets.config("loss.contrastive=0"), tokenizer)(batch)) == {"image", "entity"}


@pytest.mark.parametrize("step", [0, 1, 6])
def test_contrastive_term_is_the_mean_over_reports_and_prompts(sets, tokenizer, batch: Batch, step: int) -> None:
    """Against the naive losses on features computed one part at a time. Two images share a report; there are four templates."""
    model = model_of(sets.config("loss.image=0", "loss.entity=0"), tokenizer)
    first, second = (batch["report_id"] >= 0).nonzero().flatten()[:2].tolist()
    batch["report_id"][second] = batch["report_id"][first]
    batch["step"], paired = step, batch["report_id"] >= 0
    with torch.no_grad():
        loss = model(batch)["contrastive"]
        image = model.embed_images(batch["image"])
        text = model.embed_texts(batch["tokens"][paired], batch["token_mask"][paired])
        prompt = model.embed_texts(model.prompt_tokens[step % 4], model.prompt_mask[step % 4])
        ids = batch["report_id"][paired]
        over_reports = reference.contrastive_loss(image[paired], text, model.scale(), image_ids=ids, text_ids=ids)
        over_prompts, rows = prompt_contrastive(image[~paired], prompt, model.scale(), batch["labels"][~paired], None)
        assert int(rows) == int((~paired).sum())
        expected = (int(paired.sum()) * over_reports + int(rows) * over_prompts) / 8
    torch.testing.assert_close(loss, expected.reshape(()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["only reports", "only prompts"])
@pytest.mark.parametrize("mode", ["feature", "split", "context"])
def test_a_rank_may_hold_one_kind_of_sample(sets, tokenizer, kind: str, mode: str) -> None:
    url, sidecars = (sets.paired, "paired") if kind == "only reports" else (sets.unpaired, "unpaired")
    entities = f", entities: {sets.sidecar('entities')}" if kind == "only reports" else ""
    config = sets.config(
        f"attmim.mode={mode}",
        f"data.sources=[{{url: {url}, attention: {sets.sidecar('attention', sidecars)}{entities}}}]",
    )
    model = model_of(config, tokenizer)
    losses = model(next(loader(config, tokenizer)))
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert set(without) <= {"image.vit.embeddings.cls_token"}  # ranks that reduce different parameters hang
    assert all(loss.isfinite() for loss in losses.values())
    assert (losses["entity"] == 0) == (kind == "only prompts")


def test_unlabelled_unpaired_images_only_rebuild(sets, tokenizer, batch: Batch) -> None:
    unlabelled = Batch(**(batch | {"report_id": torch.full((8,), -1), "labels": torch.full((8, 6), -1)}))
    losses = model_of(sets.config(), tokenizer)(unlabelled)
    assert losses["contrastive"] == 0 and losses["image"] > 0 and losses["image"].isfinite()


def test_the_hidden_patches_cannot_be_seen_in_split_mode(sets, tokenizer, batch: Batch) -> None:
    """Changing the pixels outside both views changes nothing but the target; changing those of the context changes the query."""
    model = model_of(sets.config("attmim.mode=split", "attmim.hint=0"), tokenizer)
    queries: list[Tensor] = []
    model.image_decoder.register_forward_pre_hook(lambda _, args: queries.append(args[0].detach().clone()))
    # Scores count up along the rows, so the lower half is salient; the context is drawn from the upper half by noise.
    upper = torch.ones(8, 16, dtype=torch.bool)
    upper[:, 8:] = False
    order = batch["noise"].masked_fill(~upper, torch.inf).argsort(1)
    context, hidden = order[:, :4], order[:, 4:8]
    flat = torch.arange(16.0).reshape(1, 4, 4).expand(8, 4, 4)
    images = [batch["image"], brighter(batch["image"], hidden), brighter(batch["image"], context)]
    plain, changed, seen = (model(Batch(**(batch | {"image": image, "attention": flat}))) for image in images)
    torch.testing.assert_close(queries[0], queries[1])
    assert not torch.allclose(queries[0], queries[2])
    is_mask = (queries[0] == model.mask_token.detach()).all(2)
    assert torch.equal(is_mask, torch.ones(8, 16, dtype=torch.bool).scatter(1, context, False))
    with torch.no_grad():  # each feature lies at the place of its patch
        places = context[:, :, None].expand(-1, -1, 32)
        features = model.image.encode(model.image.embed(batch["image"]).gather(1, places))
    torch.testing.assert_close(queries[0].gather(1, places), features)
    assert torch.equal(plain["contrastive"], changed["contrastive"])  # the salient view is not touched
    assert torch.equal(plain["contrastive"], seen["contrastive"])
    torch.testing.assert_close(plain["image"], changed["image"])  # the target is normalised patch by patch


def test_context_mode_contrasts_whole_images_and_rebuilds_from_the_context_view(sets, tokenizer, batch: Batch) -> None:
    config = sets.config("attmim.mode=context", "attmim.hint=0", "loss.entity=0")
    model, plain = model_of(config, tokenizer), model_of(sets.config("loss.image=0", "loss.entity=0"), tokenizer)
    queries: list[Tensor] = []
    model.image_decoder.register_forward_pre_hook(lambda _, args: queries.append(args[0].detach()))
    flat = torch.arange(16.0).reshape(1, 4, 4).expand(8, 4, 4)
    losses = model(Batch(**(batch | {"attention": flat})))
    torch.testing.assert_close(losses["contrastive"], plain(batch)["contrastive"])
    context = batch["noise"][:, :8].argsort(1)[:, :4]  # drawn from the half that responds less
    is_mask = (queries[0] == model.mask_token.detach()).all(2)
    assert torch.equal(is_mask, torch.ones(8, 16, dtype=torch.bool).scatter(1, context, False))


def test_context_mode_scores_patches_where_no_sidecar_is(sets, tokenizer, batch: Batch) -> None:
    """Images with a report or a label: none of the patches that respond most is in the context view. Others: by lot."""
    model = model_of(sets.config("attmim.mode=context", "attmim.hint=0", "loss.entity=0"), tokenizer)
    nothing = torch.arange(8) == 3
    missing = Batch(**(batch | {
        "has_attention": torch.zeros(8, dtype=torch.bool), "attention": torch.zeros(8, 4, 4),
        "report_id": torch.where(nothing, -1, batch["report_id"]), "labels": torch.where(nothing[:, None], -1, batch["labels"]),
    }))  # fmt: skip
    queries: list[Tensor] = []
    model.image_decoder.register_forward_pre_hook(lambda _, args: queries.append(args[0].detach()))
    assert all(loss.isfinite() for loss in model(missing).values())
    with torch.no_grad():
        scores = model.attention_grid(missing).flatten(1)
    scores[3] = batch["noise"][3]
    top = scores.argsort(1, descending=True)[:, :8]
    assert (queries[0] == model.mask_token.detach()).all(2).gather(1, top).all()


def test_masked_terms_on_shares_of_the_batch_are_those_of_the_chosen_samples(sets, tokenizer, batch: Batch) -> None:
    """The lowest lots are rebuilt as images and the highest as reports: the losses are those of these samples alone."""
    batch["lot"] = torch.tensor([0.1, 0.9, 0.3, 0.7, 0.2, 0.6, 0.95, 0.4])
    terms = ("attmim.mode=context", "loss.contrastive=0", "entmlm.input=embeddings")
    on_shares = model_of(sets.config(*terms, "attmim.share=0.5", "entmlm.share=0.5"), tokenizer)(batch)
    whole = model_of(sets.config(*terms), tokenizer)
    for name, chosen in (("image", batch["lot"] < 0.5), ("entity", batch["lot"] >= 0.5)):
        alone = {key: value[chosen] if isinstance(value, Tensor) else value for key, value in batch.items()}
        torch.testing.assert_close(on_shares[name], whole(alone)[name])
        assert on_shares[name] > 0


def test_an_unlabelled_image_costs_its_context_view_only(sets, tokenizer, batch: Batch) -> None:
    """It is always rebuilt, whatever the share, and the contrastive loss is the one without it."""
    nothing = torch.arange(8) % 4 == 1
    labels = torch.where(nothing[:, None], -1, batch["labels"])
    some = Batch(**(batch | {"report_id": torch.where(nothing, -1, batch["report_id"]), "labels": labels}))
    some["target_tokens"] = torch.where(nothing[:, None], -100, some["target_tokens"])
    some["lot"] = torch.full((8,), 0.5)
    model = model_of(sets.config("attmim.mode=context", "attmim.share=0.1"), tokenizer)
    encoded: list[torch.Size] = []
    model.image.layers[0].register_forward_pre_hook(lambda _, args: encoded.append(args[0].shape))
    losses = model(some)
    assert [tuple(shape[:2]) for shape in encoded] == [(6, 16), (2, 4)]
    kept = {key: value[~nothing] if isinstance(value, Tensor) else value for key, value in some.items()}
    without = model_of(sets.config("loss.image=0"), tokenizer)(kept)
    torch.testing.assert_close(losses["contrastive"], without["contrastive"])
    torch.testing.assert_close(losses["entity"], without["entity"])


def test_no_sample_may_be_chosen(sets, tokenizer, batch: Batch) -> None:
    """The terms are then 0, and every parameter still has a gradient: ranks that reduce different ones hang."""
    batch["lot"] = torch.full((8,), 0.5)
    model = model_of(sets.config("attmim.mode=context", "attmim.share=0.1", "entmlm.share=0.1"), tokenizer)
    losses = model(batch)
    torch.stack(list(losses.values())).sum().backward()
    assert losses["image"] == losses["entity"] == 0 and losses["contrastive"].isfinite()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert set(without) <= {"image.vit.embeddings.cls_token"}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def brighter(image: Tensor, patches: Tensor) -> Tensor:
    """image [B, 1, 32, 32] with the pixels of patches [B, K] (of 8 pixels) raised."""
    changed = image.clone()
    for row, numbers in enumerate(patches.tolist()):
        for patch in numbers:
            top, left = divmod(patch, 4)
            changed[row, :, top * 8 : top * 8 + 8, left * 8 : left * 8 + 8] += 3
    return changed


def test_feature_mode_hides_the_patches_of_highest_score(sets, tokenizer, batch: Batch) -> None:
    model = model_of(sets.config("attmim.hint=0"), tokenizer)
    queries: list[Tensor] = []
    model.image_decoder.register_forward_pre_hook(lambda _, args: queries.append(args[0].detach()))
    flat = torch.arange(16.0).reshape(1, 4, 4).expand(8, 4, 4)
    model(Batch(**(batch | {"attention": flat})))
    is_mask = (queries[0] == model.mask_token.detach()).all(2)
    assert is_mask.tolist() == [[False] * 8 + [True] * 8] * 8


@pytest.mark.parametrize("mode", ["feature", "split", "context"])
def test_random_masks_ignore_the_scores_and_hide_as_many(sets, tokenizer, batch: Batch, mode: str) -> None:
    model = model_of(sets.config(f"attmim.mode={mode}", "attmim.guide=random"), tokenizer)
    queries: list[Tensor] = []
    model.image_decoder.register_forward_pre_hook(lambda _, args: queries.append(args[0].detach()))
    grids = torch.arange(16.0).reshape(1, 4, 4).expand(8, 4, 4)
    for scores in (grids, -grids):
        model(Batch(**(batch | {"attention": scores})))
    first, second = ((query == model.mask_token.detach()).all(2) for query in queries)
    assert torch.equal(first, second) and first.sum(1).tolist() == [8 if mode == "feature" else 12] * 8
    assert len({tuple(row) for row in first.tolist()}) > 4


def test_scores_are_computed_where_no_sidecar_is(sets, tokenizer, batch: Batch) -> None:
    model = model_of(sets.config("attmim.hint=0"), tokenizer)
    missing = Batch(**(batch | {"has_attention": torch.zeros(8, dtype=torch.bool), "attention": torch.zeros(8, 4, 4)}))
    queries: list[Tensor] = []
    model.image_decoder.register_forward_pre_hook(lambda _, args: queries.append(args[0].detach()))
    model(missing)
    with torch.no_grad():
        scores = model.attention_grid(missing).flatten(1)
    top = torch.zeros(8, 16, dtype=torch.bool).scatter(1, scores.argsort(1, descending=True)[:, :8], True)
    assert torch.equal((queries[0] == model.mask_token.detach()).all(2), top)


def test_negated_findings_never_score(sets, tokenizer, batch: Batch) -> None:
    """Scores of a report depend on its evidence tokens alone."""
    model = model_of(sets.config(), tokenizer)
    evidence = batch["evidence"].clone()
    evidence[:, 3:] = False
    evidence[:, 2] = batch["report_id"] >= 0
    with torch.no_grad():
        one = model.attention_grid(Batch(**(batch | {"evidence": evidence})))
        other = model.attention_grid(batch)
    paired = batch["report_id"] >= 0
    torch.testing.assert_close(one[paired].sum((1, 2)), torch.ones(int(paired.sum())))  # one word, one softmax
    assert not torch.allclose(one[paired], other[paired]) and torch.equal(one[~paired], other[~paired])


def test_unmasked_steps_at_the_end_see_whole_images(sets, tokenizer, batch: Batch) -> None:
    config = sets.config("attmim.mode=split", "attmim.unmasked_last_steps=10", "optim.steps=100", "loss.entity=0")
    model = model_of(config, tokenizer)
    assert model(Batch(**(batch | {"step": 90})))["image"] == 0
    assert model(Batch(**(batch | {"step": 89})))["image"] > 0


def test_scale_is_clamped_in_the_forward_pass(sets, tokenizer) -> None:
    model = model_of(sets.config(), tokenizer)
    assert model.scale().item() == pytest.approx(1 / 0.07) and model.log_scale.shape == (1,)
    with torch.no_grad():
        model.log_scale.fill_(50.0)
    assert model.scale().item() == pytest.approx(100.0)


def test_weights_come_from_the_seed_alone(sets, tokenizer) -> None:
    torch.manual_seed(5)
    one = model_of(sets.config(), tokenizer)
    drawn = torch.rand(1)
    torch.manual_seed(6)
    two, other = model_of(sets.config(), tokenizer), model_of(sets.config("seed=1"), tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.image_head.weight, other.image_head.weight)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))  # and building a model disturbs no one else's draws


def test_learning_rate_warms_up_and_ends_at_zero(sets) -> None:
    optim = sets.config("optim.steps=100", "optim.warmup=0.1", "optim.lr=1", "optim.global_batch=512").optim
    rates = [learning_rate(step, optim) for step in range(101)]
    assert max(rates) == pytest.approx(0.5, rel=0.01) and rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] > 0 and rates[100] == pytest.approx(0, abs=1e-9)


def test_other_schedules_share_warm_up_and_end(sets) -> None:
    def rates(*overrides: str) -> list[float]:
        base = ("optim.steps=100", "optim.warmup=0.1", "optim.lr=1", "optim.global_batch=1024")
        optim = sets.config(*base, *overrides).optim
        return [learning_rate(step, optim) for step in range(101)]

    cosine, linear, wsd = rates(), rates("optim.schedule=linear"), rates("optim.schedule=wsd", "optim.decay=0.4")
    assert linear[:10] == wsd[:10] == cosine[:10]
    assert linear[10:] == pytest.approx([1 - step / 90 for step in range(91)])
    assert wsd[10:61] == [1.0] * 51
    assert wsd[60:] == pytest.approx([1 - (step / 40) ** 0.5 for step in range(41)])


def test_batches_of_the_loader_train(sets, tokenizer) -> None:
    """Another batch each step: what is learned carries over to the next samples."""
    model = model_of(sets.config(), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals = []
    for found in islice(loader(sets.config(), tokenizer), 40):
        loss = torch.stack(list(model(found).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(float(loss.detach()))
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5]), totals
