"""Attention-guided masking: both implementations against the naive meaning, exact selection, gradients, bad input."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmclip_kernels import (
    attention_scores,
    attention_split_views,
    attention_topk_mask,
    reference,
    tiles,
)
from mmclip_kernels.topk_mask import TopkMask, seeded_noise, topk_mask_op
from torch import Tensor

IMPLS = ("torch", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def meant(patches: Tensor, scores: Tensor, keep: int, **options: Any) -> TopkMask:
    """What `attention_topk_mask` means, from the scores that it found."""
    token, mode = options.pop("mask_token", None), options.pop("mode", "gather")
    mask = reference.hidden_patches(scores, patches.shape[1] - keep, **options)
    visible, kept, restore = reference.keep_visible(patches, mask, keep)
    return TopkMask(reference.replace_hidden(patches, mask, token) if mode == "replace" else visible, kept, restore, mask, scores)


def assert_same(found: TopkMask, expected: TopkMask) -> None:
    """Bit for bit: what is copied is not computed."""
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        assert torch.equal(ours, theirs), name


@st.composite
def cases(draw: st.DrawFn, widest: int) -> dict[str, Any]:
    rows, patches, width = draw(st.integers(0, 3)), draw(st.integers(1, widest)), draw(st.sampled_from([1, 3, 48, 130]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 2**31))
    case: dict[str, Any] = {"patches": normal(rows, patches, width, seed=seed, dtype=dtype)}
    source = draw(st.sampled_from(["scores", "vector", "tokens", "tokens, some padded"]))
    if source == "scores":
        # Rounded: most rows hold equal scores, zeros of both signs among them.
        scores = normal(rows, patches, seed=seed + 1).round(decimals=draw(st.integers(0, 2)))
        case["scores"] = scores.to(draw(st.sampled_from([torch.float16, torch.float32])))
    else:
        feature_width = draw(st.sampled_from([width, 5, 33]))
        tokens = draw(st.integers(1, 40))
        case["score_features"] = normal(rows, patches, feature_width, seed=seed + 2, dtype=dtype)
        shape = (rows, feature_width) if source == "vector" else (rows, tokens, feature_width)
        case["text"] = normal(*shape, seed=seed + 3, dtype=dtype)
        if source == "tokens, some padded":
            case["token_mask"] = normal(rows, tokens, seed=seed + 4) > draw(st.sampled_from([-0.5, 1.5, 9.0]))
    case["keep"] = draw(st.integers(0, patches))
    case["select"] = draw(st.sampled_from(["high", "low", "hint"]))
    if case["select"] == "hint":
        case["hint"] = draw(st.sampled_from([0.0, 0.1, 0.6]))
    case["noise"] = (normal(rows, patches, seed=seed + 5).abs() * 0.3).clamp(max=0.99)
    if draw(st.booleans()):
        case |= {"mode": "replace", "mask_token": normal(width, seed=seed + 6, dtype=dtype)}
    return case


def check(impl: str, case: dict[str, Any]) -> None:
    """Values, gradients and scores of one case, against its meaning."""
    case = dict(case)
    patches, token = case.pop("patches").requires_grad_(), case.get("mask_token")
    leaves = [patches] if token is None else [patches, token.requires_grad_()]
    found = attention_topk_mask(patches, impl=impl, **case)
    if "scores" in case:
        assert torch.equal(found.scores, case["scores"].float())
        ranked = found.scores
    else:
        features = case["score_features"].double()
        mask = case.get("token_mask")
        precise = reference.patch_scores(features, case["text"].double(), mask)
        torch.testing.assert_close(found.scores.double(), precise, rtol=1e-4, atol=1e-5)
        ranked = found.scores if mask is None else torch.where(mask.any(1, keepdim=True), found.scores, case["noise"])
    kept, count = case["keep"], patches.shape[1]
    swap = round(case.get("hint", 0.1) * min(kept, count - kept)) if case["select"] == "hint" else 0
    options = {name: case[name] for name in ("mode", "mask_token") if name in case}
    expected = meant(patches, ranked, kept, select=case["select"], swap=swap, noise=case["noise"], **options)
    assert_same(found._replace(scores=ranked), expected)
    assert (found.ids_keep.diff(dim=1) > 0).all() and found.ids_restore.dtype == torch.int64

    upstream = normal(*found.visible.shape, seed=9, dtype=patches.dtype)
    of_ours = torch.autograd.grad(found.visible, leaves, upstream)
    of_theirs = torch.autograd.grad(expected.visible, leaves, upstream)
    assert torch.equal(of_ours[0], of_theirs[0])
    if token is not None:  # a sum, in float32 here
        exact = torch.where(expected.mask[:, :, None], upstream.double(), 0).sum((0, 1))
        torch.testing.assert_close(of_ours[1].double(), exact, rtol=ROUNDING[token.dtype], atol=1e-5)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases(70))
def test_any_case_is_what_it_means_in_torch(case: dict[str, Any]) -> None:
    check("torch", case)


@pytest.mark.slow
@settings(max_examples=25 if DEVICE == "cpu" else 250, deadline=None, derandomize=True)  # the grid below holds the same
@given(cases(70))
def test_any_case_is_what_it_means_in_triton(case: dict[str, Any]) -> None:
    check("triton", case)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("patches", [1, 2, 127, 196, 256, 257, 300])
def test_images_of_any_size(impl: str, patches: int) -> None:
    """Below and above what one program copies itself; sizes that divide no tile."""
    case = {"patches": normal(2, patches, 20), "text": normal(2, 3, 20, seed=1), "score_features": normal(2, patches, 20)}
    case["noise"] = seeded_noise(2, patches, 0, torch.device(DEVICE))
    case["score_features"][:, -1] = case["text"][:, 0]  # the highest response comes last, after other blocks
    check(impl, case | {"keep": patches // 2, "select": "hint"})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["gather", "replace"])
@pytest.mark.parametrize(
    ("source", "select", "dtype"),
    [
        ("scores", "high", torch.bfloat16), ("scores", "low", torch.float32), ("vector", "high", torch.float16),
        ("tokens", "low", torch.bfloat16), ("padded", "hint", torch.float32),
    ],
)  # fmt: skip
def test_each_source_and_mode(source: str, select: str, dtype: torch.dtype, mode: str, impl: str) -> None:
    case: dict[str, Any] = {"patches": normal(2, 37, 20, dtype=dtype), "keep": 15, "select": select, "hint": 0.4}
    case["noise"] = seeded_noise(2, 37, 0, torch.device(DEVICE))
    if source == "scores":
        case["scores"] = normal(2, 37, seed=1).round(decimals=1)
    else:
        case["score_features"] = normal(2, 37, 5, seed=2, dtype=dtype)
        case["text"] = normal(*((2, 5) if source == "vector" else (2, 40, 5)), seed=3, dtype=dtype)
    if source == "padded":
        case["token_mask"] = torch.arange(40, device=DEVICE) < torch.tensor([[7], [0]], device=DEVICE)
    if mode == "replace":
        case |= {"mode": mode, "mask_token": normal(20, seed=6, dtype=dtype)}
    check(impl, case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patches", [196, 256, 1000, 1024, 4096])
@pytest.mark.parametrize("source", ["scores", "vector", "tokens"])
def test_real_sizes_on_a_card(dtype: torch.dtype, patches: int, source: str) -> None:
    case: dict[str, Any] = {"patches": normal(64, patches, 768, dtype=dtype), "keep": patches // 2, "select": "hint"}
    case["noise"] = seeded_noise(64, patches, 0, torch.device("cuda"))
    if source == "scores":
        case["scores"] = normal(64, patches, seed=1)
    else:
        case["text"] = normal(64, *([45] if source == "tokens" else []), 256, seed=1, dtype=dtype)
        case["score_features"] = normal(64, patches, 256, seed=2, dtype=dtype)
    check("triton", case)
    replace = {"mode": "replace", "mask_token": normal(768, seed=3, dtype=dtype), "patches": case["patches"].detach()}
    check("triton", case | replace)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("salient", "context", "hint"), [(5, 5, 0.0), (5, 3, 0.0), (4, 0, 0.3), (0, 10, 0.0), (4, 4, 0.5), (10, 0, 0.0)])
def test_both_views_from_one_pass(impl: str, salient: int, context: int, hint: float) -> None:
    patches, scores = normal(3, 10, 7).requires_grad_(), normal(3, 10, seed=1).round(decimals=1)
    noise = seeded_noise(3, 10, 3, torch.device(DEVICE))
    views = attention_split_views(patches, salient=salient, context=context, hint=hint, scores=scores, seed=3, impl=impl)
    swap = round(hint * min(salient, 10 - salient))
    chosen = reference.hidden_patches(scores, salient, swap=swap, noise=noise)  # the salient ones are those hidden above
    for row in range(3):
        rest = sorted((~chosen[row]).nonzero().flatten().tolist(), key=lambda j: noise[row, j].item())[:context]
        assert views.ids_salient[row].tolist() == chosen[row].nonzero().flatten().tolist()
        assert views.ids_context[row].tolist() == sorted(rest)
        assert (~views.mask[row]).nonzero().flatten().tolist() == sorted(rest)
    for view, ids in ((views.salient, views.ids_salient), (views.context, views.ids_context)):
        assert torch.equal(view, torch.stack([image[at] for image, at in zip(patches, ids, strict=True)]))
    weight = normal(10, 7, seed=4)
    ((views.salient * weight[:salient]).sum() + (views.context * weight[salient : salient + context]).sum()).backward()
    expected = torch.zeros_like(patches)
    for row in range(3):
        expected[row, views.ids_salient[row]] = weight[:salient]
        expected[row, views.ids_context[row]] = weight[salient : salient + context]
    assert torch.equal(patches.grad, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_selection_is_a_stable_sort_on_every_row(impl: str) -> None:
    """Equal scores, both zeros, infinities, denormals and NaN: where integer keys and thresholds go wrong."""
    special = torch.tensor([0, -0.0, torch.inf, -torch.inf, 1e-42, -1e-42, torch.nan, -torch.nan, 1, 1 + 2**-23])
    scores = special[torch.randint(10, (6, 33), generator=torch.Generator().manual_seed(0))].to(DEVICE)
    for keep, select in ((0, "high"), (1, "high"), (16, "high"), (33, "high"), (1, "low"), (16, "low")):
        found = attention_topk_mask(normal(6, 33, 2), scores=scores, keep=keep, select=select, impl=impl)
        order = scores.sort(dim=1, descending=select == "high", stable=True).indices
        expected = torch.zeros_like(found.mask).scatter(1, order[:, : 33 - keep], True)
        assert torch.equal(found.mask, expected), (keep, select)


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_tokens_never_score_and_padded_texts_are_drawn(impl: str) -> None:
    patches, text = normal(6, 12, 8), normal(6, 5, 8, seed=1)
    mask = torch.ones(6, 5, dtype=torch.bool, device=DEVICE)
    mask[:, 3:] = False
    mask[3:] = False
    spoiled = text.clone()
    spoiled[~mask] = torch.nan  # what padding holds must not matter
    found = attention_topk_mask(patches, spoiled, mask, ratio=0.5, seed=7, impl=impl)
    torch.testing.assert_close(found.scores[:3], reference.patch_scores(patches[:3], text[:3, :3]))
    assert (found.scores[3:] == 0).all() and found.visible.isfinite().all() and (found.mask.sum(1) == 6).all()
    drawn = reference.hidden_patches(seeded_noise(6, 12, 7, torch.device(DEVICE)), 6)  # of uniform noise: see below
    assert torch.equal(found.mask[3:], drawn[3:])
    again = attention_topk_mask(patches, spoiled, mask, ratio=0.5, seed=7, impl=impl)
    other = attention_topk_mask(patches, spoiled, mask, ratio=0.5, seed=8, impl=impl)
    assert torch.equal(found.mask, again.mask) and torch.equal(found.mask[:3], other.mask[:3])
    assert not torch.equal(found.mask[3:], other.mask[3:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("where", ["patches", "text"])
@pytest.mark.parametrize("text_shape", [(4, 8), (4, 4, 8)])
@pytest.mark.parametrize("patches", [12, 260])
def test_no_bad_feature_gives_a_finite_number(impl: str, where: str, text_shape: tuple[int, ...], patches: int) -> None:
    features, text = normal(4, patches, 8), normal(*text_shape, seed=1)
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        (features if where == "patches" else text)[row].view(-1)[3] = bad
    found = attention_topk_mask(features, text, keep=patches // 2, impl=impl)
    assert found.visible[:3].isnan().all() and found.visible[3].isfinite().all()
    assert found.scores[:3].isnan().any(1).all() and found.scores[3].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_carry_no_gradient_and_repeat(impl: str) -> None:
    patches, text = normal(3, 20, 8).requires_grad_(), normal(3, 4, 8, seed=1).requires_grad_()
    runs = []
    for _ in range(2):
        found = attention_topk_mask(patches, text, keep=7, impl=impl)
        assert not found.scores.requires_grad and not found.mask.requires_grad
        runs.append((found.scores, *torch.autograd.grad(found.visible.square().sum(), [patches, text], allow_unused=True)))
    assert runs[0][2] is None and torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_scores_rank_patches_by_the_words_that_count() -> None:
    patches = torch.eye(4)[None] * 3
    words = torch.stack([torch.eye(4)[2], torch.eye(4)[0]])[None]
    masks = ([True, True], [True, False], [False, False])
    both, one, none = (attention_scores(patches, words, torch.tensor([mask])) for mask in masks)
    assert one[0].argmax() == 2 and one[0].sum() == pytest.approx(1)
    assert sorted(both[0].topk(2).indices.tolist()) == [0, 2] and both[0].sum() == pytest.approx(2)
    assert none.abs().max() == 0
    assert not attention_scores(patches.requires_grad_(), words).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_a_slice_of_patches_and_other_strides_are_taken(impl: str) -> None:
    """A ViT's patches are a slice behind [CLS]; transposed features are no reason to refuse either."""
    whole, scores = normal(3, 21, 8), normal(3, 20, seed=1)
    for patches in (whole[:, 1:], normal(3, 8, 20).transpose(1, 2), normal(20, 3, 8).transpose(0, 1)):
        found = attention_topk_mask(patches, scores=scores, keep=5, impl=impl)
        assert_same(found, meant(patches, scores, 5))
        text = normal(8, 4, 3, seed=2).permute(2, 1, 0)
        scored = attention_topk_mask(patches, text, keep=5, impl=impl)
        torch.testing.assert_close(scored.scores, reference.patch_scores(patches, text))


