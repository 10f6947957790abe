"""The metrics of a run: one row a logged step, in files of the run folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmclip_shards.storage import write_atomic
from mmclip_shards.textfiles import read_rows

from mmclip_dist.run.rows import RowFile

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


class MetricsLog(RowFile):
    """A file with one row a logged step. It first drops rows after the step that a run resumes from, so that a killed run leaves
    the same rows as an unbroken one. A damaged file is kept aside, and its readable rows are taken over."""

    def __init__(self, folder: Path, resumed_from: int, name: str = METRICS) -> None:
        super().__init__(folder / name)
        rows, damaged = readable_rows(folder, name)
        if damaged:
            aside = self.path.with_name(f"{name}.damaged")
            self.path.replace(aside)
            print(
                f"warning: {damaged} lines of {self.path} are not rows; the others are taken over, and the damaged file is now "
                f"{aside}", file=sys.stderr, flush=True,
            )  # fmt: skip
        kept = [row for row in rows if row["step"] <= resumed_from]
        write_atomic(str(self.path), "".join(json.dumps(row) + "\n" for row in kept).encode())


def read_metrics(folder: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """The rows of a run so far, without a last row that a killed run left half-written. ValueError for a damaged file."""
    path = folder / name
    return read_rows(path, "delete that line; the run loses the record of it, and nothing else") if path.exists() else []


def readable_rows(folder: Path, name: str = METRICS) -> tuple[list[dict[str, Any]], int]:
    """The rows that have a step, and how many lines are none: for a run, which no damaged record may end. The last line does not
    count as damaged if it is half-written."""
    path, rows, damaged = folder / name, [], 0
    if not path.exists():
        return [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged
