"""Which model a checkpoint holds, without loading it.

Light: nothing here needs torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mmclip_dist.checkpoint.folder import CONFIG, PROMPTS, TOKENIZER, read_meta
from mmclip_dist.config import Config, config_hash, load_config


def model_hash(checkpoint: Path, weights: str) -> str:
    """sha256 of all that `load_model` builds its model from; moving a checkpoint does not change it.

    That is the weights (given by their `weights_hash`), the encoders' shapes, the configuration of the model and of its masks,
    diseases, prompts and tokenizer.
    """
    config, meta = stored_config(checkpoint), read_meta(checkpoint)
    shape = config.model_dump(mode="json", include={"model": True, "attmim": True, "entmlm": True})
    for part, name in (("image", "pretrained"), ("text", "pretrained"), ("text", "tokenizer")):
        del shape["model"][part][name]  # only where they came from; the checkpoint has copies
    files = [checkpoint / PROMPTS, *(path for part in ("image", "text", TOKENIZER) for path in (checkpoint / part).rglob("*"))]
    hashes = {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()
    }
    return config_hash("model", weights, hashes, shape, meta.diseases)


def stored_config(checkpoint: Path) -> Config:
    """The configuration that a checkpoint was trained with; the prompts are those that lie in it."""
    return load_config(str(checkpoint / CONFIG), [f"prompts.file={checkpoint / PROMPTS}"])
