"""The input of a plan: the run, its data and its machines (`Setup`), and the layout of the run on them (`Choice`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mmclip_dist.config import Config
from mmclip_dist.plan import cost
from mmclip_dist.plan.cards import Card

# DeepSpeed's default of zero_optimization.reduce_bucket_size, in parameters.
BUCKET = 5e8


@dataclass(frozen=True)
class Corpus:
    """What the plan must know of the data. Lengths are means of the computed lengths: padding counts unless it is skipped."""

    tokens: float = 45.0  # of a report; assumed: radiology reports are short
    masked: float = 10.0  # of them hidden by EntMLM
    paired: float = 1.0  # share of the samples that have a report
    diseases: int = 14
    prompt_tokens: float = 10.0
    vocabulary: int = 28_996  # Bio_ClinicalBERT
    sample_bytes: float = 64e3  # a 512-pixel JPEG and its report
    samples: int | None = None  # of one epoch


@dataclass(frozen=True)
class Choice:
    """How a run is laid out. micro_batch: samples of one rank in one pass; fewer than its share: gradient caching."""

    zero_stage: int
    micro_batch: int
    checkpoint_activations: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def overrides(self) -> list[str]:
        """As `key=value` for the command line, without switches that are off by default and stay off."""
        on = {
            "model.checkpoint_activations": ("true", self.checkpoint_activations),
            "offload.optimizer": ("cpu", self.offload_optimizer), "offload.parameters": ("cpu", self.offload_parameters),
        }  # fmt: skip
        found = [f"zero_stage={self.zero_stage}", f"optim.micro_batch={self.micro_batch}"]
        return found + [f"{key}={value}" for key, (value, chosen) in on.items() if chosen]


@dataclass(frozen=True)
class Setup:
    """A run and its machines. bucket: parameters that DeepSpeed reduces together. overlap: communication beside backward work,
    None: DeepSpeed's default (stage 3 alone)."""

    config: Config
    corpus: Corpus
    card: Card
    gpus: int
    per_node: int
    mfu: float
    bucket: float = BUCKET
    overlap: bool | None = None

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.per_node)

    @property
    def share(self) -> int:
        """Samples of one step on one rank."""
        return self.config.optim.global_batch // self.gpus

    @property
    def number(self) -> int:
        """Bytes of a weight, and of an activation."""
        return 4 if self.config.precision == "fp32" else 2

    @property
    def parameters(self) -> float:
        return cost.parameters(self.config, self.corpus.vocabulary)


def setup_of(
    config: Config, card: Card, gpus: int, *, corpus: Corpus = Corpus(), per_node: int | None = None, mfu: float | None = None
) -> Setup:
    """The input of a plan. ValueError if the run cannot be spread over so many GPUs."""
    per_node = per_node or card.per_node
    if gpus > per_node and gpus % per_node:
        low = gpus // per_node * per_node
        raise ValueError(
            f"{gpus} GPUs do not fill nodes of {per_node}; use {low} or {low + per_node}, or set --per-node to what a node has"
        )
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"--mfu is a share of the card's peak, between 0 and 1; found {mfu}")
    if config.optim.global_batch % gpus:
        low = config.optim.global_batch // gpus * gpus
        near = " or ".join(str(batch) for batch in (low, low + gpus) if batch)
        raise ValueError(f"optim.global_batch={config.optim.global_batch} does not divide over {gpus} GPUs; set it to {near}")
    config.check_world(gpus)
    zero: dict[str, Any] = config.deepspeed.get("zero_optimization", {})
    return Setup(
        config, corpus, card, gpus, per_node, mfu or card.mfu,
        bucket=float(zero.get("reduce_bucket_size", BUCKET)), overlap=zero.get("overlap_comm"),
    )  # fmt: skip


def configured(config: Config, gpus: int) -> Choice:
    """The layout that the configuration asks for. Only this function reads it."""
    return Choice(
        config.zero_stage, config.optim.micro_batch or config.optim.global_batch // gpus, config.model.checkpoint_activations,
        config.offload.optimizer == "cpu", config.offload.parameters == "cpu",
    )  # fmt: skip


def load_of(setup: Setup, choice: Choice) -> cost.Load:
    """One pass of one rank."""
    corpus, sources = setup.corpus, setup.config.data.sources
    known = bool(sources) and all(source.attention for source in sources)
    return cost.Load(
        choice.micro_batch, choice.micro_batch * corpus.paired, corpus.tokens, corpus.masked, 2 * corpus.diseases,
        corpus.prompt_tokens, corpus.vocabulary, setup.config.optim.global_batch * corpus.paired, scored=0.0 if known else 1.0,
    )  # fmt: skip
