"""What the step benchmark compares: encoders of a shape, synthetic batches, and one training step of each variant.

All variants train the same encoders on the same images and reports:

    plain CLIP        whole images, every text padded to `model.text.max_tokens`, one B x B cross-entropy each way
    contrastive only  our step with loss.image = loss.entity = 0: reports share rows, equal reports are positives of each other
    MMCLIP feature    all three losses; whole images, half of the features hidden from the image decoder
    MMCLIP split      all three losses; half of the patches in one view, a quarter in the other
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from mmclip_shards.chunks import Tally
from torch import Tensor, nn
from torch.nn import functional as F

from mmclip_dist.config import Config, load_config
from mmclip_dist.data.batch import Batch, Example, collate, to_device
from mmclip_dist.data.entity_mask import masked_tokens
from mmclip_dist.engine.gradient_cache import weighted_sum
from mmclip_dist.model.encoders import pool
from mmclip_dist.model.mmclip import MMCLIP

PLAIN = "plain CLIP"
_WHOLE = ("attmim.share=1", "entmlm.share=1", "entmlm.input=encoder", "entmlm.probability=0.5")
VARIANTS: dict[str, tuple[str, ...]] = {
    PLAIN: ("loss.image=0", "loss.entity=0"),
    "contrastive only": ("loss.image=0", "loss.entity=0"),
    "MMCLIP context": (
        "attmim.mode=context", "attmim.share=0.125", "entmlm.share=0.25", "entmlm.input=embeddings", "entmlm.probability=1",
    ),
    "MMCLIP feature": ("attmim.mode=feature", *_WHOLE),
    "MMCLIP split": ("attmim.mode=split", "attmim.salient_keep=0.5", "attmim.context_keep=0.25", *_WHOLE),
}  # fmt: skip
DISEASES = 14
_FIRST_WORD, _MASK_TOKEN = 5, 4  # the token ids below are special ones


@dataclass(frozen=True)
class Shape:
    """A recipe with overrides, the size of the vocabulary, samples of a step, and the words of the results table."""

    recipe: str
    overrides: tuple[str, ...]
    vocabulary: int
    batch: int
    told: str


SHAPES = {
    "vit_b16": Shape("mmclip_vit_b16", (), 28996, 256, "ViT-B/16 at 224, BERT-base, the recipe's decoders"),
    "vit_l16": Shape("mmclip_vit_l16", (), 28996, 128, "ViT-L/16 at 224, BERT-base, the recipe's decoders"),
    # Both encoders and both decoders at a third of ViT-B/16's width and half of its depth.
    "small": Shape(
        "mmclip_vit_b16",
        (
            "model.image={width: 256, depth: 6, heads: 4}", "model.text={width: 256, depth: 6, heads: 4}",
            "attmim.decoder={width: 176, depth: 2, heads: 4}", "entmlm.decoder={width: 176, depth: 1, heads: 4}",
        ),
        8192, 16, "width 256, depth 6, 4 heads for ViT (224/16) and BERT; decoders of width 176, depth 2 (image) and 1 (text)",
    ),
    "tiny": Shape(
        "mmclip_vit_b16",
        (
            "model.image={size: 32, patch: 8, width: 32, depth: 1, heads: 2}",
            "model.text={width: 32, depth: 1, heads: 2, max_tokens: 24}",
            "attmim.decoder={width: 32, depth: 1, heads: 2}", "entmlm.decoder={width: 32, depth: 1, heads: 2}",
        ),
        100, 4, "for tests",
    ),
}  # fmt: skip


def config_of(shape: Shape, variant: str, device: torch.device, batch: int) -> Config:
    """bf16 and our Triton kernels on a card, fp32 and torch on a CPU."""
    kind = ("precision=bf16", "loss.impl=triton") if device.type == "cuda" else ("precision=fp32", "loss.impl=torch")
    sizes = (f"optim.global_batch={batch}", "data.streams=1", "zero_stage=1")
    return load_config(shape.recipe, [*shape.overrides, *kind, *sizes, *VARIANTS[variant]])


def build(shape: Shape, variant: str, device: torch.device, batch: int) -> MMCLIP:
    """Random weights and prompts: two templates of 2C texts."""
    torch.manual_seed(0)
    lengths = 6 + torch.arange(2 * DISEASES) % 5
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).expand(2, -1, -1)
    tokens = torch.randint(_FIRST_WORD, shape.vocabulary, mask.shape).where(mask, 0)
    config = config_of(shape, variant, device, batch)
    model = MMCLIP(config, vocabulary=shape.vocabulary, prompt_tokens=tokens, prompt_mask=mask).train()
    return model.to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)


def without_idle_parts(model: MMCLIP) -> MMCLIP:
    """The model without decoders whose loss has no weight: what such a step needs in memory."""
    idle = [("image_decoder", model.config.loss.image), ("text_decoder", model.config.loss.entity)]
    for name, weight in idle:
        if not weight:
            delattr(model, name)
    return model


# -- Batches ----------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A batch, and the texts of plain CLIP [B, max_tokens], where an unpaired image has a prompt for a report."""

    batch: Batch
    tokens: Tensor
    mask: Tensor


