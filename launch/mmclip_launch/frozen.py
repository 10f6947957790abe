"""A copy of the code that a job will run: what is edited after its submission does not reach a job that waits."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import secrets
import shlex
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from mmclip_shards.storage import write_atomic

from mmclip_launch.probe import code_hash

OURS = ("mmclip_dist", "mmclip_kernels", "mmclip_shards", "mmclip_launch")
CODE, SUBMITTED = "code", "submitted.json"


def module_folder(package: str) -> Path:
    """Where an import would find a package."""
    spec = importlib.util.find_spec(package)
    assert spec and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def frozen_at(run_dir: Path) -> Path:
    """Where the copy of the present code lies, or would: RUN/code/HASH. The name is a hash of what it holds."""
    return run_dir.absolute() / CODE / str(code_hash(list(OURS)))


def copy_packages(folder: Path) -> None:
    """Our packages as they are now, into a folder: code and data, without the results of benches."""
    for package in OURS:
        ignored = shutil.ignore_patterns("__pycache__", "results", ".*")
        shutil.copytree(module_folder(package), folder / package, ignore=ignored)


def freeze(run_dir: Path) -> Path:
    """Copy our packages, unless that was done -> the folder."""
    folder = frozen_at(run_dir)
    if not folder.is_dir():
        new = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.writing")
        try:
            copy_packages(new)
            new.rename(folder)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            if not folder.is_dir():  # else another submission was faster
                raise
    return folder


def archive(folder: Path) -> str:
    """What a folder holds, as text: a compressed tar in base64 (`mmclip_launch.unpack`)."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        tar.add(folder, arcname=".")
    return base64.b64encode(held.getvalue()).decode()


def variables(folder: Path) -> dict[str, str]:
    """What makes Python import the copy, wherever a job starts."""
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def record(run_dir: Path, target: str, command: Sequence[str], code: str) -> None:
    """Write what was submitted: RUN/submitted.json. code: a folder's name, or an image."""
    told = {"target": target, "version": version("mmclip-dist"), "code": code, "command": list(command)}
    write_atomic(str(run_dir / SUBMITTED), json.dumps(told, indent=2).encode())


def shown(command: Iterable[str], environment: Mapping[str, str]) -> str:
    """A command as one would type it, with the variables that differ from this process's."""
    changed = [f"{name}={shlex.quote(value)}" for name, value in environment.items() if os.environ.get(name) != value]
    return " ".join([*changed, shlex.join(command)])
