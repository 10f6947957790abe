"""The files of a checkpoint that evaluation, scoring and export need. They lie beside DeepSpeed's state."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmclip_dist.checkpoint.folder import AVERAGED_WEIGHTS, CONFIG, META, PROMPTS, TOKENIZER, WEIGHTS, Meta, read_meta
from mmclip_dist.checkpoint.identity import stored_config
from mmclip_dist.config import Config, dump_config
from mmclip_dist.data.prompts import prompts_text
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.model.build import Trainable, build_model
from mmclip_dist.model.mmclip import MMCLIP


def write_model(
    folder: Path, model: Trainable, tokenizer: PreTrainedTokenizerBase, config: Config, meta: Meta,
    weights: dict[str, Tensor] | None = None, averages: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write what `load_model` reads: all that evaluation and the offline stages need.

    weights: by default the model's own. averages: those of optim.ema, if it is on.
    """
    if weights is None:
        weights = {name: value.detach().float().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    if averages is not None:
        save_file(averages, folder / AVERAGED_WEIGHTS)
    (folder / CONFIG).write_text(dump_config(config))
    tokenizer.save_pretrained(str(folder / TOKENIZER))
    model.save_shapes(folder)
    (folder / PROMPTS).write_text(prompts_text(config.prompts.file), encoding="utf-8")
    (folder / META).write_text(json.dumps(vars(meta)))


def load_model(
    checkpoint: Path, *, average: bool = False
) -> tuple[MMCLIP, PreTrainedTokenizerBase, Config, Meta]:
    """The model in float32 on the CPU, in evaluation mode, with its tokenizer, config and meta.

    average: the exponential average of the weights. ValueError if the run kept none.
    """
    weights = checkpoint / (AVERAGED_WEIGHTS if average else WEIGHTS)
    if not weights.is_file():
        raise ValueError(f"{weights} is missing: the run kept no average of its weights; train with optim.ema=0.9999")
    config, meta = stored_config(checkpoint), read_meta(checkpoint)
    if config.finetune is not None:
        raise ValueError(f"{checkpoint} holds a fine-tuned classifier, no whole model: name the run that it was made from")
    tokenizer = load_tokenizer(str(checkpoint / TOKENIZER))
    model = build_model(config, tokenizer, meta.diseases, stored=checkpoint)
    model.load_state_dict(load_file(weights))
    return model.eval(), tokenizer, config, meta
