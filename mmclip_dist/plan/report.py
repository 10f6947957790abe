"""A plan as text: Markdown tables that read well on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from mmclip_dist.plan import cost
from mmclip_dist.plan.layouts import Plan
from mmclip_dist.plan.setup import Choice, load_of

PAPER = "computed on paper, not measured"
_GIB = 2**30


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *padded[1:]])} |"

    rule = "|".join("-" * (width + 2) if not index else "-" * (width + 1) + ":" for index, width in enumerate(widths))
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def describe_plan(best: Plan, asked: Plan, layouts: Sequence[Plan], *, name: str, price: float | None) -> str:
    """One number of GPUs in full: the recommended layout, its memory and time by part, and every other layout."""
    setup, optim = best.setup, best.setup.config.optim
    found = cost.training_flops(cost.pieces(setup.config, load_of(setup, best.choice), setup.number)) / best.choice.micro_batch
    nodes = f"{setup.nodes} node{'s' * (setup.nodes > 1)} of {min(setup.gpus, setup.per_node)}"
    loaded = [part for part in ("image", "text") if getattr(setup.config.model, part).pretrained]
    note = [f"note: pretrained weights are not opened; model.{part} must give their shape\n" for part in loaded]
    parts = [
        f"{name} on {setup.gpus} x {setup.card.name} ({nodes}): {PAPER}\n",
        f"{setup.parameters / 1e6:.1f} M parameters, {found / 1e9:.1f} GFLOP a sample (forward and backward), "
        f"{setup.config.precision}, {setup.share:,} of {optim.global_batch:,} samples on each GPU\n",
        *note, f"recommended: {' '.join(best.choice.overrides())}\n",
        _memory(best), _time(best), _outcome(best, price), "Largest micro batch of each layout:\n",
        _layouts(best, asked, layouts),
    ]  # fmt: skip
    return "\n".join(parts)


def _memory(found: Plan) -> str:
    memory, card = found.memory, found.setup.card
    parts = {
        "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
        "activations": memory.activations, "loss": memory.loss, "batch": memory.batch, "workspace": memory.workspace,
        "reserve (CUDA, NCCL, fragmentation)": memory.reserve, "sum": memory.total, f"of {card.name}": card.memory,
    }  # fmt: skip
    rows = [[part, f"{size / _GIB:.2f}"] for part, size in parts.items()]
    if memory.host:
        rows.append(["offloaded, on the host", f"{memory.host / _GIB:.2f}"])
    return table(["memory of a GPU, fullest moment", "GiB"], rows) + "\n"


def _time(found: Plan) -> str:
    time = found.time
    parts = {
        "compute: larger of the next two": time.compute, "- matrix products, at the assumed MFU": time.products,
        "- element-wise, from HBM bandwidth": time.element_wise, "contrastive loss": time.loss, "optimizer": time.optimizer,
        "communication": time.communication, "- of it not hidden": time.exposed, "data, beside all that": time.data,
        "step": time.total,
    }  # fmt: skip
    return table(["time of a step", "ms"], [[part, f"{1e3 * value:.2f}"] for part, value in parts.items()]) + "\n"


def _outcome(found: Plan, price: float | None) -> str:
    setup, optim = found.setup, found.setup.config.optim
    seen = optim.last_step * optim.global_batch
    epochs = f", {seen / setup.corpus.samples:.1f} epochs of {setup.corpus.samples:,}" if setup.corpus.samples else ""
    hours = found.days * 24 * setup.gpus
    source = setup.card.mfu_source if setup.mfu == setup.card.mfu else "given on the command line"
    lines = [
        f"{found.samples_per_s:,.0f} samples/s, {found.samples_per_s / setup.gpus:,.0f} a GPU; "
        f"{found.samples_per_s * setup.corpus.sample_bytes / setup.nodes / 1e6:,.0f} MB/s of data into each node",
        f"MFU assumed of the compute: {setup.mfu:.1%} ({source}); of the whole step then: {found.mfu:.1%}",
        f"{optim.last_step:,} steps, {seen:,} samples{epochs}: {found.days:.2f} days, {hours:,.0f} GPU hours"
        + (f", {hours * price:,.0f} at {price:g} a GPU hour" if price else ""),
    ]
    return "\n".join(lines) + "\n"


def _layouts(best: Plan, asked: Plan, layouts: Sequence[Plan]) -> str:
    head = ["zero_stage", "checkpointing", "offload", "micro_batch", "GiB", "step ms", "samples/s", "fits"]
    in_order = sorted(layouts, key=lambda found: found.choice.zero_stage)
    rows = [_layout(found, " <- recommended" if found is best else "") for found in in_order]
    return table(head, [*rows, _layout(asked, " <- as configured")])


def _layout(found: Plan, remark: str) -> list[str]:
    choice = found.choice
    return [
        f"{choice.zero_stage}{remark}", "yes" if choice.checkpoint_activations else "no", _offload(choice),
        str(choice.micro_batch), f"{found.memory.total / _GIB:.1f}", f"{1e3 * found.time.total:.0f}",
        f"{found.samples_per_s:,.0f}", "yes" if found.fits else "NO",
    ]  # fmt: skip


def _offload(choice: Choice) -> str:
    if choice.offload_parameters:
        return "optimizer, parameters"
    return "optimizer" if choice.offload_optimizer else "no"


def describe_scaling(plans: Sequence[Plan], *, price: float | None) -> str:
    """Several numbers of GPUs, one row each, with the efficiency relative to the first."""
    head = ["GPUs", "global batch", "zero_stage", "micro_batch", "GiB", "step ms", "not hidden ms", "samples/s", "efficiency",
            "MFU", "hours / 1e9 samples"] + ([f"cost at {price:g}"] if price else [])  # fmt: skip
    first, rows = plans[0], []
    for found in plans:
        setup, hours = found.setup, 1e9 / found.samples_per_s / 3600
        per_gpu, reference = found.samples_per_s / setup.gpus, first.samples_per_s / first.setup.gpus
        checkpointing = " +checkpointing" if found.choice.checkpoint_activations else ""
        offload = "" if _offload(found.choice) == "no" else f" +offload {_offload(found.choice)}"
        rows.append([
            f"{setup.gpus:,}", f"{setup.config.optim.global_batch:,}", f"{found.choice.zero_stage}{checkpointing}{offload}",
            str(found.choice.micro_batch), f"{found.memory.total / _GIB:.1f}", f"{1e3 * found.time.total:.1f}",
            f"{1e3 * found.time.exposed:.1f}", f"{found.samples_per_s:,.0f}", f"{per_gpu / reference:.1%}", f"{found.mfu:.1%}",
            f"{hours:.2f}", *([f"{hours * setup.gpus * price:,.0f}"] if price else []),
        ])  # fmt: skip
    return table(head, rows)
