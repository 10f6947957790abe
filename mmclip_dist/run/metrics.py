"""The metrics of a run: one row a logged step, in files of the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmclip_shards.storage import write_atomic
from mmclip_shards.textfiles import read_rows

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


class MetricsLog:
    """A file with one row a logged step. It first drops rows after the step that a run resumes from, so that a killed run leaves
    the same rows as an unbroken one."""

    def __init__(self, folder: Path, resumed_from: int, name: str = METRICS) -> None:
        self.path = folder / name
        kept = [row for row in read_metrics(folder, name) if row["step"] <= resumed_from]
        write_atomic(str(self.path), "".join(json.dumps(row) + "\n" for row in kept).encode())

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")


def read_metrics(folder: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """The rows of a run so far, without a last row that a killed run left half-written."""
    path = folder / name
    return read_rows(path, "delete that line; the run loses the record of it, and nothing else") if path.exists() else []