@pytest.mark.parametrize("patches", [20, 300])
def test_every_element_is_written(patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels leave out would show as NaN, or as a huge index."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def spoil(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**40)

    def check_written() -> None:
        for mode in ("gather", "replace"):
            data = normal(2, patches, 70).requires_grad_()
            token = normal(70, seed=2).requires_grad_() if mode == "replace" else None
            found = attention_topk_mask(
                data, normal(2, 5, 70, seed=1), keep=patches // 3, mode=mode, mask_token=token, impl="triton"
            )
            found.visible.sum().backward()
            assert found.visible.isfinite().all() and found.scores.isfinite().all()
            assert found.ids_keep.max() < patches and found.ids_restore.max() < patches and data.grad.isfinite().all()
        views = attention_split_views(data, salient=patches // 2, context=patches // 4, scores=found.scores, impl="triton")
        (views.salient.sum() + views.context.sum()).backward()
        assert views.salient.isfinite().all() and views.context.isfinite().all() and data.grad.isfinite().all()

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda *args, **options: spoil(empty(*args, **options)))
        patched.setattr(Tensor, "new_empty", lambda *args, **options: spoil(new_empty(*args, **options)))
        check_written()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"token": True}, {"split": True}])
def test_operators_keep_their_contract(impl: str, options: dict[str, bool]) -> None:
    patches, scores = normal(2, 6, 4).requires_grad_(), normal(2, 6, seed=1)
    token = normal(4, seed=2).requires_grad_() if options.get("token") else None
    views = (2, 2, True) if options.get("split") else (4, 0, False)
    noise = seeded_noise(2, 6, 0, torch.device(DEVICE))
    torch.library.opcheck(
        topk_mask_op, (patches, token, None, None, None, scores, noise, 2, 1, *views, False, 0.1, impl)
    )


