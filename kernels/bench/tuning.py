"""Other tiles for the sweeps of the contrastive loss: which ones a card can run, and which one is the fastest there."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from itertools import product
from typing import Any, Literal, get_args

import torch
from contrastive import DEVICE, trained_features
from measuring import Row, rounds, said
from mmclip_kernels import contrastive_loss, tiles
from mmclip_kernels.tiles import Kernel, Tile

SHARED = 227 * 1024  # bytes of one program's shared memory, at most, on sm_90 and sm_100
GAIN = 1.02  # a tile has to be faster by this factor to take the place of the one in use: less is noise
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


def grid(architecture: int) -> Iterator[Tile]:
    """The tiles in use, and all of 64 or 128 logits a thread whose operands fit into shared memory."""
    used = [tiles.logits_tile(way, torch.bfloat16, masked, architecture) for way, masked in map(way_of, KERNELS)]
    sizes, depths, warps, stages = (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
    tried = (Tile(*tile) for tile in product(sizes, sizes, depths, warps, stages))
    wide = {
        tile for tile in tried
        if tile.rows * tile.columns // (32 * tile.warps) in (64, 128)
        and 2 * tile.stages * tile.depth * (tile.rows + tile.columns) <= SHARED
    }  # fmt: skip
    yield from dict.fromkeys([*used, *sorted(wide)])


def way_of(kernel: Kernel) -> tuple[Literal["sweep", "gradient"], bool]:
    """-> the sweep, and whether its code is that for exclusions and the sigmoid."""
    return ("sweep" if kernel.startswith("sweep") else "gradient"), kernel.endswith("masked")


# -- Compiled, without a card -------------------------------------------------------------------------------------------


def compiled(kernel: Kernel, tile: Tile, architecture: int) -> Row:
    """What a kernel needs with this tile. `fits`: no register is spilled, in tiles that few programs compute again neither."""
    import machine_code  # here: with it Triton compiles, where a rehearsal interprets

    way, masked = way_of(kernel)
    cases = ("bf16, sigmoid", "bf16, pairs excluded") if masked else ("bf16",)
    with tiles.trying(kernel, tile):
        rows = machine_code.rows_of(architecture, {case: machine_code.CASES[case] for case in cases})
    codes = [row.code for row in rows]
    mine = [code for code in codes if code.kernel.endswith("_tile") and (code.kernel == "_gradient_tile") == (way == "gradient")]
    return {
        "kernel": kernel, **tile._asdict(), "registers": max(code.registers for code in mine),
        "spilled": max(code.spilled for code in mine), "programs": min(code.programs for code in mine),
        "fits": all(code.spilled == 0 and code.programs > 0 for code in mine),
    }  # fmt: skip


def candidates(pool: Executor, architecture: int, kernels: Sequence[Kernel], found: Sequence[Tile]) -> list[Row]:
    """Each kernel with each tile, compiled by the pool's processes. A tile that Triton cannot compile is a row with its error."""
    tasks = [(kernel, tile, architecture) for kernel in kernels for tile in found]
    futures = [pool.submit(compiled, *task) for task in tasks]
    rows: list[Row] = []
    for (kernel, tile, _), future in zip(tasks, futures, strict=True):
        error = future.exception()
        refused: Row = {"kernel": kernel, **tile._asdict(), "registers": None, "spilled": None, "programs": 0, "fits": False}
        rows.append({**future.result(), "error": None} if error is None else {**refused, "error": said(error)})
    return rows


# -- Measured on a card -------------------------------------------------------------------------------------------------


