"""The cost of one pass of the objective: FLOPs, bytes that autograd keeps, bytes that move. Pure arithmetic.

A pass is a list of pieces, in the order in which `MMCLIP.forward` computes them. FLOPs, activation memory and memory traffic
are sums over that one list, so that they always count the same work.

Letters: N rows, L tokens or patches of a row, S of what a decoder looks at, D width, e bytes of a number. What a layer keeps for
its backward pass was read off autograd (`saved_tensors_hooks`, transformers 5.23, torch 2.13) and is checked by
tests/plan/test_cost.py against what is really allocated:

  encoder layer   16 D of each token: two layer norms (input and output) 4, query, key and value 3, attention's output 1,
                  MLP 8 = 2 x 4; four statistics of the norms, and one float32 log-sum-exp a head
  decoder layer   20 D of each query token: three layer norms 6, self-attention 4, cross-attention 2, MLP 8; 3 D of each
                  token looked at (its copy in the order that attention wants, key, value)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mmclip_dist.config import Config, Decoder, Loss, TextEncoder

Kind = Literal["activations", "loss"]

# Logits of the contrastive loss that exist at once: `BLOCK` of contrastive_torch (six float32 copies of it are alive), and
# what the Triton path bounds itself to.
_TORCH_BLOCK, _TRITON_BYTES = (512, 1024), 128 * 2**20


@dataclass(frozen=True)
class Load:
    """What one rank computes in one pass. Lengths are means of the computed lengths: padding counts unless it is skipped.

    reports: images that have one. tokens: of a report. masked: tokens of a report that EntMLM hides. prompts: 2C disease
    prompts, of prompt_tokens each. texts: of the whole global batch, for the contrastive loss. scored: share of the passes
    that compute attention scores (they have no sidecar).
    """

    images: int
    reports: float
    tokens: float
    masked: float
    prompts: int
    prompt_tokens: float
    vocabulary: int
    texts: float
    scored: float = 0.0


@dataclass(frozen=True)
class Piece:
    """Equal layers in a row. Figures are of one layer: forward FLOPs, parameters, bytes.

    saved: kept for backward. work: allocated beyond `saved` while its backward pass runs. boundary: its input, which is all
    that a checkpointed layer keeps; 0: never checkpointed. moved: read and written by element-wise work, both passes.
    backward: FLOPs of the backward pass over those of the forward one. again: computed in both passes of gradient caching.
    shares: the earlier piece whose weights it uses.
    """

    name: str
    flops: float = 0.0
    parameters: float = 0.0
    saved: float = 0.0
    work: float = 0.0
    boundary: float = 0.0
    moved: float = 0.0
    layers: int = 1
    backward: float = 2.0
    kind: Kind = "activations"
    again: bool = True
    shares: str | None = None


def pieces(config: Config, load: Load, number: int) -> tuple[Piece, ...]:
    """All pieces of a pass in forward order; `number`: bytes of a weight and of an activation (2 or 4)."""
    weights, image = config.loss, config.model.image
    return (
        *_report_encoder("reports", config.model.text, load.reports, load.tokens, load.vocabulary, number),
        *_report_encoder("prompts", config.model.text, load.prompts, load.prompt_tokens, load.vocabulary, number),
        Piece(
            "patches", flops=2.0 * load.images * image.grid**2 * image.patch**2 * image.width, backward=1.0,
            parameters=(image.patch**2 + image.grid**2 + 3) * image.width,
            saved=load.images * image.size**2 * number if number != 4 else 0.0,  # in float32 the batch's own tensor is used
            work=load.images * image.grid**2 * image.width * number,
        ),
        *_image_encoder(config, load, number),
        *([_scores(config, load)] if _rebuilds(config) and _scores_patches(config) else []),
        _shared_space(config, load, number),
        *([_contrastive(config, load)] if weights.contrastive else []),
        *(_attmim(config, load, number) if _rebuilds(config) else ()),
        *(_entmlm(config, load, number) if weights.entity else ()),
    )  # fmt: skip


def parameters(config: Config, vocabulary: int) -> float:
    """Parameters of the whole model, trained or not: ZeRO shards and steps all of them."""
    load = Load(1, 1, 1, 1, 1, 1, vocabulary, 1)
    everything = config.model_copy(update={"loss": Loss(contrastive=1, image=1, entity=1)})
    return sum(p.parameters * p.layers for p in pieces(everything, load, 4) if p.shares is None)


def _rebuilds(config: Config) -> bool:
    return config.loss.image > 0


def _scores_patches(config: Config) -> bool:
    return config.attmim.mode == "feature" or (config.attmim.mode == "context" and config.attmim.guide == "attention")


def _encoder_layer(name: str, rows: float, length: float, width: int, heads: int, depth: int, number: int, masked: bool) -> Piece:
    tokens = rows * length
    return Piece(
        name, flops=24.0 * width**2 * tokens + 4.0 * tokens * length * width, parameters=12.0 * width**2 + 13 * width,
        saved=tokens * ((16 * width + 4) * number + 4 * heads) + masked * rows * length**2 * number,
        # The gradient of the residual stream, and those of the MLP's hidden layer before and after its GELU.
        work=9.0 * tokens * width * number, boundary=1.0 * tokens * width * number,
        # Norms 4 D, residual sums 6 and GELU 8 forward; 8, 6 and 12 backward.
        moved=44.0 * tokens * width * number, layers=depth,
    )  # fmt: skip


def _decoder_layer(name: str, config: Decoder, rows: float, length: float, seen: float, number: int) -> Piece:
    width, tokens, looked_at = config.width, rows * length, rows * (seen + 1)  # one slot that is always visible
    return Piece(
        name, flops=28.0 * width**2 * tokens + 4.0 * width**2 * looked_at + 4.0 * tokens * (length + seen + 1) * width,
        parameters=16.0 * width**2 + 19 * width,
        saved=(20.0 * tokens + 3 * looked_at) * width * number + 6 * tokens * number + 8 * config.heads * tokens,
        work=(9.0 * tokens + 3 * looked_at) * width * number,
        boundary=(tokens + looked_at / config.depth) * width * number,  # all layers look at the same tokens
        # As above, with a third norm and sum, and the copies that attention makes to reorder dimensions.
        moved=(67.0 * tokens + 8 * looked_at) * width * number, layers=config.depth, again=False,
    )  # fmt: skip


def _report_encoder(name: str, text: TextEncoder, rows: float, length: float, vocabulary: int, number: int) -> Iterator[Piece]:
    if rows == 0:
        return
    tokens, table = rows * length, (vocabulary + max(512, text.max_tokens) + 2) * text.width
    shares = None if name == "reports" else "reports"
    yield Piece(
        f"{name}: embedding", parameters=table + 2 * text.width, shares=shares and f"{shares}: embedding",
        saved=tokens * ((text.width + 2) * number + 16), work=table * number, moved=8.0 * tokens * text.width * number,
    )  # fmt: skip
    layer = _encoder_layer(name, rows, length, text.width, text.heads, text.depth, number, masked=True)
    yield replace(layer, shares=shares)


def _image_encoder(config: Config, load: Load, number: int) -> Iterator[Piece]:
    image, patches = config.model.image, config.model.image.grid**2
    views: tuple[tuple[str, float, float], ...] = (("image", load.images, patches),)
    if config.attmim.mode != "feature" and _rebuilds(config):
        kept = config.attmim.views(patches)
        whole = ("salient view", load.images, kept[0]) if config.attmim.mode == "split" else views[0]
        views = (whole, ("context view", load.images * config.shares[0], kept[1]))
    for index, (name, rows, length) in enumerate(views):
        layer = _encoder_layer(name, rows, length, image.width, image.heads, image.depth, number, masked=False)
        norm = Piece(
            f"{name}: norm", parameters=2.0 * image.width, saved=rows * length * (image.width + 2) * number,
            work=2.0 * rows * length * image.width * number,
        )  # fmt: skip
        for piece in (layer, norm):
            yield piece if index == 0 else replace(piece, again=False, shares=piece.name.replace(name, views[0][0]))


def _scores(config: Config, load: Load) -> Piece:
    """Attention of every patch to every word, in float32 and without gradient. Both are embedded even if scores are known."""
    patches, words, embed = config.model.image.grid**2, load.tokens + load.prompts, config.model.embed
    embedding, rows = words * config.model.text.width + patches * config.model.image.width, load.images * config.shares[0]
    return Piece(
        "attention scores", flops=2.0 * embed * rows * (embedding + load.scored * patches * words), backward=0.0,
        again=False, work=3.0 * rows * patches * words * 4 * load.scored,
    )  # fmt: skip


def _shared_space(config: Config, load: Load, number: int) -> Piece:
    image, text, embed = config.model.image, config.model.text, config.model.embed
    texts = load.reports + load.prompts
    return Piece(
        "heads", flops=2.0 * embed * (load.images * image.width + texts * text.width),
        parameters=(image.width + text.width) * embed + 1 + image.width,  # with the temperature and the mask token
        saved=(load.images * (image.width + 3 * embed) + texts * (text.width + 3 * embed)) * number,
    )  # fmt: skip


def _contrastive(config: Config, load: Load) -> Piece:
    """1 u forward and 3 u backward, u = one product of all images of this rank with all texts of the batch."""
    embed = config.model.embed
    block = 6.0 * 4 * min(load.images, _TORCH_BLOCK[0]) * min(load.texts, _TORCH_BLOCK[1])
    if config.loss.impl != "torch":
        block = min(_TRITON_BYTES, 2.0 * load.images * load.texts)
    return Piece(
        "contrastive loss", flops=2.0 * load.images * load.texts * embed, backward=3.0, kind="loss", again=False,
        saved=4.0 * 2 * load.images * embed, work=block + 2.0 * 4 * load.texts * embed,
    )  # fmt: skip


def _attmim(config: Config, load: Load, number: int) -> Iterator[Piece]:
    image, text, decoder, rows = config.model.image, config.model.text, config.attmim.decoder, load.images * config.shares[0]
    patches, words = image.grid**2, load.tokens + load.prompts
    inputs = rows * (patches * image.width + words * text.width)
    yield Piece(
        "image decoder: inputs", flops=2.0 * decoder.width * inputs, again=False, saved=inputs * number, work=inputs * number,
        parameters=(image.width + text.width + patches + 3) * decoder.width,
    )  # fmt: skip
    yield _decoder_layer("image decoder", decoder, rows, patches, words, number)
    pixels = image.patch**2
    yield Piece(
        "pixels", flops=2.0 * rows * patches * decoder.width * pixels, kind="loss", again=False,
        parameters=(decoder.width + 1) * pixels + 2 * decoder.width,
        saved=rows * patches * ((2 * decoder.width + 2) * number + 4 * pixels), work=8.0 * rows * patches * pixels,
    )  # fmt: skip


def _entmlm(config: Config, load: Load, number: int) -> Iterator[Piece]:
    image, text, decoder, rows = config.model.image, config.model.text, config.entmlm.decoder, load.reports * config.shares[1]
    for piece in _report_encoder("masked reports", text, rows, load.tokens, load.vocabulary, number):
        if config.entmlm.input == "encoder" or piece.name.endswith("embedding"):
            yield replace(piece, again=False)
    patches = image.grid**2
    if config.attmim.mode == "split" and _rebuilds(config):
        patches = sum(config.attmim.views(patches))
    inputs = rows * (load.tokens * text.width + patches * image.width)
    yield Piece(
        "text decoder: inputs", flops=2.0 * decoder.width * inputs, again=False, saved=inputs * number, work=inputs * number,
        parameters=(text.width + image.width + text.max_tokens + 3) * decoder.width,
    )  # fmt: skip
    yield _decoder_layer("text decoder", decoder, rows, load.tokens, patches, number)
    hidden = rows * load.masked
    yield Piece(
        "words", flops=2.0 * hidden * decoder.width * load.vocabulary, kind="loss", again=False,
        parameters=(decoder.width + 1) * load.vocabulary + 2 * decoder.width,
        saved=rows * load.tokens * (decoder.width + 2) * number + hidden * (decoder.width * number + 4 * load.vocabulary),
        work=8.0 * hidden * load.vocabulary,
    )  # fmt: skip


def forward_flops(found: tuple[Piece, ...]) -> float:
    return sum(p.flops * p.layers for p in found)


def training_flops(found: tuple[Piece, ...]) -> float:
    """Model FLOPs of forward and backward, as MFU counts them: without recomputed work."""
    return sum(p.flops * p.layers * (1 + p.backward) for p in found)


def recomputed_flops(found: tuple[Piece, ...], *, checkpointed: bool, cached: bool) -> float:
    """FLOPs of forward work that is repeated: layers of activation checkpointing, encoders of gradient caching."""
    once_more = sum(p.flops * p.layers for p in found if p.boundary and checkpointed)
    return once_more + (sum(p.flops * p.layers for p in found if p.again) if cached else 0.0)


def checkpointed(found: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The pieces under activation checkpointing: layers keep only inputs, and backward recomputes one layer at a time."""
    return tuple(replace(p, saved=p.boundary, work=p.work + p.saved) if p.boundary else p for p in found)


