"""The form `onnx`: the joint model, the image encoder and the text encoder, for runtimes without PyTorch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mmclip_dist.export.hf_folder import write_json, write_tokenizer
from mmclip_dist.export.remote_code.modeling_mmclip import MMCLIPDualEncoder

TOLERANCE = 1e-4
"""Largest difference of an embedding or a cosine between ONNX Runtime and PyTorch that an export may have."""

_OPSET = 18
_IMAGE = {"pixel_values": {0: "batch_size"}}
_TEXT = {name: {0: "text_batch_size", 1: "sequence_length"} for name in ("input_ids", "attention_mask")}
_OUTPUTS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx tells its own developers. What it writes is checked by running it."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


class _Joint(nn.Module):
    def __init__(self, encoder: MMCLIPDualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values)
        return tuple(out[name] for name in _OUTPUTS)


class _Image(_Joint):
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.encoder.get_image_features(pixel_values),)


class _Text(_Joint):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.encoder.get_text_features(input_ids, attention_mask),)


def write_onnx(folder: Path, encoder: MMCLIPDualEncoder, tokenizer: PreTrainedTokenizerBase) -> float:
    """Write model.onnx (embeddings of length 1), vision_model.onnx and text_model.onnx (embeddings before that), each checked.

    -> the largest difference from PyTorch, over batches of 1 and 3 and texts of 5 tokens and of all that the model reads.
    ValueError without the packages; RuntimeError if a difference is larger than TOLERANCE.
    """
    _require()
    folder.mkdir()
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")  # one graph for every sequence length
    forms = {
        "model": (_Joint(encoder), _IMAGE | _TEXT, _OUTPUTS),
        "vision_model": (_Image(encoder), _IMAGE, ("image_embeds",)),
        "text_model": (_Text(encoder), _TEXT, ("text_embeds",)),
    }
    try:
        differences = [_write(folder / f"{name}.onnx", encoder, *form) for name, form in forms.items()]
    finally:
        encoder.set_attn_implementation(before)
    write_tokenizer(folder, tokenizer, encoder.config.max_tokens)
    write_json(folder / "config.json", {"model_type": "clip", "projection_dim": encoder.config.projection_dim})
    return max(differences)


def _require() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'the form onnx needs {error.name}: pip install "mmclip-dist[export]"') from error


def _write(
    path: Path, encoder: MMCLIPDualEncoder, module: nn.Module, inputs: Mapping[str, dict[int, str]], outputs: Sequence[str]
) -> float:
    import onnxruntime

    example = _inputs(encoder, inputs, images=2, texts=3, length=7)
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            module.eval(), tuple(example.values()), str(path), input_names=list(inputs), output_names=list(outputs),
            dynamic_shapes=_shapes(inputs), opset_version=_OPSET, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for (images, texts), length in product(((1, 1), (3, 1), (1, 3)), (5, encoder.config.max_tokens)):
        values = _inputs(encoder, inputs, images, texts, length)
        with torch.no_grad():
            expected = module(**values)
        found = session.run(list(outputs), {name: value.numpy() for name, value in values.items()})
        for name, ours, theirs in zip(outputs, expected, found, strict=True):
            scale = encoder.logit_scale.exp().item() if name.startswith("logits") else 1.0
            largest = max(largest, float(np.abs(ours.numpy() - theirs).max()) / scale)
    if not largest <= TOLERANCE:
        raise RuntimeError(f"{path.name} differs from PyTorch by {largest:.1e}, and at most {TOLERANCE:.0e} is allowed")
    return largest


def _inputs(
    encoder: MMCLIPDualEncoder, names: Mapping[str, object], images: int, texts: int, length: int
) -> dict[str, Tensor]:
    """Drawn inputs; every text but the first ends in padding."""
    drawn = torch.Generator().manual_seed(0)
    side = encoder.config.vision_config.image_size
    mask = torch.ones(texts, length, dtype=torch.int64)
    mask[1:, length // 2 :] = 0
    values = {
        "pixel_values": torch.randn(images, 1, side, side, generator=drawn),
        "input_ids": torch.randint(5, encoder.config.text_config.vocab_size, (texts, length), generator=drawn),
        "attention_mask": mask,
    }
    return {name: values[name] for name in names}


def _shapes(inputs: Mapping[str, dict[int, str]]) -> dict[str, dict[int, Any]]:
    from torch.export import Dim

    axes = {axis: Dim(axis) for axes in inputs.values() for axis in axes.values()}
    return {name: {place: axes[axis] for place, axis in of_name.items()} for name, of_name in inputs.items()}
