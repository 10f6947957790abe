"""A run whose sets lie on a store that refuses it: told by one line, soon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mmclip_shards.testing.s3_server import S3Server

from tests.launched import run_training


@pytest.mark.slow
def test_wrong_credentials_at_the_start_are_one_line(sets, tmp_path: Path, s3: S3Server) -> None:
    began = time.monotonic()
    overrides = [*sets.overrides(tmp_path / "run"), f"data.sources=[{{url: {s3.url}/set/train}}]", "loss.entity=0"]
    environment = s3.environment() | {"AWS_SECRET_ACCESS_KEY": "wrong-and-secret"}
    run = run_training(overrides, tmp_path, check=False, **environment)
    assert (run.returncode, len(run.errors)) == (2, 1), run.output
    assert f"{s3.url}/set/train/manifest.json" in run.errors[0] and "the keys" in run.errors[0]
    assert "wrong-and-secret" not in run.output
    assert "Traceback" not in run.output and time.monotonic() - began < 30
