"""Shared by the kernels' benchmarks: time cases side by side, measure memory, write results."""

from __future__ import annotations

import csv
import datetime
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
Case = Callable[[int], object]
Row = dict[str, str | int | float | None]


def rounds(cases: dict[str, Case], count: int, seconds: float | None = None) -> dict[str, list[float]]:
    """Milliseconds of each case in each round. A round runs every case once, so a busy moment slows all of them.

    A case receives the round's number and may use it to choose among several inputs: the one just used is still in the cache.
    The first round warms up and is dropped. After `seconds` no more rounds start, but at least three are kept.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    begun = time.perf_counter()
    for turn in range(count + 1):
        if seconds is not None and turn > 3 and time.perf_counter() - begun > seconds:
            break
        for name, case in cases.items():
            elapsed = _milliseconds(case, turn)
            if turn > 0:
                found[name].append(elapsed)
    return found


def _milliseconds(case: Case, turn: int) -> float:
    if not torch.cuda.is_available():
        started = time.perf_counter()
        case(turn)
        return 1000 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    case(turn)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def ratios(times: dict[str, list[float]], first: str) -> dict[str, float]:
    """Each case's time divided by that of `first`: the median of the rounds' own ratios."""
    return {
        name: statistics.median(other / own for other, own in zip(values, times[first], strict=True))
        for name, values in times.items()
    }


def extra_memory(prepare: Callable[..., Case], *arguments: object, small: Sequence[object]) -> int:
    """Peak memory of `prepare(*arguments)(0)`, in bytes above the memory before the call.

    On CUDA: what PyTorch's allocator counts. On a CPU: the resident memory of a new process, which first runs
    `prepare(*small)(0)`, so that libraries and threads have their own memory already. `prepare` must be importable.
    """
    if torch.cuda.is_available():
        case = prepare(*arguments)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Not a Pool: it waits forever for a worker that died.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, torch.get_num_threads(), prepare, arguments, small).result()


def _resident(threads: int, prepare: Callable[..., Case], arguments: Sequence[object], small: Sequence[object]) -> int:
    torch.set_num_threads(threads)
    prepare(*small)(0)
    case = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    before = _status("VmRSS")
    case(0)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def missing(*packages: str) -> list[str]:
    """Which of the packages are not installed."""
    return [name for name in packages if _version(name) is None]


def versions(*packages: str) -> dict[str, str]:
    """Of torch, triton, and those of `packages` that are installed."""
    found = {package: _version(package) for package in ("torch", "triton", *packages)}
    return {package: value for package, value in found.items() if value is not None}


def table(rows: Sequence[Row]) -> list[str]:
    """The rows, which all have the same keys, as lines of a Markdown table."""
    cells = [list(rows[0]), *(["" if value is None else str(value) for value in row.values()] for row in rows)]
    head, *body = (f"| {' | '.join(line)} |" for line in cells)
    return [head, "|" + "---|" * len(rows[0]), *body]


def said(error: BaseException) -> str:
    """In one line, for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}".replace("|", "/")[:200]


def file_name(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name.lower())


def write_results(
    name: str, rows: Sequence[Row], packages: Sequence[str] = (), notes: Sequence[str] = (), keep: bool = True
) -> None:
    """Print the rows, which all have the same keys, as a table, and write them to results/<name>_<device>.md, .csv and .json.

    The files name the command, date, machine, and the versions of torch, triton and `packages`. keep=False: only print.
    """
    command = " ".join(["python", f"kernels/bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    about = {
        "command": command, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "device": device_name(),
        "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "versions": versions(*packages), "notes": list(notes),
    }  # fmt: skip
    said = ", ".join(f"{package} {found}" for package, found in versions(*packages).items())
    lines = [
        f"# {name}", "",
        f"`{command}`, {about['date']}, {about['device']}, {about['cores']} CPU cores, Python {about['python']}, {said}.",
        *notes, "", *table(rows),
    ]  # fmt: skip
    print("\n".join(lines))
    if not keep:
        return
    RESULTS.mkdir(exist_ok=True)
    base = RESULTS / f"{name}_{file_name(device_name())}"
    base.with_suffix(".md").write_text("\n".join(lines) + "\n")
    base.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    with base.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
