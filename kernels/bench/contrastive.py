"""Time, memory and error of the contrastive loss, forward and backward, beside every peer that is installed.

    python kernels/bench/contrastive.py [--quick] [--rows 4096] [--threads 1]

On a CUDA device: impl="triton" in bfloat16, for at most five minutes. Otherwise: impl="torch" in float32 on the CPU, at sizes for
a laptop. Features are random but shaped as after training: all lie in one cone, those of a pair closer to each other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from measuring import Case, Row, device_name, extra_memory, missing, ratios, rounds, said, write_results
from mmclip_kernels import contrastive_loss, reference
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
SIZES = [(rows, width) for rows in (32768, 65536, 131072) for width in (512, 768)] if CUDA else [(4096, 512), (8192, 512)]
QUICK = [(8192, 512)] if CUDA else [(1024, 512)]
ACCURACY = (4096, 512) if CUDA else (2048, 512)  # float64 needs the whole matrix several times
ROUNDS, SECONDS = (40, 12.0) if CUDA else (9, 60.0)  # of one size at most
PACKAGES = {"inf-cl": "inf_cl", "Liger": "liger-kernel", "cut-cross-entropy": "cut-cross-entropy", "QuACK": "quack-kernels"}
OURS = 'ours, impl="triton"' if CUDA else 'ours, impl="torch"'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small size, three rounds, nothing written")
    parser.add_argument("--rows", type=int, nargs="*", help="only these N = M")
    parser.add_argument("--threads", type=int, help="CPU threads; one is steadier where others use the machine")
    arguments = parser.parse_args()
    quick = arguments.quick
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = [size for size in (QUICK if quick else SIZES) if not arguments.rows or size[0] in arguments.rows]
    absent = skipped()
    print(*absent, sep="\n")
    rows = [row for size in sizes for row in compare(*size, 3 if quick else ROUNDS)]
    packages = list(PACKAGES.values())
    notes = [
        f"N = M, {DTYPE}, forward and backward, {torch.get_num_threads()} CPU threads.",
        "Medians of the rounds; the ratio is the median of the rounds' own ratios.",
        "Memory: at the peak, above what the inputs take.", *absent,
    ]  # fmt: skip
    write_results("contrastive", rows, packages, notes, keep=not quick)
    rows_of, width = ACCURACY
    notes = [
        f"N = M = {rows_of}, D = {width}, {DTYPE} features, scale 100, against float64 on the same features. Loss: absolute",
        "error. Gradients: norm of the error relative to the gradient's norm.", *absent,
    ]  # fmt: skip
    write_results("contrastive_accuracy", errors(rows_of, width), packages, notes, keep=not quick)


# -- What is compared -------------------------------------------------------------------------------------------------


def losses() -> dict[str, Callable[[], Loss]]:
    """All ways to compute the loss on this machine, each of which is imported when it is called for. Ours comes first."""
    found: dict[str, Callable[[], Loss]] = {OURS: ours, "open_clip, eager": lambda: open_clip}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy x 2"] = lambda: both_ways(F.linear_cross_entropy)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy x 2, in chunks"] = in_chunks
    if not CUDA:
        return found
    found["open_clip, torch.compile"] = lambda: torch.compile(open_clip, dynamic=False)
    peers = {
        "inf-cl": ("inf-cl x 2", inf_cl), "Liger": ("Liger x 2", liger), "QuACK": ("QuACK x 2", quack),
        "cut-cross-entropy": ("cut-cross-entropy x 2, exact", exact_cut_cross_entropy),
    }  # fmt: skip
    return found | dict(peers[name] for name, package in PACKAGES.items() if not missing(package))


def skipped() -> list[str]:
    """Lines that say what is not compared, and why."""
    recent = hasattr(torch.nn, "LinearCrossEntropyOptions")
    lines = [] if recent else ["Not compared: F.linear_cross_entropy in chunks (needs torch 2.13)."]
    if not CUDA:
        return [*lines, f"Not compared, as they need a CUDA card: torch.compile, {', '.join(PACKAGES)}."]
    absent = [f"{name} (pip install {package})" for name, package in PACKAGES.items() if missing(package)]
    return [*lines, f"Not compared, as not installed: {', '.join(absent)}."] if absent else lines


def ours() -> Loss:
    return lambda image, text, scale: contrastive_loss(image, text, scale, impl="triton" if CUDA else "torch")


def open_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The formula of open_clip.loss.ClipLoss, in one process."""
    scale = scale.to(image.dtype)
    of_images, of_texts = scale * image @ text.T, scale * text @ image.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(of_images, labels) + F.cross_entropy(of_texts, labels)) / 2


