"""Build the model of a config."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from mmclip_dist.config import Config
from mmclip_dist.model.mmclip import MMCLIP
from mmclip_dist.model.prompts import load_prompts, tokenize_prompts


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerBase, diseases: Sequence[str], *, pretrained: bool = True
) -> MMCLIP:
    """The model, the same on every rank: random weights come from `config.seed` alone.

    pretrained=False skips loading pretrained weights that a checkpoint is about to replace, keeping their shape.
    """
    prompts = load_prompts(diseases, config.prompts.file)
    tokens, mask = tokenize_prompts(prompts, tokenizer, config.model.text.max_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MMCLIP(config, vocabulary=len(tokenizer), prompt_tokens=tokens, prompt_mask=mask)
