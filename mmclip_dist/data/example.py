"""Make the tensors of a training example from the members of a packed sample. Everything random is a function of (seed, epoch,
key), so it is the same after a resume and on any rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from mmclip_shards.document import is_evidence, read_document
from mmclip_shards.images import decode_image
from mmclip_shards.schema import decode_npy, image_of
from transformers import PreTrainedTokenizerBase

from mmclip_dist.config import Augment, EntMLM
from mmclip_dist.data.batch import Example
from mmclip_dist.data.entity_mask import masked_tokens
from mmclip_dist.data.transforms import WHOLE, crop_grid, crop_image, random_crop
from mmclip_dist.errors import Mendable

_UNKNOWN = -1


class MissingSidecar(Mendable):
    """A report came without the entities that EntMLM needs: the fault of the configuration, not of the one sample."""


@dataclass(frozen=True)
class ExampleMaker:
    """Turns samples into examples.

    diseases: the label names, in the order of the model's prompts. augment: None leaves images whole and unmasked
    (evaluation, attention scores). needs_entities: refuse a report without entity sidecar. reports: False leaves them out.
    """

    tokenizer: PreTrainedTokenizerBase
    diseases: Sequence[str]
    size: int
    grid: int
    max_tokens: int
    entmlm: EntMLM
    augment: Augment | None
    seed: int = 0
    needs_entities: bool = False
    reports: bool = True

    @property
    def bytes_per_example(self) -> int:
        """Bytes of the tensors of an example whose report is as long as allowed."""
        pixels, patches = self.size**2, self.grid**2
        return 4 * pixels + 8 * patches + 26 * self.max_tokens + 8 * len(self.diseases) + 13

    def __call__(self, key: str, members: Mapping[str, bytes], epoch: int) -> Example:
        """The example. ValueError if the image or the document cannot be decoded."""
        random = np.random.Generator(np.random.PCG64(xxhash.xxh3_64_intdigest(f"{self.seed}/{epoch}/{key}".encode())))
        crop = random_crop(random, self.augment) if self.augment else WHOLE
        data = image_of(members)
        if data is None:
            raise ValueError(f"sample {key} has no image")
        example: Example = {
            "key": key,
            "image": torch.from_numpy(crop_image(decode_image(data), crop, self.size)),
            "noise": torch.from_numpy(random.random(self.grid**2, dtype=np.float32)),
            "replaced": [],
        }
        document = read_document(members)
        example["labels"] = torch.tensor(
            [self._label(document.labels.get(name)) for name in self.diseases], dtype=torch.int64
        )
        example |= self._attention(members.get("attention.npy"), crop)
        example |= self._report(key, document.report if self.reports else "", members.get("entities.json"), random)
        example["lot"] = np.float32(random.random())
        return example

    @staticmethod
    def _label(value: int | None) -> int:
        return value if value in (0, 1) else _UNKNOWN

    def _attention(self, data: bytes | None, crop: object) -> Example:
        if data is None:
            return {"attention": torch.zeros(self.grid, self.grid), "has_attention": False}
        scores = decode_npy(data)
        return {"attention": torch.from_numpy(crop_grid(scores, crop, self.grid)), "has_attention": True}  # type: ignore[arg-type]

    def _report(self, key: str, text: str, entities: bytes | None, random: np.random.Generator) -> Example:
        if not text:
            nothing = torch.zeros(1, dtype=torch.int64)
            return {
                "tokens": nothing + self.tokenizer.pad_token_id, "token_mask": nothing.bool(),
                "masked_tokens": nothing + self.tokenizer.pad_token_id, "target_tokens": nothing - 100,
                "evidence": nothing.bool(), "report_id": -1,
            }  # fmt: skip
        if entities is None and self.needs_entities:
            raise MissingSidecar(
                f"sample {key} has a report but its source names no entity sidecar: run `mmclip entities SET/train` "
                "and set `entities` of the source, or train without the term: loss.entity=0"
            )
        encoded = self.tokenizer(
            text, truncation=True, max_length=self.max_tokens, return_offsets_mapping=True, return_attention_mask=False
        )
        tokens = np.asarray(encoded["input_ids"], dtype=np.int64)
        offsets = np.asarray(encoded["offset_mapping"])
        words = np.asarray([_UNKNOWN if word is None else word for word in encoded.word_ids()])
        spans = [] if entities is None else json.loads(entities)
        overlaps = _tokens_of_spans(offsets, spans)
        hidden = masked_tokens(
            words, [np.flatnonzero(overlap) for overlap in overlaps if overlap.any()], random,
            probability=self.entmlm.probability, word_probability=self.entmlm.word_probability,
        )  # fmt: skip
        evidence = overlaps[[row for row, span in enumerate(spans) if is_evidence(span)]].any(0)
        if not evidence.any():  # nothing stated, or no entity: use all words
            evidence = words >= 0
        return {
            "tokens": torch.from_numpy(tokens),
            "token_mask": torch.ones(len(tokens), dtype=torch.bool),
            "masked_tokens": torch.from_numpy(np.where(hidden, self.tokenizer.mask_token_id, tokens)),
            "target_tokens": torch.from_numpy(np.where(hidden, tokens, -100)),
            "evidence": torch.from_numpy(evidence),
            "report_id": xxhash.xxh3_64_intdigest(text.encode()) >> 1,  # int64 and never negative
        }


def _tokens_of_spans(offsets: np.ndarray, spans: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Which tokens overlap which span of characters. offsets [T, 2] -> [spans, T] bool; special tokens overlap none."""
    bounds = np.array([(span["start"], span["end"]) for span in spans], dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    return (starts < bounds[:, 1:]) & (ends > bounds[:, :1]) & (ends > starts)
