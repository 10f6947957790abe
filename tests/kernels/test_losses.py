"""The drop-in losses against open_clip's: its formulas over all pairs, and its own classes where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from mmclip_kernels import ClipLoss, SigLipLoss, contrastive_loss, ranks
from torch import Tensor, nn
from torch.nn import functional as F

from tests.contrastive_cases import cone, features

OPEN_CLIP = importlib.util.find_spec("open_clip") is not None
needs_open_clip = pytest.mark.skipif(not OPEN_CLIP, reason="open_clip is not installed")
ROWS = 5
"""Pairs of each rank: open_clip's ranks must hold equally many."""


class Case(NamedTuple):
    """whole: whether the features' gradients, averaged over the ranks, are those of the global loss, or 1 / world of them."""

    name: str
    options: dict[str, Any]
    whole: bool = True


CASES = {
    "clip": Case("ClipLoss", {}, False),
    "clip, gathered with gradient": Case("ClipLoss", {"gather_with_grad": True}),
    "clip, local": Case("ClipLoss", {"local_loss": True, "gather_with_grad": True, "cache_labels": True}),
    **{f"siglip, {kind}": Case("SigLipLoss", {"dist_impl": kind}) for kind in ("bidir", "shift", "reduce", "gather")},
}
OURS: dict[str, Callable[..., nn.Module]] = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}


def formula(name: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What both say, over all pairs of one batch."""
    logits = scale * image @ text.T + (0 if bias is None else bias)
    if name == "SigLipLoss":
        sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
        return -F.logsigmoid(sign * logits).sum() / len(image)
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def batch(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """image, text, scale, bias."""
    return *cone(rows, 8, 3, dtype), torch.tensor(9.0, dtype=dtype), torch.tensor(-2.0, dtype=dtype)


def outcome(loss_of: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The loss, and its gradients by image, text, scale and bias."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    loss = loss_of(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, meant in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, meant, rtol=1e-10, atol=1e-12)


# -- One process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_in_one_process_it_is_the_formula(name: str) -> None:
    inputs = batch(7)
    wanted = outcome(lambda *values: formula(name, *values), inputs)
    close(outcome(OURS[name](), inputs), wanted)
    loss = OURS[name]()(*inputs, output_dict=True)
    assert list(loss) == ["contrastive_loss"] and torch.equal(loss["contrastive_loss"], OURS[name]()(*inputs))
    without = OURS[name]()(*inputs[:3], None)
    torch.testing.assert_close(without, formula(name, *inputs[:3], None))


def test_open_clips_training_loop_can_call_it_by_name() -> None:
    """Its step passes the model's output as keywords, and registers the loss as a module."""
    image, text, scale, bias = batch(4)
    output = {"image_features": image, "text_features": text, "logit_scale": scale, "logit_bias": bias}
    for name, kind in OURS.items():
        loss = kind(rank=0, world_size=1)
        assert isinstance(loss, nn.Module) and not list(loss.parameters())
        found = loss(**output, output_dict=True)["contrastive_loss"]
        assert found.item() == pytest.approx(formula(name, *output.values()).item())
    assert ClipLoss(True, True, True, 0, 1, False)(image, text, scale).isfinite()
    assert SigLipLoss(True, 0, 1, "gather")(image, text, scale, bias).isfinite()


@pytest.mark.parametrize("name", OURS)
def test_equal_reports_are_merged_where_ids_are_given(name: str) -> None:
    image, text, scale, _ = batch(6)
    ids = torch.tensor([0, 1, 1, 2, 0, -1])
    found = OURS[name]()(image, text, scale, None, image_ids=ids, text_ids=ids)
    mode = "softmax" if name == "ClipLoss" else "sigmoid"
    wanted = contrastive_loss(image, text, scale, image_ids=ids, text_ids=ids, mode=mode)
    assert torch.equal(found, wanted) and not torch.equal(found, OURS[name]()(image, text, scale, None))


@pytest.mark.parametrize("name", OURS)
def test_under_autocast_features_are_rounded_once_as_by_a_product(name: str) -> None:
    """To its type, also where the towers' types differ; all else stays float32."""
    image, text, scale, bias = batch(16, torch.float32)
    rounded = image.bfloat16(), text.bfloat16()
    wanted = formula(name, *(value.double() for value in (*rounded, scale, bias)))
    with torch.autocast("cpu", torch.bfloat16):
        for pair in ((image, text), (rounded[0], text)):
            assert OURS[name]()(*pair, scale, bias).item() == pytest.approx(wanted.item(), rel=1e-6)
        doubles = [value.double() for value in (image, text, scale, bias)]
        exact = OURS[name]()(*doubles)
    assert exact.item() == pytest.approx(formula(name, *doubles).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ClipLoss(use_horovod=True), "use_horovod=True is not supported: start the ranks with torch.distributed"),
        (lambda: ClipLoss(local_loss=True, world_size=2), "set gather_with_grad=True too, or local_loss=False"),
        (lambda: SigLipLoss(dist_impl="ring"), "dist_impl='ring' is unknown; leave it None, or use one of bidir, shift"),
        (lambda: ClipLoss(world_size=2)(*batch(3)), "world_size=2 needs torch.distributed: call init_process_group first"),
        (lambda: ClipLoss(impl="cuda")(*batch(3)), "impl='cuda' is not available"),
        (lambda: ClipLoss()(*batch(3)[:2], 5.0), "scale must be a tensor that holds one number, found float"),
        (lambda: ClipLoss()(*batch(3)[:3], text_ids=torch.arange(3)), "pass both image_ids and text_ids"),
    ],
)  # fmt: skip
def test_what_is_refused(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


# -- Several ranks ----------------------------------------------------------------------------------------------------


def _run(process: int, folder: Path, world: int) -> None:
    """Save what the rank finds for its part of the batch: with our classes, and with open_clip's."""
    torch.set_num_threads(1)
    ranks.PIECE_ROWS = 2  # several pieces, even of so few rows
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=world, timeout=timedelta(seconds=60)
    )
    classes: dict[str, Any] = {"ours": OURS}
    if OPEN_CLIP:
        peer = importlib.import_module("open_clip.loss")
        classes["open_clip"] = {name: getattr(peer, name) for name in OURS}
    try:
        *pairs, scale, bias = batch(ROWS * world)
        own = (*(value.split(ROWS)[process] for value in pairs), scale, bias)
        found = {
            (who, name): outcome(kinds[case.name](rank=process, world_size=world, **case.options), own)
            for who, kinds in classes.items()
            for name, case in CASES.items()
        }
        with pytest.raises(ValueError, match=f"but this is rank {process} of {world}: pass those"):
            ClipLoss(rank=process, world_size=world + 1, gather_with_grad=True)(*own)
        torch.save(found, folder / f"{process}.pt")
    finally:
        dist.destroy_process_group()