def test_gradcheck() -> None:
    patches, token = normal(2, 6, 3, dtype=torch.float64).requires_grad_(), normal(3, dtype=torch.float64).requires_grad_()
    scores, text = normal(2, 6, seed=1), normal(2, 4, 3, seed=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p, t: attention_topk_mask(p, scores=scores, ratio=0.5, mode="replace", mask_token=t).visible, (patches, token)
    )
    # Scores come from a copy: moving a patch must not change which ones are chosen.
    features = patches.detach().clone()
    assert torch.autograd.gradcheck(
        lambda p: attention_topk_mask(p, text, keep=2, score_features=features).visible, (patches,)
    )
    assert torch.autograd.gradcheck(lambda p: attention_split_views(p, salient=2, context=3, scores=scores)[:2], (patches,))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_into_one_graph(impl: str) -> None:
    def step(patches: Tensor, text: Tensor, token: Tensor) -> Tensor:
        found = attention_topk_mask(patches * 2, text, ratio=0.5, mode="replace", mask_token=token, select="hint", impl=impl)
        views = attention_split_views(found.visible, salient=3, context=2, scores=found.scores, impl=impl)
        return views.salient.square().sum() + views.context.sum() + found.mask.sum()

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")):
        patches, token = normal(2, 8, 4).requires_grad_(), normal(4, seed=2).requires_grad_()
        loss = call(patches, normal(2, 3, 4, seed=1), token)
        loss.backward()
        results.append((loss.detach(), patches.grad, token.grad))
    torch.testing.assert_close(*results)


