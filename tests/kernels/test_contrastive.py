"""The contrastive loss of every implementation against its float64 meaning, in one process. Several ranks: test_ranks.py."""

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmclip_kernels import contrastive_loss, contrastive_torch, reference
from mmclip_kernels.contrastive import contrastive_op
from mmclip_kernels.pairs import Pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.contrastive_cases import IMPLS, cone, device_of, drawn_case, evaluate, features, meaning, precise_dtype

# Triton's interpreter computes in NumPy, which warns of what is meant: exp of a pair that takes no part, a NaN that is passed on.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
every_impl = pytest.mark.parametrize("impl", IMPLS)
EVERY_DTYPE = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

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
    given_ones = features(rows, 9, 0), features(columns, 9, 1), torch.tensor([factor], dtype=torch.float64)
    ours, meant = evaluate(contrastive_loss, *given_ones, **ids), meaning(*given_ones, **ids)
    for found, wanted in zip(ours, meant, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    if case != "no positive":
        assert ours[1].abs().sum() > 0 or rows == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [0.3, 3.0])
def test_logits_near_each_other_and_far_apart(angle: float, dtype: torch.dtype) -> None:
    """One exponential for both directions loses nothing: texts turn away from all images, the last one to a logit of -99."""
    turn = torch.linspace(0, angle, 6, dtype=torch.float64)
    image = torch.nn.functional.normalize(torch.stack([torch.ones(6).double(), turn / 60], dim=1), dim=1)
    text = torch.stack([turn.cos(), turn.sin()], dim=1)
    given_ones = image.to(dtype), text.to(dtype), torch.tensor(100.0, dtype=dtype)
    for found, wanted in zip(evaluate(contrastive_loss, *given_ones), meaning(*given_ones), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5 if dtype == torch.float32 else 1e-10, atol=1e-6)


def test_a_block_without_positives_compares_no_ids(monkeypatch) -> None:
    """And none has a mask of what is left out, where nothing is; near logits cost one exponential a block in each direction."""
    monkeypatch.setattr(contrastive_torch, "BLOCK", (4, 4))
    image, text = cone(16, 8, 0, torch.float32)
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            counts[str(function).removeprefix("aten.").split(".")[0]] += getattr(result, "shape", None) == (4, 4)
            return result

    def sweeps(ids: torch.Tensor) -> Counter[str]:
        counts.clear()
        one, zero = torch.ones(()), torch.zeros(())
        each = torch.full((16,), 1 / 16)
        pairs = Pairs(ids, torch.arange(16, dtype=torch.int32), True, None, 9 * one, zero, each, each, each, each)
        with Count():
            part = contrastive_torch.sweep(image, text, pairs, "softmax")
            lse = [sums.peak + sums.total.log() for sums in (part.rows, part.columns)]
            contrastive_torch.gradient(image, text, pairs, "softmax", *lse)
        return counts

    diagonal = sweeps(torch.arange(16, dtype=torch.int32))
    assert diagonal["mm"] == 32 and diagonal["exp_"] == 32  # 16 blocks, forward and backward
    assert diagonal["eq"] == 8 and diagonal["masked_fill_"] == 0
    assert sweeps((torch.arange(16) * 5 % 16).int())["eq"] == 32


def test_gradcheck() -> None:
    ids = torch.tensor([0, 1, 1, 2, -1])
    image, text = features(5, 4, 0).requires_grad_(), features(5, 4, 1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda i, t, s: contrastive_loss(i, t, s, image_ids=ids, text_ids=ids), (image, text, scale)
    )