def _fork(_: int, folder: Path, world: int) -> None:
    torch.multiprocessing.start_processes(_run, (folder, world), nprocs=world, start_method="fork")


@pytest.fixture(scope="module", params=[2, 3])
def averaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, dict[Any, Any]]]:
    """The number of ranks, and for each class and case the losses of the ranks and their gradients as DDP averages them."""
    folder, world = tmp_path_factory.mktemp("losses"), request.param
    torch.multiprocessing.spawn(_fork, (folder, world))  # one process that imports: the ranks are forked from it
    by_rank = [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    def gathered(key: Any) -> tuple[list[Tensor], list[Tensor]]:
        losses, image, text, scale, bias = zip(*(found[key] for found in by_rank), strict=True)
        return list(losses), [torch.cat(image) / world, torch.cat(text) / world, sum(scale) / world, sum(bias) / world]

    yield world, {key: gathered(key) for key in by_rank[0]}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_averaged_over_the_ranks_it_is_the_formula_over_all_pairs(name: str, averaged: tuple[int, dict[Any, Any]]) -> None:
    world, found = averaged
    case, inputs = CASES[name], batch(ROWS * world)
    loss, *gradients = outcome(lambda *values: formula(case.name, *values), inputs)
    if not case.whole:
        gradients[:2] = [gradient / world for gradient in gradients[:2]]
    losses, ours = found["ours", name]
    close(losses, [loss] * world)
    close(ours, gradients)


@needs_open_clip
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_averaged_over_the_ranks_it_is_open_clip(name: str, averaged: tuple[int, dict[Any, Any]]) -> None:
    """Its ranks return their own part or the whole: the mean is the same."""
    world, found = averaged
    losses, ours = found["ours", name]
    their_losses, theirs = found["open_clip", name]
    close(losses, [torch.stack(their_losses).mean()] * world)
    close(ours, theirs)


@needs_open_clip
@pytest.mark.parametrize("name", OURS)
def test_in_one_process_it_is_open_clip(name: str) -> None:
    peer = getattr(importlib.import_module("open_clip.loss"), name)
    close(outcome(OURS[name](), batch(9)), outcome(peer(), batch(9)))
    image, text = features(2, 3, 0), features(2, 3, 1)
    assert list(peer()(image, text, torch.tensor(1.0), None, output_dict=True)) == ["contrastive_loss"]