def test_both_implementations_choose_alike() -> None:
    """On features in general position; the scores differ by rounding alone."""
    patches, text = normal(4, 40, 24), normal(4, 6, 24, seed=1)
    ours, theirs = (attention_topk_mask(patches, text, keep=10, select="hint", impl=impl) for impl in IMPLS)
    torch.testing.assert_close(ours.scores, theirs.scores)
    assert_same(ours._replace(scores=theirs.scores), theirs)


def test_noise_is_the_same_everywhere_and_uniform() -> None:
    noise = seeded_noise(200, 50, 11, torch.device("cpu"))
    assert torch.equal(noise, seeded_noise(200, 50, 11, torch.device(DEVICE)).cpu())
    assert noise.min() >= 0 and noise.max() < 1 and noise.dtype == torch.float32
    assert (noise.flatten().histc(20, 0, 1) / 500 - 1).abs().max() < 0.2 and len(noise.unique()) > 9_900
    assert [round(value, 6) for value in noise[0, :3].tolist()] == [0.387822, 0.833713, 0.065223]
    for seed in (0, -5, 2**62):
        assert not torch.equal(noise, seeded_noise(200, 50, seed, torch.device("cpu")))


def test_largest_tile_of_the_table_holds_the_patches() -> None:
    for count in (1, 16, 17, 196, 256, 257, 1024, 5000):
        tile = tiles.mask_tile(count, torch.bfloat16)
        assert tile.patches >= count and tile.patches & (tile.patches - 1) == 0 and 4 <= tile.warps <= 16