@dataclass(frozen=True)
class Moment:
    """Bytes at the fullest moment of the backward pass."""

    activations: float
    loss: float
    workspace: float
    gradients: float

    @property
    def total(self) -> float:
        return self.activations + self.loss + self.workspace + self.gradients


def fullest(found: tuple[Piece, ...], number: int, *, most_gradients: float) -> Moment:
    """Walk the backward pass: kept activations shrink layer by layer while gradients grow, up to `most_gradients` bytes.

    Gradients of weights that serve several passes (the text encoder, the ViT in split mode) come on top: they cannot be
    reduced before the last of these passes.
    """
    kept = {"activations": 0.0, "loss": 0.0}
    for piece in found:
        kept[piece.kind] += piece.saved * piece.layers
    left = Counter(piece.shares or piece.name for piece in found)
    gradients = waiting = 0.0
    top = Moment(0.0, 0.0, 0.0, 0.0)
    seen: set[str] = set()
    for piece in reversed(found):
        weights = piece.shares or piece.name
        left[weights] -= 1
        for _ in range(piece.layers):
            there = waiting + min(gradients - waiting, most_gradients)
            top = max(top, Moment(kept["activations"], kept["loss"], piece.work, there), key=lambda m: m.total)
            kept[piece.kind] -= piece.saved
            if weights not in seen:
                gradients += piece.parameters * number
                waiting += piece.parameters * number if left[weights] else 0.0
            elif not left[weights]:
                waiting -= piece.parameters * number
        seen.add(weights)
    end = Moment(0.0, 0.0, 0.0, min(gradients, most_gradients))
    return max(top, end, key=lambda m: m.total)
