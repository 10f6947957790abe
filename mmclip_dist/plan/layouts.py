"""A run on paper: memory of each GPU by part, time of a step by part, and which ZeRO stage and micro batch fit.

Pure functions of a `Setup` and a `Choice`. What is allocated follows DeepSpeed 0.19 and is checked against measured memory by
tests/plan/test_layouts.py. Times follow from the card's table (`cards.py`) and the assumptions below; they have not been
measured for this model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from mmclip_dist.plan import cost
from mmclip_dist.plan.setup import BUCKET, Choice, Setup, load_of

# Reached share of the nominal bandwidth: element-wise kernels over HBM, collectives over NVLink and the network.
HBM_SHARE, LINK_SHARE = 0.8, 0.8
# Largest hidden share of the communication that may overlap the backward pass; share of the compute that is backward.
HIDDEN, BACKWARD = 0.5, 2 / 3
# Reached share of the float32 peak, in matrix products.
FP32_SHARE = 0.7
# Latency of a collective over N ranks in seconds: this times log2 N.
HOP_S = 10e-6
# PCIe 4.0 x16, one way: what offloaded states travel over. Bytes/s of the host's memory for one rank's share of Adam.
HOST_LINK, HOST_MEMORY = 25e9, 20e9
# CUDA context, cuBLAS workspace and NCCL's buffers; and what the caching allocator loses to fragmentation.
RESERVE, FRAGMENTATION = 1.5 * 2**30, 0.05
# Radiographs of 512 pixels that one loader process decodes a second (mmclip_dist/bench/results/loader_peers.md).
DECODED_PER_S = 580.0
# Seconds of a rank's main thread for a sample that its loader processes made (mmclip_dist/bench/results/feed.md).
TAKEN_S = 0.033e-3
# Parameters that DeepSpeed keeps gathered at stage 3 (stage3_max_live_parameters).
LIVE = 1e9


# -- Memory -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step; `host`: bytes on its node's host memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    batch: float
    workspace: float
    reserve: float
    host: float

    @property
    def allocated(self) -> float:
        """What the framework allocates: everything except the reserve."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.loss, self.batch, self.workspace)
        return sum(parts)

    @property
    def total(self) -> float:
        return self.allocated + self.reserve


def memory(setup: Setup, choice: Choice) -> Memory:
    """The largest of three moments: inside the backward pass, at its end (gradients reduced), and in the optimizer's step."""
    count, number, ranks = setup.parameters, setup.number, setup.gpus
    sharded = count / ranks if choice.zero_stage >= 1 else count
    gathered = min(count, LIVE) * number if choice.zero_stage == 3 and ranks > 1 else 0.0
    own = number * (sharded if choice.zero_stage == 3 else count)
    weights = 0.0 if choice.offload_parameters else own
    # Two moments of AdamW and LAMB, a float32 master copy (of float32 weights too, except at stage 0), an average if wanted.
    states = (8 if choice.zero_stage == 0 and number == 4 else 12) * sharded
    states += 0.0 if setup.config.optim.ema is None else 4 * sharded

    held, growing, reduced = _gradients(setup, choice, number * count, number * sharded)
    found = cost.pieces(setup.config, load_of(setup, choice), number)
    if choice.checkpoint_activations:
        found = cost.checkpointed(found)
    inside = cost.fullest(found, number, most_gradients=growing)
    inside = replace(inside, gradients=inside.gradients + held)
    end = cost.Moment(0.0, 0.0, reduced, held + growing)
    # Gradients of the step in float32; fused AdamW allocates nothing else.
    cast = 4.0 * (0 if choice.zero_stage == 0 and number == 4 else 1) * sharded
    if choice.offload_optimizer:
        cast = 0.0
    # In half precision they are first flattened, then converted to float32.
    flattened = cost.Moment(0.0, 0.0, cast + (number * sharded if cast and number == 2 else 0.0), number * sharded)
    # Stage 1 has freed the gradients themselves by then.
    updated = cost.Moment(0.0, 0.0, cast, 0.0 if choice.zero_stage == 1 else number * sharded)
    # ZeRO-3 frees gathered weights before it steps.
    moments = (inside, weights + gathered), (end, weights + gathered), (flattened, weights), (updated, weights)
    most, weights = max(moments, key=lambda moment: moment[0].total + moment[1])

    images, text, side = setup.share, setup.config.model.text.max_tokens, setup.config.model.image.grid
    batch = images * (4.0 * setup.config.model.image.size**2 + 8.0 * side**2 + 26.0 * min(setup.corpus.tokens, text))
    host = (states + 4 * sharded if choice.offload_optimizer else 0) + (own if choice.offload_parameters else 0)
    device = Memory(
        weights, most.gradients, 0.0 if choice.offload_optimizer else states, most.activations, most.loss, batch,
        most.workspace, 0.0, host,
    )  # fmt: skip
    return replace(device, reserve=RESERVE + FRAGMENTATION * device.allocated)


