"""A classifier on the image encoder of a trained model: what fine-tuning trains.

Shape letters: B samples of this rank, P patches, S pixels a side, D width of the encoder, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mmclip_dist.config import Config, FineTune
from mmclip_dist.data.batch import Batch
from mmclip_dist.model.encoders import ImageTower


class Weights(NamedTuple):
    """Weights of the losses, as `engine.gradient_cache.forward_backward` takes them: there is one, and nothing to contrast."""

    classification: float = 1.0
    contrastive: float = 0.0


class Classifier(nn.Module):
    """Image encoder, mean of the patches, and a linear head; its random weights come from `config.seed` alone.

    image: the encoder, which becomes part of this model.
    """

    def __init__(self, config: Config, image: ImageTower) -> None:
        super().__init__()
        assert config.finetune is not None
        self.config, self.options = config, config.finetune
        self.image = image
        self.norm: nn.Module = nn.LayerNorm(image.width) if self.options.head_norm else nn.Identity()
        self.head = nn.Linear(image.width, len(self.options.classes))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            nn.init.trunc_normal_(self.head.weight, std=self.options.head_deviation)
        nn.init.zeros_(self.head.bias)

    @property
    def encoders(self) -> tuple[ImageTower, ...]:
        return (self.image,)

    def save_shapes(self, folder: Path) -> None:
        """Write the encoder's shape."""
        self.image.vit.config.save_pretrained(folder / "image")

    def logits(self, image: Tensor, chance: Tensor | None = None) -> Tensor:
        """image [B, 1, S, S] -> [B, C]. chance [B, at least a column for each layer] in [0, 1): chooses the layers that an image
        passes by, in training with `drop_path`; None: none."""
        patches = self.image.embed(image.to(self.head.weight.dtype))
        if chance is None:
            seen = self.image.encode(patches)
        else:
            layers, most = self.image.layers, self.options.drop_path
            for depth, layer in enumerate(layers):
                kept = 1 - most * depth / max(len(layers) - 1, 1)
                through = (chance[:, depth] < kept).to(patches.dtype)[:, None, None] / kept
                patches = patches + (layer(patches) - patches) * through
            seen = self.image.vit.layernorm(patches)
        found: Tensor = self.head(self.norm(seen.mean(1)))
        return found

    def forward(self, batch: Batch, part: object | None = None) -> dict[str, Tensor]:
        """The loss of one batch, "classification", whose mean over the ranks is that of the global batch. part: that the batch is
        a part of this rank's; its loss is its share either way.

        The chance of `drop_path` is the sample's own noise, so that a step is a function of its samples.
        """
        chance = batch["noise"] if self.training and self.options.drop_path else None
        logits = self.logits(batch["image"], chance).float()
        world = dist.get_world_size() if dist.is_initialized() else 1
        share = self.config.optim.global_batch / world
        return {"classification": label_loss(logits, batch["labels"], self.options) / share}

    def prepared(self, batch: Batch) -> Batch:
        """The batch itself: nothing of other ranks is needed."""
        return batch


def label_loss(logits: Tensor, labels: Tensor, options: FineTune) -> Tensor:
    """logits [B, C], labels [B, C] (1 present, 0 absent, -1 unknown) -> the sum over the samples, [].

    Binary cross-entropy, the mean over the classes, in which an unknown label counts as 0; so every known label has the same
    weight in every batch. For classes that exclude each other: cross-entropy, 0 for an image that is not known to have one.
    """
    smoothing = options.smoothing
    if options.exclusive:
        known = (labels == 1).sum(1) == 1
        each = F.cross_entropy(logits, labels.argmax(1), reduction="none", label_smoothing=smoothing)
        return (each * known).sum()
    target = labels.clamp(min=0).to(logits.dtype) * (1 - smoothing) + smoothing / 2
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (each * (labels >= 0)).sum() / labels.shape[1]
