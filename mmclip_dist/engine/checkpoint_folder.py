"""The folders of checkpoints: their names, the newest one, and what one says of itself. Light: nothing here needs torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = re.compile(r"step-(\d{8})")
WEIGHTS, AVERAGED_WEIGHTS, CONFIG, META = "model.safetensors", "ema.safetensors", "config.yaml", "meta.json"


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself. trained_on: sha256 of every base shard that training could read."""

    step: int
    world_size: int
    zero_stage: int
    diseases: tuple[str, ...]
    trained_on: tuple[str, ...]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; a torn one never carries the final name."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return max(found, default=None)


def resolve_checkpoint(path: str) -> Path:
    """A checkpoint folder, or the newest one of a run folder. ValueError if there is none."""
    folder = Path(path)
    if (folder / META).is_file():
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        raise ValueError(f"no checkpoint at {path}: name a run folder or one of its checkpoints/step-* folders")
    return newest


def read_meta(checkpoint: Path) -> Meta:
    values: dict[str, Any] = json.loads((checkpoint / META).read_text())
    return Meta(**values | {name: tuple(values[name]) for name in ("diseases", "trained_on")})


def weights_hash(checkpoint: Path) -> str:
    """sha256 of the weights: the identity of a checkpoint for what is made with it."""
    with (checkpoint / WEIGHTS).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
