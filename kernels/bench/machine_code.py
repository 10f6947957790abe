"""What a card will run, without a card: the kernels' machine code, compiled along their own launch path and disassembled.

    python kernels/bench/machine_code.py [--architecture 80 90 100] [--print-only]

A driver that compiles and never launches takes the place of CUDA's, so that Triton specialises each kernel as it would on a card:
arguments of 1, multiples of 16 and odd ones each give other code. Counted are instructions of the tensor loop and those of the
shortest way from it to the end (the usual path: rare branches are not taken) and of all code behind it; registers, spilled bytes,
shared memory and programs an SM. From these and the bytes follows what a whole loss takes at least on a card (`bound.py`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import bound
import torch
import triton
from mmclip_kernels import contrastive_triton, tiles, topk_mask_triton, weights_triton
from mmclip_kernels.pairs import LogSums, Pairs
from mmclip_kernels.patches import Plan
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

RESULTS = Path(__file__).parent / "results"
TENSOR = re.compile(r"\b(?:H?GMMA|HMMA|UTC\w*MMA|IMMA|DMMA)\b")
COPY = re.compile(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
BRANCH = re.compile(r"\bBRA (?:\S+, )?`\((\.L_x_\d+)\)")  # not BRA.DIV, which threads take that have come apart
PLAIN = re.compile(r"\bFFMA2?\b")  # products without tensor cores
SM = {  # registers and bytes of shared memory of an SM, most threads, multiprocessors, boost clock in GHz
    80: (65536, 164 * 1024, 2048, 108, 1.41), 90: (65536, 228 * 1024, 2048, 132, 1.98), 100: (65536, 228 * 1024, 2048, 148, 1.97),
}  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZE = 32768, 512  # N = M and E of the computed times
WAYS: tuple[Literal["sweep", "gradient"], ...] = ("sweep", "gradient")


class CompilesOnly:
    """As much of a driver as Triton asks for until a kernel would be launched."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # a device of its own: Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(architecture: int) -> Iterator[list[tuple[str, Any]]]:
    """Within, every launch compiles its kernel and runs nothing. Yields (name, compiled kernel) of each launch, as they come."""
    launched: list[tuple[str, Any]] = []

    def launch(function: JITFunction[Any], grid: Any) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            kernel = function.run(*arguments, grid=grid, warmup=True, **options)
            launched.append((function.__name__, kernel))

        return run

    own = JITFunction.__getitem__
    active = driver._active  # type: ignore[attr-defined]
    driver._active = CompilesOnly(architecture)  # type: ignore[attr-defined]
    JITFunction.__getitem__ = launch  # type: ignore[method-assign]
    try:
        yield launched
    finally:
        JITFunction.__getitem__ = own  # type: ignore[method-assign]
        driver._active = active  # type: ignore[attr-defined]


# -- Machine code ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """Of one kernel. loop: instructions of the loop of products; products, copies: how many those are; usual: of the shortest way
    from its end to the program's; rest: of all code behind it. Without tiles of logits, rest is the whole kernel, and loop and
    usual are 0. programs: that fit an SM at once."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    warps: int
    programs: int
    loop: int
    products: int
    copies: int
    usual: int
    rest: int


