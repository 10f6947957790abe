"""The chunked, distributed loss against its float64 meaning."""

import pytest
import torch
import torch.multiprocessing
from mmclip_kernels import contrastive_loss, reference
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
@pytest.mark.parametrize("chunk", [1, 4, 4096])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_equals_its_meaning(case: str, chunk: int, factor: float) -> None:
    rows, columns, image_ids, text_ids = CASES[case]
    ids = {} if image_ids is None else {"image_ids": torch.tensor(image_ids), "text_ids": torch.tensor(text_ids)}
    results = []
    for loss_of in (reference.contrastive_loss, lambda *a, **k: contrastive_loss(*a, chunk=chunk, **k)):
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
        lambda i, t, s: contrastive_loss(i, t, s, image_ids=ids, text_ids=ids, chunk=2), (image, text, scale)
    )


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
        ({"chunk": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"image": torch.zeros(4, 8), "text": torch.zeros(4, 8), "scale": torch.ones(1)} | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(arguments.pop("image"), arguments.pop("text"), arguments.pop("scale"), **arguments)


SIZES = ((3, 4), (0, 2), (5, 1))  # ragged: images and texts of each rank


def _rank(rank: int, store: str, factor: float, results: torch.multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(SIZES))
    try:
        images, texts, image_ids, text_ids = _whole_batch()
        rows = slice(sum(n for n, _ in SIZES[:rank]), sum(n for n, _ in SIZES[: rank + 1]))
        columns = slice(sum(m for _, m in SIZES[:rank]), sum(m for _, m in SIZES[: rank + 1]))
        image, text = images[rows].clone().requires_grad_(), texts[columns].clone().requires_grad_()
        scale = torch.tensor([factor], dtype=torch.float64, requires_grad=True)
        loss = contrastive_loss(
            image, text, scale, image_ids=image_ids[rows], text_ids=text_ids[columns], chunk=2,
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
