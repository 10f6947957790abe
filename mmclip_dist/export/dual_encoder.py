"""A trained model as the dual encoder that is exported: the decoders and the unused class token are left out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig

from mmclip_dist.export.remote_code.configuration_mmclip import MMCLIPConfig
from mmclip_dist.export.remote_code.modeling_mmclip import MMCLIPDualEncoder
from mmclip_dist.model.mmclip import MMCLIP

FORMAT_VERSION = 1
"""Of an exported folder. It grows with a change that older readers would misread."""

_PARTS = ("layer_norm1", "layer_norm2", "fc1", "fc2", "q_proj", "k_proj", "v_proj", "out_proj")


def dual_encoder(model: MMCLIP) -> MMCLIPDualEncoder:
    """The same embeddings by transformers' own classes, in float32 on the CPU, in evaluation mode. The weights are copies."""
    vit: Any = model.image.vit.config
    config, text = model.config, model.text.bert.config.to_dict()
    made = MMCLIPDualEncoder(
        MMCLIPConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=vit.hidden_size, intermediate_size=vit.intermediate_size, num_hidden_layers=vit.num_hidden_layers,
                num_attention_heads=vit.num_attention_heads, num_channels=vit.num_channels, image_size=vit.image_size,
                patch_size=vit.patch_size, hidden_act=vit.hidden_act, layer_norm_eps=vit.layer_norm_eps, vision_use_head=False,
            ),
            text_config={name: value for name, value in text.items() if name != "_name_or_path"},  # it may name a person's folder
            projection_dim=config.model.embed,
            max_tokens=config.model.text.max_tokens, attention_temperature=config.attmim.score_temperature,
            format_version=FORMAT_VERSION,
        )
    )  # fmt: skip
    made.vision_model.load_state_dict(vision_weights(model))
    made.text_model.load_state_dict(model.text.bert.state_dict())
    with torch.no_grad():
        made.visual_projection.weight.copy_(model.image_head.weight)
        made.text_projection.weight.copy_(model.text_head.weight)
        made.logit_scale.copy_(model.log_scale.clamp(max=math.log(config.model.max_scale))[0])
    return made.float().eval()


def vision_weights(model: MMCLIP) -> dict[str, Tensor]:
    """The image encoder under the names of a `SiglipVisionModel` without head. ValueError for layers of another form."""
    embeddings: Any = model.image.embeddings
    projection = embeddings.patch_embeddings.projection
    weights = {
        "embeddings.patch_embedding.weight": projection.weight,
        "embeddings.patch_embedding.bias": projection.bias,
        "embeddings.position_embedding.weight": embeddings.position_embeddings[0, 1:],
        **_named("post_layernorm", model.image.vit.layernorm),
    }
    for number, layer in enumerate(model.image.layers):
        for part, module in zip(_PARTS, _modules(layer), strict=True):
            home = "mlp." if part.startswith("fc") else "self_attn." if part.endswith("_proj") else ""
            weights |= _named(f"encoder.layers.{number}.{home}{part}", module)
    return {name: value.detach() for name, value in weights.items()}


def _modules(layer: Any) -> tuple[nn.Module, ...]:
    """The modules of a ViT layer, in the order of _PARTS. transformers 5.17 and 5.23 name them differently."""
    before, after, attention = layer.layernorm_before, layer.layernorm_after, layer.attention
    if hasattr(layer, "mlp"):
        return (before, after, layer.mlp.fc1, layer.mlp.fc2,
                attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)  # fmt: skip
    inner = attention.attention
    return (before, after, layer.intermediate.dense, layer.output.dense,
            inner.query, inner.key, inner.value, attention.output.dense)  # fmt: skip


def _named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
