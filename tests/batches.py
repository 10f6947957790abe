"""Batches of the small sets, as the loader makes them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from mmclip_dist.config import Config
from mmclip_dist.data.batch import Batch
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.loader import build_loader, build_order, label_names
from mmclip_dist.data.reading import open_sets
from mmclip_dist.model.build import build_model
from mmclip_dist.model.inputs import PlannedBatch, planned
from mmclip_dist.model.mmclip import MMCLIP

DISEASES = ("Atelectasis", "Cardiomegaly", "Consolidation", "Nodule", "Pleural Effusion", "Pneumothorax")


def loader(config: Config, tokenizer: PreTrainedTokenizerBase, *, rank: int = 0, world: int = 1, start: int = 0):
    joined = open_sets(config.data.sources, config.data, world)
    maker = ExampleMaker(
        tokenizer, label_names(joined), config.model.image.size, config.model.image.grid, config.model.text.max_tokens,
        config.entmlm, config.data.augment, config.seed, needs_entities=config.loss.entity > 0,
    )  # fmt: skip
    order = build_order(joined, config.data, config.seed)
    return build_loader(
        joined, order, maker, data=config.data, global_batch=config.optim.global_batch, rank=rank, world=world, start=start
    )  # fmt: skip


def mixed_batch(sets: Any, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """The first batch: some samples with a report, some without."""
    found: Batch = next(loader(sets.config(), tokenizer))
    assert 0 < int((found["report_id"] >= 0).sum()) < 8
    return found


def model_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> MMCLIP:
    return build_model(config, tokenizer, DISEASES)


def in_passes(batch: Batch, model: MMCLIP, micro_batch: int | None) -> PlannedBatch:
    """The batch with a plan for passes over so many samples each."""
    return planned(batch, model.text.width, -(-len(batch["keys"]) // micro_batch) if micro_batch else 1, model.config.shares)