def check_any_case(data: st.DataObject, impl: str, dtypes: list[torch.dtype]) -> None:
    image, text, scale, options = drawn_case(data.draw, dtypes)
    meant = meaning(image, text, scale, **options)
    found = evaluate(partial(contrastive_loss, impl=impl), image, text, scale, device_of(impl), **options)
    # The features' gradients come back in the features' own type; all else is computed in float32 at least.
    rounding = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[image.dtype]
    for index, (wanted, ours) in enumerate(zip(meant, found, strict=True)):
        tolerance = rounding if index in (1, 2) else min(rounding, 2e-5)
        size = max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0, scale.item() if index == 0 else 0.0)
        torch.testing.assert_close(ours.double(), wanted.double(), rtol=0, atol=tolerance * size)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.data())
def test_any_case_equals_its_meaning(data: st.DataObject) -> None:
    check_any_case(data, "torch", EVERY_DTYPE)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)  # test_contrastive_triton.py has a grid of the same
@given(st.data())
def test_any_case_equals_its_meaning_in_triton(data: st.DataObject) -> None:
    check_any_case(data, "triton", EVERY_DTYPE[1:])


@every_impl
def test_directions_are_the_two_halves(impl: str) -> None:
    given_ones = features(5, 4, 0), features(5, 4, 1), torch.tensor(9.0, dtype=torch.float64)
    wanted = reference.contrastive_loss(*given_ones, directions=True)
    dtype = precise_dtype(impl)
    ours = partial(contrastive_loss, *(x.to(device_of(impl), dtype) for x in given_ones), impl=impl)
    halves = ours(directions=True)
    torch.testing.assert_close(halves.cpu(), wanted.to(dtype))
    assert halves.mean() == ours()


@every_impl
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_operators_keep_their_contract(mode: str, impl: str) -> None:
    device, dtype = device_of(impl), precise_dtype(impl)
    ids = torch.tensor([0, 1, 1, -1], device=device)
    given_ones = features(4, 3, 0), features(4, 3, 1), torch.tensor(3.0)
    leaves = [x.to(device, dtype).requires_grad_() for x in given_ones]
    bias = torch.zeros((), dtype=dtype, device=device)
    arguments = (*leaves, bias, ids, ids, None, None, None, False, mode, impl)
    torch.library.opcheck(contrastive_op, arguments)
    losses, *log_sums = contrastive_op(*arguments)
    assert losses.requires_grad and not any(value.requires_grad for value in log_sums)