def arguments(**changes: Any) -> dict[str, Any]:
    return {"patches": torch.zeros(2, 6, 4), "scores": torch.zeros(2, 6), "keep": 3} | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patches": torch.zeros(6, 4)}, "patches must be floats"),
        ({"patches": torch.zeros(2, 6, 4, dtype=torch.int64)}, "patches must be floats"),
        ({"text": torch.zeros(2, 4)}, "either text"),
        ({"scores": None}, "either text"),
        ({"scores": torch.zeros(2, 5)}, r"scores must be floats \[2, 6\]"),
        ({"keep": 7}, "use 0 <= keep <= 6"),
        ({"keep": -1}, "use 0 <= keep <= 6"),
        ({"ratio": 0.5}, "either keep"),
        ({"keep": None}, "either keep"),
        ({"keep": None, "ratio": 0.0}, "between 0 and 1"),
        ({"keep": None, "ratio": 1.0}, "between 0 and 1"),
        ({"keep": None, "ratio": float("nan")}, "between 0 and 1"),
        ({"mode": "drop"}, "use 'gather' or 'replace'"),
        ({"select": "top"}, "use 'high', 'low' or 'hint'"),
        ({"select": "hint", "hint": 1.0}, "at least 0 and below 1"),
        ({"mode": "replace"}, "needs a mask_token of 4 numbers, found none"),
        ({"mode": "replace", "mask_token": torch.zeros(3)}, "needs a mask_token of 4 numbers"),
        ({"mode": "replace", "mask_token": torch.zeros(4).double()}, "mask_token must be torch.float32"),
        ({"mask_token": torch.zeros(4)}, "belongs to mode='replace'"),
        ({"scores": None, "text": torch.zeros(2, 5)}, "text must be"),
        ({"scores": None, "text": torch.zeros(3, 4)}, "text must be"),
        ({"scores": None, "text": torch.zeros(2, 0, 4)}, "has no tokens"),
        ({"scores": None, "text": torch.zeros(2, 4).half()}, "share a dtype"),
        ({"scores": None, "text": torch.zeros(2, 4), "temperature": 0.0}, "temperature must be positive"),
        ({"scores": None, "text": torch.zeros(2, 3, 4), "token_mask": torch.ones(2, 4).bool()}, "token_mask must be"),
        ({"scores": None, "text": torch.zeros(2, 3, 4), "token_mask": torch.ones(2, 3)}, "must be bool"),
        ({"token_mask": torch.ones(2, 3).bool()}, "belong to text"),
        ({"score_features": torch.zeros(2, 6, 3)}, "belong to text"),
        ({"scores": None, "text": torch.zeros(2, 4), "score_features": torch.zeros(2, 5, 4)}, "score_features must be"),
        ({"noise": torch.zeros(2, 5)}, "noise must be float32"),
        ({"scores": torch.zeros(2, 6, device="meta")}, "on one device"),
        ({"impl": "cuda"}, "not available"),
        ({"impl": "triton", "patches": torch.zeros(2, 6, 4).double()}, "use impl='torch' for float64"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given_arguments = arguments(**change)
    with pytest.raises(ValueError, match=message):
        attention_topk_mask(given_arguments.pop("patches"), **given_arguments)


def test_views_must_share_the_patches() -> None:
    for salient, context in ((4, 3), (-1, 3), (3, -1)):
        with pytest.raises(ValueError, match="must share the 6 patches"):
            attention_split_views(torch.zeros(2, 6, 4), salient=salient, context=context, scores=torch.zeros(2, 6))


def _refusal() -> str:
    try:
        attention_topk_mask(torch.zeros(2, 6, 4), scores=torch.zeros(2, 6), keep=3, impl="triton")
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.slow
def test_triton_refuses_what_it_cannot_run_on(compiler: Executor) -> None:
    """Not interpreted and without CUDA tensors: a sentence, not a fallback."""
    assert "needs CUDA tensors, found cpu; use impl='torch'" in compiler.submit(_refusal).result()


def test_empty_inputs() -> None:
    for impl in IMPLS:
        for shape in ((0, 6, 4), (2, 0, 4)):
            patches = torch.zeros(shape, device=DEVICE, requires_grad=True)
            found = attention_topk_mask(patches, scores=torch.zeros(shape[:2], device=DEVICE), keep=0, impl=impl)
            found.visible.sum().backward()
            assert found.visible.shape == (shape[0], 0, 4) and patches.grad.shape == shape
