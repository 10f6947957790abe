"""Compile Triton kernels for GPUs that this machine lacks. Needs another process: the tests' own runs Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may use, by architecture
NAMED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Resources(NamedTuple):
    """registers: of one thread. spilled: bytes of a thread that did not fit its registers. shared: bytes of a program."""

    kernel: str
    registers: int
    spilled: int
    shared: int


def resources(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, *, unaligned: Sequence[str] = (),
    **options: int,
) -> Resources:  # fmt: skip
    """Compile a kernel. types: of its arguments, by default "*fp32". unaligned: arguments that are no multiple of 16."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, (name, kind) in enumerate(signature.items())
        if kind not in ("constexpr", "fp32") and name not in unaligned
    }  # fmt: skip
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", architecture, 32), options=options
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    return Resources(kernel.__name__, int(found[1]), int(found[2]), compiled.metadata.shared)


def use_compiler(folder: Path) -> None:
    """Have Triton compile in this process, with its cache in `folder`. Call it before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default; named because Triton 3.9 warns that it will change
    os.environ["TRITON_CACHE_DIR"] = str(folder)


def compile_all(
    compiler: Executor, compile_case: Callable[..., list[Resources]], cases: Sequence[tuple[Any, ...]]
) -> list[list[Resources]]:
    """-> what `compile_case` finds of each case, whose first entry is the architecture (80, 90). compiler: see `use_compiler`."""
    found = list(compiler.map(compile_case, *zip(*cases, strict=True)))
    for case, kernels in zip(cases, found, strict=True):
        for kernel in kernels:
            print(*case, kernel)
            assert kernel.shared <= SHARED_MEMORY[case[0]], (case, kernel)
    return found
