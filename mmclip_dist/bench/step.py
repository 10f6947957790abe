"""The cost of a training step beside plain CLIP, and what our loop adds to it: one command, one run.

    python -m mmclip_dist.bench.step [--shape small|vit_b16|vit_l16 ...] [--batch N] [--rounds N] [--unpaired SHARE]

Forward, backward and AdamW's step of the four variants of `variants.py`. Every round measures each variant once, in turn, on the
same batch; the table holds medians, and the ratio to plain CLIP is the median of the rounds' own ratios. On a CUDA card ViT-B/16
and ViT-L/16 in bf16 with Triton kernels, by the wall clock; on a CPU a small shape in fp32 on one thread, by the processor's
time, in which other work on the machine shows little. Peak memory is that of a step of each variant alone, with its weights,
gradients and optimizer state. The second table is that of `overhead.py`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmclip_dist.bench import overhead
from mmclip_dist.bench.variants import (
    PLAIN,
    SHAPES,
    VARIANTS,
    AdamW,
    Sample,
    build,
    config_of,
    loss_of,
    make_sample,
    run_step,
    seconds,
    without_idle_parts,
)
from mmclip_dist.model.mmclip import MMCLIP

RESULTS = Path(__file__).parent / "results"
SAMPLES = 4  # batches that the rounds use in turn; their reports differ in length
Row = dict[str, str | int | float]


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mmclip_dist.bench.step", description=str(__doc__).splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["vit_b16", "vit_l16"] if gpu else ["small"])
    parser.add_argument("--batch", type=int, help="samples of a step; default: the shape's own")
    parser.add_argument("--rounds", type=int, default=20 if gpu else 7)
    parser.add_argument("--unpaired", type=float, default=0.0, help="share of images without a report")
    parser.add_argument("--print-only", action="store_true", help="write no results")
    options = parser.parse_args(words)
    device = torch.device("cuda" if gpu else "cpu")
    rows, engine = [], []
    for name in options.shape:
        batch = options.batch or SHAPES[name].batch
        peaks = {variant: peak(name, variant, batch, options.unpaired, device) for variant in VARIANTS}
        rows += in_a_process(compare, name, batch, options.rounds, options.unpaired, device, peaks)
        engine.append(in_a_process(overhead.measure, name, batch, options.rounds, device))
    publish(rows, engine, words, options)


def compare(
    name: str, batch: int, rounds: int, unpaired: float, device: torch.device, peaks: dict[str, int]
) -> list[Row]:
    """One row a variant; peaks: bytes of each."""
    torch.set_num_threads(1)
    shape = SHAPES[name]
    configs = {variant: config_of(shape, variant, device, batch) for variant in VARIANTS}
    model = build(shape, "MMCLIP feature", device, batch)
    optimizer = AdamW(list(model.parameters()))
    samples = [make_sample(model, shape, batch, unpaired, seed, device) for seed in range(SAMPLES)]
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(rounds + 1):
        for variant in VARIANTS:
            model.config = configs[variant]
            started = seconds(device)
            run_step(model, optimizer, variant, samples[turn % SAMPLES])
            if turn:  # the first round warms up
                times[variant].append(1000 * (seconds(device) - started))
    rows: list[Row] = []
    plain = 0.0
    for variant in VARIANTS:
        model.config = configs[variant]
        tokens, operations = counted(model, variant, samples)
        plain = plain or operations  # plain CLIP comes first
        ratios = [own / other for own, other in zip(times[variant], times[PLAIN], strict=True)]
        rows.append({
            "shape": name, "batch": batch, "variant": variant, "ms": round(statistics.median(times[variant]), 1),
            "ratio": round(statistics.median(ratios), 3), "lowest": round(min(ratios), 3), "highest": round(max(ratios), 3),
            "operations, ratio": round(operations / plain, 3), "peak MiB": round(peaks[variant] / 2**20), **tokens,
        })  # fmt: skip
    return rows


# -- Tokens and operations ----------------------------------------------------------------------------------------------


def counted(model: MMCLIP, variant: str, samples: Sequence[Sample]) -> tuple[dict[str, float], float]:
    """Tokens per sample that enter each stack of layers, and operations of a step: means over the samples, counted by running.

    Prompts, padding and unused room in packed rows count like any other token.
    """
    stacks: dict[str, nn.ModuleList] = {
        "image tokens": model.image.layers, "text tokens": model.text.layers,
        "image decoder tokens": model.image_decoder.layers, "text decoder tokens": model.text_decoder.layers,
    }  # fmt: skip
    tokens = dict.fromkeys(stacks, 0)
    hooks = []
    for name, layers in stacks.items():

        def count(_: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            tokens[name] += inputs[0].shape[:2].numel()

        hooks.append(layers[0].register_forward_pre_hook(count))
    operations = 0
    for sample in samples:
        with FlopCounterMode(display=False, custom_mapping=_cpu_attention()) as counter:
            loss_of(model, variant, sample).backward()
        operations += counter.get_total_flops()
        model.zero_grad()
    for hook in hooks:
        hook.remove()
    seen = len(samples) * len(samples[0].tokens)
    return {name: round(total / seen, 1) for name, total in tokens.items()}, operations / len(samples)


def _cpu_attention() -> dict[Any, Any]:
    """Give torch's FLOP counter the formulas of its CUDA kernels for the CPU's."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


