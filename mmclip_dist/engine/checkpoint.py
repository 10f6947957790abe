"""Checkpoints: written under a temporary name, published whole by one rename.

`checkpoints/step-00001000/` holds DeepSpeed's state (weights, optimizer) and, for every use that is not training,
`model.safetensors` with `config.yaml` and `meta.json`. The encoders' shapes, the tokenizer and the prompts make it
complete: a checkpoint can be moved and used without its run, and without the weights that the run started from.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmclip_dist.config import Config, dump_config, load_config
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.engine.checkpoint_folder import (
    AVERAGED_WEIGHTS,
    CONFIG,
    META,
    WEIGHTS,
    Meta,
    checkpoint_path,
    newest_checkpoint,
    read_meta,
    resolve_checkpoint,
)  # fmt: skip
from mmclip_dist.engine.weights import averaged_weights, full_weights
from mmclip_dist.model.build import build_model
from mmclip_dist.model.mmclip import MMCLIP
from mmclip_dist.model.prompts import prompts_source

_TOKENIZER, _PROMPTS = "tokenizer", "prompts.yaml"


def save(run_dir: Path, engine: Any, tokenizer: PreTrainedTokenizerBase, config: Config, meta: Meta) -> None:
    """Save all ranks' state; a collective call. Older checkpoints beyond `config.checkpoint.keep` are removed after it."""
    final = checkpoint_path(run_dir, meta.step)
    temporary = final.with_name(f".{final.name}.writing")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(temporary.parent), tag=temporary.name, save_latest=False)
    weights = full_weights(engine)
    averages = averaged_weights(engine) if config.optim.ema is not None else None
    if first:
        write_model(temporary, engine.module, weights, averages, tokenizer, config, meta)
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(final.parent, deep=False)
        for old in sorted(run_dir.glob("checkpoints/step-*"))[: -config.checkpoint.keep]:
            shutil.rmtree(old)
    dist.barrier()


def write_model(
    folder: Path, model: MMCLIP, weights: dict[str, Tensor], averages: dict[str, Tensor] | None,
    tokenizer: PreTrainedTokenizerBase, config: Config, meta: Meta,
) -> None:  # fmt: skip
    """Write what `load_model` reads: all that evaluation and the offline stages need. averages: of optim.ema, if on."""
    save_file(weights, folder / WEIGHTS)
    if averages is not None:
        save_file(averages, folder / AVERAGED_WEIGHTS)
    (folder / CONFIG).write_text(dump_config(config))
    tokenizer.save_pretrained(str(folder / _TOKENIZER))
    model.save_shapes(folder)
    (folder / _PROMPTS).write_text(prompts_source(config.prompts.file).read_text())
    (folder / META).write_text(json.dumps(vars(meta)))


def _sync(folder: Path, deep: bool = True) -> None:
    for path in [folder, *(folder.rglob("*") if deep else ())]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def resume(run_dir: Path, engine: Any, config: Config) -> int:
    """Load the newest checkpoint of the run, or the one to start from; the step to go on with (0: nothing to load)."""
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None and config.checkpoint.start_from is not None:
        checkpoint = resolve_checkpoint(config.checkpoint.start_from)
    if checkpoint is None:
        return 0
    meta = read_meta(checkpoint)
    if (meta.world_size, meta.zero_stage) != (dist.get_world_size(), config.zero_stage):
        raise ValueError(
            f"{checkpoint} was written by {meta.world_size} ranks at zero_stage={meta.zero_stage}; this run has "
            f"{dist.get_world_size()} ranks at zero_stage={config.zero_stage}: start it with the same"
        )
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise ValueError(f"DeepSpeed could not load {checkpoint}; delete that folder to go on from an older one")
    return meta.step


def load_model(
    checkpoint: Path, *, average: bool = False
) -> tuple[MMCLIP, PreTrainedTokenizerBase, Config, Meta]:  # fmt: skip
    """The model in float32 on the CPU, in evaluation mode, with its tokenizer, config and meta.

    average: the exponential average of the weights. ValueError if the run kept none.
    """
    weights = checkpoint / (AVERAGED_WEIGHTS if average else WEIGHTS)
    if not weights.is_file():
        raise ValueError(f"{weights} is missing: the run kept no average of its weights; train with optim.ema=0.9999")
    config, meta = (
        load_config(str(checkpoint / CONFIG), [f"prompts.file={checkpoint / _PROMPTS}"]),
        read_meta(checkpoint),
    )
    tokenizer = load_tokenizer(str(checkpoint / _TOKENIZER))
    model = build_model(config, tokenizer, meta.diseases, stored=checkpoint)
    model.load_state_dict(load_file(weights))
    return model.eval(), tokenizer, config, meta
