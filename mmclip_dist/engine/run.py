"""The run folder: who owns it, what it says about itself, and the metrics of every step."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmclip_shards.storage import write_atomic

from mmclip_dist.config import Config, dump_config
from mmclip_dist.engine.orphans import ORPHAN_S

METRICS = "metrics.jsonl"


@contextmanager
def locked(folder: Path, wait_s: float = ORPHAN_S + 5) -> Iterator[None]:
    """Own a run folder. ValueError if another run does; one whose launcher was killed saves and lets go within the wait."""
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


def describe(folder: Path, config: Config, world: int, deepspeed: dict[str, Any]) -> None:
    """Write what made this run: the resolved config, DeepSpeed's JSON, versions, git state and command.

    ValueError if the folder holds a run of another configuration: its checkpoints would not be this run's.
    """
    path, text = folder / "config.yaml", dump_config(config)
    if path.exists() and path.read_text() != text:
        raise ValueError(
            f"{folder} holds a run of another configuration (differs in {', '.join(_differences(path.read_text(), text))}); "
            "set run_dir to another folder, or delete this one to start anew"
        )
    write_atomic(str(path), text.encode())
    write_atomic(str(folder / "deepspeed.json"), json.dumps(deepspeed, indent=2).encode())
    environment = {
        "command": sys.argv,
        "world_size": world,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": {name: _version(name) for name in ("mmclip-dist", "torch", "deepspeed", "transformers", "numpy")},
        "git": _git_state(),
    }
    write_atomic(str(folder / "environment.json"), json.dumps(environment, indent=2).encode())


def _differences(old: str, new: str) -> list[str]:
    return sorted({line.split(":")[0].strip() for line in set(old.splitlines()) ^ set(new.splitlines())})[:5]


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


class MetricsLog:
    """metrics.jsonl: one row a logged step. Rows after the step that a run resumes from are dropped first, so that a run
    that was killed leaves the same rows as one that was not."""

    def __init__(self, folder: Path, resumed_from: int) -> None:
        self.path = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= resumed_from]
        write_atomic(str(self.path), "".join(json.dumps(row) + "\n" for row in kept).encode())

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; a row that a killed run left half-written is passed over."""
    path = folder / METRICS
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def host_memory_gib() -> float:
    """Resident memory of this process, GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