# -- Memory -------------------------------------------------------------------------------------------------------------


def peak(name: str, variant: str, batch: int, unpaired: float, device: torch.device) -> int:
    """Bytes at the peak of a step of one variant alone: weights, gradients, optimizer state, batch and activations.

    On CUDA as PyTorch's allocator counts them; on a CPU the resident memory of a process of its own, above what it needs for a
    tiny step of the same kind.
    """
    return int(in_a_process(_peak, name, variant, batch, unpaired, device.type))


def _peak(name: str, variant: str, batch: int, unpaired: float, kind: str) -> int:
    device = torch.device(kind)
    _second_step("tiny", variant, 4, 0.0, device)
    before = 0 if kind == "cuda" else _resident("VmRSS")
    return _second_step(name, variant, batch, unpaired, device) - before


def _second_step(name: str, variant: str, batch: int, unpaired: float, device: torch.device) -> int:
    """The peak of the second step: the first one makes the optimizer's state."""
    model = build(SHAPES[name], variant, device, batch)
    sample = make_sample(model, SHAPES[name], batch, unpaired, 0, device)
    model = without_idle_parts(model)
    optimizer = AdamW(list(model.parameters()))
    run_step(model, optimizer, variant, sample)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run_step(model, optimizer, variant, sample)
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted from here
    run_step(model, optimizer, variant, sample)
    return _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def in_a_process(call: Callable[..., Any], *arguments: object) -> Any:
    """call(*arguments) in a process of its own, whose memory, process groups and watchdogs end with it."""
    # No Pool: it ends workers by SIGTERM, which our loop takes for a stop request. The fork server has
    # imported the packages but run nothing, so a process starts clean and without their imports' time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmclip_dist.bench.variants", "mmclip_dist.bench.overhead", "deepspeed"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(call, *arguments).result()


# -- Results ------------------------------------------------------------------------------------------------------------


def publish(rows: list[Row], engine: list[Row], words: Sequence[str], options: argparse.Namespace) -> None:
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "CPU"
    packages = ["torch", "transformers", "deepspeed", *(["triton"] if gpu else [])]
    about = {
        "command": " ".join(["python", "-m", "mmclip_dist.bench.step", *words]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "device": device,
        "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1), "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }  # fmt: skip
    text = "\n".join(_page(about, rows, engine, options.shape))
    print(text)
    if options.print_only:
        return
    RESULTS.mkdir(exist_ok=True)
    base = RESULTS / f"step_{re.sub('[^a-z0-9]+', '_', device.lower())}"
    base.with_suffix(".md").write_text(text + "\n")
    base.with_suffix(".json").write_text(json.dumps({**about, "rows": rows, "engine": engine}, indent=2) + "\n")


def _page(about: dict[str, Any], rows: list[Row], engine: list[Row], shapes: Sequence[str]) -> list[str]:
    versions = ", ".join(f"{package} {found}" for package, found in about["versions"].items())
    return [
        "# Training step", "",
        f"`{about['command']}`, {about['date']}, {about['device']}, {about['cores']} CPU cores, load {about['load']} at the end "
        f"(the benchmark's own included), Python {about['python']}, {versions}.", "",
        *(f"`{name}`: {SHAPES[name].told}." for name in shapes), "",
        f"One step is forward, backward and AdamW{', on one thread, in processor time' if about['device'] == 'CPU' else ''}. "
        "Times are medians over rounds, a ratio is the median of the rounds' own ratios to plain CLIP. Operations are those of "
        "matrix products and attention, forward and backward, as torch counts them while a step runs: what a step should cost. "
        "Tokens are per sample: what enters the layers, with padding, prompts and room left in packed rows. MMCLIP encodes each "
        "report twice, as it is and with its entities masked, and 28 prompts of 6 to 10 tokens a step, whatever its batch.", "",
        *_table(rows), "",
        "Our loop (DeepSpeed ZeRO-1 on one rank, as `train.py` runs it) beside the bare model and optimizer, both for `MMCLIP "
        "feature`, in turn on the same batches; milliseconds, medians. Clipping belongs to the optimizer. Overhead is all that "
        "the loop costs above the bare step, less the data wait; ours is the part of it outside DeepSpeed's engine: stop flags, "
        "sums over ranks, health, quarantine, watchdog, log.", "",
        *_table(engine),
    ]  # fmt: skip


def _table(rows: list[Row]) -> list[str]:
    heads = list(rows[0])
    cells = [[f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *cells)]


if __name__ == "__main__":
    main(sys.argv[1:])
