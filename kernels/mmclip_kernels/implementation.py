"""Choose the implementation of a kernel by name. One that cannot run is an error, never replaced by another."""

from __future__ import annotations

import importlib
from importlib import metadata
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
    if impl == "triton" and not module.INTERPRETED:
        if device.type != "cuda":
            raise ValueError(f"impl='triton' needs CUDA tensors, found {device.type}; use impl='torch' there")
        _check_compiler(device)
    return module


def _check_compiler(device: torch.device) -> None:
    """Triton 3.6 and 3.7 fail to compile the contrastive loss for sm_100: "parent layout must have at least rank >= 2"."""
    version = metadata.version("triton")
    if torch.cuda.get_device_capability(device)[0] == 10 and tuple(map(int, version.split(".")[:2])) < (3, 8):
        raise ValueError(f"impl='triton' needs Triton 3.8 or newer on this card, found {version}; update it or use impl='torch'")


def check_impl(impl: str, device: torch.device) -> None:
    """ValueError if `impl` cannot run on `device`. Lets a program find out before its first step."""
    for operator in ("contrastive", "topk_mask"):
        implementation(operator, impl, device)