def _gradients(setup: Setup, choice: Choice, whole: float, sharded: float) -> tuple[float, float, float]:
    """Bytes of gradients: held throughout the backward pass, largest growth within it, copied at its end.

    Stages 0 and 1 reduce at the end. Stages 2 and 3 keep a partition and reduce each full bucket; if one bucket holds the
    whole model, stage 2 saves nothing over stage 1.
    """
    bucket = setup.bucket * setup.number
    beside = 2 if (setup.overlap if setup.overlap is not None else choice.zero_stage == 3) else 1
    if choice.zero_stage == 3 or (choice.zero_stage == 2 and bucket < whole):
        return sharded, min(whole, beside * bucket), 0.0
    copied = min(whole, BUCKET * setup.number) if choice.zero_stage == 0 else sharded  # stage 0 ignores reduce_bucket_size
    if choice.micro_batch < setup.share:  # they are summed over the passes
        return whole, 0.0, copied
    return 0.0, whole, copied


# -- Time ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of one rank. compute: the larger of `products` and `element_wise`, since the published MFU holds both.
    exposed: communication that is not hidden. The loader runs in parallel with all of it."""

    products: float
    element_wise: float
    loss: float
    optimizer: float
    communication: float
    exposed: float
    data: float
    flops: float

    @property
    def compute(self) -> float:
        return max(self.products, self.element_wise)

    @property
    def total(self) -> float:
        return max(self.compute + self.loss + self.optimizer + self.exposed, self.data)


def step_time(setup: Setup, choice: Choice) -> StepTime:
    """Time from multiplications, memory traffic, and bytes over the links."""
    passes = setup.share / choice.micro_batch
    found = cost.pieces(setup.config, load_of(setup, choice), setup.number)
    encoders = tuple(piece for piece in found if piece.name != "contrastive loss")
    model, contrastive = cost.training_flops(encoders) * passes, cost.training_flops(found) * passes
    contrastive -= model
    cached = passes > 1 and setup.config.loss.contrastive > 0
    again = passes * cost.recomputed_flops(encoders, checkpointed=choice.checkpoint_activations, cached=cached)
    slow, fast = setup.card.flops_fp32 * FP32_SHARE, setup.card.flops * setup.mfu
    sharded = setup.parameters / (setup.gpus if choice.zero_stage else 1)
    moved = passes * (sum(p.moved * p.layers for p in found) + 3 * setup.number * setup.parameters)
    states = sharded * (24 + 2 * setup.number)  # gradient, master copy and moments read; the last three and the weight written
    optimizer = states / (setup.card.hbm * HBM_SHARE)
    if choice.offload_optimizer:
        optimizer = 2 * setup.number * sharded / HOST_LINK + states / HOST_MEMORY
    products = (model + again) / (slow if setup.config.precision == "fp32" else fast)
    travelling = communication(setup, choice)
    if choice.offload_parameters:
        travelling += 2 * passes * setup.number * sharded / HOST_LINK
    hides = setup.overlap if setup.overlap is not None else choice.zero_stage == 3
    return StepTime(
        products, moved * (1 + again / model) / (setup.card.hbm * HBM_SHARE),
        contrastive / (slow if setup.config.loss.impl == "torch" else fast), optimizer, travelling,
        travelling - (min(HIDDEN * travelling, BACKWARD * products) if hides else 0.0),
        setup.share * max(1 / (max(1, setup.config.data.workers) * DECODED_PER_S), TAKEN_S), model + contrastive,
    )  # fmt: skip


def communication(setup: Setup, choice: Choice) -> float:
    """Seconds of collectives in one step. In units of the model's size: stages 0 to 2 gather and scatter once (stage 2
    scatters in every pass), stage 3 gathers for each forward and backward pass; the contrastive loss gathers its texts twice
    and scatters their gradients."""
    if setup.gpus == 1:
        return 0.0
    passes, count = math.ceil(setup.share / choice.micro_batch), setup.parameters
    gathers, scatters = 1, passes if choice.zero_stage >= 2 else 1
    if choice.zero_stage == 3:
        gathers = passes * (3 if passes > 1 and setup.config.loss.contrastive else 2)
    texts = setup.config.optim.global_batch * setup.corpus.paired * setup.config.model.embed
    bytes_of_all = (gathers + scatters) * setup.number * count + 3 * 4 * texts
    layers = sum(p.layers for p in cost.pieces(setup.config, load_of(setup, choice), setup.number))
    calls = (gathers + scatters) * (layers if choice.zero_stage == 3 else math.ceil(count / setup.bucket)) + 3
    return links(setup, bytes_of_all) + calls * HOP_S * math.log2(setup.gpus)


def links(setup: Setup, size: float) -> float:
    """Seconds to gather (or scatter) `size` bytes over all ranks: each card receives what its neighbours and the other nodes
    hold, and the cards of a node share its network."""
    local = min(setup.gpus, setup.per_node)
    inside = size * (local - 1) / local / setup.card.nvlink
    across = size * (setup.nodes - 1) / setup.nodes / setup.card.network
    return max(inside, across) / LINK_SHARE


# -- Choices ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    setup: Setup
    choice: Choice
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.setup.card.memory

    @property
    def samples_per_s(self) -> float:
        return self.setup.config.optim.global_batch / self.time.total

    @property
    def mfu(self) -> float:
        """Of the whole step, communication included."""
        return self.time.flops / self.time.total / self.setup.card.flops

    @property
    def days(self) -> float:
        return self.setup.config.optim.last_step * self.time.total / 86_400


def plan(setup: Setup, choice: Choice) -> Plan:
    if setup.share % choice.micro_batch:
        raise ValueError(f"optim.micro_batch={choice.micro_batch} does not divide the {setup.share} samples of a rank")
    return Plan(setup, choice, memory(setup, choice), step_time(setup, choice))


def layouts() -> Iterator[Choice]:
    """Every layout without its micro batch, best first. Stage 1 communicates as much as stage 0 and shards the largest part;
    stages 2 and 3, checkpointing and offload are for models that do not fit otherwise."""
    for stage in (1, 0, 2, 3):
        for checkpoint in (False, True):
            for optimizer, weights in ((False, False), (True, False), (True, True)):
                if stage >= (3 if weights else 1 if optimizer else 0):  # DeepSpeed offloads from stages 1 and 3 on
                    yield Choice(stage, 1, checkpoint, optimizer, weights)


def largest(setup: Setup, layout: Choice) -> Plan:
    """The plan with the largest micro batch that fits; the smallest micro batch if none fits."""
    micro_batches = [size for size in range(setup.share, 0, -1) if setup.share % size == 0]
    found = (plan(setup, replace(layout, micro_batch=size)) for size in micro_batches)
    return next(candidate for candidate in found if candidate.fits or candidate.choice.micro_batch == 1)


def recommend(plans: list[Plan]) -> Plan:
    """The first that fits and is within 5% of the fastest (estimates are no finer). ValueError if none fits."""
    fitting = [candidate for candidate in plans if candidate.fits]
    if not fitting:
        least = min(plans, key=lambda candidate: candidate.memory.total)
        part, size = max(_parts(least.memory), key=lambda item: item[1])
        raise ValueError(
            f"nothing fits: the least of all layouts ({' '.join(least.choice.overrides())}) needs "
            f"{least.memory.total / 2**30:.1f} GiB of {least.setup.card.memory / 2**30:.1f}, most of it {part} "
            f"({size / 2**30:.1f} GiB); use more GPUs, a card with more memory (--gpu), a smaller model, or a smaller "
            "deepspeed.zero_optimization.reduce_bucket_size"
        )
    best = min(candidate.time.total for candidate in fitting)
    return next(candidate for candidate in fitting if candidate.time.total <= 1.05 * best)


def _parts(found: Memory) -> list[tuple[str, float]]:
    return [(field.name, getattr(found, field.name)) for field in fields(found) if field.name != "host"]
