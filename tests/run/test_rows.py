"""Rows of the run folder: what cannot be written is told, seldom, and never ends a run."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmclip_dist.run import rows
from mmclip_dist.run.metrics import MetricsLog, read_metrics
from mmclip_dist.run.rows import RowFile, SeldomWarning


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """What a full disk does: a write is cut, and the next one fails."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_whole_rows_and_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1})
    with files_no_larger_than(len('{"step": 1}\n') + 5):
        log.write({"step": 2})
        log.write({"step": 3})
    log.write({"step": 4})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 4}]
    (told,) = capsys.readouterr().err.splitlines()
    assert told == f"warning: {tmp_path / 'metrics.jsonl'} lacks a row: No space left on device; training goes on"


def test_a_folder_that_is_gone_costs_rows_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RowFile(tmp_path / "gone" / "rows.jsonl").write({"step": 1})
    assert "lacks a row: No such file or directory" in capsys.readouterr().err


def test_a_fault_that_stays_is_told_again_every_ten_minutes_with_its_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(rows.time, "monotonic", lambda: now)
    warning = SeldomWarning()
    for now in (0.0, 1.0, 599.0, 601.0, 602.0):  # noqa: B007 (the clock reads it)
        warning.tell("no room")
    assert capsys.readouterr().err.splitlines() == ["warning: no room", "warning: no room (4 times so far)"]


def test_a_damaged_file_is_kept_aside_and_its_readable_rows_are_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = b'{"step": 2}\n\xff\x00\n[1]\n{"loss": 1}\n{"step": 4}\n{"step": 6}\n{"st'
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    MetricsLog(tmp_path, 4).write({"step": 6, "again": True})
    assert read_metrics(tmp_path) == [{"step": 2}, {"step": 4}, {"step": 6, "again": True}]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert "warning: 3 lines of " in capsys.readouterr().err
