"""A maker of sidecar rows that fails. It imports little: every Ray worker that fails is followed by one that imports it again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def build_failing(fault: str, counter: str):
    """A maker that fails as `fault` says, at most so many times as its counter file allows."""

    def count() -> int:
        path = Path(counter)
        path.write_text(path.read_text() + "x" if path.exists() else "x")
        return len(path.read_text())

    def make(samples):
        if fault == "bug" or (fault == "once" and count() == 1):
            raise RuntimeError("the model is gone")
        if fault == "dies" or (fault == "dies twice at each of two shards" and count() in (1, 2, 4, 5)):
            os._exit(9)
        if fault == "damaged" or (fault == "first damaged" and count() == 1):
            raise ValueError("key k-7, offset 512:\n  damaged")
        return [(key, {"entities.json": b"[]"}) for key, _ in samples]

    if fault == "no start":
        raise ValueError("no such model here")
    return make


def build_slow(go: str):
    """A maker that notes each shard it begins in `go`.starts, and waits for the file `go`."""

    def make(samples):
        with Path(f"{go}.starts").open("a") as starts:
            starts.write(f"{os.getpid()}\n")
        while not Path(go).exists():
            time.sleep(0.05)
        return [(key, {"entities.json": json.dumps([key]).encode()}) for key, _ in samples]

    return make


def build_large(size: int):
    """A maker that holds `size` bytes."""
    held = b"x" * size
    return lambda samples: [(key, {"entities.json": held[:0] + b"[]"}) for key, _ in samples]
