"""The form `hf`: a folder that transformers' AutoModel and AutoProcessor load, offline and without this package."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from mmclip_shards.textfiles import read_json
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from mmclip_dist.checkpoint.folder import META
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.data.transforms import PIXEL_DEVIATION, PIXEL_MEAN
from mmclip_dist.export.dual_encoder import FORMAT_VERSION
from mmclip_dist.export.remote_code.configuration_mmclip import MMCLIPConfig
from mmclip_dist.export.remote_code.modeling_mmclip import MMCLIPDualEncoder

ABOUT = "training.json"
"""What an export says of the weights and of the sets that they were trained on."""
_REDO = "export the model again"

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
    write_grey(folder)


def is_export(place: str) -> bool:
    """Whether a folder was written by `mmclip export`, in any form, or by transformers."""
    folder = Path(place)
    return any((folder / name).is_file() for name in (ABOUT, "config.json")) and not (folder / META).exists()


def read_hf(folder: Path) -> tuple[MMCLIPDualEncoder, PreTrainedTokenizerBase]:
    """The model in float32 on the CPU, in evaluation mode, and its tokenizer. Reads safetensors and JSON alone; of the code in
    the folder, nothing is run. ValueError for another kind of folder, for one that a newer version wrote, or for damage."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} is an export without the form hf: export the run again with --format hf, or name the run")
    found = read_json(config, _REDO)
    if found.get("model_type") != MMCLIPConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {found.get('model_type')!r}, not one of `mmclip export --format hf`; evaluate it as "
            f"hf:{folder}"
        )
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version!r}, and this version of mmclip-dist reads {FORMAT_VERSION}: {_REDO}, or "
            "install the version that wrote it"
        )
    try:
        model = MMCLIPDualEncoder(MMCLIPConfig.from_pretrained(folder, local_files_only=True))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read ({' '.join(str(error).split())[:300]}): {_REDO}") from error
    return model.float().eval(), load_tokenizer(str(folder))


def write_grey(folder: Path) -> None:
    """grey.py, by which images of any kind give the pixels of training."""
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
