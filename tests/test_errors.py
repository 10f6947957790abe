"""Which errors are the user's to mend, and what is printed of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mmclip_shards.storage import write_atomic

from mmclip_dist.data.example import MissingSidecar
from mmclip_dist.engine.collective import AgreedError, AgreedFailure
from mmclip_dist.errors import SECRET, exit_code, line

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


@pytest.mark.parametrize(
    "url",
    ["s3://AKIA1:hunter2@bucket/set", "s3://AKIA1:hun/ter2@bucket/set", "https://hunter2@there/set", "http://me:hun@ter2@there/set",
     "https://b.s3.amazonaws.com/table.csv?X-Amz-Credential=hunter2%2Fs3&X-Amz-Signature=hunter2&x=1",
     "https://b.blob.core.windows.net/table.csv?sv=1&sig=hunter2", "https://storage.googleapis.com/b?X-Goog-Signature=hunter2"],
)  # fmt: skip
def test_an_error_does_not_repeat_what_is_secret_in_a_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mmclip", "stats", f"--data={url}"])
    bucket = url.partition("://")[2].partition("/set")[0]
    told = line(OSError(f'{url}: Invalid bucket name "{bucket}"'))
    assert told.startswith(f"failed: {url.partition('://')[0]}://") and "hun" not in told and "ter2" not in told


@pytest.mark.parametrize(
    "plain",
    ["s3://bucket/set@2/train", "http://host:5000/a@b", "http://host:5000", "abfs://container@account.dfs.core.windows.net/run",
     '[{"url":"s3://bucket/a","note":"x@y"}]', "https://host/table.csv?version=3"],
)  # fmt: skip
def test_what_is_not_secret_in_a_url_is_told(plain: str) -> None:
    assert not SECRET.search(plain) and line(OSError(plain)) == f"failed: {plain}"


@pytest.mark.parametrize("words", [["doctor", "--json"], ["doctor"], ["stats"], ["entities"]])
def test_no_command_repeats_a_key_that_stands_in_a_url(words: list[str]) -> None:
    data = ["--data"] if words[0] == "doctor" else []
    command = [sys.executable, "-m", "mmclip_launch.cli", *words, *data, "file:///no/AKIA1?X-Amz-Signature=hunter2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode in (1, 2) and "/no/AKIA1" in ran.stdout + ran.stderr and "hunter2" not in ran.stdout + ran.stderr