def measure(kernel: Kernel, found: Sequence[Row], sizes: Sequence[tuple[int, int]], count: int, seconds: float) -> dict[str, Any]:
    """Time of one pass of the loss with each tile, the one in use first. -> rows, and the tile to use. sizes: N = M, and E."""
    way, masked = way_of(kernel)
    used = tiles.logits_tile(way, torch.bfloat16, masked, architecture())
    fitting = [Tile(*(row[part] for part in Tile._fields)) for row in found if row["kernel"] == kernel and row["fits"]]
    tried = list(dict.fromkeys([used, *fitting]))
    spent = [0.0] * len(tried)
    for rows, width in sizes:
        pass_of = _pass(rows, width, way, masked)
        names = {str(number): number for number in range(len(tried))}

        def timed(tile: Tile, run: Any = pass_of) -> Any:
            def case(_: int) -> object:
                with tiles.trying(kernel, tile):
                    return run()

            return case

        times = rounds({name: timed(tried[number]) for name, number in names.items()}, count, seconds)
        for name, number in names.items():
            spent[number] += statistics.median(times[name])
    best = min(range(len(tried)), key=spent.__getitem__)
    if spent[best] * GAIN > spent[0]:
        best = 0
    _check(kernel, tried[best], masked, min(rows for rows, _ in sizes))
    table: list[Row] = [
        {"kernel": kernel, **tile._asdict(), "ms": round(value, 3), "time / in use": round(value / spent[0], 3)}
        for tile, value in sorted(zip(tried, spent, strict=True), key=lambda pair: pair[1])
    ]
    return {"rows": table, "used": list(used), "best": list(tried[best])}


def architecture() -> int:
    """Of this card, as 90 for sm_90; without one 0."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return 10 * major + minor


def _pass(rows: int, width: int, way: str, masked: bool) -> Any:
    """One forward pass, or one backward pass whose forward pass has been run."""
    inputs = [value.detach().to(torch.bfloat16 if value.ndim else torch.float32).requires_grad_()
              for value in trained_features(rows, width, 0)]  # fmt: skip

    def forward() -> Any:
        return contrastive_loss(*inputs, mode="sigmoid" if masked else "softmax", impl="triton")

    if way == "sweep":
        return forward
    loss = forward()
    return lambda: torch.autograd.grad(loss, inputs, retain_graph=True)


def _check(kernel: Kernel, tile: Tile, masked: bool, most: int) -> None:
    """ValueError unless loss and gradients with this tile are those of impl="torch" in float64."""
    inputs = [value.detach().to(torch.bfloat16 if value.ndim else torch.float32).requires_grad_()
              for value in trained_features(min(most, 4099), 512 if DEVICE == "cuda" else 32, 1)]  # fmt: skip
    exact = [value.detach().double().requires_grad_() for value in inputs]
    mode: Any = "sigmoid" if masked else "softmax"
    with tiles.trying(kernel, tile):
        loss = contrastive_loss(*inputs, mode=mode, impl="triton")
        gradients = torch.autograd.grad(loss, inputs)
    wanted = contrastive_loss(*exact, mode=mode, impl="torch")
    away = [abs(loss.item() - wanted.item()) / max(abs(wanted.item()), 1.0)]
    away += [
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in zip(gradients, torch.autograd.grad(wanted, exact), strict=True)
    ]  # fmt: skip
    limits = (1e-5, 2e-2, 2e-2, 1e-3)
    if any(not error <= limit for error, limit in zip(away, limits, strict=True)):
        raise ValueError(f"{kernel} with {tile} is wrong: errors of loss and gradients {away}; leave this tile out")


def lines(found: Sequence[dict[str, Any]], architecture: int) -> list[str]:
    """The line of `tiles.BY_ARCHITECTURE` that holds the fastest tiles, where these are not in use already."""
    faster = [result for result in found if result["best"] != result["used"]]
    better = {result["rows"][0]["kernel"]: Tile(*result["best"]) for result in faster}
    kept = {**tiles.BY_ARCHITECTURE.get(architecture, {}), **better}
    inside = ", ".join(f'"{kernel}": {tile!r}' for kernel, tile in kept.items())
    return [f"    {architecture}: {{{inside}}},"] if better else []
