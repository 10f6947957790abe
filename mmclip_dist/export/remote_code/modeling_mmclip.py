"""An exported MMCLIP model: two encoders and a shared space, for inference. Needs PyTorch and transformers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel, SiglipVisionModel
from transformers.utils import ModelOutput

from .configuration_mmclip import MMCLIPConfig


@dataclass
class MMCLIPOutput(ModelOutput):
    """logits_per_image [N, M], logits_per_text [M, N]: scaled cosines. text_embeds [M, E], image_embeds [N, E]: of length 1."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class MMCLIPDualEncoder(PreTrainedModel):
    """Features of an image are the mean over its patches, those of a text the mean over its tokens: there is no class token."""

    config_class = MMCLIPConfig
    base_model_prefix = "mmclip"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: MMCLIPConfig) -> None:
        super().__init__(config)
        self.vision_model = SiglipVisionModel(config.vision_config)
        self.text_model = AutoModel.from_config(config.text_config, add_pooling_layer=False)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.post_init()

    def get_patch_features(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [N, 1, S, S] -> features of all patches in the shared space [N, P, E], not normalised."""
        features: Tensor = self.visual_projection(self.vision_model(pixel_values=pixel_values).last_hidden_state)
        return features

    def get_word_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask [M, T] -> features of all tokens in the shared space [M, T, E], not normalised."""
        encoded = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        features: Tensor = self.text_projection(encoded)
        return features

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """pixel_values [N, 1, S, S] -> features of whole images [N, E], not normalised."""
        return self.get_patch_features(pixel_values).mean(1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """input_ids, attention_mask [M, T] -> features of whole texts [M, E], not normalised."""
        words = self.get_word_features(input_ids, attention_mask)
        weight = attention_mask[:, :, None].to(words.dtype)
        return (words * weight).sum(1) / weight.sum(1).clamp(min=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, **kwargs: Any) -> MMCLIPOutput:
        """N images and M texts -> `MMCLIPOutput`."""
        images = F.normalize(self.get_image_features(pixel_values), dim=-1)
        texts = F.normalize(self.get_text_features(input_ids, attention_mask), dim=-1)
        logits = self.logit_scale.exp() * images @ texts.T
        return MMCLIPOutput(logits_per_image=logits, logits_per_text=logits.T, text_embeds=texts, image_embeds=images)
