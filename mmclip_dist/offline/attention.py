"""Offline stage `attention`: how strongly each patch of every image responds to its report, as a sidecar.

A frozen checkpoint scores each un-augmented image against the entity words of its report that are not negated, or
against the prompts of its diseases. One float16 grid an image.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from mmclip_shards.schema import encode_npy

from mmclip_dist.config import config_hash
from mmclip_dist.data.batch import Example, collate, to_device
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.engine.checkpoint import load_model, resolve_checkpoint, weights_hash
from mmclip_dist.offline.stage import Maker, Members, Stage


def attention_stage(base: str, out: str, checkpoint: str, entities: str | None = None, gpus: float = 0) -> Stage:
    """Scores of the images in `base` by a checkpoint (a folder, or a run), guided by the `entities` sidecar, to `out`.

    gpus: of each worker process; 0 scores on the CPU.
    """
    folder = resolve_checkpoint(checkpoint)
    weights = weights_hash(folder)
    identity = config_hash("attention", weights, entities is not None)
    return Stage("attention", base, out, identity, partial(_build, str(folder)), entities, weights, gpus)


def _build(checkpoint: str) -> Maker:
    torch.set_num_threads(1)  # one process a core
    model, tokenizer, config, meta = load_model(resolve_checkpoint(checkpoint))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    examine = ExampleMaker(
        tokenizer, meta.diseases, config.model.image.size, config.model.image.grid, config.model.text.max_tokens,
        config.entmlm, augment=None,
    )  # fmt: skip

    def example(key: str, members: Members) -> Example | None:
        try:
            return examine(key, members, epoch=0)
        except ValueError:
            return None  # undecodable: no scores. Training meets the same sample, replaces it and counts it.

    def make(samples: list[tuple[str, Members]]) -> list[tuple[str, Members]]:
        examples = {key: found for key, members in samples if (found := example(key, members))}
        grids = np.zeros((len(samples), config.model.image.grid, config.model.image.grid), np.float16)
        known = [row for row, (key, _) in enumerate(samples) if key in examples]
        if known:
            batch = collate(list(examples.values()), 0, tokenizer.pad_token_id)
            with torch.inference_mode():
                grids[known] = model.attention_grid(to_device(batch, device)).cpu().numpy()
        return [(key, {"attention.npy": encode_npy(grid)}) for (key, _), grid in zip(samples, grids, strict=True)]

    return make
