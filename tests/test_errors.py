"""Which errors are the user's to mend, and what is printed of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmclip_shards.storage import write_atomic

from mmclip_dist.data.example import MissingSidecar
from mmclip_dist.engine.collective import AgreedError, AgreedFailure
from mmclip_dist.errors import exit_code, line

USERS = [ValueError("x"), FileNotFoundError("x"), PermissionError("x"), NotADirectoryError("x"), IsADirectoryError("x"),
         MissingSidecar("x"), AgreedError("x")]  # fmt: skip


@pytest.mark.parametrize("error", USERS, ids=lambda error: type(error).__name__)
def test_what_a_user_can_mend_is_an_error_with_code_2(error: Exception) -> None:
    assert exit_code(error) == 2 and line(error) == "error: x"
    assert line(error, "rank 3 on node7") == "error: rank 3 on node7: x"


@pytest.mark.parametrize("error", [OSError("x"), TimeoutError("x"), ConnectionError("x"), AgreedFailure("x")])
def test_what_a_machine_or_a_store_did_is_a_failure_with_code_1(error: Exception) -> None:
    assert exit_code(error) == 1 and line(error) == "failed: x"


def test_what_the_system_refused_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OSError) as told:
        write_atomic(tmp_path / "page.html", b"")
    assert line(told.value) == f"error: {tmp_path}/page.html: Is a directory"


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), AssertionError("x")])
def test_a_bug_is_told_with_its_type(error: Exception) -> None:
    assert exit_code(error) is None and line(error, "rank 0 on a").startswith(f"failed: rank 0 on a: {type(error).__name__}: ")
