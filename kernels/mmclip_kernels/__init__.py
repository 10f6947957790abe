"""Kernels of masked contrastive pretraining over large, distributed batches, in PyTorch and in Triton.

    from mmclip_kernels import attention_topk_mask, contrastive_loss

    # image, text [B, E] of this rank, L2-normalised: the loss of all ranks' pairs, each logit computed once.
    loss = contrastive_loss(image, text, scale, impl="triton", group=torch.distributed.group.WORLD)

    # Hide the half of patches [B, P, D] that responds most to the words [B, T, D]; keep the others.
    kept = attention_topk_mask(patches, words, word_mask, ratio=0.5, impl="triton").visible

`ClipLoss` and `SigLipLoss` take the place of open_clip's classes.

impl="torch" runs on every device, impl="triton" on CUDA tensors; one that cannot run is a ValueError. `mmclip_kernels.reference`
holds the definitions. Imports nothing of mmclip_dist.
"""

from mmclip_kernels.contrastive import contrastive_loss
from mmclip_kernels.implementation import check_impl
from mmclip_kernels.losses import ClipLoss, SigLipLoss
from mmclip_kernels.ranks import gather_with_gradient
from mmclip_kernels.topk_mask import SplitViews, TopkMask, attention_scores, attention_split_views, attention_topk_mask

__all__ = [
    "ClipLoss", "SigLipLoss", "SplitViews", "TopkMask", "__version__", "attention_scores", "attention_split_views",
    "attention_topk_mask", "check_impl", "contrastive_loss", "gather_with_gradient",
]  # fmt: skip

__version__ = "0.1.0"
