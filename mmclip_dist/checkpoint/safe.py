"""Load the .pt files of a checkpoint without running what is in them.

A pickle may call any function, so torch's restricted unpickler reads them (`weights_only=True`), with the few classes that
DeepSpeed's state needs. DeepSpeed itself reads them without it: when it loads a universal checkpoint and when it writes one. So
all files are checked before it gets any (`check_files`).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmclip_dist.engine import deepspeed_inside

_NUMPY: list[Any] = [
    np.ndarray, np.dtype, type(np.dtype("uint32")),
    *((np.zeros(1).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]  # fmt: skip
"""What the state of numpy's random generator consists of. numpy 2 has renamed the function."""


def _member(kind: Any, name: str) -> Any:
    """A member of an enumeration. Some versions of Python (3.11.2, 3.12) pickle it as a call of `getattr`; no other attribute of
    anything is given out."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"GLOBAL getattr of {kind!r} is no member of an enumeration")
    return kind[name]


_MEMBERS: list[Any] = [(_member, f"{module}.getattr") for module in ("__builtin__", "builtins")]


def load_state(path: str | Path, map_location: Any = None, *, trusted: bool = False, mmap: bool | None = None) -> Any:
    """torch.load without any call but those of a training state. ValueError if the file asks for another one.

    trusted: call whatever the file asks for.
    """
    if trusted:
        return torch.load(path, map_location=map_location, mmap=mmap, weights_only=False)
    try:
        with torch.serialization.safe_globals([*deepspeed_inside.state_classes(), *_NUMPY, *_MEMBERS]):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} asks to run {found[1] if found else 'what is no state of a training run'}, so it was not loaded: name "
            "another checkpoint, or, if you know who wrote this one, set checkpoint.trusted=true"
        ) from error


def check_files(files: Sequence[Path]) -> None:
    """ValueError if one of these .pt files asks for a call that no training state needs. Reads no tensors."""
    for path in files:
        load_state(path, "cpu", mmap=True)
