"""Kernels of masked contrastive pretraining on large, distributed batches. Imports nothing of mmclip_dist."""

from mmclip_kernels.contrastive import contrastive_loss
from mmclip_kernels.implementation import check_impl
from mmclip_kernels.ranks import gather_with_gradient
from mmclip_kernels.topk_mask import SplitViews, TopkMask, attention_scores, attention_split_views, attention_topk_mask

__all__ = [
    "SplitViews", "TopkMask", "attention_scores", "attention_split_views", "attention_topk_mask", "check_impl",
    "contrastive_loss", "gather_with_gradient",
]  # fmt: skip

__version__ = "0.1.0"