def code_of(name: str, kernel: Any, architecture: int) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        usage = _output([knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)])
        text = _output([knobs.nvidia.nvdisasm.path, "-c", str(binary)])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, spilled, shared = int(found[1]), int(found[2]), int(kernel.metadata.shared)
    warps = int(kernel.metadata.num_warps)
    limits = SM[architecture]
    whole = -(-registers // 8) * 8 * 32 * warps
    programs = min(limits[0] // whole, limits[1] // max(shared + 1024, 1), limits[2] // (32 * warps), 32)
    return Code(name, registers, spilled, shared, warps, programs, **_paths(text, name.endswith("_tile")))


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _paths(text: str, of_logits: bool) -> dict[str, Any]:
    """Instructions of the loop of products and behind it; of a kernel without tiles of logits, of all its code."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := INSTRUCTION.match(line):
            lines.append(instruction[2])
    copies = sum(bool(COPY.search(line)) for line in lines)
    if not of_logits:
        products = sum(bool(TENSOR.search(line)) for line in lines)
        return {"loop": 0, "products": products, "copies": copies, "usual": 0, "rest": len(lines)}
    jumps = {at: labels[found[1]] for at, line in enumerate(lines) if (found := BRANCH.search(line))}
    loops = [(to, at) for at, to in jumps.items() if to < at and not any("EXIT" in line for line in lines[to:at])]
    kind = TENSOR if any(TENSOR.search(line) for line in lines) else PLAIN
    start, end = max(loops, key=lambda pair: sum(bool(kind.search(line)) for line in lines[pair[0] : pair[1]]), default=(0, -1))
    body = lines[start : end + 1]
    last = max(at for at, line in enumerate(lines) if "EXIT" in line)
    return {
        "loop": len(body), "products": sum(bool(kind.search(line)) for line in body),
        "copies": copies, "usual": _shortest(lines, jumps, end + 1), "rest": last - end,
    }  # fmt: skip


def _shortest(lines: Sequence[str], jumps: dict[int, int], start: int) -> int:
    """Fewest instructions from `start` to an EXIT that is always taken."""
    best = {start: 0}
    waiting = [start]
    ends = []
    while waiting:
        at = min(waiting, key=best.__getitem__)
        waiting.remove(at)
        line, spent = lines[at], best[at] + 1
        certain = not line.startswith("@")
        if "EXIT" in line and certain:
            ends.append(spent)
            continue
        onwards = [jumps[at]] if at in jumps else []
        if not (at in jumps and certain) and at + 1 < len(lines):
            onwards.append(at + 1)
        for to in onwards:
            if spent < best.get(to, 1 << 60):
                best[to] = spent
                if to not in waiting:
                    waiting.append(to)
    return min(ends)


# -- Cases: the real calls --------------------------------------------------------------------------------------------------


def pairs_of(rows: int, columns: int, *, some_out: bool, excluded: bool) -> Pairs:
    one = torch.ones(())
    return Pairs(
        row_ids=torch.zeros(rows, dtype=torch.int32), column_ids=torch.zeros(columns, dtype=torch.int32), some_out=some_out,
        exclude=torch.zeros(rows, columns, dtype=torch.bool) if excluded else None, factor=one, bias=one,
        row_mean=torch.ones(rows), column_mean=torch.ones(columns), row_share=torch.ones(rows), column_share=torch.ones(columns),
        unit=torch.ones(2),
    )  # fmt: skip


def contrastive(
    rows: int, columns: int, width: int, dtype: torch.dtype, mode: Any = "softmax", *, out: bool = True, excluded: bool = False
) -> None:
    """Both sweeps over images [rows, width] and texts [columns, width]. out: whether rows may be left out, as ids allow."""
    image, text = torch.zeros(rows, width, dtype=dtype), torch.zeros(columns, width, dtype=dtype)
    pairs = pairs_of(rows, columns, some_out=out, excluded=excluded)
    contrastive_triton._add_product = _no_product  # the products are cuBLAS's: not ours to count
    contrastive_triton.sweep(image, text, pairs, mode)
    contrastive_triton.gradient(image, text, pairs, mode, torch.zeros(rows), torch.zeros(columns))


def _no_product(*_: torch.Tensor, new: bool) -> None:
    pass


def vectors(rows: int, columns: int, mode: Any = "softmax", *, weighted: bool = False, counted: bool = False) -> None:
    """The steps between the sweeps. counted: the positives are counted already, as for exclusions and the diagonal."""
    row_ids, column_ids, one = torch.zeros(rows, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64), torch.ones(2)
    weight = (torch.ones(rows), torch.ones(columns)) if weighted else (None, None)
    every, counts = (None, (row_ids, column_ids)) if counted else (row_ids, None)
    weights = weights_triton.relate(row_ids, column_ids, every, counts, *weight, mode, FP32)
    sums = (LogSums(*torch.zeros(2, count)) for count in (rows, columns))
    lse, means = weights_triton.log_sums(*sums, weights.mean)
    weights_triton.slopes(one, one, means, one[0], lse, weights, rows, mode)


def masking(count: int, dtype: torch.dtype, source: str, *, replace: bool = False, split: bool = False, width: int = 768) -> None:
    """Forward and backward of two images of `count` patches. source: "scores", one text "vector", or "tokens"."""
    patches, token = torch.zeros(2, count, width, dtype=dtype), torch.zeros(width, dtype=dtype) if replace else None
    words = torch.zeros(2, 64, width, dtype=dtype)
    text = {"scores": None, "vector": words[:, 0], "tokens": words}[source]
    scores = torch.zeros(2, count) if text is None else None
    mask = torch.ones(2, 64, dtype=torch.bool) if source == "tokens" else None
    noise = torch.zeros(2, count) if split or mask is not None else None
    second = count // 4 if split else 0
    plan = Plan(count // 2, 0, count // 2, second, True, False, 0.1)
    first_view, second_view, restore, *_ = topk_mask_triton.forward(patches, token, None, text, mask, scores, noise, plan)
    topk_mask_triton.backward(first_view, second_view, restore, plan.first, second, replace)


CASES: dict[str, Callable[[], None]] = {
    "bf16": partial(contrastive, 256, 256, 512, BF16),
    "bf16, diagonal": partial(contrastive, 256, 256, 512, BF16, out=False),
    "fp16": partial(contrastive, 256, 256, 512, FP16),
    "fp32": partial(contrastive, 256, 256, 512, FP32),
    "bf16, sigmoid": partial(contrastive, 256, 256, 512, BF16, "sigmoid"),
    "bf16, pairs excluded": partial(contrastive, 256, 256, 512, BF16, excluded=True),
    "fp16, sigmoid, pairs excluded": partial(contrastive, 256, 256, 512, FP16, "sigmoid", excluded=True),
    "fp32, sigmoid": partial(contrastive, 256, 256, 512, FP32, "sigmoid"),
    "bf16, odd sizes": partial(contrastive, 257, 259, 512, BF16),
    "bf16, width 520": partial(contrastive, 256, 256, 520, BF16),
    "bf16, width 500": partial(contrastive, 256, 256, 500, BF16),
    "bf16, one row": partial(contrastive, 1, 256, 512, BF16),
    "bf16, one column": partial(contrastive, 256, 1, 512, BF16),
    "bf16, width 1": partial(contrastive, 256, 256, 1, BF16),
    "vectors": partial(vectors, 256, 256),
    "vectors, weighted": partial(vectors, 257, 255, weighted=True),
    "vectors, counted": partial(vectors, 256, 256, weighted=True, counted=True),
    "vectors, one row, sigmoid": partial(vectors, 1, 1, "sigmoid"),
    "masking, bf16, 196 scores": partial(masking, 196, BF16, "scores"),
    "masking, bf16, 196 scores, split": partial(masking, 196, BF16, "scores", split=True),
    "masking, bf16, 196 scores, replace": partial(masking, 196, BF16, "scores", replace=True),
    "masking, bf16, 196 vector": partial(masking, 196, BF16, "vector"),
    "masking, bf16, 196 tokens": partial(masking, 196, BF16, "tokens"),
    "masking, fp32, 196 tokens": partial(masking, 196, FP32, "tokens"),
    "masking, bf16, 1024 scores": partial(masking, 1024, BF16, "scores"),
    "masking, bf16, 1024 tokens": partial(masking, 1024, BF16, "tokens"),
}


@dataclass(frozen=True)
class Row:
    """A kernel of a case. per_logit: instructions of the usual path a logit and thread, that is, per 32 logits and warp."""

    case: str
    architecture: int
    code: Code
    per_logit: float | None


def rows_of(architecture: int, cases: dict[str, Callable[[], None]]) -> list[Row]:
    rows = []
    for case, call in cases.items():
        with compiling(architecture) as launched:
            call()
        for name, kernel in dict(launched).items():
            code = code_of(name, kernel, architecture)
            tile = tile_of(name, case, architecture)
            per_logit = None if tile is None else round(code.usual / (tile.rows * tile.columns / (32 * code.warps)), 1)
            rows.append(Row(case, architecture, code, per_logit))
    return rows


def tile_of(kernel: str, case: str, architecture: int) -> tiles.Tile | None:
    """None: the kernel has no tiles of logits."""
    if not kernel.endswith("_tile"):
        return None
    dtype, masked = FP32 if case.startswith("fp32") else BF16, "excluded" in case or "sigmoid" in case
    return tiles.logits_tile("gradient" if kernel == "_gradient_tile" else "sweep", dtype, masked, architecture)


def issue_ms(row: Row, size: int, width: int) -> float | None:
    """Milliseconds of issue slots that all programs of a size x size sweep need on the card, if every scheduler always issued."""
    tile, (_, _, _, processors, clock) = tile_of(row.code.kernel, row.case, row.architecture), SM[row.architecture]
    if tile is None:
        return None
    issued = bound.warp_instructions(asdict(row.code), tile, size, width)
    return issued / (processors * bound.SCHEDULERS * clock * 1e6)


def of_loss(rows: Sequence[Row], size: int, width: int, card: bound.Card) -> list[bound.Part]:
    """What the usual case's kernels take on a card. No part if they were not compiled for it."""
    codes = {row.code.kernel: asdict(row.code) for row in rows if (row.case, row.architecture) == ("bf16", card.architecture)}
    if not codes:
        return []
    sweep, gradient = (tiles.logits_tile(way, BF16, False, card.architecture) for way in WAYS)
    return bound.parts(codes, sweep, gradient, size, width, card)


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python kernels/bench/machine_code.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--architecture", type=int, nargs="+", choices=sorted(SM), default=[80, 90, 100])
    parser.add_argument("--print-only", action="store_true", help="write no results")
    options = parser.parse_args(words)
    rows = [row for architecture in options.architecture for row in rows_of(architecture, CASES)]
    losses = [(card, found) for card in (bound.H200, bound.H100) if (found := of_loss(rows, *SIZE, card))]
    names = (
        "case", "sm", "kernel", "registers", "spilled", "shared KiB", "warps", "programs an SM", "loop", "products", "copies",
        "usual", "per logit", "all", "issue ms",
    )  # fmt: skip
    lines = [
        "# Machine code of the kernels", "",
        f"{datetime.date.today()}, Triton {triton.__version__}, torch {torch.__version__}, no card. Command:",
        f"`python kernels/bench/machine_code.py {' '.join(words)}`".replace(" `", "`"), "",
        *(line for card, found in losses for line in bound.table(found, *SIZE, card)),
        "## Kernels", "",
        "usual: instructions of the shortest way from the loop of products to the end; per logit: for each logit of a thread;",
        "all: behind the loop, rare branches included; issue: milliseconds of issue slots at N = M = 32,768, E = 512, at the",
        "boost clock.", "",
        f"| {' | '.join(names)} |", "|---" * len(names) + "|",
    ]  # fmt: skip
    for row in rows:
        code = row.code
        cells = (
            row.case, row.architecture, code.kernel, code.registers, code.spilled, code.shared // 1024, code.warps, code.programs,
            code.loop, code.products, code.copies, code.usual, row.per_logit, code.rest, issue_ms(row, *SIZE),
        )  # fmt: skip
        shown = ("" if cell is None else f"{cell:.2f}" if cell is cells[-1] else str(cell) for cell in cells)
        lines.append(f"| {' | '.join(shown)} |")
    print("\n".join(lines))
    if not options.print_only:
        (RESULTS / "machine_code.md").write_text("\n".join(lines) + "\n")
        table = [{"case": r.case, "architecture": r.architecture, "per_logit": r.per_logit, **asdict(r.code)} for r in rows]
        whole = [bound.document(found, *SIZE, card) for card, found in losses]
        document = {"triton": triton.__version__, "losses": whole, "rows": table}
        (RESULTS / "machine_code.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
