"""Choose the implementation of a kernel by name. One that cannot run is an error, never replaced by another."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal

import torch

Impl = Literal["torch", "triton"]


def implementation(operator: str, impl: str, device: torch.device) -> ModuleType:
    """The module of an operator ("contrastive" or "topk_mask"). ValueError if `impl` cannot run on `device`."""
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl={impl!r} is not available; use impl='torch' or impl='triton'")
    try:
        module = importlib.import_module(f"mmclip_kernels.{operator}_{impl}")
    except ImportError as error:
        raise ValueError(f"impl='triton' needs the triton package ({error}); use impl='torch'") from error
    if impl == "triton" and device.type != "cuda" and not module.INTERPRETED:
        raise ValueError(f"impl='triton' needs CUDA tensors, found {device.type}; use impl='torch' there")
    return module


def check_impl(impl: str, device: torch.device) -> None:
    """ValueError if `impl` cannot run on `device`. Lets a program find out before its first step."""
    for operator in ("contrastive", "topk_mask"):
        implementation(operator, impl, device)
