"""What a training step gets: the contract between the loader and the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from mmclip_shards.chunks import Tally
from torch import Size, Tensor
from torch.nn.utils.rnn import pad_sequence


class Batch(TypedDict):
    """One rank's share of a global batch. B samples, T tokens of the longest report, S pixels, g patches a side, C diseases."""

    step: int
    keys: list[str]
    image: Tensor  # [B, 1, S, S] float32, normalised
    tokens: Tensor  # [B, T] int64; padding where there is no report
    token_mask: Tensor  # [B, T] bool, True: a token
    masked_tokens: Tensor  # [B, T] int64, with entities masked
    target_tokens: Tensor  # [B, T] int64, the masked tokens, -100 elsewhere
    evidence: Tensor  # [B, T] bool, tokens that may score patches: entities stated as seen, else the words
    report_id: Tensor  # [B] int64, equal for equal reports; -1: no report
    labels: Tensor  # [B, C] int64: 1 present, 0 absent, -1 uncertain or not mentioned
    attention: Tensor  # [B, g, g] float32, scores per patch
    has_attention: Tensor  # [B] bool
    noise: Tensor  # [B, g * g] float32 in [0, 1): the random part of the choice of patches
    lot: Tensor  # [B] float32 in [0, 1): chooses the samples that are masked, where not all are
    replaced: list[tuple[str, str]]  # (key, reason) of samples that could not be decoded and were replaced
    reading: Tally  # requests, bytes and waiting of reading the samples


Example = dict[str, Any]
"""One sample's entries of a Batch, without the batch dimension (`report_id` a number)."""


_TOKENS = {"tokens": None, "token_mask": False, "masked_tokens": None, "target_tokens": -100, "evidence": False}
"""Tensors with a column for each token, and what fills the columns behind a text's end; None: the tokenizer's padding."""

TENSORS = ("image", *_TOKENS, "report_id", "labels", "attention", "has_attention", "noise", "lot")


def collate(examples: Sequence[Example], step: int, padding: int) -> Batch:
    """Stack examples; token rows are padded to the longest. `padding`: the tokenizer's padding id."""
    return collate_into(examples, step, padding, lambda sizes: [torch.empty(size, dtype=dtype) for dtype, size in sizes])


def collate_into(
    examples: Sequence[Example], step: int, padding: int, room: Callable[[Sequence[tuple[torch.dtype, Size]]], list[Tensor]]
) -> Batch:
    """As `collate`, into the tensors that room([(type, shape), ...]) returns. What an image takes is then written once."""
    rows = {name: [torch.as_tensor(example[name]) for example in examples] for name in TENSORS}
    sizes = []
    for name, values in rows.items():
        shape = (max(map(len, values)),) if name in _TOKENS else values[0].shape
        sizes.append((values[0].dtype, torch.Size((len(values), *shape))))
    tensors = dict(zip(rows, room(sizes), strict=True))
    for name, values in rows.items():
        if name in _TOKENS:
            tensors[name].copy_(pad_sequence(values, batch_first=True, padding_value=_fill(name, padding)))
        else:
            torch.stack(values, out=tensors[name])
    keys, replaced = [example["key"] for example in examples], [pair for example in examples for pair in example["replaced"]]
    return Batch(step=step, keys=keys, replaced=replaced, reading=Tally(), **tensors)  # type: ignore[typeddict-item]


def _fill(name: str, padding: int) -> int:
    fill = _TOKENS[name]
    return padding if fill is None else fill


def join(parts: Sequence[Batch], padding: int, *, pin: bool = False) -> Batch:
    """A copy of the parts of a step, in order; token rows are padded to the longest. pin: into pinned memory."""
    joined: dict[str, Any] = {}
    for name, first in parts[0].items():
        values: list[Any] = [part[name] for part in parts]  # type: ignore[literal-required]
        if isinstance(first, list):
            joined[name] = [item for value in values for item in value]
        elif isinstance(first, Tensor):
            size = [sum(map(len, values)), *first.shape[1:]]
            if name in _TOKENS:
                size[1] = max(value.shape[1] for value in values)
            whole = torch.empty(size, dtype=first.dtype, pin_memory=pin)
            for value, rows in zip(values, whole.split([len(value) for value in values]), strict=True):
                if name in _TOKENS:
                    rows[:, : value.shape[1]], rows[:, value.shape[1] :] = value, _fill(name, padding)
                else:
                    rows.copy_(value)
            joined[name] = whole
        else:
            joined[name] = first
    return Batch(**joined)  # type: ignore[typeddict-item]


def even_share(rows: range, part: int, parts: int) -> range:
    """Part number `part` of `parts` contiguous parts of some rows, whose lengths differ by at most one."""
    return rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """The batch in so many parts, in order, whose sizes differ by at most one."""
    if parts == 1:
        return [batch]
    rows, found = range(len(batch["keys"])), []
    for number in range(parts):
        share = even_share(rows, number, parts)
        here = slice(share.start, share.stop)
        part = {name: value[here] if isinstance(value, list | Tensor) else value for name, value in batch.items()}
        found.append(Batch(**part))  # type: ignore[typeddict-item]
    return found


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    return Batch(**moved)  # type: ignore[typeddict-item]
