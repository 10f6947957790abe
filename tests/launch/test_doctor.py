"""`mmclip doctor` on this machine, and on Ray clusters that are none."""

from __future__ import annotations

import json
import platform
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from mmclip_launch import all_reduce, doctor
from mmclip_launch.commands import app
from mmclip_launch.findings import Finding, judge_all_reduce
from mmclip_launch.hosts import LOCAL, Answer, Host
from mmclip_launch.probe import free_port
from mmclip_launch.ray_cluster import judge_cluster
from typer.testing import CliRunner

from tests.conftest import wait_for

HERE = (Host(LOCAL, 2),)


def test_this_machine_says_what_a_run_needs_to_know(tmp_path: Path) -> None:
    found, known = doctor.look(HERE, tmp_path / "run", by_ssh=False)
    assert {"host", "disk", "open files", "compiler", "versions"} <= {finding.check for finding in found}
    assert not [finding for finding in found if finding.level == "error" and finding.check != "disk"], found
    assert known[LOCAL]["packages"]["torch"] == version("torch") and len(known[LOCAL]["code"]) == 12
    assert known[LOCAL]["run_dir"]["seen"] is True and not [*(tmp_path / "run").iterdir()]


def test_a_run_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found, _ = doctor.look(HERE, tmp_path / "file" / "run", by_ssh=False)
    (fault,) = [finding for finding in found if finding.check == "run_dir"]
    assert fault.level == "error" and "cannot be written to: Not a directory" in fault.text


