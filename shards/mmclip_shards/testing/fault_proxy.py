"""An HTTP proxy in front of the S3 server that breaks chosen answers. It keeps the Host header, so signatures stay valid."""

from __future__ import annotations

import base64
import http.client
import re
import select
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal

from mmclip_shards.testing.s3_server import S3Server

Kind = Literal[
    "error",  # an error of S3 with this `status` and `code`
    "silence",  # no answer at all
    "late",  # the whole answer, after `wait_s`
    "stall", "trickle", "close", "reset",  # the bytes before `at`, then: nothing, a few bytes a second, FIN, RST
    "short", "short_range", "unsized",  # only the bytes before `at`, with a matching length, length and range, or no length
    "flip", "flip_checksum",  # one flipped bit at `at`, without or with a checksum of the true bytes
    "zeros",  # zeros from `at` to the end of the answer
    "empty", "page", "whole",  # status 200 with no bytes, with an error page, or with the whole object instead of the range
]  # fmt: skip

_LASTING = {"stall", "trickle", "close", "reset", "short", "short_range", "unsized", "zeros"}
_HOP = {"connection", "content-length", "expect", "keep-alive", "transfer-encoding"}
_TRICKLE_S = 0.2


@dataclass(frozen=True)
class Fault:
    """A fault of one answer. at: byte of the object where it strikes; None means the middle of the answer."""

    kind: Kind
    at: int | None = None
    status: int = 0
    code: str = ""
    wait_s: float = 0.0

    def shows_in(self, request: Request, *, lasting: bool) -> bool:
        """Whether the fault can show in the answer: the request asks for byte `at`, or, if lasting, for bytes after it that the
        fault also breaks."""
        if self.at is None or self.kind not in _LASTING | {"flip", "flip_checksum"}:
            return True
        beyond = lasting and self.kind in _LASTING
        return self.at < request.stop and (beyond or request.start <= self.at)


@dataclass(frozen=True)
class Request:
    """A client's request. start, stop: the bytes of the object that it asks for; number: counts method and path, from 0."""

    method: str
    path: str
    start: int
    stop: float
    number: int
    access_key: str


Plan = Callable[[Request], Fault | None]
"""Chooses a request's fault. Called for every request, never by two threads at once."""


def on_reads(fault: Fault, *, of: str = ".tar", times: int | None = 1) -> Plan:
    """A plan: break the first `times` GETs (None: all) whose path ends with `of` and whose answer can show the fault."""
    left = times

    def plan(request: Request) -> Fault | None:
        nonlocal left
        if request.method != "GET" or not request.path.endswith(of) or left == 0:
            return None
        if not fault.shows_in(request, lasting=times is None):
            return None
        left = None if left is None else left - 1
        return fault

    return plan


