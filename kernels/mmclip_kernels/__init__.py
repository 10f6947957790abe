"""Losses for contrastive pretraining on large, distributed batches. Imports nothing of mmclip_dist."""

from mmclip_kernels.contrastive import contrastive_loss
from mmclip_kernels.ranks import gather_with_gradient

__all__ = ["contrastive_loss", "gather_with_gradient"]