def test_another_hosts_folder_of_the_same_name_is_not_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host that is asked sees no mark of ours, as on a file system of its own."""
    monkeypatch.setattr(doctor, "run_everywhere", seeing_another_folder(doctor.run_everywhere, tmp_path / "other"))
    found, _ = doctor.look(HERE, tmp_path / "run", by_ssh=False)
    assert [str(each) for each in found if each.check == "run_dir"] == [
        f"error: run_dir: {LOCAL}: {tmp_path / 'other'} is not the folder that this machine sees: set run_dir to a folder that "
        "all hosts share, or checkpoint.host_local=true"
    ]


def seeing_another_folder(run: Any, other: Path) -> Any:
    other.mkdir()
    return lambda hosts, program, requests, timeout_s, by_ssh: run(
        hosts,
        program,
        {name: request | {"run_dir": str(other)} for name, request in requests.items()},
        timeout_s,
        by_ssh=by_ssh,
    )


@pytest.mark.slow
def test_two_ranks_add_up_here_and_a_set_is_read(sets: Any) -> None:
    found = list(doctor.examine(HERE, None, sets.paired, by_ssh=False))
    levels = {finding.check: finding.level for finding in found}
    assert levels["storage"] == "ok" and levels["all-reduce"] in ("ok", "warning"), found


def test_a_set_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "measure_all_reduce", lambda *_, **__: [])
    found = list(doctor.examine(HERE, None, str(tmp_path / "set"), by_ssh=False))
    (fault,) = [finding for finding in found if finding.check == "storage"]
    assert fault.level == "error" and str(tmp_path / "set") in fault.text


def test_sets_that_a_run_cannot_read_are_all_looked_at_before_it_starts(sets: Any, tmp_path: Path) -> None:
    for urls, told in (
        ([sets.paired, sets.sidecar("entities")], None),
        ([sets.paired, str(tmp_path / "gone")], f"{tmp_path / 'gone'} cannot be read: no manifest.json in"),
        ([str(tmp_path)], f"{tmp_path} cannot be read: "),
    ):
        found, _ = doctor.look(HERE, None, by_ssh=False, sets=urls)
        faults = [finding for finding in found if finding.check == "storage"]
        assert [finding.level for finding in faults] == ["error"] * (told is not None), found
        assert not told or (told in faults[0].text and faults[0].host == LOCAL)


def test_hosts_that_cannot_take_part_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "look", lambda *_, **__: ([], {}))
    monkeypatch.setattr(doctor, "measure_all_reduce", lambda *_, **__: pytest.fail("measured"))
    found = doctor.examine((Host("a", 1), Host("b", 1)), None, None, by_ssh=True)
    assert [finding.level for finding in found] == ["not checked", "not checked"]


@pytest.mark.parametrize(("cards", "backend", "ranks"), [([1] * 4, "nccl", [4, 2]), ([], "gloo", [1, 1])])
def test_every_gpu_takes_part_or_one_rank_of_each_host(
    monkeypatch: pytest.MonkeyPatch, cards: list[int], backend: str, ranks: list[int]
) -> None:
    asked: dict[str, Any] = {}

    def answer(hosts: Any, program: str, requests: dict[str, Any], *_: Any, **__: Any) -> dict[str, Answer]:
        asked.update(requests)
        return {host.name: Answer(host, {"fault": "no"}) for host in hosts}

    monkeypatch.setattr(doctor, "run_everywhere", answer)
    facts = {"gpus": cards, "port": 5, "address": "10.0.0.1", "fabric": [], "links": {}}
    doctor.measure_all_reduce((Host("a", 8), Host("b", 2)), {"a": facts, "b": facts}, by_ssh=True)
    assert [asked[name]["ranks"] for name in "ab"] == ranks and asked["b"]["first"] == ranks[0]
    assert asked["a"] | {"backend": backend, "world": sum(ranks), "address": "10.0.0.1", "port": 5} == asked["a"]


def meeting(*firsts: int, hosts: int) -> list[str]:
    """What hosts say that meet on this machine. firsts: of each host that comes, the number of its first rank."""
    port = free_port()
    with ThreadPoolExecutor(len(firsts)) as pool:
        requests = [{"first": first, "hosts": hosts, "address": "127.0.0.1", "port": port} for first in firsts]
        return list(pool.map(all_reduce.meet, requests))


def test_hosts_meet_before_they_import_torch_and_one_that_is_cut_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meeting(2, 0, 4, hosts=3) == [""] * 3
    monkeypatch.setattr(all_reduce, "REACH_S", 1.0)
    waited, let_down = meeting(0, 2, hosts=3)
    assert waited.startswith("1 of 2 other hosts reached port ") and let_down == "not all hosts reached the first one"
    (cut,) = meeting(2, hosts=2)
    assert cut.startswith("cannot reach 127.0.0.1 port ") and ", where the first rank waits: Connection refused" in cut
    told = {"a": waited, "b": let_down, "c": cut}
    answers = {name: Answer(Host(name, 1), {"fault": fault}) for name, fault in told.items()}
    (finding,) = judge_all_reduce("gloo", [each.host for each in answers.values()], {}, answers)
    assert finding.host == "c"


def test_a_host_that_does_not_come_ends_the_measurement_before_ranks_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_reduce, "REACH_S", 0.2)
    monkeypatch.setattr(all_reduce, "rank", lambda *_: pytest.fail("started"))
    told = all_reduce.main({"first": 1, "ranks": 1, "hosts": 2, "address": "127.0.0.1", "port": free_port()})
    assert told["fault"].startswith("cannot reach 127.0.0.1 port")


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("not checked", 0), ("error", 1)])
def test_errors_give_code_1_and_json_holds_every_finding(
    level: Any, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("a slots=1\n")
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: [Finding(level, "disk", "a", "text", "mend")])
    ran = CliRunner().invoke(app, ["doctor", "--hostfile", str(tmp_path / "hosts"), "--json"])
    assert ran.exit_code == code
    assert json.loads(ran.stdout) == [{"level": level, "check": "disk", "host": "a", "text": "text", "mend": "mend"}]


@pytest.mark.parametrize(
    ("files", "words", "told"),
    [
        ({"hosts": b"a slots=1\na slots=1\n"}, (), "hosts, line 2: a stands there twice: delete one line"),
        ({"hosts": b"\xff\xfea"}, (), "hosts is not UTF-8 text (byte 0): write lines `NAME slots=N`"),
        ({}, (), "hosts is no hostfile: "),
        ({"hosts/inside": b""}, (), "hosts is no hostfile: "),
        ({"hosts": b"a slots=1\n", ".deepspeed_env": b"PLACE\n"}, (), ".deepspeed_env, line 1: 'PLACE' is not NAME=VALUE"),
    ],
)
def test_what_the_hosts_are_read_from_is_a_finding_of_the_json_too(
    files: dict[str, bytes], words: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(text)
    ran = subprocess.run(
        [sys.executable, "-m", "mmclip_launch.cli", "doctor", "--hostfile", "hosts", "--json", *words],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    (finding,) = json.loads(ran.stdout)
    assert ran.returncode == 2 and finding["level"] == "error" and told in finding["text"], ran
    assert ran.stderr == f"error: {finding['text']}\n"


def test_findings_are_told_as_they_come(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A fault of a host is on the screen before the slow parts begin."""
    dead = Finding("error", "host", "a", "Connection timed out", "is it on?")
    monkeypatch.setattr(doctor, "look", lambda *_, **__: ([dead], {"b": {"packages": {"torch": "1"}}}))

    def read(*_: Any, **__: Any) -> Any:
        wait_for(lambda: str(dead) in capsys.readouterr().out, 20)
        return {"b": Answer(Host("b", 1), {"faults": ["/set/train cannot be read: slow"]})}

    monkeypatch.setattr(doctor, "run_everywhere", read)
    monkeypatch.setattr("mmclip_launch.hosts.read_hostfile", lambda _: (Host("a", 1), Host("b", 1)))
    with pytest.raises(SystemExit):
        app(["doctor", "--hostfile", "hosts", "--data", "/set/train"])
    assert "error: storage: b: /set/train cannot be read: slow" in capsys.readouterr().out


