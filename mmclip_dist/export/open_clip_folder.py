"""The form `open_clip`: its JSON and weights, where one of the named ViTs without a class token has the model's shape."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmclip_dist.data.transforms import PIXEL_DEVIATION, PIXEL_MEAN
from mmclip_dist.export.hf_folder import write_grey, write_json, write_tokenizer
from mmclip_dist.export.remote_code.modeling_mmclip import MMCLIPDualEncoder

# open_clip passes neither a shape nor an image size on to timm: they must be those that the name stands for.
_NAMES = {
    (768, 12, 12, 3072, 16, 224): "vit_base_patch16_siglip_gap_224",
    (768, 12, 12, 3072, 16, 256): "vit_base_patch16_siglip_gap_256",
    (768, 12, 12, 3072, 16, 384): "vit_base_patch16_siglip_gap_384",
    (1024, 24, 16, 4096, 16, 256): "vit_large_patch16_siglip_gap_256",
    (1024, 24, 16, 4096, 16, 384): "vit_large_patch16_siglip_gap_384",
}
_TEXTS = ("bert", "roberta", "xlm-roberta")  # those whose mean pooler open_clip knows


def unfit(encoder: MMCLIPDualEncoder) -> str | None:
    """Why open_clip cannot hold the model; None if it can."""
    vision, text = encoder.config.vision_config, encoder.config.text_config
    if _shape(encoder) not in _NAMES or vision.hidden_act != "gelu":
        return (
            f"no ViT without a class token that it can name is {vision.hidden_size} wide, {vision.num_hidden_layers} deep, with "
            f"patches of {vision.patch_size} and images of {vision.image_size} pixels; ViT-B/16 at 224, 256 and 384 and "
            "ViT-L/16 at 256 and 384 are"
        )
    return None if text.model_type in _TEXTS else f"its text encoders have no mean pooling for {text.model_type}"


def write_open_clip(folder: Path, encoder: MMCLIPDualEncoder, tokenizer: PreTrainedTokenizerBase, home: Path) -> None:
    """Write open_clip_config.json, open_clip_model.safetensors, the tokenizer and grey.py.

    home: the absolute path where the folder will lie. open_clip takes the text encoder's shape from a path or from the hub, never
    from its own JSON: who moves the folder must change `hf_model_name` there.
    """
    folder.mkdir()
    write_grey(folder)
    config = encoder.config
    write_tokenizer(folder, tokenizer, config.max_tokens)
    config.text_config.save_pretrained(folder / "text")
    write_json(
        folder / "open_clip_config.json",
        {
            "model_cfg": {
                "embed_dim": config.projection_dim,
                "vision_cfg": {
                    "timm_model_name": _NAMES[_shape(encoder)], "timm_model_pretrained": False, "timm_pool": "avg",
                    "timm_proj": "linear", "image_size": config.vision_config.image_size,
                },
                "text_cfg": {
                    "hf_model_name": str(home / "text"), "hf_tokenizer_name": str(home), "hf_model_pretrained": False,
                    "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear", "context_length": config.max_tokens,
                    "vocab_size": config.text_config.vocab_size,
                },
            },
            "preprocess_cfg": {
                "mean": [PIXEL_MEAN] * 3, "std": [PIXEL_DEVIATION] * 3, "interpolation": "bilinear", "resize_mode": "squash"
            },
        },
    )  # fmt: skip
    save_file(open_clip_weights(encoder), folder / "open_clip_model.safetensors")


def open_clip_weights(encoder: MMCLIPDualEncoder) -> dict[str, Tensor]:
    """The weights under open_clip's names. Three equal colours give what one grey channel gives."""
    own = encoder.vision_model.state_dict()
    trunk = {
        "patch_embed.proj.weight": own["embeddings.patch_embedding.weight"].expand(-1, 3, -1, -1) / 3,
        "patch_embed.proj.bias": own["embeddings.patch_embedding.bias"],
        "pos_embed": own["embeddings.position_embedding.weight"][None],
    }
    for kind in ("weight", "bias"):
        trunk[f"norm.{kind}"] = own[f"post_layernorm.{kind}"]
        for number in range(encoder.config.vision_config.num_hidden_layers):
            layer, block = f"encoder.layers.{number}.", f"blocks.{number}."
            trunk[f"{block}attn.qkv.{kind}"] = torch.cat([own[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"])
            for theirs, ours in (
                ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.proj", "self_attn.out_proj"), ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):  # fmt: skip
                trunk[f"{block}{theirs}.{kind}"] = own[f"{layer}{ours}.{kind}"]
    weights = {f"visual.trunk.{name}": value for name, value in trunk.items()}
    weights |= {f"text.transformer.{name}": value for name, value in encoder.text_model.state_dict().items()}
    weights |= {
        "visual.head.proj.weight": encoder.visual_projection.weight, "text.proj.weight": encoder.text_projection.weight,
        "logit_scale": encoder.logit_scale,
    }  # fmt: skip
    return {name: value.detach().clone().contiguous() for name, value in weights.items()}


def _shape(encoder: MMCLIPDualEncoder) -> tuple[int, int, int, int, int, int]:
    vision = encoder.config.vision_config
    return (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.intermediate_size,
            vision.patch_size, vision.image_size)  # fmt: skip
