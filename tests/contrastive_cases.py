"""Inputs of the contrastive loss and its float64 meaning, for the tests of every implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from mmclip_kernels import reference
from torch import Tensor
from torch.nn.functional import normalize

IMPLS = ("torch", "triton")


def device_of(impl: str) -> str:
    """Where an implementation is tested: Triton on the card, where there is one."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def precise_dtype(impl: str) -> torch.dtype:
    return torch.float64 if impl == "torch" else torch.float32


def features(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def cone(rows: int, width: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features as after training: all within one cone, those of a pair closer to each other than to the rest."""
    axis, pair = features(1, width, seed), features(rows, width, seed + 1)
    image, text = (normalize(2 * axis + pair + 1.5 * features(rows, width, seed + n), dim=1) for n in (2, 3))
    return image.to(dtype), text.to(dtype)


def evaluate(
    loss_of: Callable[..., Tensor], image: Tensor, text: Tensor, scale: Tensor, device: str = "cpu", **options: object
) -> list[Tensor]:
    """The loss, and its gradients by image, text, scale and (if given) bias: on the CPU, in the types they come in."""
    leaves = [leaf.detach().to(device, copy=True).requires_grad_() for leaf in (image, text, scale)]
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    if isinstance(bias := options.get("bias"), Tensor):
        options["bias"] = bias.clone().requires_grad_()
        leaves.append(options["bias"])
    loss = loss_of(*leaves[:3], **options)
    loss.backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [value.cpu() for value in (loss.detach().reshape(()), *gradients)]


def meaning(image: Tensor, text: Tensor, scale: Tensor, **options: object) -> list[Tensor]:
    """`evaluate` of the reference, in float64."""
    if isinstance(bias := options.get("bias"), Tensor):
        options["bias"] = bias.double()
    return evaluate(reference.contrastive_loss, image.double(), text.double(), scale.double(), **options)


def drawn_case(draw: st.DrawFn, dtypes: list[torch.dtype]) -> tuple[Tensor, Tensor, Tensor, dict]:
    """Any shapes, dtype, ids, weights and exclusions -> image, text, scale, keywords."""
    rows, columns, width = draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(st.sampled_from([1, 3, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    image, text = (normalize(some(n, width), dim=1).to(dtype) for n in (rows, columns))
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
