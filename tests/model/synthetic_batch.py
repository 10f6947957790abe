"""A model and a batch of exactly known sizes, without data sets, tokenizer or loader."""

from __future__ import annotations

from typing import Any, cast

import torch
from mmclip_shards.chunks import Tally

from mmclip_dist.config import Config, load_config
from mmclip_dist.data.batch import Batch
from mmclip_dist.model.mmclip import MMCLIP
from mmclip_dist.plan.cost import Load
from tests.conftest import PAPER

VOCABULARY, PROMPT_TOKENS = 900, 8


def config_of(*overrides: str, batch: int, precision: str = "fp32") -> Config:
    return load_config(
        "quickstart",
        [
            f"precision={precision}", f"optim.global_batch={batch}", f"data.streams={batch}",
            "model.image={size: 64, patch: 8, width: 96, depth: 4, heads: 4}",
            "model.text={width: 64, depth: 3, heads: 4, max_tokens: 48}",
            "attmim.decoder={depth: 2, width: 64, heads: 4}", "entmlm.decoder={depth: 2, width: 64, heads: 4}",
            *PAPER, *overrides,
        ],
    )  # fmt: skip


def model_of(config: Config, diseases: int) -> MMCLIP:
    prompts = torch.randint(1, VOCABULARY, (2, 2 * diseases, PROMPT_TOKENS))
    return MMCLIP(config, vocabulary=VOCABULARY, prompt_tokens=prompts, prompt_mask=torch.ones_like(prompts).bool())


def batch_of(config: Config, load: Load) -> Batch:
    """All images have a report of `load.tokens` tokens, the first `load.masked` of them hidden."""
    rows, length, side = load.images, int(load.tokens), config.model.image.grid
    assert load.reports == rows and length == load.tokens and load.scored in (0, 1)
    tokens = torch.randint(1, load.vocabulary, (rows, length))
    hidden = (torch.arange(length) < load.masked).expand(rows, -1)
    size = config.model.image.size
    batch: dict[str, Any] = {
        "step": 0, "keys": [str(row) for row in range(rows)], "replaced": [],
        "reading": Tally(), "image": torch.randn(rows, 1, size, size), "tokens": tokens,
        "token_mask": torch.ones_like(tokens).bool(), "masked_tokens": tokens.clone(),
        "target_tokens": torch.where(hidden, tokens, -100), "evidence": torch.ones_like(tokens).bool(),
        "report_id": torch.arange(rows), "labels": torch.randint(-1, 2, (rows, load.prompts // 2)),
        "attention": torch.rand(rows, side, side), "has_attention": torch.full((rows,), not load.scored),
        "noise": torch.rand(rows, side * side), "lot": (torch.arange(rows) + 0.5) / rows,
    }  # fmt: skip
    return cast(Batch, batch)


def load_of(
    config: Config, *, tokens: int = 40, masked: int = 10, diseases: int = 6, scored: bool = False, ranks: int = 1
) -> Load:
    texts = config.optim.global_batch
    rows = texts // ranks
    return Load(rows, rows, tokens, masked, 2 * diseases, PROMPT_TOKENS, VOCABULARY, texts, float(scored))
