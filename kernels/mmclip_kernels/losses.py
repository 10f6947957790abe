"""open_clip's loss classes on top of `contrastive_loss`: the same constructor, call and gradients after averaging over ranks.

    loss = mmclip_kernels.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size, impl="triton")
    loss(image_features, text_features, logit_scale, output_dict=True)["contrastive_loss"].backward()

Three things differ. Every rank returns the loss of the whole batch: where open_clip's ranks each return their own part, this is
their mean. Ranks may hold different numbers of pairs. With ids, equal reports are no negatives of each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmclip_kernels.contrastive import contrastive_loss
from mmclip_kernels.implementation import Impl
from mmclip_kernels.pairs import Mode
from mmclip_kernels.ranks import Group

_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class _Contrastive(nn.Module):
    """What the two losses share: the ranks of the batch, and the type of the products."""

    mode: Mode

    def __init__(self, cache_labels: bool, rank: int, world_size: int, impl: Impl) -> None:
        super().__init__()
        self.cache_labels, self.rank, self.world_size, self.impl = cache_labels, rank, world_size, impl

    def _loss(
        self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, image_ids: Tensor | None, text_ids: Tensor | None
    ) -> Tensor:
        return contrastive_loss(
            _autocast(image), _autocast(text), scale, bias=bias, image_ids=image_ids, text_ids=text_ids, mode=self.mode,
            impl=self.impl, group=self._group(),
        )  # fmt: skip

    def _group(self) -> Group:
        if self.world_size == 1:
            return None
        if not dist.is_initialized():
            raise ValueError(f"world_size={self.world_size} needs torch.distributed: call init_process_group first")
        found = dist.get_rank(), dist.get_world_size()
        if found != (self.rank, self.world_size):
            given = f"rank={self.rank}, world_size={self.world_size}"
            raise ValueError(f"{given}, but this is rank {found[0]} of {found[1]}: pass those")
        return dist.group.WORLD


class ClipLoss(_Contrastive):
    """`open_clip.ClipLoss`: symmetric InfoNCE of the pairs of all ranks. The N x N matrix is never in memory.

    local_loss, gather_with_grad: how the gradients are scaled. With both, and with gather_with_grad alone, their average over the
      ranks is the gradient of the global loss. With neither, that of the features is 1 / world_size of it, as open_clip's is;
      that of the scale is whole. local_loss alone is refused: open_clip's gradient then lacks the part of the gathered features.
    cache_labels: accepted. There are no labels to keep.
    rank, world_size: of torch.distributed's default group. world_size=1: this process alone, whatever group there is.
    use_horovod: refused. The ranks talk through torch.distributed.
    impl: as in `contrastive_loss`.
    """

    mode: Mode = "softmax"

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0,
        world_size: int = 1, use_horovod: bool = False, *, impl: Impl = "torch",
    ) -> None:  # fmt: skip
        super().__init__(cache_labels, rank, world_size, impl)
        if use_horovod:
            raise ValueError("use_horovod=True is not supported: start the ranks with torch.distributed and leave it False")
        if local_loss and not gather_with_grad and world_size > 1:
            raise ValueError("local_loss=True alone gives no loss's gradient: set gather_with_grad=True too, or local_loss=False")
        self.local_loss, self.gather_with_grad, self.use_horovod = local_loss, gather_with_grad, use_horovod

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None,
        output_dict: bool = False, *, image_ids: Tensor | None = None, text_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """image_features, text_features [N, E], L2-normalised; logit_scale [], the factor itself -> [], or a dict of it.

        logit_bias: a softmax does not see it. Its gradient is 0. image_ids, text_ids [N]: as in `contrastive_loss`.
        """
        if self.world_size > 1 and not self.gather_with_grad:
            image_features, text_features = (
                _ScaledGradient.apply(features, 1 / self.world_size) for features in (image_features, text_features)
            )
        loss = self._loss(image_features, text_features, logit_scale, None, image_ids, text_ids)
        if logit_bias is not None:  # stays in the graph: DDP waits for the gradient of each of its parameters
            loss = loss + 0 * logit_bias.reshape(())
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_Contrastive):
    """`open_clip.SigLipLoss`: the sigmoid loss of the pairs of all ranks (arXiv 2303.15343).

    The average of the gradients over the ranks is the gradient of the global loss, as open_clip's is.
    cache_labels, rank, world_size, impl: as in `ClipLoss`.
    dist_impl: None, "bidir", "shift", "reduce" or "gather": the ways in which open_clip sends texts, all with the same result.
      Here they are sent in pieces, of which one is computed while the next is sent.
    """

    mode: Mode = "sigmoid"

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None, *,
        impl: Impl = "torch",
    ) -> None:  # fmt: skip
        super().__init__(cache_labels, rank, world_size, impl)
        if dist_impl is not None and dist_impl not in _EXCHANGES:
            raise ValueError(f"dist_impl={dist_impl!r} is unknown; leave it None, or use one of {', '.join(_EXCHANGES)}")
        self.dist_impl = dist_impl or _EXCHANGES[0]

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None,
        output_dict: bool = False, *, image_ids: Tensor | None = None, text_ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """image_features, text_features [N, E], L2-normalised; logit_scale [] and logit_bias [] or None -> [], or a dict of it.

        image_ids, text_ids [N]: as in `contrastive_loss`.
        """
        loss = self._loss(image_features, text_features, logit_scale, logit_bias, image_ids, text_ids)
        return {"contrastive_loss": loss} if output_dict else loss


def _autocast(features: Tensor) -> Tensor:
    """The features in the type in which autocast, where it is on, would multiply them: as for a product, float64 stays."""
    kind = features.device.type
    cast = torch.is_autocast_enabled(kind) and features.dtype != torch.float64
    return features.to(torch.get_autocast_dtype(kind)) if cast else features


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] * ctx.factor, None
