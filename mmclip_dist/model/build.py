"""Build the model of a config, and what the engine asks of any model that it trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from mmclip_dist.config import Config
from mmclip_dist.data.prompts import load_prompts, tokenize_prompts
from mmclip_dist.model.classifier import Classifier
from mmclip_dist.model.mmclip import MMCLIP

Trainable = MMCLIP | Classifier
"""What the engine trains, checkpoints hold and the log follows."""


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, diseases: Sequence[str], *, stored: Path | None = None
) -> MMCLIP:
    """The model, the same on every rank: random weights come from `config.seed` alone.

    stored: a checkpoint whose weights are about to be loaded, so that pretrained ones need not be.
    """
    prompts = load_prompts(diseases, config.prompts.file)
    tokens, mask = tokenize_prompts(prompts, tokenizer, config.model.text.max_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = MMCLIP(config, vocabulary=len(tokenizer), prompt_tokens=tokens, prompt_mask=mask, stored=stored)
    return model.train()  # transformers hands out pretrained encoders in evaluation mode
