"""What a training step gets: the contract between the loader and the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from mmclip_shards.chunks import Tally
from torch import Tensor


class Batch(TypedDict):
    """One rank's share of a global batch. B samples, T tokens of the longest report, S pixels, g patches a side, C diseases."""

    step: int
    keys: list[str]
    image: Tensor  # [B, 1, S, S] float32, normalised
    tokens: Tensor  # [B, T] int64; padding where there is no report
    token_mask: Tensor  # [B, T] bool, True: a token
    masked_tokens: Tensor  # [B, T] int64, with entities masked
    target_tokens: Tensor  # [B, T] int64, the masked tokens, -100 elsewhere
    evidence: Tensor  # [B, T] bool, tokens that may score patches: non-negated entities, else the words
    report_id: Tensor  # [B] int64, equal for equal reports; -1: no report
    labels: Tensor  # [B, C] int64: 1 present, 0 absent, -1 uncertain or not mentioned
    attention: Tensor  # [B, g, g] float32, scores per patch
    has_attention: Tensor  # [B] bool
    noise: Tensor  # [B, g * g] float32 in [0, 1): the random part of the choice of patches
    replaced: list[tuple[str, str]]  # (key, reason) of samples that could not be decoded and were replaced
    reading: Tally  # requests, bytes and waiting of reading the samples


Example = dict[str, Any]
"""One sample's entries of a Batch, without the batch dimension (`report_id` a number)."""


def collate(examples: Sequence[Example], step: int, padding: int) -> Batch:
    """Stack examples; token rows are padded to the longest. `padding`: the tokenizer's padding id."""

    def stack(name: str) -> Tensor:
        return torch.stack([example[name] for example in examples])

    def pad(name: str, fill: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([e[name] for e in examples], batch_first=True, padding_value=fill)

    return Batch(
        step=step,
        keys=[example["key"] for example in examples],
        image=stack("image"),
        tokens=pad("tokens", padding),
        token_mask=pad("token_mask", False),
        masked_tokens=pad("masked_tokens", padding),
        target_tokens=pad("target_tokens", -100),
        evidence=pad("evidence", False),
        report_id=torch.tensor([example["report_id"] for example in examples]),
        labels=stack("labels"),
        attention=stack("attention"),
        has_attention=torch.tensor([example["has_attention"] for example in examples]),
        noise=stack("noise"),
        replaced=[pair for example in examples for pair in example["replaced"]],
        reading=Tally(),
    )


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """The batch in parts of `size` samples, in order."""
    count = len(batch["keys"])
    if size >= count:
        return [batch]
    parts = []
    for start in range(0, count, size):
        here = slice(start, start + size)
        part = {name: value[here] if isinstance(value, list | Tensor) else value for name, value in batch.items()}
        parts.append(Batch(**part))  # type: ignore[typeddict-item]
    return parts


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    return Batch(**moved)  # type: ignore[typeddict-item]
