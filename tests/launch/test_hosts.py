"""Hostfiles, and programs that are run on hosts over a stand-in for ssh."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from pathlib import Path

import pytest
from mmclip_launch.findings import judge_answers
from mmclip_launch.hosts import PASSED_ON, Host, first_hosts, hostfile_text, read_hostfile, run_everywhere

A, B = Host("node-1", 8), Host("node-2", 8)
# It notes its arguments, and runs the last one here. Hosts in $DEAD behave like hosts that are off.
SSH = """#!/usr/bin/env bash
echo "$@" >>"$NOTES"
host="${@: -2:1}"
[[ $host == dead ]] && { echo "ssh: connect to host dead port 22: Connection timed out" >&2; exit 255; }
[[ $host == slow ]] && exec sleep 30
[[ $host == full ]] && { echo "bash: cannot create temp file: No space left on device" >&2; exit 1; }
[[ $host == bare ]] && { echo "bash: /opt/venv/bin/python: No such file or directory" >&2; exit 127; }
echo "Welcome to $host"
exec env -i PATH="$PATH" bash -c "${@: -1}"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in on PATH; the file in which it notes its arguments. The working folder is empty."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("HOME", str(tmp_path / "work"))
    return tmp_path / "notes"


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two nodes\n\nnode-1 slots=8\n  node-2   slots=8 # the new one\n")
    assert read_hostfile(tmp_path / "hosts") == (A, B)
    assert hostfile_text((A, B)) == "node-1 slots=8\nnode-2 slots=8\n"
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfnode-1 slots=8\r\nnode-2 slots=8\r\n")  # of an editor on Windows
    assert read_hostfile(tmp_path / "hosts") == (A, B)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node-1 slots=8\nnode-2 slot=8\n", "line 2: 'node-2 slot=8' is not `NAME slots=N`"),
        ("node-1 slots=8 node-2 slots=8\n", "line 1: 'node-1 slots=8 node-2 slots=8' is not"),
        ("node-1\n", "line 1: 'node-1' is not"),
        ("-oProxyCommand=x slots=1\n", "line 1: '-oProxyCommand=x slots=1' is not"),
        ("node-1 slots=8\n\nnode-1 slots=8\n", "line 3: node-1 stands there twice: delete one line"),
        ("node-1 slots=0\n", "line 1: node-1 has no slots"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_wrong_line_of_a_hostfile_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=re.escape(told)):
        read_hostfile(tmp_path / "hosts")


def test_more_nodes_than_hosts_are_refused() -> None:
    assert first_hosts((A, B), 1) == (A,) and first_hosts((A, B), None) == (A, B) and first_hosts(None, 1) is None
    with pytest.raises(ValueError, match="--nodes 3, but the hostfile names 2: name more hosts"):
        first_hosts((A, B), 3)
    with pytest.raises(ValueError, match="--nodes 2 needs a list of them: --hostfile FILE"):
        first_hosts(None, 2)


def test_the_variables_that_are_passed_on_are_those_of_deepspeeds_launcher() -> None:
    """Without MLFLOW*, which may hold a password."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec and spec.origin
    runner = Path(spec.origin).parent / "launcher" / "runner.py"
    cuda = next(Path(spec.origin).parent.rglob("cuda_accelerator.py"))
    named = re.findall(r"EXPORT_ENVS = \[(.*)\]", runner.read_text())
    named += re.findall(r"def export_envs.*\n\s+return \[(.*)\]", cuda.read_text())
    assert len(named) == 2
    assert set(re.findall(r"'(\w+)'", " ".join(named))) == {*PASSED_ON, "MLFLOW"}


ECHO = """
import json, os
seen = [request["word"], os.environ.get("NCCL_DEBUG"), os.environ.get("PLACE"), os.getcwd()]
print("MMCLIP-ANSWER " + json.dumps(seen))
"""


def test_a_program_sees_what_ranks_would_see_and_no_secret_is_in_a_list_of_processes(
    ssh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-in-the-shell")
    Path(".deepspeed_env").write_text("PLACE=planted-in-the-file\n")
    requests = {name: {"word": f"hello {name}"} for name in ("a", "b")}
    answers = run_everywhere((Host("a", 1), Host("b", 1)), ECHO, requests, 20, by_ssh=True)
    for name in ("a", "b"):
        assert answers[name].value == [f"hello {name}", "WARN", "planted-in-the-file", str(Path.cwd())], answers[name]
    assert "planted" not in ssh.read_text() and "BatchMode=yes" in ssh.read_text()


def test_a_line_of_deepspeed_env_that_would_end_the_launcher_is_named(ssh: Path) -> None:
    Path(".deepspeed_env").write_text("PLACE=here\n\n")
    with pytest.raises(ValueError, match=r"\.deepspeed_env, line 2: '' is not NAME=VALUE"):
        run_everywhere((Host("a", 1),), ECHO, {"a": {"word": ""}}, 20, by_ssh=True)


def test_hosts_that_do_not_answer_are_named_with_the_cause_soon(ssh: Path) -> None:
    names = ("dead", "slow", "full", "bare", "fine")
    began = time.monotonic()
    hosts = [Host(name, 1) for name in names]
    answers = run_everywhere(hosts, ECHO, {name: {"word": name} for name in names}, 2, by_ssh=True)
    assert time.monotonic() - began < 8
    told = {finding.host: str(finding) for finding in judge_answers(answers)}
    assert told.keys() == {"dead", "slow", "full", "bare"}
    assert "Connection timed out: is it on, and does a firewall let port 22 through?" in told["dead"]
    assert "no answer within 2 s: log in and see what holds it up" in told["slow"]
    assert "No space left on device: free some disk there" in told["full"]
    assert "install the same environment at the same path" in told["bare"]


def test_a_program_that_fails_is_told_by_its_last_line(ssh: Path) -> None:
    answers = run_everywhere((Host("a", 1),), "raise RuntimeError('odd')", {"a": {}}, 20, by_ssh=True)
    assert answers["a"].value is None and answers["a"].fault == "code 1: RuntimeError: odd"
