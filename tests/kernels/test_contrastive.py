"""The chunked, distributed loss against its float64 meaning."""

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from mmclip_kernels import contrastive_loss, contrastive_torch, ranks, reference
from mmclip_kernels.contrastive import contrastive_op
from torch import Tensor


def features(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=1)


CASES = {
    "diagonal": (7, 7, None, None),
    "duplicates": (6, 6, [0, 1, 1, 2, 0, 3], [0, 1, 1, 2, 0, 3]),
    "rectangular": (5, 3, [0, 1, 2, 2, 9], [2, 0, 7]),
    "left out": (6, 5, [0, -1, 1, 2, -1, 3], [3, 2, -1, 1, 0]),
    "one": (1, 1, None, None),
    "no positive": (3, 2, [0, 1, 2], [8, 9]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block", [(1, 2), (4, 3), (4096, 4096)])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_equals_its_meaning(case: str, block: tuple[int, int], factor: float, monkeypatch) -> None:
    monkeypatch.setattr(contrastive_torch, "BLOCK", block)
    rows, columns, image_ids, text_ids = CASES[case]
    ids = {} if image_ids is None else {"image_ids": torch.tensor(image_ids), "text_ids": torch.tensor(text_ids)}
    results = []
    for loss_of in (reference.contrastive_loss, contrastive_loss):
        image, text = features(rows, 9, 0).requires_grad_(), features(columns, 9, 1).requires_grad_()
        scale = torch.tensor([factor], dtype=torch.float64, requires_grad=True)
        loss = loss_of(image, text, scale, **ids)
        loss.sum().backward()
        results.append((loss.detach().reshape(()), image.grad, text.grad, scale.grad))
    for ours, meant in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, meant, rtol=1e-9, atol=1e-11)
    if case != "no positive":
        assert results[1][1].abs().sum() > 0 or rows == 1


def test_gradcheck() -> None:
    ids = torch.tensor([0, 1, 1, 2, -1])
    image, text = features(5, 4, 0).requires_grad_(), features(5, 4, 1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda i, t, s: contrastive_loss(i, t, s, image_ids=ids, text_ids=ids), (image, text, scale)
    )


def drawn_case(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Any shapes, dtype, ids, weights and exclusions -> image, text, scale, keywords."""
    rows, columns, width = draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.sampled_from([1, 3, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    image, text = (torch.nn.functional.normalize(some(n, width), dim=1).to(dtype) for n in (rows, columns))
    options: dict = {"mode": draw(st.sampled_from(["softmax", "sigmoid"]))}
    if rows != columns or draw(st.booleans()):
        options["image_ids"] = torch.randint(-1, 4, (rows,), generator=generator)
        options["text_ids"] = torch.randint(-1, 4, (columns,), generator=generator)
    if draw(st.booleans()):
        options["row_weight"], options["col_weight"] = some(rows).relu().float(), some(columns).abs().float()
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(rows, columns), (1, columns), (rows, 1)]))
        options["exclude"] = some(*shape) > draw(st.sampled_from([-9.0, 0.0, 0.7]))
    if options["mode"] == "sigmoid" and draw(st.booleans()):
        options["bias"] = torch.tensor([-3.0], dtype=torch.float64)
    scale = torch.tensor(draw(st.sampled_from([1.0, 14.0, 100.0])), dtype=torch.float64)
    return image, text, scale, options


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.data())
def test_any_case_equals_its_meaning(data: st.DataObject) -> None:
    image, text, scale, options = drawn_case(data.draw)
    results = []
    for precise, loss_of in ((True, reference.contrastive_loss), (False, contrastive_loss)):
        given_options = dict(options)
        leaves = [(x.double() if precise else x).clone().requires_grad_() for x in (image, text)] + [
            scale.clone().requires_grad_()
        ]
        if "bias" in options:
            given_options["bias"] = options["bias"].clone().requires_grad_()
            leaves.append(given_options["bias"])
        loss = loss_of(*leaves[:3], **given_options)
        loss.backward()
        results.append([loss.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)])
    # The features' gradients come back in the features' own type; all else is computed in float32 at least.
    rounding = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[image.dtype]
    for index, (meant, ours) in enumerate(zip(*results, strict=True)):
        tolerance = rounding if index in (1, 2) else min(rounding, 2e-5)
        size = max(1.0, meant.abs().max().item() if meant.numel() else 0.0, scale.item() if index == 0 else 0.0)
        torch.testing.assert_close(ours.double(), meant.double(), rtol=0, atol=tolerance * size)


def test_directions_are_the_two_halves() -> None:
    image, text, scale = features(5, 4, 0), features(5, 4, 1), torch.tensor(9.0, dtype=torch.float64)
    halves = contrastive_loss(image, text, scale, directions=True)
    torch.testing.assert_close(halves, reference.contrastive_loss(image, text, scale, directions=True))
    assert halves.mean() == contrastive_loss(image, text, scale)


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_operators_keep_their_contract(mode: str) -> None:
    ids = torch.tensor([0, 1, 1, -1])
    leaves = [x.requires_grad_() for x in (features(4, 3, 0), features(4, 3, 1), torch.tensor(3.0).double())]
    bias = torch.zeros((), dtype=torch.float64)
    torch.library.opcheck(contrastive_op, (*leaves, bias, ids, ids, None, None, None, False, mode, "torch"))


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_compiles_into_one_graph(mode: str) -> None:
    def step(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss(image * 2, text, scale.exp(), mode=mode) * 3

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [
            x.requires_grad_()
            for x in (features(4, 3, 0, torch.float32), features(4, 3, 1, torch.float32), torch.ones(()))
        ]
        call(*leaves).backward()
        results.append([x.grad for x in leaves])
    torch.testing.assert_close(*results)


def test_nothing_as_large_as_the_matrix_is_kept() -> None:
    """4,096 x 4,096 logits are 64 MiB; the saved log-sum-exps and the blocks are far below that."""
    image, text = (features(4096, 8, seed, torch.float32).requires_grad_() for seed in (0, 1))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nelement()), t)[1], lambda t: t):
        contrastive_loss(image, text, torch.tensor(10.0)).backward()
    assert max(sizes) == 4096 * 8


def test_rows_that_take_no_part_may_hold_anything() -> None:
    image, ids = features(4, 8, 0, torch.float32), torch.tensor([0, -1, 1, 2])
    image[1] = torch.nan
    image.requires_grad_()
    loss = contrastive_loss(image, features(4, 8, 1, torch.float32), torch.tensor(10.0), image_ids=ids, text_ids=ids)
    loss.backward()
    assert loss.isfinite() and image.grad.isfinite().all() and (image.grad[1] == 0).all()


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_bad_feature_gives_a_finite_number(mode: str, bad: float) -> None:
    # Row 0 has no positive, and all its logits are -inf or +inf: no sum would show it.
    image, text = torch.ones(3, 2), torch.ones(3, 2, requires_grad=True)
    image[0, 0] = bad
    ids = torch.tensor([7, 1, 2]), torch.tensor([0, 1, 2])
    loss = contrastive_loss(image, text, torch.tensor(10.0), image_ids=ids[0], text_ids=ids[1], mode=mode)
    loss.backward()
    assert loss.isnan() and text.grad.isnan().all()


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_all_excluded_is_zero(mode: str) -> None:
    leaves = [x.requires_grad_() for x in (features(3, 4, 0), features(3, 4, 1), torch.tensor(10.0).double())]
    everything = torch.ones(1, 1, dtype=torch.bool)
    nothing = torch.full((3,), -1)
    for options in ({"exclude": everything}, {"image_ids": nothing, "text_ids": nothing}):
        loss = contrastive_loss(*leaves, mode=mode, **options)
        loss.backward()
        assert loss == 0
        assert all((leaf.grad == 0).all() for leaf in leaves)


def test_identical_texts_are_not_each_others_negatives() -> None:
    # Two studies with one report each: image 0 and 1 carry the same text, as do 2 and 3.
    image = text = torch.eye(2).repeat_interleave(2, 0)
    ids = torch.tensor([0, 0, 1, 1])
    scale = torch.tensor(50.0)
    grouped = contrastive_loss(image, text, scale, image_ids=ids, text_ids=ids)
    assert grouped.item() == pytest.approx(0.6931472, abs=1e-5)  # log 2: two equal texts share the mass, no more
    crossed = contrastive_loss(image, text, scale, image_ids=torch.tensor([0, 1, 0, 1]), text_ids=ids)
    assert crossed.item() > 20  # a wrong grouping shows


def test_features_with_nan_give_nan() -> None:
    image = features(4, 8, 0, torch.float32)
    image[2, 3] = torch.nan
    assert contrastive_loss(image, features(4, 8, 1, torch.float32), torch.tensor(10.0)).isnan()


def test_empty_batch_is_zero() -> None:
    image = torch.zeros(0, 8, requires_grad=True)
    loss = contrastive_loss(image, torch.zeros(0, 8), torch.tensor(10.0))
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(4, 7)}, "must share E"),
        ({"text": torch.zeros(3, 8)}, "as many images as texts"),
        ({"image_ids": torch.zeros(4, dtype=torch.int64)}, "both image_ids and text_ids"),
        (
            {"image_ids": torch.zeros(3, dtype=torch.int64), "text_ids": torch.zeros(4, dtype=torch.int64)},
            "one id a row",
        ),
        ({"scale": torch.ones(2)}, "one number"),
        ({"impl": "cuda"}, "not available"),
        ({"scale": torch.tensor(torch.nan)}, "scale must be finite"),
        ({"text": torch.zeros(4, 8, dtype=torch.bfloat16)}, "share a floating dtype"),
        ({"mode": "hinge"}, "use 'softmax' or 'sigmoid'"),
        ({"bias": torch.zeros(())}, "belongs to mode='sigmoid'"),
        ({"directions": True, "mode": "sigmoid"}, "no directions"),
        ({"row_weight": torch.ones(3)}, "row_weight must be floats"),
        ({"exclude": torch.ones(4, 3, dtype=torch.bool)}, "exclude must be bool"),
        ({"image_ids": torch.zeros(4), "text_ids": torch.zeros(4)}, "ids must be int64"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"image": torch.zeros(4, 8), "text": torch.zeros(4, 8), "scale": torch.ones(1)} | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(arguments.pop("image"), arguments.pop("text"), arguments.pop("scale"), **arguments)


SIZES = ((3, 4), (0, 2), (5, 1))  # ragged: images and texts of each rank


def _rank(rank: int, store: str, factor: float, results: torch.multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    ranks.PIECE_ROWS = 1  # several pieces, even of so few rows
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(SIZES))
    try:
        images, texts, image_ids, text_ids = _whole_batch()
        rows = slice(sum(n for n, _ in SIZES[:rank]), sum(n for n, _ in SIZES[: rank + 1]))
        columns = slice(sum(m for _, m in SIZES[:rank]), sum(m for _, m in SIZES[: rank + 1]))
        image, text = images[rows].clone().requires_grad_(), texts[columns].clone().requires_grad_()
        scale = torch.tensor([factor], dtype=torch.float64, requires_grad=True)
        loss = contrastive_loss(
            image, text, scale, image_ids=image_ids[rows], text_ids=text_ids[columns],
            group=torch.distributed.group.WORLD,
        )  # fmt: skip
        loss.backward()
        results.put((rank, loss.item(), image.grad.tolist(), text.grad.tolist(), scale.grad.item()))
        results.close()
        results.join_thread()
    finally:
        torch.distributed.destroy_process_group()


def _whole_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, texts = features(sum(n for n, _ in SIZES), 6, 2), features(sum(m for _, m in SIZES), 6, 3)
    return images, texts, torch.tensor([0, 1, 1, 2, 3, -1, 0, 5]), torch.tensor([1, 0, 2, 2, 3, -1, 1])


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_ragged_ranks_equal_one_process(factor: float, tmp_path) -> None:
    """Averaging each rank's gradient over the ranks gives the gradient of the global loss; the scale's once."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(r, str(tmp_path / "store"), factor, results)) for r in range(len(SIZES))
    ]
    for process in ranks:
        process.start()
    gathered = sorted(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0

    images, texts, image_ids, text_ids = _whole_batch()
    images.requires_grad_(), texts.requires_grad_()
    scale = torch.tensor([factor], dtype=torch.float64, requires_grad=True)
    loss = reference.contrastive_loss(images, texts, scale, image_ids=image_ids, text_ids=text_ids)
    loss.backward()
    world = len(SIZES)
    for _, value, *_ in gathered:
        assert value == pytest.approx(loss.item(), rel=1e-9)
    image_grad = torch.tensor(sum((g[2] for g in gathered), []), dtype=torch.float64) / world
    text_grad = torch.tensor(sum((g[3] for g in gathered), []), dtype=torch.float64) / world
    torch.testing.assert_close(image_grad, images.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(text_grad, texts.grad, rtol=1e-8, atol=1e-10)
    assert sum(g[4] for g in gathered) / world == pytest.approx(scale.grad.item(), rel=1e-8)
