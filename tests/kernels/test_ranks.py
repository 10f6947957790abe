"""The contrastive loss and gathered rows over several ranks, against one process. All ranks run once, for all tests."""

from __future__ import annotations

import itertools
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from mmclip_kernels import contrastive_loss, gather_with_gradient, ranks
from torch import Tensor

from tests.contrastive_cases import IMPLS, evaluate, features, meaning, precise_dtype

pytestmark = pytest.mark.slow

# Images and texts of each rank: ragged, one rank without images and one without texts, 8 images and 7 texts in all.
SIZES = {1: ((8, 7),), 2: ((3, 4), (5, 3)), 3: ((3, 4), (0, 3), (5, 0))}
GROUPS = {1: [0], 2: [1, 2], 3: [0, 1, 2]}
"""The processes of each group: in the second, a rank's number in the group is not its number in the world."""


PIECE = 4
CLASSES = (3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 18)
"""Rows of every rank, one below, at and above one to four pieces of `PIECE` rows: most do not fill the last piece."""


def class_batch(rows: int, world: int, ids: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As many images as texts of every rank; with ids, each text belongs to two images of the whole batch."""
    image, text = features(rows * world, 5, 6), features(rows * world, 5, 7)
    numbers = torch.arange(rows * world) // 2
    return image, text, {"image_ids": numbers, "text_ids": numbers} if ids else {}


class Case(NamedTuple):
    """excluded: None, "pairs" [N, M] or "texts" [1, M]. ids: False for the diagonal, whose texts are spread as the images are."""

    mode: str
    scale: float
    weights: bool = False
    excluded: str | None = None
    ids: bool = True


CASES = {
    "plain": Case("softmax", 1.0),
    "pairs excluded": Case("softmax", 100.0, True, "pairs"),
    "texts excluded": Case("softmax", 10.0, True, "texts"),
    "sigmoid": Case("sigmoid", 10.0, True, "pairs"),
    "diagonal": Case("softmax", 10.0, ids=False),
}


def whole_batch(case: Case) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Duplicate ids within and across ranks, rows that are left out, rows without a positive -> image, text, keywords."""
    if not case.ids:
        return features(8, 6, 2), features(8, 6, 3), {"mode": case.mode}
    options: dict[str, Any] = {
        "image_ids": torch.tensor([0, 1, 1, 2, 3, -1, 0, 5]), "text_ids": torch.tensor([1, 0, 2, 2, 3, -1, 1]), "mode": case.mode,
        "row_weight": torch.linspace(0, 2, 8) if case.weights else torch.ones(8),
        "col_weight": torch.linspace(1, 0, 7) if case.weights else torch.ones(7),
    }  # fmt: skip
    if case.excluded is not None:
        chance = torch.rand(8 if case.excluded == "pairs" else 1, 7, generator=torch.Generator().manual_seed(4))
        options["exclude"] = chance > 0.7
    return features(8, 6, 2), features(7, 6, 3), options


def share(case: Case, world: int, rank: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """One rank's part of `whole_batch`. The columns of `exclude` are the texts of all ranks."""
    image, text, options = whole_batch(case)
    rows = [images for images, _ in SIZES[world]]
    columns = [texts for _, texts in SIZES[world]] if case.ids else rows
    sizes = {"image_ids": rows, "row_weight": rows, "text_ids": columns, "col_weight": columns}
    if case.excluded == "pairs":
        sizes["exclude"] = rows
    own = {name: value.split(sizes[name])[rank] if name in sizes else value for name, value in options.items()}
    return image.split(rows)[rank], text.split(columns)[rank], own


def gathered_rows(rank: int) -> Tensor:
    """[rank + 1, 2]: another number of rows from each rank."""
    return torch.arange(2.0 * (rank + 1)).reshape(-1, 2) + 100 * rank


def upstream(rank: int, world: int) -> Tensor:
    """The gradient that a rank has for the rows of all ranks."""
    return features(sum(range(1, world + 1)), 2, rank).float()


def _run(process: int, folder: Path) -> None:
    """Save what the process finds in each of its groups: loss and gradients of each case, gathered rows and their gradient."""
    torch.set_num_threads(1)
    ranks.PIECE_ROWS = 1  # several pieces, even of so few rows
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=3, timeout=timedelta(seconds=60)
    )
    try:
        for world, members in GROUPS.items():
            group = dist.new_group(members)
            if process not in members:
                continue
            rank = members.index(process)
            found: dict[Any, Any] = {}
            for impl in IMPLS:
                for name, case in CASES.items():
                    image, text, options = share(case, world, rank)
                    values = [x.to(precise_dtype(impl)) for x in (image, text, torch.tensor([case.scale]))]
                    known = tuple(zip(*SIZES[world], strict=True)) if name == "plain" else None  # else the ranks ask each other
                    loss = partial(contrastive_loss, impl=impl, group=group, sizes=known)
                    found[impl, name] = evaluate(loss, *values, **options)
            ranks.PIECE_ROWS = PIECE
            for rows, ids, impl in itertools.product(CLASSES, (False, True), IMPLS):
                image, text, options = class_batch(rows, world, ids)
                own = {name: value.split(rows)[rank] for name, value in options.items()}
                values = [x.split(rows)[rank].to(precise_dtype(impl)) for x in (image, text)]
                values.append(torch.ones(1, dtype=precise_dtype(impl)))
                found[impl, rows, ids] = evaluate(partial(contrastive_loss, impl=impl, group=group), *values, **own)
            ranks.PIECE_ROWS = 1
            rows = gathered_rows(rank).requires_grad_()
            everything = gather_with_gradient(rows, group)
            everything.backward(upstream(rank, world))
            found["gathered"] = everything.detach(), rows.grad
            torch.save(found, folder / f"{world}-{rank}.pt")
    finally:
        dist.destroy_process_group()


def _fork(_: int, folder: Path) -> None:
    torch.multiprocessing.start_processes(_run, (folder,), nprocs=3, start_method="fork")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Any, Any]]]:
    """What each rank of each group found."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_INTERPRET", "1")  # gloo, and so the CPU, also where there is a card
        torch.multiprocessing.spawn(
            _fork, (folder,)
        )  # one process that imports, and no threads yet: three are forked from it
    return {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in SIZES}


@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_ragged_ranks_equal_one_process(
    name: str, impl: str, world: int, found: dict[int, list[dict[Any, Any]]]
) -> None:
    """Averaging each rank's gradient over the ranks gives the gradient of the global loss; the scale's too."""
    case = CASES[name]
    image, text, options = whole_batch(case)
    meant = meaning(image, text, torch.tensor([case.scale]), **options)
    ours = [of_rank[impl, name] for of_rank in found[world]]
    exact, absolute = (1e-8, 1e-10) if impl == "torch" else (2e-5, 1e-6 * case.scale)
    for loss, *_ in ours:
        assert loss.item() == pytest.approx(meant[0].item(), rel=exact)
    for index in (1, 2):
        mean = torch.cat([values[index] for values in ours]).double() / world
        torch.testing.assert_close(mean, meant[index], rtol=exact, atol=absolute)
    ratio = sum(values[3].item() for values in ours) / world / meant[3].item()
    assert ratio == pytest.approx(1.0, rel=exact)  # Inf-CL's is the number of ranks


@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ids", [False, True])
def test_pieces_that_are_not_full_hold_no_negatives(
    ids: bool, impl: str, world: int, found: dict[int, list[dict[Any, Any]]]
) -> None:
    exact, absolute = (1e-10, 1e-12) if impl == "torch" else (2e-5, 1e-6)
    for rows in CLASSES:
        image, text, options = class_batch(rows, world, ids)
        meant = meaning(image, text, torch.tensor([1.0]), **options)
        ours = [of_rank[impl, rows, ids] for of_rank in found[world]]
        for loss, *_ in ours:
            assert loss.item() == pytest.approx(meant[0].item(), rel=exact), rows
        for index in (1, 2):
            mean = torch.cat([values[index] for values in ours]).double() / world
            torch.testing.assert_close(mean, meant[index], rtol=exact, atol=absolute)


@pytest.mark.parametrize("world", SIZES)
def test_gathered_rows_get_the_gradients_of_all_ranks(world: int, found: dict[int, list[dict[Any, Any]]]) -> None:
    rows = torch.cat([gathered_rows(rank) for rank in range(world)])
    gradients = sum(upstream(rank, world) for rank in range(world)).split([rank + 1 for rank in range(world)])
    for rank in range(world):
        gathered, gradient = found[world][rank]["gathered"]
        assert torch.equal(gathered, rows)
        torch.testing.assert_close(gradient, gradients[rank])
