"""Attention-guided masking of image patches: score, select and copy in one operation.

With words w_i [T, E] and patches p_j [P, E], both L2-normalised here, the score of a patch is

    s_j = sum over the words i that count of softmax over j of (<w_i, p_j> / temperature)           (MedIM)

or, for a text of one vector w, <w, p_j>: the softmax would not change the ranking. The M patches of highest score are *chosen*,
as by a stable descending sort (among equal scores the lower index first). Masking hides the chosen patches and keeps the
K = P - M others. The two views of `attention_split_views` are the chosen patches, and a part of the rest.

`ids_restore` [B, P] holds the place of each patch: kept patches first, in ascending order, then the others. The backward pass
gathers through it, so no gradient is added atomically and no buffer is filled with zeros first.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from mmclip_kernels import topk_mask_torch
from mmclip_kernels.implementation import Impl, implementation
from mmclip_kernels.patches import Plan

Mode = Literal["gather", "replace"]
Select = Literal["high", "low", "hint"]


class TopkMask(NamedTuple):
    """Result of `attention_topk_mask`.

    visible: the kept patches [B, K, D] (mode "gather"), or all patches [B, P, D] with the mask token in place of the hidden ones
    (mode "replace"; `masked` is the same tensor). ids_keep [B, K] int64, ascending. ids_restore [B, P] int64: the place of each
    patch among the kept ones followed by the hidden ones (MAE's convention). mask [B, P] bool, True: hidden. scores [B, P]
    float32 (float64 for float64 patches).
    """

    visible: Tensor
    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor
    scores: Tensor

    @property
    def masked(self) -> Tensor:
        return self.visible


class SplitViews(NamedTuple):
    """Result of `attention_split_views`.

    salient [B, S, D], context [B, C, D]: disjoint views. ids_salient [B, S], ids_context [B, C]: int64, ascending.
    mask [B, P] bool, True: not in the context view, to be rebuilt from it. scores [B, P] float32 (float64 for float64 patches).
    """

    salient: Tensor
    context: Tensor
    ids_salient: Tensor
    ids_context: Tensor
    mask: Tensor
    scores: Tensor


def attention_topk_mask(
    patches: Tensor,
    text: Tensor | None = None,
    token_mask: Tensor | None = None,
    *,
    keep: int | None = None,
    ratio: float | None = None,
    mode: Mode = "gather",
    select: Select = "high",
    hint: float = 0.1,
    scores: Tensor | None = None,
    score_features: Tensor | None = None,
    mask_token: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
    temperature: float = 0.1,
    impl: Impl = "torch",
) -> TopkMask:
    """Hide the patches [B, P, D] that respond most to the text, and keep K of them.

    keep: K. Or ratio: the share of patches that is hidden, P - K = round(ratio P).
    text [B, D] or [B, T, D]: patches are scored against it. token_mask [B, T] bool, True: the token counts. A row without a token
      that counts has scores of 0 and is masked at random. Instead of text: scores [B, P], computed beforehand, any floating type.
    score_features [B, P, E]: compared with the text instead of the patches themselves; text is then [B, E] or [B, T, E].
    mode: "gather" returns the kept patches. "replace" returns all patches, with mask_token (D numbers) for the hidden ones.
    select: "high" hides the patches of highest score, "low" those of lowest. "hint" is "high", but a share `hint` of the hidden
      patches becomes visible and as many others are hidden (AttMask). Among equal scores the lower index is hidden first. NaN
      ranks highest.
    noise [B, P] float32, in [0, 1): decides all random choices. By default a function of seed, row and patch alone.
    impl: "torch" runs on any device. "triton" is fused and needs CUDA tensors.

    Gradients flow to patches and mask_token, not to scores. A row whose scores hold NaN (features that are not finite) is
    returned as NaN. ValueError for arguments that do not fit.
    """
    _check(patches, text, token_mask, scores, score_features, noise, temperature, impl)
    rows, count, _ = patches.shape
    kept = _kept(count, keep, ratio)
    if mode not in ("gather", "replace"):
        raise ValueError(f"mode={mode!r} is unknown; use 'gather' or 'replace'")
    if select not in ("high", "low", "hint"):
        raise ValueError(f"select={select!r} is unknown; use 'high', 'low' or 'hint'")
    swap = _swapped(hint, kept, count) if select == "hint" else 0
    token = _token(mask_token, patches) if mode == "replace" else None
    if mode == "gather" and mask_token is not None:
        raise ValueError("mask_token belongs to mode='replace'; mode='gather' does not see it")
    if noise is None and (swap or token_mask is not None):
        noise = seeded_noise(rows, count, seed, patches.device)
    plan = Plan(count - kept, swap, kept, 0, False, select == "low", temperature)
    visible, _, restore, ids, found = topk_mask_op(
        patches, token, score_features, text, token_mask, scores, noise, *plan, impl
    )
    return TopkMask(visible, ids, restore, restore >= kept, found)


def attention_split_views(
    patches: Tensor,
    text: Tensor | None = None,
    token_mask: Tensor | None = None,
    *,
    salient: int,
    context: int,
    hint: float = 0.0,
    scores: Tensor | None = None,
    score_features: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
    temperature: float = 0.1,
    impl: Impl = "torch",
) -> SplitViews:
    """Two disjoint views of patches [B, P, D] in one pass: the `salient` patches of highest score, and `context` of the rest.

    The context view is drawn without replacement: it holds the patches of lowest noise among the rest. A share `hint` of the
    salient patches changes places with others. All else as in `attention_topk_mask`.
    """
    _check(patches, text, token_mask, scores, score_features, noise, temperature, impl)
    rows, count, _ = patches.shape
    if salient < 0 or context < 0 or salient + context > count:
        raise ValueError(f"salient={salient} and context={context} must share the {count} patches between them")
    swap = _swapped(hint, salient, count)
    if noise is None and (swap or salient + context < count or token_mask is not None):
        noise = seeded_noise(rows, count, seed, patches.device)
    plan = Plan(salient, swap, salient, context, True, False, temperature)
    first, second, restore, ids, found = topk_mask_op(
        patches, None, score_features, text, token_mask, scores, noise, *plan, impl
    )
    outside = (restore < salient) | (restore >= salient + context)
    return SplitViews(first, second, ids[:, :salient], ids[:, salient:], outside, found)


@torch.no_grad()
def attention_scores(
    patches: Tensor, text: Tensor, token_mask: Tensor | None = None, *, temperature: float = 0.1
) -> Tensor:
    """Only the scores of `attention_topk_mask`: patches [B, P, E], text [B, E] or [B, T, E], token_mask [B, T] -> [B, P].

    float32 (float64 for float64 patches). All 0 for a row without a token that counts. No gradient. In PyTorch, on any device.
    """
    _check_text(patches, text, token_mask, (len(patches), patches.shape[1]), temperature)
    return topk_mask_torch.patch_scores(patches, text, token_mask, temperature)


def seeded_noise(rows: int, patches: int, seed: int, device: torch.device) -> Tensor:
    """[rows, patches] float32 in [0, 1): a function of seed, row and patch alone, the same on every device."""
    # The finaliser of SplitMix64 (Steele et al. 2014) in wrapping int64. `>>` is arithmetic, so the copied sign bits are masked.
    start = (seed + 1) * 0x9E3779B97F4A7C15 % (1 << 64) - (1 << 63)
    x = torch.arange(rows * patches, dtype=torch.int64, device=device) + start
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return ((x >> 40) & 0xFFFFFF).to(torch.float32).div(1 << 24).view(rows, patches)


# -- Checks -------------------------------------------------------------------------------------------------------------


def _check(
    patches: Tensor, text: Tensor | None, token_mask: Tensor | None, scores: Tensor | None, score_features: Tensor | None,
    noise: Tensor | None, temperature: float, impl: str,
) -> None:  # fmt: skip
    if patches.ndim != 3 or not patches.is_floating_point():
        raise ValueError(f"patches must be floats [B, P, D], found {patches.dtype} {list(patches.shape)}")
    if impl == "triton" and patches.dtype == torch.float64:
        raise ValueError("impl='triton' takes float32, bfloat16 and float16; use impl='torch' for float64")
    rows, count, _ = patches.shape
    if (text is None) == (scores is None):
        raise ValueError("pass either text, to score the patches against, or scores computed beforehand")
    if text is None and (token_mask is not None or score_features is not None):
        raise ValueError("token_mask and score_features belong to text; with scores leave them out")
    if scores is not None and (scores.shape != (rows, count) or not scores.is_floating_point()):
        raise ValueError(f"scores must be floats [{rows}, {count}], found {scores.dtype} {list(scores.shape)}")
    if noise is not None and (noise.shape != (rows, count) or noise.dtype != torch.float32):
        raise ValueError(f"noise must be float32 [{rows}, {count}], found {noise.dtype} {list(noise.shape)}")
    if text is not None:
        _check_text(patches if score_features is None else score_features, text, token_mask, (rows, count), temperature)
    tensors = [t for t in (patches, text, token_mask, scores, score_features, noise) if t is not None]
    if len({t.device for t in tensors}) > 1:
        raise ValueError(f"all tensors must be on one device, found {sorted({str(t.device) for t in tensors})}")


def _check_text(
    compared: Tensor, text: Tensor, token_mask: Tensor | None, size: tuple[int, int], temperature: float
) -> None:
    if compared.ndim != 3 or compared.shape[:2] != size:
        raise ValueError(f"score_features must be [{size[0]}, {size[1]}, E], found {list(compared.shape)}")
    rows, _, width = compared.shape
    if text.ndim not in (2, 3) or len(text) != rows or text.shape[-1] != width:
        raise ValueError(f"text must be [{rows}, {width}] or [{rows}, T, {width}], found {list(text.shape)}")
    if text.ndim == 3 and text.shape[1] == 0:
        raise ValueError("text [B, T, D] has no tokens, T = 0; pass one padded token with a token_mask of False")
    if text.dtype != compared.dtype:
        raise ValueError(f"text and patches must share a dtype, found {text.dtype} and {compared.dtype}; cast one")
    if token_mask is not None and (token_mask.shape != text.shape[:-1] or text.ndim == 2):
        raise ValueError(f"token_mask must be [B, T] for text [B, T, D], found {list(token_mask.shape)}")
    if token_mask is not None and token_mask.dtype != torch.bool:
        raise ValueError(f"token_mask must be bool (True: the token counts), found {token_mask.dtype}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")


def _kept(count: int, keep: int | None, ratio: float | None) -> int:
    if (keep is None) == (ratio is None):
        raise ValueError("pass either keep, the number of visible patches, or ratio, the share of hidden ones")
    if ratio is not None:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio={ratio} must lie between 0 and 1; keep={count} hides nothing")
        return count - round(ratio * count)
    assert keep is not None
    if not 0 <= keep <= count:
        raise ValueError(f"keep={keep} visible patches, but there are {count}; use 0 <= keep <= {count}")
    return keep


def _swapped(hint: float, chosen: int, count: int) -> int:
    if not 0 <= hint < 1:
        raise ValueError(f"hint={hint} must be at least 0 and below 1")
    return round(hint * min(chosen, count - chosen))


def _token(mask_token: Tensor | None, patches: Tensor) -> Tensor:
    width = patches.shape[2]
    if mask_token is None or mask_token.numel() != width:
        found = "none" if mask_token is None else f"shape {list(mask_token.shape)}"
        raise ValueError(f"mode='replace' needs a mask_token of {width} numbers, found {found}")
    if mask_token.dtype != patches.dtype or mask_token.device != patches.device:
        raise ValueError(
            f"mask_token must be {patches.dtype} on {patches.device} as patches are, "
            f"found {mask_token.dtype} on {mask_token.device}"
        )
    return mask_token.reshape(width)


# -- Autograd: one custom operator forward, one backward ------------------------------------------------------------------


@torch.library.custom_op("mmclip::attention_topk_mask", mutates_args=())
def topk_mask_op(
    patches: Tensor, token: Tensor | None, features: Tensor | None, text: Tensor | None, token_mask: Tensor | None,
    scores: Tensor | None, noise: Tensor | None,
    chosen: int, swap: int, first: int, second: int, chosen_first: bool, low: bool, temperature: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the first view (all patches, if there is a token), the second view, ids_restore, ids of both views, scores."""
    plan = Plan(chosen, swap, first, second, chosen_first, low, temperature)
    forward = implementation("topk_mask", impl, patches.device).forward
    return cast(
        tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        forward(patches, token, features, text, token_mask, scores, noise, plan),
    )


@topk_mask_op.register_fake
def _(
    patches: Tensor, token: Tensor | None, features: Tensor | None, text: Tensor | None, token_mask: Tensor | None,
    scores: Tensor | None, noise: Tensor | None, chosen: int, swap: int, first: int, second: int, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, count, width = patches.shape
    precise = torch.promote_types(torch.float32, patches.dtype)
    return (
        patches.new_empty(rows, first if token is None else count, width), patches.new_empty(rows, second, width),
        patches.new_empty(rows, count, dtype=torch.int64), patches.new_empty(rows, first + second, dtype=torch.int64),
        patches.new_empty(rows, count, dtype=precise),
    )  # fmt: skip


@torch.library.custom_op("mmclip::attention_topk_mask_backward", mutates_args=())
def topk_mask_backward_op(
    of_first: Tensor, of_second: Tensor, restore: Tensor, first: int, second: int, replace: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """-> gradients of the patches [B, P, D] and of the mask token [D] (0 if there is no token)."""
    backward = implementation("topk_mask", impl, of_first.device).backward
    return cast(tuple[Tensor, Tensor], backward(of_first, of_second, restore, first, second, replace))


@topk_mask_backward_op.register_fake
def _(of_first: Tensor, of_second: Tensor, restore: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    width = of_first.shape[2]
    return of_first.new_empty(*restore.shape, width), of_first.new_empty(width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.options = inputs[9], inputs[10], inputs[1] is not None, inputs[14]
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx: Any, of_first: Tensor, of_second: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    of_patches, of_token = topk_mask_backward_op(of_first, of_second, *ctx.saved_tensors, *ctx.options)
    return of_patches, of_token if ctx.options[2] else None, *[None] * 13


topk_mask_op.register_autograd(_differentiate, setup_context=_save)