def test_a_hostfile_of_this_machine_alone_needs_no_ssh_as_for_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(doctor, "examine", lambda *_, by_ssh: asked.append(by_ssh) or [])
    for number, text in enumerate((f"{LOCAL} slots=2\n", f"{LOCAL} slots=2\nb slots=2\n", "a slots=2\n")):
        (tmp_path / f"hosts{number}").write_text(text)
        assert CliRunner().invoke(app, ["doctor", "--hostfile", str(tmp_path / f"hosts{number}")]).exit_code == 0
    assert asked == [False, True, True]


# -- Ray --------------------------------------------------------------------------------------------------------------


@contextmanager
def server(token: str | None, ray: str | None, python: str | None = None) -> Iterator[str]:
    """A job server that asks for a token, if there is one, and tells its versions, if it is one. python: by default ours."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = token is None or self.headers["Authorization"] == f"Bearer {token}"
            self.send_response(200 if allowed else 401)
            self.end_headers()
            if allowed:
                told = {"ray_version": ray, "data": {"pythonVersion": python or platform.python_version()}}
                self.wfile.write(json.dumps(told).encode() if ray else b"<html>")

        def log_message(self, *_: Any) -> None: ...

    http = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


@pytest.mark.parametrize(
    ("asked", "given", "ray", "told"),
    [
        ("planted", "planted", version("ray"), "ok: Ray: Ray "),
        (
            "planted",
            "planted-wrong",
            version("ray"),
            "error: Ray: ADDRESS refuses our token: it is wrong or has expired",
        ),
        ("planted", None, version("ray"), "error: Ray: ADDRESS asks for a token, and none is set"),
        (None, None, version("ray"), "warning: Ray: ADDRESS lets everybody in"),
        ("planted", "planted", "2.1.0", "error: Ray: ADDRESS runs Ray 2.1.0, here is"),
        ("planted", "planted", None, "error: Ray: ADDRESS is no Ray job server"),
    ],
)
def test_a_ray_cluster_is_judged_and_its_token_is_never_shown(
    asked: str | None, given: str | None, ray: str | None, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    if given:
        (tmp_path / "token").write_text(f"{given}\n")
    with server(asked, ray) as address:
        (finding,) = judge_cluster(address)
    assert str(finding).startswith(told.replace("ADDRESS", address)) and "planted" not in str(finding)


def test_a_cluster_with_another_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "planted")
    with server("planted", version("ray"), "3.9.1") as address:
        (finding,) = judge_cluster(address)
    here = platform.python_version()
    assert str(finding).startswith(f"error: Ray: {address} runs Python 3.9.1, here is {here}: use Python 3.9")


@contextmanager
def answering(said: bytes) -> Iterator[int]:
    """A port where something says that, whatever it is asked."""

    class Say(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(said)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Say) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize(
    ("scheme", "said", "told"),
    [  # the port of Ray's own protocol, as its answer begins (HTTP/2); a store; https where there is none; a cut answer
        ("http", b"\0\0\x18\x04\0\0\0\0\0", "does not speak HTTP: name Ray's job server: --address http://HOST:8265"),
        ("http", b"-ERR unknown command\r\n", "does not speak HTTP: name Ray's job server: --address http://HOST:8265"),
        ("https", b"HTTP/1.1 400 Bad Request\r\n\r\n", "WRONG_VERSION_NUMBER] wrong version number"),
        ("http", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{", "is no Ray job server (code 200)"),
        ("http", b"", "does not speak HTTP"),
    ],
)
def test_a_port_of_something_else_is_told(scheme: str, said: bytes, told: str) -> None:
    with answering(said) as port:
        (finding,) = judge_cluster(f"{scheme}://127.0.0.1:{port}")
    assert finding.level == "error" and told in str(finding), finding
    assert (scheme == "https") == ("http://, not https://" in finding.mend)


@pytest.mark.parametrize(
    "address", ["http://", "http://head:abc", "http://head:99999", "http://[::1", "http://he ad:1", "head:8265", "auto", "ray://h:1"]
)
def test_what_is_no_address_is_told(address: str) -> None:
    (finding,) = judge_cluster(address)
    assert str(finding) == f"error: Ray: {address} is no address of a job server: name it: --address http://HOST:8265"


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    (finding,) = judge_cluster("http://planted:planted@127.0.0.1:1")
    assert finding.level == "error" and "planted" not in str(finding) and "RAY_AUTH_TOKEN_PATH" in finding.mend


def test_a_token_that_cannot_be_read_or_sent_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    for text in (b"planted\nplanted", b"\xffplanted", "plänted†".encode()):
        (tmp_path / "token").write_bytes(text)
        (finding,) = judge_cluster("http://127.0.0.1:1")
        assert finding.level == "error" and "token" in finding.text and "planted" not in str(finding), finding
        assert "RAY_AUTH_TOKEN_PATH" in finding.mend


def test_a_ray_cluster_that_is_away_is_told() -> None:
    (finding,) = judge_cluster("http://127.0.0.1:1")
    assert finding.level == "error" and "does not answer" in finding.text
