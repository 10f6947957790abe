"""How the layers run in training: recomputed in the backward pass, compiled, or plainly."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmclip_dist.model.build import Trainable
from mmclip_dist.model.mmclip import MMCLIP


def checkpoint_activations(model: Trainable) -> None:
    """Keep only the input of every layer of encoders and decoders; the rest is computed again in the backward pass.

    `forward` is wrapped, not `__call__`: ZeRO-3's hooks of the layer itself stay outside, those of its parts run again and
    gather the weights that the second run needs.
    """
    decoders = (*model.image_decoder.layers, *model.text_decoder.layers) if isinstance(model, MMCLIP) else ()
    for layer in (*_encoder_layers(model), *decoders):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def compile_encoders(model: Trainable, backend: str = "inductor") -> None:
    """torch.compile each layer of the encoders. ValueError if the backend cannot build code on this machine.

    Layer by layer: all layers of an encoder share one graph, so that a depth of 24 compiles no longer than one of 1. Shapes
    are dynamic, since the number of reports and their length change from step to step.
    """
    device = next(model.parameters()).device
    _try_backend(backend, device)
    for layer in _encoder_layers(model):
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)


def _try_backend(backend: str, device: torch.device) -> None:
    """Build one addition, so that a missing compiler is reported before the run, not at its first step."""
    try:
        torch.compile(lambda value: value + 1, backend=backend)(torch.zeros(2, device=device))
    except Exception as error:  # dynamo, inductor, Triton and compilers raise many kinds
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"model.compile=true, but torch.compile ({backend}) cannot build code here: {type(error).__name__}: {first_line}. "
            "It needs a C++ compiler on the CPU (apt install g++, or CXX=PATH), Triton and a C compiler on a GPU; "
            "or set model.compile=false"
        ) from error


def _encoder_layers(model: Trainable) -> list[nn.Module]:
    return [layer for encoder in model.encoders for layer in encoder.layers]