def both_ways(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """The loss from a fused linear cross-entropy, which has no scale and one direction: call it twice, on scaled features."""

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        scale = scale.to(image.dtype)
        labels = torch.arange(len(image), device=image.device)
        return (cross_entropy(scale * image, text, labels) + cross_entropy(scale * text, image, labels)) / 2

    return loss


def in_chunks() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()
    return both_ways(lambda features, classes, target: F.linear_cross_entropy(features, classes, target, options=options))


def inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    return lambda image, text, scale: (
        cal_flash_loss(image, text, scale=scale).mean() + cal_flash_loss(text, image, scale=scale).mean()
    ) / 2


def liger() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return both_ways(liger_fused_linear_cross_entropy)


def quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return both_ways(chunked_linear_cross_entropy)


def exact_cut_cross_entropy() -> Loss:
    """Without its gradient filter, which drops gradients that CLIP needs. Later versions call this `cce_exact`."""
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    named = "CCE_EXACT" in LinearCrossEntropyImpl.__members__
    options = {"impl": "cce_exact"} if named else {"impl": "cce", "filter_eps": None}
    return both_ways(lambda features, classes, target: linear_cross_entropy(features, classes, target, **options))


# -- Measured ---------------------------------------------------------------------------------------------------------


def trained_features(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image [rows, width], text [rows, width], scale [], with gradient."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def some(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=generator, device=DEVICE), dim=1)

    axis, pair = some(1), some(rows)
    image, text = (F.normalize(2 * axis + pair + 1.5 * some(rows), dim=1).to(DTYPE).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(100.0, device=DEVICE, requires_grad=True)


def step(name: str, rows: int, width: int, copies: int = 1) -> Case:
    """Loss and gradients, on another input in each turn: the last one may still be in the L2 cache."""
    loss_of = losses()[name]()
    inputs = [trained_features(rows, width, seed) for seed in range(copies)]

    def case(turn: int) -> object:
        return torch.autograd.grad(loss_of(*(chosen := inputs[turn % copies])), chosen)

    return case


def compare(rows: int, width: int, count: int, seconds: float = SECONDS, with_memory: bool = True) -> list[Row]:
    """Every loss at N = M = rows, for at most `count` rounds and `seconds`. with_memory: a CPU takes a new process for each."""
    cases, memory, failed = {}, {}, {}
    for name in losses():
        print(f"N = M = {rows}, D = {width}: {name}", flush=True)
        try:
            if with_memory:
                memory[name] = extra_memory(step, name, rows, width, small=(name, 64, width))
            case = step(name, rows, width, copies=3 if CUDA else 2)
            case(0)
            cases[name] = case
        except Exception as error:  # a peer's: of any kind
            if name == OURS:
                raise
            failed[name] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"failed: {said(error)}"
        if CUDA:
            torch.cuda.empty_cache()
    times = rounds(cases, count, seconds)
    slower = ratios(times, OURS)
    return [
        {
            "N = M": rows, "D": width, "loss": name,
            "ms": round(statistics.median(times[name]), 2) if name in times else failed[name],
            "time / ours": round(slower[name], 2) if name in times else None,
            "memory, MiB": round(memory[name] / 2**20) if name in memory else None,
            "rounds": len(times[name]) if name in times else 0,
        }
        for name in losses()
    ]  # fmt: skip


def errors(rows: int, width: int) -> list[Row]:
    inputs = trained_features(rows, width, 0)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    with torch.device(DEVICE):
        wanted = reference.contrastive_loss(*exact)
    gradients = torch.autograd.grad(wanted, exact)
    table: list[Row] = []
    columns = ("loss error", "image gradient", "text gradient", "scale gradient")
    for name, made in losses().items():
        row: Row = {"loss": name}
        try:
            loss = made()(*inputs)
            found = torch.autograd.grad(loss, inputs)
        except Exception as error:  # a peer's: of any kind
            if name == OURS:
                raise
            table.append(row | {columns[0]: f"failed: {said(error)}"} | dict.fromkeys(columns[1:]))
            continue
        away = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, gradients, strict=True)]
        loss_error = abs(loss.item() - wanted.item())
        row.update({column: f"{value:.1e}" for column, value in zip(columns, (loss_error, *away), strict=True)})
        table.append(row)
    return table


if __name__ == "__main__":
    print(device_name())
    main()
