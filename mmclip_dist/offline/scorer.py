"""The worker of the `attention` stage: applies a checkpoint to a batch of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mmclip_shards.schema import encode_npy

from mmclip_dist.checkpoint.model_files import load_model
from mmclip_dist.data.batch import Example, collate, to_device
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.offline.stage import Maker, Members, Unreadable


def build_scorer(checkpoint: str) -> Maker:
    """Attention grids of samples by the checkpoint in this folder; an image that cannot be decoded gets zeros."""
    torch.set_num_threads(1)  # one process a core
    model, tokenizer, config, meta = load_model(Path(checkpoint))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    examine = ExampleMaker(
        tokenizer, meta.diseases, config.model.image.size, config.model.image.grid, config.model.text.max_tokens,
        config.entmlm, augment=None,
    )  # fmt: skip

    def make(samples: list[tuple[str, Members]]) -> list[tuple[str, Members]]:
        examples: dict[str, Example] = {}
        problems: dict[str, str] = {}
        for key, members in samples:
            try:
                examples[key] = examine(key, members, epoch=0)
            except ValueError as error:  # no scores: training meets the same sample, replaces it and counts it
                problems[key] = str(error)
        grids = np.zeros((len(samples), config.model.image.grid, config.model.image.grid), np.float16)
        known = [row for row, (key, _) in enumerate(samples) if key in examples]
        if known:
            batch = collate(list(examples.values()), 0, tokenizer.pad_token_id)
            with torch.inference_mode():
                grids[known] = model.attention_grid(to_device(batch, device)).cpu().numpy()
        rows: list[tuple[str, Members]] = []
        for (key, _), grid in zip(samples, grids, strict=True):
            row = {"attention.npy": encode_npy(grid)}
            rows.append((key, Unreadable(row, problems[key]) if key in problems else row))
        return rows

    return make