class FaultProxy:
    """`with FaultProxy(server) as proxy:` forwards from `proxy.endpoint`; set `proxy.plan` to break answers.

    injected: faults sent, by kind. requests: by method and path.
    """

    def __init__(self, server: S3Server, plan: Plan | None = None) -> None:
        self.server, self.plan = server, plan
        self.injected: Counter[str] = Counter()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self.upstream = server.client()
        self._http = _Listener(self)
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), name="fault-proxy", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def choose(self, method: str, path: str, headers: dict[str, str]) -> tuple[Request, Fault | None]:
        """Count a request and ask the plan for its fault."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        start = int(asked[1]) if asked else 0
        stop = int(asked[2]) + 1 if asked and asked[2] else float("inf")
        key = re.search(r"Credential=([^/]+)/", headers.get("authorization", ""))
        with self._lock:
            number = self.requests[method, path]
            self.requests[method, path] += 1
            request = Request(method, path, start, stop, number, key[1] if key else "")
            fault = self.plan(request) if self.plan else None
            if fault is not None:
                self.injected[fault.kind if fault.kind != "error" else str(fault.status)] += 1
        return request, fault


@dataclass(frozen=True)
class _Answer:
    """An answer to send. length: the promised one, or None to promise none; ending: what follows the body."""

    status: int
    headers: dict[str, str]
    body: bytes
    length: int | None
    ending: Literal["keep", "stall", "trickle", "close", "reset"] = "keep"
    rest: bytes = field(default=b"", repr=False)


def _page(status: int, code: str) -> _Answer:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>injected {code}</Message></Error>'
    )
    return _Answer(status, {"Content-Type": "application/xml"}, body.encode(), len(body))


def _break(fault: Fault, request: Request, answer: _Answer, whole: Callable[[], bytes]) -> _Answer:
    """The answer to send in place of the true `answer`."""
    body, start = answer.body, request.start
    at = max(0, min(len(body), len(body) // 2 if fault.at is None else fault.at - start))
    bare = {name: value for name, value in answer.headers.items() if not name.lower().startswith("x-amz-checksum")}
    plain = replace(answer, headers=bare)
    match fault.kind:
        case "stall" | "trickle" | "close" | "reset":
            broken = replace(answer, body=body[:at], ending=fault.kind, rest=body[at:])
        case "short":
            broken = replace(plain, body=body[:at], length=at)
        case "short_range" if at == 0:
            broken = _page(416, "InvalidRange")
        case "short_range":
            content_range = {"Content-Range": f"bytes {start}-{start + at - 1}/{start + at}"}
            broken = replace(answer, headers=bare | content_range, body=body[:at], length=at)
        case "unsized":
            broken = replace(plain, body=body[:at], length=None, ending="close")
        case "flip" | "flip_checksum":
            at = min(at, len(body) - 1)
            checksum = {"x-amz-checksum-crc32": base64.b64encode(struct.pack(">I", zlib.crc32(body))).decode()}
            headers = bare | (checksum if fault.kind == "flip_checksum" else {})
            broken = replace(answer, headers=headers, body=body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
        case "zeros":
            broken = replace(plain, body=body[:at] + bytes(len(body) - at))
        case "empty":
            broken = _Answer(200, {}, b"", 0)
        case "page":
            broken = _page(200, "InternalError")
        case "whole":
            everything = whole()
            bare.pop("Content-Range", None)
            broken = replace(plain, status=200, body=everything, length=len(everything))
        case _:
            raise AssertionError(fault.kind)
    return broken


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self._upstream: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        if self._upstream:
            self._upstream.close()
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client went away
            self.close_connection = True

    def _serve(self) -> None:
        proxy = self.server.proxy
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request, fault = proxy.choose(self.command, self.path.partition("?")[0], headers)
        if fault is None:
            return self._send(self._forward(sent))
        if fault.kind == "silence":
            return self._send_nothing()
        if fault.kind == "late":
            proxy.closing.wait(fault.wait_s)
            return self._send(self._forward(sent))
        if fault.kind == "error":
            return self._send(_page(fault.status, fault.code))
        return self._send(_break(fault, request, self._forward(sent), lambda: self._whole(request.path)))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _forward(self, sent: bytes) -> _Answer:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            raise NotImplementedError("the proxy takes no chunked request")
        for attempt in (0, 1):
            if self._upstream is None:
                address = self.server.proxy.server.endpoint.removeprefix("http://")
                self._upstream = http.client.HTTPConnection(address, timeout=60)
            try:
                self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in _HOP or (name.lower() == "content-length"):
                        self._upstream.putheader(name, value)
                self._upstream.endheaders(sent)
                came = self._upstream.getresponse()
                body = came.read()
                break
            except (http.client.HTTPException, OSError):
                self._upstream.close()  # the server closed an idle connection, or was restarted
                self._upstream = None
                if attempt:
                    raise
        headers = {name: value for name, value in came.getheaders() if name.lower() not in _HOP}
        length = int(came.getheader("Content-Length") or 0) if self.command == "HEAD" else len(body)
        return _Answer(came.status, headers, body, length)

    def _whole(self, path: str) -> bytes:
        bucket, _, key = path.removeprefix("/").partition("/")
        whole: bytes = self.server.proxy.upstream.get_object(Bucket=bucket, Key=key)["Body"].read()
        return whole

    def _send(self, answer: _Answer) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.length is not None:
            self.send_header("Content-Length", str(answer.length))
        if answer.ending != "keep":
            self.close_connection = True
        if answer.length is None:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        if answer.ending == "stall":
            self._send_nothing()
        elif answer.ending == "trickle":
            for byte in answer.rest:
                if self.server.proxy.closing.wait(_TRICKLE_S):
                    return
                self.wfile.write(bytes([byte]))
        elif answer.ending == "reset":
            self._reset()

    def _send_nothing(self) -> None:
        """Keep the connection open and silent until the client closes it."""
        self.close_connection = True
        while not self.server.proxy.closing.is_set():
            if select.select([self.connection], [], [], 0.05)[0]:
                return

    def _reset(self) -> None:
        time.sleep(0.02)  # let the sent bytes arrive: a reset drops those that still wait
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
