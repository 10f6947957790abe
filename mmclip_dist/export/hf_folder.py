"""The form `hf`: a folder that transformers' AutoModel and AutoProcessor load, offline and without this package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mmclip_dist.data.transforms import PIXEL_DEVIATION, PIXEL_MEAN
from mmclip_dist.export.remote_code.modeling_mmclip import MMCLIPDualEncoder

_CODE = ("configuration_mmclip", "modeling_mmclip", "image_processing_mmclip", "processing_mmclip")


def write_hf(folder: Path, encoder: MMCLIPDualEncoder, tokenizer: PreTrainedTokenizerBase, prompts: str) -> None:
    """Write weights, configuration, tokenizer, processor, prompts and the code that reads them."""
    encoder.config.architectures = ["MMCLIPDualEncoder"]
    encoder.config.auto_map = {
        "AutoConfig": "configuration_mmclip.MMCLIPConfig", "AutoModel": "modeling_mmclip.MMCLIPDualEncoder"
    }  # fmt: skip
    encoder.save_pretrained(folder, safe_serialization=True)
    write_tokenizer(folder, tokenizer, encoder.config.max_tokens)
    processors = {
        "AutoImageProcessor": "image_processing_mmclip.MMCLIPImageProcessor",
        "AutoProcessor": "processing_mmclip.MMCLIPProcessor",
    }
    pixels = {"size": encoder.config.vision_config.image_size, "image_mean": PIXEL_MEAN, "image_std": PIXEL_DEVIATION}
    kinds = {"image_processor_type": "MMCLIPImageProcessor", "processor_class": "MMCLIPProcessor"}
    write_json(folder / "preprocessor_config.json", pixels | kinds | {"auto_map": processors})
    (folder / "prompts.yaml").write_text(prompts, encoding="utf-8")
    for name in _CODE:
        code = (resources.files("mmclip_dist.export.remote_code") / f"{name}.py").read_text(encoding="utf-8")
        # The rule that makes any image grey has one home; the folder carries a copy beside the code that uses it.
        (folder / f"{name}.py").write_text(code.replace("from mmclip_shards.grey import", "from .grey import"), encoding="utf-8")
    grey = (resources.files("mmclip_shards") / "grey.py").read_text(encoding="utf-8")
    (folder / "grey.py").write_text(grey, encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    """The tokenizer, which cuts texts at the model's length."""
    before, tokenizer.model_max_length = tokenizer.model_max_length, max_tokens
    try:
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.model_max_length = before


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
