"""What `first_hour.py` does on a card, stage by stage. Each runs in a process of its own: a fault of the card ends only that one.

    python kernels/bench/stages.py NAME --result FILE [--earlier FILE] [--rehearse]

A stage writes a JSON document: `rows` are shown as a table. It fails by an exception. A rehearsal runs the same code on a CPU, at
sizes for Triton's interpreter, where there are no CUDA graphs and no peers that need a card: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from measuring import device_name, versions
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
Document = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """build: N = M. losses, graph, accuracy, tuned: N = M and E. masks: images, patches and width. few: how many tiles are tried,
    None for all. rounds: of a measurement."""

    build: int
    graph: tuple[int, int]
    losses: tuple[tuple[int, int], ...]
    accuracy: tuple[int, int]
    masks: tuple[tuple[int, int, int], ...]
    tuned: tuple[tuple[int, int], ...]
    few: int | None
    rounds: int


CARD = Sizes(
    1000, (32768, 512), tuple((rows, width) for rows in (32768, 65536, 131072) for width in (512, 768)), (4096, 512),
    ((4096, 196, 768), (4096, 1024, 768)), ((32768, 512), (32768, 768)), None, 20,
)  # fmt: skip
REHEARSAL = Sizes(20, (24, 16), ((64, 32),), (64, 32), ((2, 16, 16),), ((40, 16),), 2, 1)


@dataclass(frozen=True)
class Stage:
    """run: given the results of earlier stages. minutes: after which it is stopped."""

    name: str
    run: Callable[[Document], Document]
    minutes: float


def stages(rehearse: bool) -> list[Stage]:
    """In the order of their worth: what is not reached in time matters least."""
    sizes = REHEARSAL if rehearse else CARD
    timed = [Stage(f"contrastive {rows} x {width}", partial(contrastive, sizes, rows, width), 6) for rows, width in sizes.losses]
    return [
        Stage("build", partial(build, sizes), 5),
        Stage("graph", partial(graph, sizes), 5),
        Stage("tests", partial(gpu_tests, rehearse), 20),
        *timed[:2],
        *(Stage(f"topk_mask {count} x {patches}", partial(topk_mask, sizes, count, patches, width), 6)
          for count, patches, width in sizes.masks),
        Stage("candidates", partial(candidates, sizes), 10),
        *(Stage(f"tune {kernel}", partial(tune, sizes, kernel), 5) for kernel in ("sweep", "gradient")),
        Stage("accuracy", partial(accuracy, sizes), 3),
        *timed[2:],
        *(Stage(f"tune {kernel}", partial(tune, sizes, kernel), 5) for kernel in ("sweep, masked", "gradient, masked")),
    ]  # fmt: skip


def machine() -> Document:
    """The card, its driver, and the versions that results depend on."""
    import contrastive as losses

    found: Document = {
        "device": device_name(), "python": platform.python_version(), "cores": len(os.sched_getaffinity(0)),
        "versions": versions(*losses.PACKAGES.values()), "cuda": torch.version.cuda,
    }  # fmt: skip
    if torch.cuda.is_available():
        found |= {"capability": list(torch.cuda.get_device_capability()), "driver": _driver()}
    return found


def _driver() -> str:
    """Driver version, power limit and highest clock; or why they are not known, which is no reason to lose the hour."""
    card = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader", "-i", card]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not known ({error})"


# -- Stages ---------------------------------------------------------------------------------------------------------------


def build(sizes: Sizes, _: Document) -> Document:
    """Compile and run every kernel once, and compare the loss with float64. -> seconds of the first and of the second call."""
    from contrastive import trained_features
    from mmclip_kernels import attention_topk_mask, contrastive_loss

    needed = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]["dependencies"]
    triton = next(Requirement(line) for line in needed if line.startswith("triton"))
    have = versions()["triton"]
    if not triton.specifier.contains(have):
        raise ValueError(f"triton {have} is installed, {triton} is needed: pip install '{triton.name}{triton.specifier}'")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise ValueError(f"{device_name()} is sm_{''.join(map(str, torch.cuda.get_device_capability()))}: the kernels need sm_80")
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = [value.detach().to(dtype if value.ndim else torch.float32) for value in trained_features(sizes.build, 48, 0)]
        for mode in ("softmax", "sigmoid"):
            exact: Any = contrastive_loss(*(value.double() for value in inputs), mode=mode)
            given = [value.clone().requires_grad_() for value in inputs]

            def once(given: list[Any] = given, mode: Any = mode) -> Any:
                loss = contrastive_loss(*given, mode=mode, impl="triton")
                torch.autograd.grad(loss, given)
                return loss.item()

            first, again, loss = _twice(once)
            if not abs(loss - exact.item()) <= 1e-5 * max(abs(exact.item()), 1.0):
                raise ValueError(f"the loss in {dtype}, {mode}, is {loss}, and {exact.item()} in float64")
            rows.append({"what": f"contrastive_loss, {mode}, {dtype}", "first s": first, "again s": again})
    patches = trained_features(32, 48, 0)[0].detach().reshape(2, 16, 48).requires_grad_()
    for source in ({"scores": patches.detach()[:, :, 0]}, {"text": patches.detach()[:, 0]}, {"text": patches.detach()[:, :3]}):

        def masked(source: Any = source) -> Any:
            visible = attention_topk_mask(patches, keep=8, impl="triton", **source).visible
            torch.autograd.grad(visible.sum(), patches)
            wanted = attention_topk_mask(patches, keep=8, impl="torch", **source).visible
            assert torch.equal(visible, wanted), source
            return 0.0

        first, again, _ = _twice(masked)
        rows.append({"what": f"attention_topk_mask, {next(iter(source))}", "first s": first, "again s": again})
    return {"rows": rows}


def _twice(call: Callable[[], float]) -> tuple[float, float, float]:
    started = time.perf_counter()
    call()
    first = time.perf_counter()
    value = call()
    return round(first - started, 3), round(time.perf_counter() - first, 3), value


def graph(sizes: Sizes, _: Document) -> Document:
    """Capture forward and backward in a CUDA graph, and replay it on other features. ValueError if a value differs by more than
    rounding: the products may be those of another algorithm. Without a card, nothing is captured."""
    from contrastive import DEVICE, trained_features
    from measuring import rounds
    from mmclip_kernels import contrastive_loss

    rows = []
    ids = torch.arange(sizes.graph[0], device=DEVICE) // 2
    kinds: dict[str, Any] = {"softmax, ids": {"image_ids": ids, "text_ids": ids}, "softmax": {}, "sigmoid": {"mode": "sigmoid"}}
    for mode, options in kinds.items():
        draws = [
            [value.detach().to(torch.bfloat16 if value.ndim else torch.float32) for value in trained_features(*sizes.graph, seed)]
            for seed in (0, 1)
        ]
        held = [value.clone().requires_grad_() for value in draws[0]]

        def step(held: list[Any] = held, options: Any = options) -> list[Any]:
            loss = contrastive_loss(*held, impl="triton", **options)
            return [loss.detach(), *torch.autograd.grad(loss, held)]

        outputs, replay = _captured(step)
        away, same = 0.0, True
        for draw in (draws[1], draws[0]):
            with torch.no_grad():
                for place, value in zip(held, draw, strict=True):
                    place.copy_(value)
            wanted = [value.clone() for value in step()]
            replay()
            for found, value in zip(outputs, wanted, strict=True):
                same = same and torch.equal(found, value)
                away = max(away, ((found.double() - value.double()).norm() / value.double().norm()).item())
        if not away <= 1e-3:
            raise ValueError(f"a replayed graph of {mode} differs by {away:.1e}")
        times = rounds({"calls": lambda _, step=step: step(), "graph": lambda _, replay=replay: replay()}, sizes.rounds)
        eager, graphed = (sorted(times[name])[len(times[name]) // 2] for name in ("calls", "graph"))
        rows.append({
            "loss": mode, "N": sizes.graph[0], "E": sizes.graph[1], "calls ms": round(eager, 3), "graph ms": round(graphed, 3),
            "equal bit for bit": str(same), "differs by": f"{away:.1e}",
        })  # fmt: skip
    return {"rows": rows}


def _captured(step: Callable[[], list[Any]]) -> tuple[list[Any], Callable[[], object]]:
    """-> the outputs that each replay fills, and the replay."""
    if not torch.cuda.is_available():
        outputs = step()
        return outputs, lambda: [place.copy_(value) for place, value in zip(outputs, step(), strict=True)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and sets up libraries, which a capture cannot hold
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        outputs = step()
    return outputs, captured.replay


def gpu_tests(rehearse: bool, _: Document) -> Document:
    """The tests marked `gpu`. A rehearsal collects them, and skips all."""
    report = Path(os.environ["FIRST_HOUR_SCRATCH"], "tests.xml")
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, "tests/kernels"]
    print(" ".join(command), flush=True)
    ran = subprocess.run(command, cwd=ROOT, check=False)
    if not report.exists():
        raise ValueError(f"pytest ended with {ran.returncode} and no report")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    kinds = [next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed") for case in cases]
    found = {kind: kinds.count(kind) for kind in ("passed", "failure", "error", "skipped")}
    names = [f"{case.get('classname')}::{case.get('name')}" for case in cases]
    bad = [name for name, kind in zip(names, kinds, strict=True) if kind in ("failure", "error")]
    if bad or not cases or (found["skipped"] and not rehearse):
        raise ValueError(f"{found}: {', '.join(bad)[:2000]}")
    return {"rows": [found]}


def contrastive(sizes: Sizes, rows: int, width: int, _: Document) -> Document:
    import contrastive as losses

    found = losses.compare(rows, width, 2 * sizes.rounds, with_memory=sizes is CARD)
    return {"rows": found, "notes": losses.skipped()}


def accuracy(sizes: Sizes, _: Document) -> Document:
    import contrastive as losses

    return {"rows": losses.errors(*sizes.accuracy)}


def topk_mask(sizes: Sizes, images: int, patches: int, width: int, _: Document) -> Document:
    import topk_mask as masks

    return {"rows": masks.compare(images, patches, width, sizes.rounds, with_memory=sizes is CARD)}


def candidates(sizes: Sizes, _: Document) -> Document:
    import tuning

    target = tuning.architecture() or 90
    found = list(tuning.grid(target))[: sizes.few]
    kernels = tuning.KERNELS[:1] if sizes.few else tuning.KERNELS
    cores = min(len(os.sched_getaffinity(0)), len(kernels) * len(found))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        rows = tuning.candidates(pool, target, kernels, found)
    if not any(row["fits"] for row in rows):
        raise ValueError(f"no tile fits; the first: {rows[0]}")
    return {"architecture": target, "rows": rows}


def tune(sizes: Sizes, kernel: Any, earlier: Document) -> Document:
    import tuning

    if "candidates" not in earlier:
        raise ValueError("no tile has been compiled: the stage `candidates` has to pass first")
    return tuning.measure(kernel, earlier["candidates"]["rows"], sizes.tuned, sizes.rounds, 60.0)


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python kernels/bench/stages.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--earlier", type=Path, help="results of earlier stages, by name")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(words)
    earlier = json.loads(options.earlier.read_text()) if options.earlier else {}
    every = {stage.name: stage.run for stage in stages(options.rehearse)} | {"machine": lambda _: machine()}
    options.result.write_text(json.dumps(every[options.name](earlier)))


if __name__ == "__main__":
    main(sys.argv[1:])