def report_lengths(random: np.random.Generator, count: int, longest: int) -> np.ndarray:
    """Tokens of reports, skewed as those of radiology are: mean 0.4 of the longest allowed (45 of 112). -> [count] int64"""
    drawn = 0.365 * longest * np.exp(0.45 * random.standard_normal(count))
    return np.clip(drawn.round(), 6, longest).astype(np.int64)


def make_sample(model: MMCLIP, shape: Shape, count: int, unpaired: float, seed: int, device: torch.device) -> Sample:
    """unpaired: share of images without a report, which have labels of 14 diseases. All have attention scores."""
    config, random = model.config, np.random.default_rng(seed)
    longest = config.model.text.max_tokens
    lengths = report_lengths(random, count, longest)
    lengths[: round(unpaired * count)] = 0
    examples = [_example(row, int(length), config, shape.vocabulary, random) for row, length in enumerate(lengths)]
    batch = collate(examples, 0, 0)
    tokens, mask = (F.pad(batch[name], (0, longest - batch["tokens"].shape[1])) for name in ("tokens", "token_mask"))
    room = (0, longest - model.prompt_tokens.shape[2])
    prompt, prompt_mask = F.pad(model.prompt_tokens[0].cpu(), room), F.pad(model.prompt_mask[0].cpu(), room)
    bare, which = ~mask.any(1), torch.arange(count) % (2 * DISEASES)
    tokens[bare], mask[bare] = prompt[which[bare]], prompt_mask[which[bare]]
    return Sample(to_device(batch, device), tokens.to(device), mask.to(device))


def _example(row: int, length: int, config: Config, vocabulary: int, random: np.random.Generator) -> Example:
    image, grid = config.model.image, config.model.image.grid
    tokens = random.integers(_FIRST_WORD, vocabulary, max(1, length))
    words = np.arange(len(tokens)) if length else np.full(1, -1)
    # An entity of one to three tokens for every eight, as scispaCy finds them in reports; each is masked with probability 0.5.
    starts = np.arange(1, length - 3, 8)
    entities = [np.arange(start, start + 1 + random.integers(3)) for start in starts]
    options = config.entmlm
    hidden = masked_tokens(words, entities, random, probability=options.probability, word_probability=options.word_probability)
    evidence = np.isin(np.arange(len(tokens)), np.concatenate([[-1], *entities]))
    return {
        "key": f"sample-{row}",
        "image": torch.from_numpy(random.standard_normal((1, image.size, image.size), dtype=np.float32)),
        "tokens": torch.from_numpy(tokens if length else np.zeros(1, dtype=np.int64)),
        "token_mask": torch.full((len(tokens),), bool(length)),
        "masked_tokens": torch.from_numpy(np.where(hidden, _MASK_TOKEN, tokens)),
        "target_tokens": torch.from_numpy(np.where(hidden, tokens, -100)),
        "evidence": torch.from_numpy(evidence),
        "report_id": row if length else -1,
        "labels": torch.from_numpy(random.integers(0, 2, DISEASES)),
        "attention": torch.from_numpy(random.random((grid, grid), dtype=np.float32)),
        "has_attention": True,
        "noise": torch.from_numpy(random.random(grid**2, dtype=np.float32)),
        "lot": np.float32(random.random()),
        "replaced": [],
        "reading": Tally(),
    }


# -- Steps ------------------------------------------------------------------------------------------------------------


class AdamW:
    """torch's fused AdamW; of half-precision weights, on fp32 copies, as ZeRO keeps them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        full = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
        self.pairs = list(zip(parameters, full, strict=True))
        self.adam = torch.optim.AdamW(full, lr=1e-6, fused=True)

    def step(self) -> None:
        """One step; gradients are freed afterwards, and weights without a gradient do not change."""
        for weight, full in self.pairs:
            if weight is not full:
                full.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        self.adam.step()
        copied = [pair for pair in self.pairs if pair[0] is not pair[1] and pair[1].grad is not None]
        if copied:
            torch._foreach_copy_([weight.detach() for weight, _ in copied], [full for _, full in copied])
        self.adam.zero_grad()


def loss_of(model: MMCLIP, variant: str, sample: Sample) -> Tensor:
    """Scalar loss of `sample`, with the inputs that the variant uses."""
    if variant == PLAIN:
        return plain_clip_loss(model, sample)
    return weighted_sum(model(sample.batch), model.config.loss)


def plain_clip_loss(model: MMCLIP, sample: Sample) -> Tensor:
    """As CLIP is usually run: each image against every text, each text against every image; all texts are padded alike."""
    features = model.text.bert(input_ids=sample.tokens, attention_mask=sample.mask.long()).last_hidden_state
    text = F.normalize(model.text_head(pool(features, sample.mask)), dim=-1)
    logits = (model.scale() * model.embed_images(sample.batch["image"]) @ text.T).float()
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def seconds(device: torch.device) -> float:
    """Seconds: wall time after a device synchronisation on a card, processor time of this process on a CPU."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def run_step(model: MMCLIP, optimizer: AdamW, variant: str, sample: Sample) -> None:
    loss_of(model, variant, sample).backward()
    optimizer.step()
