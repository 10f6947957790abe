"""Configuration of an exported MMCLIP model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig, SiglipVisionConfig


class MMCLIPConfig(PretrainedConfig):
    """vision_config: of a `SiglipVisionModel`; text_config: of any BERT-family encoder; projection_dim: of the shared space;
    max_tokens: of a text; attention_temperature: of `patch_scores`; format_version: of the exported folder."""

    model_type = "mmclip"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": AutoConfig}  # noqa: RUF012 (transformers' own form)

    def __init__(
        self, vision_config: Any = None, text_config: Any = None, projection_dim: int = 256, max_tokens: int = 112,
        attention_temperature: float = 0.1, format_version: int = 1, **kwargs: Any,
    ) -> None:  # fmt: skip
        if not isinstance(vision_config, SiglipVisionConfig):
            vision_config = SiglipVisionConfig(**(vision_config or {}))
        if not isinstance(text_config, PretrainedConfig):
            text_config = dict(text_config or {"model_type": "bert"})
            text_config = AutoConfig.for_model(text_config.pop("model_type"), **text_config)
        self.vision_config, self.text_config, self.projection_dim = vision_config, text_config, projection_dim
        self.max_tokens, self.attention_temperature = max_tokens, attention_temperature
        self.format_version = format_version
        super().__init__(**kwargs)