@every_impl
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_compiles_into_one_graph(mode: str, impl: str) -> None:
    def step(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss(image * 2, text, scale.exp(), mode=mode, impl=impl) * 3

    given_ones = features(4, 3, 0, torch.float32), features(4, 3, 1, torch.float32), torch.ones(())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [evaluate(call, *given_ones, device_of(impl)) for call in (step, compiled)]
    torch.testing.assert_close(*results)


def test_no_more_than_a_fifth_of_the_matrix_is_kept() -> None:
    """4,096 x 4,096 logits are 64 MiB. What is kept of the cosines is not computed again; the rest is far below that."""
    image, text = (features(4096, 8, seed, torch.float32).requires_grad_() for seed in (0, 1))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nelement()), t)[1], lambda t: t):
        contrastive_loss(image, text, torch.tensor(10.0)).backward()
    assert sorted(sizes)[-3:] == [4096 * 8, 4096 * 8, 5 * 4096**2 // 32]


def test_what_is_kept_for_the_backward_pass_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of matrices that the share divides, does not divide, and that have blocks of all sizes."""
    for rows, columns in ((2048, 2048), (1600, 2300), (1025, 4099)):
        found = []
        for most in (contrastive_torch.KEPT_MOST, 0):
            monkeypatch.setattr(contrastive_torch, "KEPT_MOST", most)
            inputs = [features(rows, 8, 0, torch.float32), features(columns, 8, 1, torch.float32), torch.tensor(10.0)]
            ids = torch.arange(rows) % 700, torch.arange(columns) % 700
            loss = contrastive_loss(*[value.requires_grad_() for value in inputs], image_ids=ids[0], text_ids=ids[1])
            found.append([loss, *torch.autograd.grad(loss, inputs)])
        monkeypatch.undo()
        assert contrastive_torch.kept_size(rows, columns, torch.device("cpu")) >= 512 * 1024
        assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


def test_what_is_kept_has_a_bound() -> None:
    assert contrastive_torch.kept_size(1 << 20, 1 << 20, torch.device("cpu")) == 1 << 24  # 64 MiB
    assert contrastive_torch.kept_size(1 << 20, 1 << 20, torch.device("cuda")) == 0


@every_impl
def test_rows_that_take_no_part_may_hold_anything(impl: str) -> None:
    image, text, ids = features(4, 8, 0, torch.float32), features(4, 8, 1, torch.float32), torch.tensor([0, -1, 1, 2])
    image[1] = torch.nan
    loss_of = partial(contrastive_loss, impl=impl, image_ids=ids.to(device_of(impl)), text_ids=ids.to(device_of(impl)))
    loss, image_grad, *_ = evaluate(loss_of, image, text, torch.tensor(10.0), device_of(impl))
    assert loss.isfinite() and image_grad.isfinite().all() and (image_grad[1] == 0).all()


@every_impl
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_bad_feature_gives_a_finite_number(mode: str, bad: float, impl: str) -> None:
    # Row 0 has no positive, and all its logits are -inf or +inf: no sum would show it.
    image, text = torch.ones(3, 2), torch.ones(3, 2)
    image[0, 0] = bad
    ids = {"image_ids": torch.tensor([7, 1, 2]), "text_ids": torch.tensor([0, 1, 2])}
    loss_of = partial(contrastive_loss, impl=impl, mode=mode)
    loss, _, text_grad, _ = evaluate(loss_of, image, text, torch.tensor(10.0), device_of(impl), **ids)
    assert loss.isnan() and text_grad.isnan().all()


@every_impl
def test_a_learned_sigmoid_keeps_its_small_rest(impl: str) -> None:
    """Each pair costs log(1 + exp(-18)): float32 rounds the sum to 1, and its logarithm to 0."""
    image, bias = torch.eye(4), torch.tensor(-18.0)
    loss_of = partial(contrastive_loss, impl=impl, mode="sigmoid")
    loss, image_grad, *_ = evaluate(loss_of, image, image, torch.tensor(36.0), device_of(impl), bias=bias)
    meant = meaning(image, image, torch.tensor(36.0), mode="sigmoid", bias=bias)
    assert loss.item() == pytest.approx(meant[0].item(), rel=1e-5) and loss > 0
    torch.testing.assert_close(image_grad.double(), meant[1], rtol=1e-5, atol=0)


@every_impl
def test_float32_gradients_do_not_carry_the_rounding_of_log_sum_exps(impl: str) -> None:
    """The reference in float32 holds a log-sum-exp as one number: at a scale of 128, its rounding is most of the error.

    The features have few digits, so that all products and logits are exact: how a processor sums them is another matter.
    """
    image, text = ((features * 2**9).round() / 2**9 for features in cone(192, 256, 0, torch.float32))
    given_ones = image, text, torch.tensor(128.0)
    meant = meaning(*given_ones)
    ours = evaluate(partial(contrastive_loss, impl=impl), *given_ones, device_of(impl))
    rounded = evaluate(reference.contrastive_loss, *given_ones)
    for index in (1, 2):
        errors = [(found[index] - meant[index]).norm().item() for found in (ours, rounded)]
        assert errors[0] < 0.2 * errors[1]


@every_impl
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_all_excluded_is_zero(mode: str, impl: str) -> None:
    given_ones = [x.to(precise_dtype(impl)) for x in (features(3, 4, 0), features(3, 4, 1), torch.tensor(10.0))]
    nothing = torch.full((3,), -1)
    loss_of = partial(contrastive_loss, impl=impl, mode=mode)
    for options in ({"exclude": torch.ones(1, 1, dtype=torch.bool)}, {"image_ids": nothing, "text_ids": nothing}):
        for value in evaluate(loss_of, *given_ones, device_of(impl), **options):
            assert (value == 0).all()


def test_identical_texts_are_not_each_others_negatives() -> None:
    # Two studies with one report each: image 0 and 1 carry the same text, as do 2 and 3.
    image = text = torch.eye(2).repeat_interleave(2, 0)
    ids = torch.tensor([0, 0, 1, 1])
    scale = torch.tensor(50.0)
    grouped = contrastive_loss(image, text, scale, image_ids=ids, text_ids=ids)
    assert grouped.item() == pytest.approx(0.6931472, abs=1e-5)  # log 2: two equal texts share the mass, no more
    crossed = contrastive_loss(image, text, scale, image_ids=torch.tensor([0, 1, 0, 1]), text_ids=ids)
    assert crossed.item() > 20  # a wrong grouping shows


@every_impl
def test_features_with_nan_give_nan(impl: str) -> None:
    image, text = features(4, 8, 0, torch.float32), features(4, 8, 1, torch.float32)
    image[2, 3] = torch.nan
    given_ones = (x.to(device_of(impl)) for x in (image, text, torch.tensor(10.0)))
    assert contrastive_loss(*given_ones, impl=impl).isnan()


@every_impl
@pytest.mark.parametrize(
    ("mode", "scale", "bias"),
    [("softmax", torch.nan, None), ("softmax", torch.inf, None), ("sigmoid", torch.nan, 0.0), ("sigmoid", 1.0, -torch.inf)],
)
def test_a_scale_or_bias_that_is_not_finite_gives_nan(mode: str, scale: float, bias: float | None, impl: str) -> None:
    """An error would be better, but to raise it the host would have to wait for the device."""
    options = {} if bias is None else {"bias": torch.tensor(bias)}
    loss_of = partial(contrastive_loss, impl=impl, mode=mode)
    loss, image_grad, *_ = evaluate(loss_of, torch.eye(4), torch.eye(4), torch.tensor(scale), device_of(impl), **options)
    assert loss.isnan() and image_grad.isnan().all()


@every_impl
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_ids_may_be_any_number_of_64_bits(mode: str, impl: str) -> None:
    least, most = -(2**63), 2**63 - 1
    ids = {
        "image_ids": torch.tensor([least, most, 0, -1, most - 1]), "text_ids": torch.tensor([most, least, most, 0, most - 1]),
    }  # fmt: skip
    given_ones = features(5, 8, 0, torch.float32), features(5, 8, 1, torch.float32), torch.tensor(10.0)
    found = evaluate(partial(contrastive_loss, impl=impl, mode=mode), *given_ones, device_of(impl), **ids)
    for ours, wanted in zip(found, meaning(*given_ones, mode=mode, **ids), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)


@every_impl
def test_a_weight_that_is_nan_gives_nan(impl: str) -> None:
    weights = {"row_weight": torch.tensor([1.0, torch.nan, 1.0, 1.0]), "col_weight": torch.ones(4)}
    given_ones = features(4, 8, 0, torch.float32), features(4, 8, 1, torch.float32), torch.tensor(10.0)
    loss, image_grad, *_ = evaluate(partial(contrastive_loss, impl=impl), *given_ones, device_of(impl), **weights)
    assert loss.isnan() and image_grad.isnan().any()


@every_impl
@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_empty_batch_is_zero(mode: str, impl: str) -> None:
    loss_of, empty = partial(contrastive_loss, impl=impl, mode=mode), torch.zeros(0, 8)
    loss, image_grad, *_ = evaluate(loss_of, empty, empty, torch.tensor(10.0), device_of(impl))
    assert loss == 0 and image_grad.shape == (0, 8)


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
        ({"scale": torch.ones(1, device="meta")}, "on one device"),
        ({"exclude": torch.ones(1, 1, dtype=torch.bool, device="meta")}, "on one device"),
        ({"image": torch.zeros(4, 8).double(), "text": torch.zeros(4, 8).double(), "impl": "triton"}, "for float64"),
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
