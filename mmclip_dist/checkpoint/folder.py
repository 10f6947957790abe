"""The folders of checkpoints: their names, which are whole, which to keep, and what one says of itself.

Light: nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from mmclip_shards.storage import write_atomic

from mmclip_dist.config import Checkpoint

_NAME = re.compile(r"step-(\d{8})")
WEIGHTS, AVERAGED_WEIGHTS, CONFIG, META = "model.safetensors", "ema.safetensors", "config.yaml", "meta.json"
TOKENIZER, PROMPTS = "tokenizer", "prompts.yaml"
MANIFEST = "checkpoint.json"
"""Sizes and hashes of all other files, written last. A checkpoint without it, or that differs from it, is torn."""
_BLOCK = 1 << 22
_READERS = 8  # files read at once; one reader cannot saturate a parallel file system


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself. trained_on: sha256 of every base shard that training could read."""

    step: int
    world_size: int
    zero_stage: int
    diseases: tuple[str, ...]
    trained_on: tuple[str, ...]
    score: float | None = None  # of an evaluation; higher is better


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint. xxh3: 128 bits, hexadecimal."""

    bytes: int
    xxh3: str


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / checkpoint_name(step)


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name; None for other names, such as those of copies under way."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def checkpoints_of(run_dir: Path) -> list[Path]:
    """All checkpoints of a run that carry a final name, oldest first."""
    return sorted(_named_as_checkpoints(run_dir / "checkpoints"))


def _named_as_checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if step_of(path.name) is not None]


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run. A torn save never gets a final name; `fault` finds later damage."""
    return max(checkpoints_of(run_dir), default=None)


def resolve_checkpoint(path: str) -> Path:
    """A checkpoint folder, or the newest one of a run folder or of a mirror on a disk. ValueError if there is none.

    `checkpoint.mirror.local_checkpoint` takes the URL of a mirror as well.
    """
    folder = Path(path)
    if (folder / META).is_file():
        return folder
    newest = newest_checkpoint(folder) or max(_named_as_checkpoints(folder), default=None)
    if newest is None:
        raise ValueError(f"no checkpoint at {path}: name a run folder or one of its checkpoints/step-* folders")
    return newest


def read_meta(checkpoint: Path) -> Meta:
    try:
        return parse_meta((checkpoint / META).read_bytes())
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def parse_meta(data: bytes) -> Meta:
    """ValueError if another version of this package wrote it, or if it is damaged."""
    try:
        values: dict[str, Any] = json.loads(data)
        return Meta(**values | {name: tuple(values[name]) for name in ("diseases", "trained_on")})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{META} is not that of this version of mmclip-dist ({error}): use the version that wrote the checkpoint, or start "
            "anew in another run_dir"
        ) from error


def weights_hash(checkpoint: Path, *, average: bool = False) -> str:
    """sha256 of the weights, or of their average."""
    with (checkpoint / (AVERAGED_WEIGHTS if average else WEIGHTS)).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# -- Whole or torn ----------------------------------------------------------------------------------------------------


def entry_of(path: Path) -> Entry:
    """Size and hash of a file as it is on the disk."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return Entry(size, digest.hexdigest())


def write_manifest(folder: Path, files: Mapping[str, Entry]) -> None:
    rows = {name: vars(entry) for name, entry in sorted(files.items())}
    write_atomic(str(folder / MANIFEST), json.dumps({"files": rows}, indent=1).encode())


def parse_manifest(data: bytes) -> dict[str, Entry]:
    """ValueError if it is not a manifest, or if it names a file that would lie outside the checkpoint's folder."""
    try:
        files = {name: Entry(**row) for name, row in json.loads(data)["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a manifest: {error!r}") from error
    odd = [name for name in files if not _is_inside(name)]
    if odd:
        raise ValueError(f"not a manifest: it names {odd[0]!r}, which is no file of a checkpoint; trust nothing that lies there")
    return files


def _is_inside(name: str) -> bool:
    """Whether a manifest's file name is a plain relative path, on every system."""
    parts = name.split("/")
    return name.isprintable() and not set("\\:") & set(name) and not {"", ".", ".."} & set(parts) and name != MANIFEST


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, short or changed. None: it is whole. Reads all of it."""
    try:
        files = parse_manifest((checkpoint / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    if META not in files:
        return f"{MANIFEST} names no {META}"

    def fault_of(item: tuple[str, Entry]) -> str | None:
        name, wanted = item
        try:
            size = (checkpoint / name).stat().st_size
            if size != wanted.bytes:
                return f"{name} has {size} bytes instead of {wanted.bytes}"
            return None if entry_of(checkpoint / name) == wanted else f"{name} has changed since it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"

    with ThreadPoolExecutor(_READERS) as pool:
        return next((found for found in pool.map(fault_of, files.items()) if found), None)


def to_keep(scores: Mapping[int, float | None], *, newest: int, every: int | None, best: int) -> set[int]:
    """Of checkpoints {step: score}, the steps to keep: the newest, those of a multiple of `every`, those with the best scores."""
    steps = sorted(scores)
    periodic = {step for step in steps if every and step % every == 0}
    scored = sorted(((score, step) for step, score in scores.items() if score is not None), reverse=True)
    return {*steps[-newest:], *periodic, *(step for _, step in scored[:best])}


def set_aside(checkpoint: Path, reason: str) -> None:
    """Give a checkpoint another name, so that it neither counts as one to keep nor is looked at again; say so."""
    aside = checkpoint.with_name(f"{checkpoint.name}.torn")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    say(f"passing over {checkpoint}, which {reason}; it is now {aside.name}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def kept_by(settings: Checkpoint) -> Callable[[Mapping[int, float | None]], set[int]]:
    """The function from {step: score} to the steps to keep."""
    return partial(to_keep, newest=settings.keep, every=settings.keep_every, best=settings.keep_best)


def scores_of(checkpoints: Collection[Path]) -> dict[int, float | None]:
    """{step: score}. A damaged old checkpoint, or one of another version, gets no score instead of an error."""
    scores: dict[int, float | None] = {}
    for path in checkpoints:
        step = step_of(path.name)
        assert step is not None, path
        try:
            scores[step] = read_meta(path).score
        except (OSError, ValueError):
            scores[step] = None
    return scores
