"""Triton kernels compiled for cards that are not here, in a process of its own: this one runs them in the interpreter."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # of one program at most, in bytes
NAMED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Resources(NamedTuple):
    """What one thread of a kernel takes; `spilled` bytes did not fit the registers. shared: bytes of a program."""

    kernel: str
    registers: int
    spilled: int
    shared: int


def resources(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, *, unaligned: Sequence[str] = (),
    **options: int,
) -> Resources:  # fmt: skip
    """Compile a kernel. types: those of its arguments, "*fp32" for all others. unaligned: arguments no multiple of 16."""
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


def compile_all(
    compile_case: Callable[..., list[Resources]], cases: Sequence[tuple[Any, ...]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[list[Resources]]:
    """What `compile_case` finds of each case, whose first entry is the architecture (80, 90)."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # its default, named because 3.9 warns that it will change
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.starmap(compile_case, cases)
    for case, kernels in zip(cases, found, strict=True):
        for kernel in kernels:
            print(*case, kernel)
            assert kernel.shared <= SHARED_MEMORY[case[0]], (case, kernel)
    return found
