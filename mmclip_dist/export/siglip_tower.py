"""The form `siglip-tower`: the image encoder alone, as transformers' own SiglipVisionModel."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from mmclip_dist.data.transforms import PIXEL_DEVIATION, PIXEL_MEAN
from mmclip_dist.export.hf_folder import write_grey, write_json
from mmclip_dist.export.remote_code.modeling_mmclip import MMCLIPDualEncoder


def siglip_tower(encoder: MMCLIPDualEncoder) -> SiglipVisionModel:
    """The image encoder with three equal channels and a pooler that is the mean over patches [N, 3, S, S] -> [N, D].

    A SiglipVisionModel pools by attention. Queries and keys of 0 make that uniform, identities elsewhere make it the mean, and
    the MLP after it adds 0. The features are those before the projection to the space that images and texts share.
    """
    values = encoder.config.vision_config.to_dict() | {"num_channels": 3, "vision_use_head": True}
    tower = SiglipVisionModel(SiglipVisionConfig(**values))
    weights = dict(encoder.vision_model.state_dict())
    weights["embeddings.patch_embedding.weight"] = weights["embeddings.patch_embedding.weight"].expand(-1, 3, -1, -1) / 3
    tower.load_state_dict(weights | _mean_pooling(tower))
    return tower.eval()


def _mean_pooling(tower: SiglipVisionModel) -> dict[str, Tensor]:
    head = {name: torch.zeros_like(value) for name, value in tower.state_dict().items() if name.startswith("head.")}
    width = tower.config.hidden_size
    head["head.attention.in_proj_weight"][2 * width :] = torch.eye(width)
    head["head.attention.out_proj.weight"] += torch.eye(width)
    head["head.layernorm.weight"] += 1
    return head


def write_siglip_tower(folder: Path, encoder: MMCLIPDualEncoder) -> None:
    """Write weights, configuration, processor and grey.py. The processor converts nothing: it would clip 16-bit images at 255 and
    show what a transparent image hides, where `grey_image(image).convert("RGB")` gives the pixels of training."""
    folder.mkdir()
    write_grey(folder)
    siglip_tower(encoder).save_pretrained(folder, safe_serialization=True)
    side = encoder.config.vision_config.image_size
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "SiglipImageProcessor", "do_convert_rgb": False, "do_resize": True, "resample": 2,
            "size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": [PIXEL_MEAN] * 3, "image_std": [PIXEL_DEVIATION] * 3,
        },
    )  # fmt: skip
