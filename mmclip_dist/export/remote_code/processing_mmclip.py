"""Images and texts of an exported MMCLIP model, together."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature, ProcessorMixin


class MMCLIPProcessor(ProcessorMixin):
    """An image processor and a tokenizer that cuts texts to the model's length."""

    def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(self, images: Any = None, text: Any = None, return_tensors: str = "pt", **kwargs: Any) -> BatchFeature:
        """-> pixel_values of the images, input_ids and attention_mask of the texts."""
        values: dict[str, Any] = {}
        if text is not None:
            encoded = self.tokenizer(
                text, padding=True, truncation=True, return_token_type_ids=False, return_tensors=return_tensors
            )
            values |= dict(encoded)
        if images is not None:
            values |= dict(self.image_processor(images, return_tensors=return_tensors))
        return BatchFeature(values)
