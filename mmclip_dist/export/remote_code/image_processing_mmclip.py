"""Images of an exported MMCLIP model: any PNG or JPEG to one grey channel, as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mmclip_shards.grey import FORMATS, grey_array, grey_image
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin


class MMCLIPImageProcessor(ImageProcessingMixin):
    """Grey, upright, resized to `size` x `size` pixels whatever the sides' ratio, scaled to [0, 1], normalised."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' own form)

    def __init__(self, size: int = 224, image_mean: float = 0.5, image_std: float = 0.25, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.image_mean, self.image_std = size, image_mean, image_std

    def __call__(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Files, Pillow images or arrays [height, width], one or a list -> pixel_values [N, 1, size, size] float32."""
        images = images if isinstance(images, list | tuple) else [images]
        return BatchFeature({"pixel_values": np.stack([self._pixels(image) for image in images])}, tensor_type=return_tensors)

    def _pixels(self, image: Any) -> np.ndarray:
        if isinstance(image, str | Path):
            with Image.open(image, formats=FORMATS) as opened:
                grey = grey_image(opened)
        else:
            grey = grey_image(image) if isinstance(image, Image.Image) else grey_array(np.asarray(image))
        resized = grey.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return ((np.asarray(resized, dtype=np.float32) / 255 - self.image_mean) / self.image_std)[None]
