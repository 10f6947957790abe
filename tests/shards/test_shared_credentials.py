"""Credentials of a metadata service: one process of a machine asks for all of them."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from aiobotocore.session import AioSession
from botocore.exceptions import ClientError, CredentialRetrievalError
from botocore.session import Session
from mmclip_shards import credentials, storage
from mmclip_shards.testing.s3_server import S3Server

PROCESSES = 8
ROLE = "/latest/meta-data/iam/security-credentials/"


class Metadata(ThreadingHTTPServer):
    """A metadata service of EC2, and of containers, that counts. keys: given in turn, the last one for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.keys = [(f"KEY{number}", f"secret-{number}") for number in range(1, 9)]
        self.given = 0
        self.life, self.down, self.counting = timedelta(hours=1), False, threading.Lock()


class Answers(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        self._answer("session")

    def do_GET(self) -> None:
        if self.path == ROLE:
            return self._answer("role")
        with self.server.counting:
            self.server.given += 1
            key, secret = self.server.keys[min(self.server.given, len(self.server.keys)) - 1]
            expiry = datetime.now(UTC) + self.server.life * self.server.given
        found = {"AccessKeyId": key, "SecretAccessKey": secret, "Token": "", "Expiration": f"{expiry:%Y-%m-%dT%H:%M:%SZ}"}
        return self._answer(json.dumps(found))

    def _answer(self, text: str) -> None:
        self.send_response(503 if self.server.down else 200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Metadata]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("_given", "_refused"):
        monkeypatch.setattr(credentials, name, None)
    monkeypatch.setattr(credentials.atexit, "register", lambda *arguments, **options: None)
    service = Metadata()
    threading.Thread(target=service.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.address)
    yield service
    service.shutdown()
    service.server_close()


def published(folder: Path) -> Path:
    (file,) = folder.glob("mmclip-credentials-*/*.json")
    return file


async def asked_twice(session: AioSession, later: multiprocessing.synchronize.Barrier) -> list[str]:
    found = await credentials.share_metadata(session).get_credentials()
    first = (await found.get_frozen_credentials()).access_key
    found._time_fetcher = pass_most_of_an_hour(later)
    return [first, (await found.get_frozen_credentials()).access_key]


def pass_most_of_an_hour(later: multiprocessing.synchronize.Barrier):
    later.wait(30)
    now = datetime.now(UTC) + timedelta(minutes=55)
    credentials._now = lambda: now
    return lambda: now


def process(number: int, later: multiprocessing.synchronize.Barrier, told: multiprocessing.Queue) -> None:
    if number % 2:
        return told.put(asyncio.run(asked_twice(AioSession(), later)))
    found = credentials.share_metadata(Session()).get_credentials()
    first = found.get_frozen_credentials().access_key
    found._time_fetcher = pass_most_of_an_hour(later)
    return told.put([first, found.get_frozen_credentials().access_key])


@pytest.mark.parametrize("service", ["EC2", "a container's"])
def test_one_process_asks_for_all_and_once_again_before_they_expire(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    if service != "EC2":
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{metadata.address}/keys")
    context = multiprocessing.get_context("fork")
    later, told = context.Barrier(PROCESSES), context.Queue()
    processes = [context.Process(target=process, args=(number, later, told), daemon=True) for number in range(PROCESSES)]
    for one in processes:
        one.start()
    assert [told.get(timeout=30) for _ in processes] == [["KEY1", "KEY2"]] * PROCESSES
    assert metadata.given == 2
    for one in processes:
        one.join()


def test_only_this_user_may_read_the_file_and_it_goes_with_the_process(metadata: Metadata, tmp_path: Path) -> None:
    asked = "from mmclip_shards import credentials as c; from pathlib import Path; c.shared(); print(*Path().rglob('*.json'))"
    left = subprocess.run(
        [sys.executable, "-c", asked], check=True, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "TMPDIR": "."}
    )
    assert left.stdout.strip().endswith(".json") and not list(tmp_path.rglob("*.json")), left.stderr
    assert credentials.shared()
    file = published(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_full_disk_is_no_reason_to_end(metadata: Metadata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(found: object, output: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(credentials.json, "dump", full)
    assert credentials.shared() and not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("trap", ["open to others", "a link"])
def test_a_folder_that_others_may_enter_or_made_is_refused(metadata: Metadata, tmp_path: Path, trap: str) -> None:
    folder = tmp_path / f"mmclip-credentials-{os.getuid()}"
    if trap == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o755)
    with pytest.raises(ValueError, match="a folder that you own and nobody else may enter: remove it, or set another TMPDIR"):
        credentials.shared()
    assert not metadata.given


def test_what_a_store_called_expired_is_asked_for_once_more_and_others_take_the_new_ones(metadata: Metadata) -> None:
    def key() -> str:
        return (credentials.shared() or {})["access_key"]

    assert [key(), key()] == ["KEY1", "KEY1"] and metadata.given == 1
    credentials.refuse()
    assert [key(), key()] == ["KEY2", "KEY2"] and metadata.given == 2
    credentials._given = "KEY1"  # as in another process, which learns it a little later
    credentials.refuse()
    assert key() == "KEY2" and metadata.given == 2


def test_an_expired_token_of_a_store_is_such_a_call(metadata: Metadata) -> None:
    assert (credentials.shared() or {})["access_key"] == "KEY1"
    fault = OSError("expired")
    fault.__cause__ = ClientError({"Error": {"Code": "ExpiredToken"}}, "GetObject")
    storage._diagnose("s3://bucket/key", object(), fault)
    assert (credentials.shared() or {})["access_key"] == "KEY2"


def test_what_was_published_just_before_the_lock_was_free_is_taken(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = credentials._locked
    published = {"access_key": "THEIRS", "secret_key": "", "token": "", "expiry_time": "2999-01-01T00:00:00+00:00"}

    def locked_late(lock: int) -> bool:
        credentials._publish(credentials._path(), published)
        return locked(lock)

    monkeypatch.setattr(credentials, "_locked", locked_late)
    assert credentials.shared() == published and not metadata.given


def test_those_that_waited_in_vain_do_not_all_ask_a_service_that_is_down(metadata: Metadata, tmp_path: Path) -> None:
    metadata.down = True
    assert credentials.shared() is None  # botocore goes on to say that there are no credentials
    path = credentials._path()
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR)
    assert credentials._locked(lock)
    threading.Timer(0.1, os.close, (lock,)).start()
    with pytest.raises(CredentialRetrievalError, match="the process that asked for all had no answer"):
        credentials.shared()
    metadata.down = False
    assert credentials.shared()


@pytest.mark.parametrize("client", ["s3fs", "obstore"])
def test_a_store_is_read_with_them(
    s3: S3Server, metadata: Metadata, monkeypatch: pytest.MonkeyPatch, client: storage.Client
) -> None:
    keys = s3.new_credentials()
    metadata.keys = [(keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"])]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    storage._filesystems.clear()
    try:
        storage.write_atomic(f"{s3.url}/{client}", b"bytes")
        assert bytes(storage.read_range(f"{s3.url}/{client}", 1, 3, client=client)) == b"yte"
        assert metadata.given == 1
    finally:
        storage._filesystems.clear()
        s3.revoke(keys)


def test_keys_of_the_environment_come_first(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "MINE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    assert credentials.share_metadata(Session()).get_credentials().access_key == "MINE" and not metadata.given


def test_without_s3fs_it_is_said_what_to_install() -> None:
    missing = "import sys; sys.modules |= dict.fromkeys(['s3fs', 'aiobotocore', 'aiobotocore.session'])\n"
    asked = missing + "from mmclip_shards import storage; storage.read_bytes('s3://bucket/key')"
    ended = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert ended.returncode and ended.stderr.splitlines()[-1] == "ImportError: Install s3fs to access S3"
