"""Everything this package uses of DeepSpeed beyond its public interface.

Another release may change any of it without notice, so it is all here, and only versions that the tests ran with are
accepted. When the range in `pyproject.toml` grows: read these functions beside the new source, then run `tests/engine`,
`tests/test_broken_runs.py` and `tests/test_faults.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn

TESTED = ">=0.19,<0.20"
"""Versions of DeepSpeed that this module fits; the same as in pyproject.toml."""


def check_version(found: str | None = None) -> None:
    """ValueError unless DeepSpeed is of a version in `TESTED`. found: by default, the installed one."""
    found = found or version("deepspeed")
    if not SpecifierSet(TESTED).contains(found, prereleases=True):
        raise ValueError(
            f"deepspeed {found} is installed, but this release was tested with {TESTED}: pip install 'deepspeed{TESTED}'"
        )


# -- Start ------------------------------------------------------------------------------------------------------------


def leave_out_shared_memory_op() -> None:
    """Mark DeepSpeed's shared-memory op as not available. Call this before the process group is joined.

    The op serves inference on CPUs alone. Joining would compile it (a compiler for nothing, and a killed build leaves a lock
    file on which every later run waits forever) and map 66 MiB of /dev/shm a rank that no process ever removes.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def silence_old_names() -> None:
    """Every rank of every run would warn that DeepSpeed calls collectives by names that torch 2.13 replaces."""
    old = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=old, category=FutureWarning)


def leave_muon_uncompiled() -> None:
    """Load DeepSpeed's Muon without `torch.compile`. Call this before an engine is built around an optimizer of ours.

    Every engine loads Muon, to ask whether its optimizer is one. Muon asks for compiled functions as it is loaded, which loads
    all of Inductor: 2 s of processor time at the start of each rank, for functions that only Muon calls.
    """
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 (to load it)
    finally:
        compiler.compile = compile_


def multiplies_fp16() -> bool:
    """What DeepSpeed asks of a CPU before it accepts fp16 (cpu_accelerator.py, is_fp16_supported)."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


# -- Weights ----------------------------------------------------------------------------------------------------------


def masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """At stage 0 in half precision: the float32 weight of each parameter. ZeRO has public functions for this."""
    if engine.zero_optimization_stage() > 0 or not hasattr(engine.optimizer, "fp32_groups"):
        return {}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {half: master for halves, wholes in pairs for half, master in zip(halves, wholes, strict=True)}


def refresh_weights(engine: Any) -> None:
    """Copy the optimizer's weights to those that the model computes with, as DeepSpeed does after a step."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        for half, master in masters(engine).items():
            half.data.copy_(master)


# -- Checkpoints ------------------------------------------------------------------------------------------------------


def leave_out_recovery_script(engine: Any) -> None:
    """Do not copy zero_to_fp32.py into checkpoints: model.safetensors holds those weights, and on a full disk the copy would
    fail on the first rank alone."""
    engine._copy_recovery_script = lambda folder: None


def state_classes() -> list[type]:
    """The classes of the objects in DeepSpeed's state files, besides those that torch loads with weights_only=True."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def loading_universal(engine: Any) -> Iterator[None]:
    """Inside, `engine.load_checkpoint` reads the universal format. DeepSpeed has a config key for it, but whether a conversion
    is needed is known only once the engine is built."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def mend_universal_stage_3(optimizer: Any, folder: Path) -> None:
    """Load what DeepSpeed 0.19 leaves out, and repair what it spoils, when it loads a universal checkpoint at stage 3."""
    first = optimizer.param_names[optimizer.fp16_groups[0][0]]
    others = {path.stem for path in (folder / first).glob("*.pt")} - {"fp32", "exp_avg", "exp_avg_sq", "step"}
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        state = optimizer.optimizer.state[flat]
        # DeepSpeed gives all groups one step counter, so each would count the others' steps as well.
        state["step"] = state["step"].clone()
        for key in others:
            names = [optimizer.param_names[weight] for weight in group]
            parts = [
                optimizer.load_hp_checkpoint_state(str(folder / name), key, param=weight)
                for name, weight in zip(names, group, strict=True)
            ]
            state[key] = torch.cat(parts).to(flat)


def optimizer_files(checkpoint: str) -> tuple[list[str], int]:
    """The files with each rank's optimizer state, in rank order, and the ZeRO stage that wrote them."""
    from deepspeed.checkpoint import ds_to_universal

    files = ds_to_universal._get_optim_files(checkpoint)
    return files, ds_to_universal._get_zero_stage(files)


def weight_file(checkpoint: str) -> str:
    """A file with the model's state, which holds the shapes of all weights."""
    from deepspeed.checkpoint import ds_to_universal

    return str(ds_to_universal._get_model_state_files(checkpoint)[0])
