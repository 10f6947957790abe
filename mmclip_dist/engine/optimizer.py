"""The optimizer: which parameters share a group, AdamW, LAMB or SGD, and an exponential average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmclip_dist.config import Optim
from mmclip_dist.model.build import Trainable

AVERAGE = "ema"  # name of the average in the optimizer's state, beside exp_avg and exp_avg_sq


# -- Parameter groups -------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, optim: Optim, scales: dict[nn.Parameter, float]) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, single tokens and the temperature do not. One group for each pair of decay and scale.

    scales: `layer_scales`; a parameter that is not in it has scale 1. `lr_scale` of a group multiplies its learning rate.
    LAMB gets a group for every matrix: it needs norms of whole tensors, and ZeRO cuts a group's tensors, laid end to end,
    wherever the ranks' shares end.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for parameter in model.parameters():
        matrix, scale = parameter.squeeze().ndim >= 2, scales.get(parameter, 1.0)
        key = (matrix, scale, id(parameter) if matrix and optim.name == "lamb" else None)
        decay = optim.weight_decay if matrix else 0.0
        group = groups.setdefault(key, {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def layer_scales(model: Trainable, layer_decay: float, encoder_rate: float = 1.0) -> dict[nn.Parameter, float]:
    """Layer-wise decay of the learning rate in the encoders; heads and decoders keep the full rate.

    Of L layers, layer l (from 0) has layer_decay ** (L - l), the embeddings have layer_decay ** (L + 1), the final norm has 1.
    Source: BEiT, MAE. encoder_rate: multiplies all of them.
    """
    scales = {parameter: encoder_rate for encoder in model.encoders for parameter in encoder.parameters()}
    return scales | {
        parameter: encoder_rate * layer_decay ** (len(encoder.layers) + 1 - depth)
        for encoder in model.encoders
        for depth, module in enumerate([encoder.embeddings, *encoder.layers])
        for parameter in module.parameters()
    }


# -- Optimizers -------------------------------------------------------------------------------------------------------


def build_optimizer(groups: list[dict[str, Any]], optim: Optim, *, sharded: bool) -> torch.optim.Optimizer:
    """AdamW, LAMB or SGD with momentum (the first of `optim.betas`). The learning rate is 0 here and set before every step.

    AdamW is torch's fused one, on GPUs and CPUs. DeepSpeed's FusedAdam and CPUAdam need a C++ compiler at first use, and a
    killed build leaves a lock on which every later run waits forever.
    sharded: ZeRO hands each rank its part of every tensor.
    """
    optimizer: torch.optim.Optimizer
    if optim.name == "lamb":
        optimizer = Lamb(groups, betas=optim.betas, sharded=sharded)
    elif optim.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=optim.betas[0])
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)
    if optim.ema is not None:
        keep_average(optimizer, optim.ema)
    return optimizer


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., arXiv 1904.00962, algorithm 2): Adam's direction, scaled for each tensor by |weight| / |direction|.

    As in its authors' code, tensors without weight decay are not scaled, and the ratio is 1 where a norm is 0. One that is
    scaled must be alone in its group; `sharded` ranks then hold a part each and sum the squares of their parts.
    """

    def __init__(
        self, params: Iterable[Any], *, betas: tuple[float, float], sharded: bool, eps: float = 1e-6
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.sharded = sharded

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        mean, square, step = state["exp_avg"], state["exp_avg_sq"], state["step"].item()
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        direction = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        if group["weight_decay"] == 0:
            weight.sub_(direction, alpha=group["lr"])
            return
        direction.add_(weight, alpha=group["weight_decay"])
        weight.sub_(direction * self._ratio(weight, direction), alpha=group["lr"])

    def _ratio(self, weight: Tensor, direction: Tensor) -> Tensor:
        """|weight| / |direction| of the whole tensor, [] float32; 1 where either is 0."""
        squares = torch.stack([weight.square().sum(), direction.square().sum()])
        if self.sharded:
            on = squares.device
            if dist.get_backend() == "nccl":  # offloaded parts are on the CPU
                squares = squares.cuda()
            dist.all_reduce(squares)
            squares = squares.to(on)
        of_weight, of_direction = squares.sqrt()
        return torch.where((of_weight > 0) & (of_direction > 0), of_weight / of_direction, 1.0)


# -- The average of the weights ---------------------------------------------------------------------------------------


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Average every weight after each step, average = decay * average + (1 - decay) * weight, from the initial weights on.

    The average is one more entry in the optimizer's state of each weight. So ZeRO shards and offloads it in float32 with the
    rest, and checkpoints contain it.
    """
    before: dict[Tensor, Tensor] = {}  # kept here, because the optimizer must find an empty state at its first step

    def start(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for weight in _stepped(optimizer):
            if AVERAGE not in optimizer.state[weight]:
                before[weight] = weight.detach().clone()

    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for weight in _stepped(optimizer):
            state = optimizer.state[weight]
            if AVERAGE not in state:
                state[AVERAGE] = before.pop(weight)
            state[AVERAGE].lerp_(weight.detach(), 1 - decay)

    optimizer.register_step_pre_hook(start)
    optimizer.register_step_post_hook(update)


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
