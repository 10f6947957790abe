"""The run folder: who owns it, and what it says about itself."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from mmclip_shards.storage import write_atomic
from mmclip_shards.textfiles import read_json

from mmclip_dist.config import Config, differences, dump_config, is_operational, load_config
from mmclip_dist.errors import SECRET
from mmclip_dist.run.metrics import readable_rows
from mmclip_dist.run.orphans import ORPHAN_S

CONFIG, CHANGES, DATA = "config.yaml", "changes.jsonl", "data.json"
_MEND = "set run_dir to another folder, or delete this one to start anew"
# Prefixes of environment variables that change what a run computes or how fast.
_TELLING = ("NCCL_", "TORCH_", "PYTORCH_", "DS_", "CUDA_", "OMP_", "TRITON_", "LOCAL_WORLD_SIZE")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASS", "PWD", "CRED", "AUTH", "PRIVATE", "COOKIE", "WEBHOOK", "DSN", "SIGNATURE")
# A long word of letters and digits, or one behind a name that tells: what tokens look like, and no setting does.
_SECRET_VALUE = re.compile(
    rf"{SECRET.pattern}|(?i:{'|'.join(_SECRET)})\w*[=:]|\b(?=\w*\d)(?=\w*[A-Za-z])\w{{20,}}|\w{{32,}}"
)
_README = """What lies here:

config.yaml       the resolved configuration; `python -m mmclip_dist.train config.yaml` under the launcher is this run again
changes.jsonl     keys that were changed when the run went on, with the last logged step before
data.json         hashes of the training sets and their sidecars, which may move but not change
deepspeed.json    what DeepSpeed was given, derived from it
environment.json  command, versions, git state, cards and drivers, environment variables that matter
packages.txt      every installed package and its version
metrics.jsonl     one row a logged step; the trackers, where there are any, show the same numbers
evaluations.jsonl one row an evaluation on held-out sets: zero-shot AUC of every class, and their mean
checkpoints/      step-NNNNNNNN: weights, optimizer, tokenizer and configuration; whole ones only, a torn one is never named so
quarantine-*      samples that could not be decoded, with the reason
trouble-*         steps that were skipped or whose loss jumped, with the keys of their samples
stop, stopped.json  make a file `stop` and the run saves and ends; stopped.json is there after a stop on request
trackers.json     the ids under which Weights & Biases and MLflow know this run; tensorboard/: its event files
.lock             held while the run works here

Training started again with the same configuration goes on from the newest checkpoint.
"""


@contextmanager
def locked(folder: Path, wait_s: float = ORPHAN_S + 5) -> Iterator[None]:
    """Own a run folder. ValueError if another run still owns it after `wait_s`; an orphaned run saves and ends within that."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise ValueError(f"run_dir={folder} cannot be written to: {error.strerror}; name another folder") from error
    with (folder / ".lock").open("a") as handle:
        deadline, told = time.monotonic() + wait_s, False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"another run is working in {folder}; wait for it or name another folder"
                    ) from None
                if not told:
                    print(f"waiting for another run in {folder} to end", file=sys.stderr, flush=True)
                told = True
                time.sleep(0.2)
        yield


def wait_for_others(folder: Path) -> None:
    """Wait for a run that owns the folder to end, as `locked` does, and own nothing afterwards."""
    if (folder / ".lock").exists():
        with locked(folder):
            pass


Identity = list[list[str]]
"""Of the training sets: hashes of each set's manifest and of its sidecars'."""


def describe(folder: Path, config: Config, world: int, deepspeed: dict[str, Any], data: Identity | None = None) -> None:
    """Write what made this run: the resolved config, DeepSpeed's JSON, versions, devices, variables, git state and command.

    A run that goes on with other operational keys (`config.OPERATIONAL`) notes them in changes.jsonl. ValueError if it would
    compute something else than the run in the folder, whose checkpoints would then be of another run. data: content of the
    training sets, which may move.
    """
    changed = _changes(folder, config, data)
    if changed:
        last = next((row["step"] for row in reversed(readable_rows(folder)[0])), 0)
        with (folder / CHANGES).open("a") as handle:
            handle.write(json.dumps({"after_step": last, "changed": changed}) + "\n")
        told = ", ".join(f"{key}={json.dumps(new)} (was {json.dumps(old)})" for key, (old, new) in changed.items())
        print(f"going on with {told}; noted in {folder / CHANGES}", flush=True)
    write_atomic(str(folder / CONFIG), dump_config(config).encode())
    if data is not None:
        write_atomic(str(folder / DATA), json.dumps(data, indent=2).encode())
    write_atomic(str(folder / "deepspeed.json"), json.dumps(deepspeed, indent=2).encode())
    environment = {
        "command": [SECRET.sub("...", word) for word in sys.argv],
        "world_size": world,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": {name: _version(name) for name in ("mmclip-dist", "torch", "deepspeed", "transformers", "triton", "numpy")},
        "devices": _devices(),
        "variables": telling_variables(os.environ),
        "git": _git_state(),
    }
    write_atomic(str(folder / "environment.json"), json.dumps(environment, indent=2).encode())
    write_atomic(str(folder / "packages.txt"), _packages().encode())
    write_atomic(str(folder / "README.txt"), _README.encode())


def _changes(folder: Path, config: Config, data: Identity | None) -> dict[str, tuple[Any, Any]]:
    """The keys that changed since the run in the folder was started. ValueError if one of them may not."""
    path = folder / CONFIG
    if not path.exists():
        return {}
    try:
        before = load_config(str(path))
    except ValueError as error:
        raise ValueError(f"{error}. It is the configuration of the run in {folder}: {_MEND}") from error
    changed = differences(before, config)
    fixed = [key for key in changed if not is_operational(key)]
    if "data.sources" in fixed and data is not None and _same_data(folder, before, config, data):
        fixed.remove("data.sources")  # the same sets, elsewhere
    if fixed:
        raise ValueError(
            f"{folder} holds a run of another configuration (differs in {', '.join(fixed)}, which would change what it "
            f"computes): give it the old values again, {_MEND}"
        )
    return changed


def _same_data(folder: Path, before: Config, config: Config, data: Identity) -> bool:
    """Whether sets and sidecars have the same content as before, and the same weights."""
    path = folder / DATA
    if not path.exists() or read_json(path, _MEND) != data:
        return False
    return [source.weight for source in before.data.sources] == [source.weight for source in config.data.sources]


def telling_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what a run computes or how fast, without those whose name tells of a secret; a value that looks
    like one is left out."""
    return {
        name: "(not shown: it may hold a secret)" if _SECRET_VALUE.search(value) else value
        for name, value in sorted(environment.items())
        if name.startswith(_TELLING) and not any(word in name for word in _SECRET)
    }  # fmt: skip


def _devices() -> dict[str, Any]:
    """The GPUs that this process sees (an empty list without any), and the versions of driver and libraries."""
    import torch  # imported here: readers of run folders do without torch

    driver = Path("/proc/driver/nvidia/version")
    gpu = torch.cuda.is_available()
    return {
        "names": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        "cpus": os.cpu_count(),
    }


def _packages() -> str:
    told = [item.metadata for item in distributions()]  # each access reads and parses the file anew
    found = {f"{each['Name']}=={each['Version']}" for each in told if each["Name"]}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
