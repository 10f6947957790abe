"""What only the fused kernels can get wrong: tiles, blocks, the branches for far values, rounding, elements not written.

Without a GPU they run in Triton's interpreter; the tests marked `gpu` need one. Tests of every implementation are in
test_contrastive.py.
"""

from concurrent.futures import Executor
from functools import partial

import pytest
import torch
from mmclip_kernels import contrastive_loss, contrastive_triton, reference, tiles
from mmclip_kernels.implementation import implementation
from torch import Tensor

from tests.contrastive_cases import cone, device_of, evaluate, features, meaning

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
DEVICE = device_of("triton")
fused = partial(contrastive_loss, impl="triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest gradient, against float64 on the same inputs. bfloat16 is rounded twice, dL/ds and the result, by 2^-9
# each; Triton 3.9's interpreter cuts dL/ds off instead, by up to 2^-8.
FEATURE_ERROR = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the kernels get holds NaN: an element that they do not write shows."""
    empty = torch.empty

    def filled(*arguments: object, **options: object) -> Tensor:
        made = empty(*arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)


def check(image: Tensor, text: Tensor, scale: float, **options: object) -> list[Tensor]:
    """-> loss and gradients of the kernels, after comparing them with float64."""
    meant = meaning(image, text, torch.tensor([scale]), **options)
    found = evaluate(fused, image, text, torch.tensor([scale]), DEVICE, **options)
    assert [value.shape for value in found] == [value.shape for value in meant]
    for index, (ours, wanted) in enumerate(zip(found, meant, strict=True)):
        size = wanted.abs().max().item() if wanted.numel() else 0.0
        if index == 0:  # a logit of 100 in float32 is known to 4e-6
            tolerance = 1e-6 * max(scale, size)
        else:
            tolerance = FEATURE_ERROR[image.dtype] * size if index in (1, 2) else 1e-5 * max(size, 0.1)
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=tolerance + 1e-7)
    return found


SHAPES = [(1, 1, 1), (2, 2, 48), (63, 63, 123), (70, 130, 48), (130, 70, 1), (128, 128, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_sizes_that_divide_no_tile(shape: tuple[int, int, int], mode: str, dtype: torch.dtype) -> None:
    rows, columns, width = shape
    generator = torch.Generator().manual_seed(rows)
    ids = {
        "image_ids": torch.randint(-1, 40, (rows,), generator=generator),
        "text_ids": torch.randint(-1, 40, (columns,), generator=generator),
    }
    image, text = features(rows, width, 0, dtype), features(columns, width, 1, dtype)
    check(image, text, 20.0, mode=mode, **ids)
    if rows == columns:
        check(image, text, 20.0, mode=mode)


def test_more_tiles_than_are_computed_side_by_side() -> None:
    """Programs go through the tiles in groups of eight tile rows: here there is a second group, of one row."""
    rows, columns = 8 * 64 + 1, 65
    ids = {"image_ids": torch.arange(rows), "text_ids": torch.arange(rows - columns, rows)}
    check(features(rows, 8, 0, torch.float32), features(columns, 8, 1, torch.float32), 10.0, **ids)


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
@pytest.mark.parametrize("excluded", [None, (80, 100), (1, 100), (80, 1)])
def test_several_blocks(mode: str, excluded: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and tiles (64 x 64) divide neither each other nor the batch."""
    monkeypatch.setattr(tiles, "SWEEP_BLOCK", (70, 40))
    monkeypatch.setattr(tiles, "GRADIENT_BLOCK", (40, 140))  # 70 columns in float32
    generator = torch.Generator().manual_seed(0)
    options: dict = {
        "image_ids": torch.randint(-1, 40, (80,), generator=generator),
        "text_ids": torch.randint(-1, 40, (100,), generator=generator),
        "row_weight": torch.rand(80, generator=generator), "col_weight": torch.rand(100, generator=generator),
    }  # fmt: skip
    if excluded is not None:
        options["exclude"] = torch.rand(excluded, generator=generator) > 0.7
    if mode == "sigmoid":
        options["bias"] = torch.tensor([-4.0])
    check(features(80, 24, 0, torch.float32), features(100, 24, 1, torch.float32), 10.0, mode=mode, **options)


@pytest.mark.parametrize("rows_step", [1, 3])
def test_exclusions_of_any_strides(rows_step: int) -> None:
    exclude = (torch.rand(70 * rows_step, 66, generator=torch.Generator().manual_seed(0)) > 0.5)[::rows_step]
    exclude.fill_diagonal_(False)
    image = features(66, 8, 0, torch.float32)
    check(image, features(66, 8, 1, torch.float32), 10.0, exclude=exclude[:66])
    check(image, features(66, 8, 1, torch.float32), 10.0, exclude=exclude[:66].T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_errors_are_no_larger_than_eager_pytorchs(scale: float, dtype: torch.dtype) -> None:
    """On features as after training, where eager two-byte logits ruin the loss and its gradients."""
    image, text = cone(130, 64, 0, dtype)
    meant = meaning(image, text, torch.tensor(scale))
    eager = evaluate(reference.contrastive_loss, image, text, torch.tensor(scale, dtype=dtype))
    found = check(image, text, scale)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 3e-4}[dtype]
    for index, (ours, theirs, wanted) in enumerate(zip(found, eager, meant, strict=True)):
        size = wanted.norm()
        allowed = tolerance if index in (1, 2) else 2e-6
        assert (ours - wanted).norm() <= (theirs - wanted).norm() + allowed * size


def far_apart() -> tuple[Tensor, Tensor]:
    """Features whose logits lie between -scale and scale. Row 1 is far below the others."""
    image, text = torch.zeros(4, 2), torch.zeros(4, 2)
    image[:, 0], text[:, 0] = torch.tensor([1.0, -1.0, 0.9, 0.8]), torch.tensor([1.0, 1.0, 0.95, 1.0])
    return image, text


@pytest.mark.parametrize("limit", ["FAINT", "SPREAD"])
def test_rows_far_below_their_tile(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = far_apart()
    check(image, text, 100.0)
    check(text, image, 100.0)
    if not contrastive_triton.INTERPRETED:
        return
    # Without its branch the result is wrong: the test does need the branch.
    value = 0.0 if limit == "FAINT" else float("inf")
    monkeypatch.setattr(contrastive_triton, limit, contrastive_triton.tl.constexpr(value))
    with pytest.raises(AssertionError):
        check(image, text, 100.0)


@pytest.mark.parametrize("turned", [False, True])
def test_a_row_or_column_far_below_a_whole_tile(turned: bool) -> None:
    """No row is past the end here, so only the far row's or column's own sum can ask for the branch."""
    image, text = cone(64, 8, 0, torch.float32)
    text[5] = -image.mean(0) / image.mean(0).norm()
    check(*((text, image) if turned else (image, text)), 100.0)


@pytest.mark.parametrize("turned", [False, True])
def test_positives_at_the_edge_of_a_tiles_ids(turned: bool) -> None:
    """Of 64 images and two tiles of 64 texts: the highest place of the rows is the lowest of a tile's columns, where the only
    positive is; or, turned, the lowest of the rows is the highest of the columns."""
    image_ids, text_ids = torch.arange(64) + (63 if turned else 1), torch.arange(128)
    image, text = cone(128, 8, 0, torch.float32)
    loss, image_grad, *_ = check(image[:64], text, 10.0, image_ids=image_ids, text_ids=text_ids)
    assert loss > 0.1 and image_grad.abs().max() > 0.05


def test_rows_left_out_keep_the_common_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log-sum-exp of -inf would send its whole tile to the slow branch; most tiles of a batch with unpaired images hold one."""
    seen: list[Tensor] = []
    gradient = contrastive_triton.gradient

    def spy(*arguments: object) -> object:
        seen.extend(arguments[4:6])
        return gradient(*arguments)

    monkeypatch.setattr(contrastive_triton, "gradient", spy)
    ids = torch.tensor([0, -1, 1, 2])
    image, text = cone(4, 8, 0, torch.float32)
    check(image, text, 10.0, image_ids=ids, text_ids=ids.roll(1))
    row_lse, column_lse = (lse.cpu() for lse in seen)
    assert (row_lse.isposinf() == (ids < 0)).all() and (column_lse.isposinf() == (ids.roll(1) < 0)).all()
    assert not row_lse.isneginf().any()


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_the_common_path_needs_no_second_exponential(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles of trained features: the branches for far values are not taken, and not needed."""
    image, text = cone(128, 32, 0, torch.float32)
    expected = check(image, text, scale)
    if contrastive_triton.INTERPRETED and scale < 100:
        monkeypatch.setattr(contrastive_triton, "FAINT", contrastive_triton.tl.constexpr(0.0))
        monkeypatch.setattr(contrastive_triton, "SPREAD", contrastive_triton.tl.constexpr(float("inf")))
        torch.testing.assert_close(check(image, text, scale), expected, rtol=0, atol=0)


def test_a_tile_that_is_tried_is_used_in_both_passes_and_no_longer_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 alone, on any architecture: backward passes of a card run in another thread."""
    sweep, gradient = tiles.Tile(16, 32, 16, 4, 2), tiles.Tile(32, 16, 16, 4, 2)
    seen = []
    options = contrastive_triton._options
    monkeypatch.setattr(contrastive_triton, "_options", lambda tile, *rest: seen.append(tile) or options(tile, *rest))
    monkeypatch.setitem(tiles.BY_ARCHITECTURE, 0, {"sweep": tiles.Tile(64, 16, 16, 4, 2)})
    image, text = cone(40, 16, 0, torch.bfloat16)
    with tiles.trying("sweep", sweep), tiles.trying("gradient", gradient):
        check(image, text, 10.0)
        check(image.float(), text.float(), 10.0)
    check(image, text, 10.0)
    assert seen == [
        sweep, gradient, tiles.FLOAT32, tiles.FLOAT32, tiles.Tile(64, 16, 16, 4, 2), tiles.USUAL["gradient"]
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SWEEP_BLOCK", (128, 128))
    image, text = cone(140, 48, 0, dtype)
    once, again = (evaluate(fused, image, text, torch.tensor(50.0), DEVICE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_scale_and_image_gradients_agree() -> None:
    """The logits depend on scale and image through their product alone."""
    image, text = cone(140, 32, 0, torch.float32)
    _, image_grad, text_grad, scale_grad = evaluate(fused, image, text, torch.tensor(40.0), DEVICE)
    assert (image * image_grad).sum().item() == pytest.approx(40.0 * scale_grad.item(), rel=1e-4, abs=1e-6)
    assert (text * text_grad).sum().item() == pytest.approx(40.0 * scale_grad.item(), rel=1e-4, abs=1e-6)


def test_non_contiguous_input() -> None:
    wide, tall = features(70, 48, 0, torch.float32), features(24, 70, 1, torch.float32)
    found = evaluate(lambda i, t, s: fused(i[:, ::2], t.T, s), wide, tall, torch.tensor(5.0), DEVICE)
    meant = evaluate(
        lambda i, t, s: reference.contrastive_loss(i[:, ::2], t.T, s), wide.double(), tall.double(), torch.tensor(5.0).double()
    )
    for ours, wanted in zip(found, meant, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_inputs_without_gradient(only: int) -> None:
    given_ones = [x.to(DEVICE) for x in (*cone(20, 8, 0, torch.float32), torch.tensor(9.0))]
    wanted = evaluate(fused, *given_ones, DEVICE)
    given_ones[only].requires_grad_()
    fused(*given_ones).backward()
    torch.testing.assert_close(given_ones[only].grad.cpu(), wanted[1 + only], rtol=0, atol=0)
    assert all(x.grad is None for index, x in enumerate(given_ones) if index != only)


def test_a_loss_scaled_for_float16_keeps_small_gradients() -> None:
    """dL/ds is stored relative to its largest possible value: unscaled, all of it would be below float16's least number."""
    image, text = cone(64, 16, 0, torch.float16)
    small = evaluate(lambda *x: 2.0**-12 * fused(*x, row_weight=torch.full((64,), 1e-6, device=DEVICE)), image, text,
                     torch.tensor(10.0), DEVICE)  # fmt: skip
    usual = evaluate(fused, image, text, torch.tensor(10.0), DEVICE)
    assert small[3].item() == pytest.approx(usual[3].item() / 4096, rel=1e-5)
    torch.testing.assert_close(4096 * small[1].float(), usual[1].float(), rtol=0.02, atol=4096 * 2.0**-24)


def _refusal() -> str:
    try:
        contrastive_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(()), impl="triton")
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.slow
def test_cpu_tensors_without_the_interpreter_are_refused(compiler: Executor) -> None:
    assert compiler.submit(_refusal).result() == "impl='triton' needs CUDA tensors, found cpu; use impl='torch' there"


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_addresses_and_descriptors_give_the_same_bits(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards before sm_90 copy features by address, and all do in float32."""
    image, text = features(130, 72, 0, dtype), features(70, 72, 1, dtype)
    options = {"mode": mode, "image_ids": torch.arange(130), "text_ids": torch.arange(70)}
    described = check(image, text, 20.0, **options)
    monkeypatch.setattr(contrastive_triton, "_described", lambda dtype: False)
    by_address = check(image, text, 20.0, **options)
    for one, other in zip(described, by_address, strict=True):
        assert torch.equal(one, other)


def test_features_at_an_odd_address() -> None:
    """A descriptor's begin is a multiple of 16 bytes; a view may begin anywhere."""
    image, text = (features(40, 64, seed, torch.bfloat16) for seed in (0, 1))
    shifted = torch.empty(40 * 64 + 1, dtype=torch.bfloat16)[1:].view(40, 64).copy_(image)
    assert shifted.data_ptr() % 16 and shifted.is_contiguous()
    scale = torch.tensor(20.0)
    assert torch.equal(fused(shifted.to(DEVICE), text.to(DEVICE), scale), fused(image.to(DEVICE), text.to(DEVICE), scale))


@pytest.mark.parametrize(("triton", "major", "refused"), [("3.7.1", 10, True), ("3.8.0", 10, False), ("3.6.0", 9, False)])
def test_a_compiler_that_fails_on_a_card_is_refused(
    triton: str, major: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive_triton, "INTERPRETED", False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr("importlib.metadata.version", lambda name: triton)
    if refused:
        with pytest.raises(ValueError, match=r"needs Triton 3\.8 or newer on this card, found 3\.7\.1"):
            implementation("contrastive", "triton", torch.device("cuda"))
    else:
        assert implementation("contrastive", "triton", torch.device("cuda")) is contrastive_triton


# -- On a card ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [512, 768, 1000])
@pytest.mark.parametrize("rows", [1000, 32771])
def test_large_sizes_on_a_card(rows: int, width: int, dtype: torch.dtype) -> None:
    """Against the blocks of impl="torch" in float64, which test_contrastive.py holds to the reference."""
    image, text = (x.cuda() for x in cone(rows, width, 0, dtype))
    scale = torch.tensor(100.0)
    meant = evaluate(contrastive_loss, image.double(), text.double(), scale.double(), "cuda")
    found = evaluate(fused, image, text, scale, "cuda")
    assert found[0].item() == pytest.approx(meant[0].item(), rel=1e-5, abs=1e-5)
    assert found[3].item() == pytest.approx(meant[3].item(), rel=1e-4)
    for ours, wanted in zip(found[1:3], meant[1:3], strict=True):
        assert (ours - wanted).norm() <= {torch.float32: 1e-4, torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype] * wanted.norm()


@pytest.mark.gpu
def test_memory_is_bounded_on_a_card() -> None:
    """At most 128 MiB and the features' gradients in float32, before they are handed back in the features' type."""
    rows, width = 65536, 512
    image, text = (x.cuda().requires_grad_() for x in cone(rows, width, 0, torch.bfloat16))
    scale = torch.tensor(50.0, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused(image, text, scale).backward()
    handed_back = 2 * rows * width * image.element_size()
    assert torch.cuda.max_memory_allocated() - before - handed_back <= 128 * 2**20 + 4 * 2 * rows * width


@pytest.mark.gpu
def test_compiles_into_one_graph_on_a_card() -> None:
    given_ones = (*cone(300, 64, 0, torch.bfloat16), torch.tensor(3.0))

    def step(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return fused(image, text, scale.exp()) * 2

    eager, compiled = (evaluate(f, *given_ones, "cuda") for f in (step, torch.compile(step, fullgraph=True)))
    torch.testing.assert_close(compiled, eager)
