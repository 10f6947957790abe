"""Notice within a minute that a machine is gone: one without power sends no word, and collective calls wait for it for minutes.

The first process of every machine sends a datagram to the first machine now and then, which answers. Silence ends the run: that
of another machine on the first one, whose launcher then ends the rest; that of the first machine on all others.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from mmclip_dist.engine import watchdog
from mmclip_dist.engine.rendezvous import address_to_listen_on, source_towards
from mmclip_dist.launcher import ranks_of_machine

_BEATS = 9  # within the time after which a machine counts as lost


class Heartbeat:
    """The beats of one machine. first: its first rank, 0 on the one that watches. address: of the watching machine."""

    def __init__(self, first: int, token: bytes, address: tuple[str, int], lost_s: float) -> None:
        self.first, self.token, self.lost_s = first, token, lost_s
        family, _, _, _, found = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        self.address: tuple[Any, ...] = found
        if first == 0:
            here = address_to_listen_on(*address, socket.SOCK_DGRAM) or ("", address[1])
        else:
            here = source_towards(str(found[0])) or "", 0
        if here[0]:
            family = socket.AF_INET6 if ":" in here[0] else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind(here)
        self.socket.settimeout(lost_s / _BEATS)
        self._heard: dict[str, float] = {}  # host of a machine, or of the watching one -> when
        self._thread = threading.Thread(target=self._watch if first == 0 else self._send, name="heartbeat", daemon=True)
        self._left = threading.Event()

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])

    def start(self) -> None:
        self._thread.start()

    def leave(self) -> None:
        """The run is over on this machine: its silence from now on means nothing."""
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._left.is_set():
            try:
                data, sender = self.socket.recvfrom(1024)
            except TimeoutError:
                data = b""
            token, _, rest = data.partition(b" ")
            if token == self.token:
                state, _, host = rest.decode(errors="replace").partition(" ")
                if state == "left":
                    self._heard.pop(host, None)
                else:
                    self._heard[host] = time.monotonic()
                    self.socket.sendto(self.token, sender)
            self._judge()

    def _send(self) -> None:
        watcher = self.address[0]
        while not self._left.is_set():
            began = time.monotonic()
            try:
                self.socket.sendto(self.token + f" beat {self.first}/{socket.gethostname()}".encode(), self.address)
                while self.socket.recv(1024) != self.token:
                    pass
                self._heard[watcher] = time.monotonic()
            except OSError:  # no answer in time, or no route to the machine
                pass
            self._judge()
            self._left.wait(max(0.0, began + self.lost_s / _BEATS - time.monotonic()))
        self.socket.sendto(self.token + f" left {self.first}/{socket.gethostname()}".encode(), self.address)

    def _judge(self) -> None:
        for host, heard in self._heard.items():
            if time.monotonic() - heard > self.lost_s:
                print(
                    f"failed: {socket.gethostname()}: no sign of life from machine {_named(host)} for "
                    f"{self.lost_s:g} s: it or its network is gone. Start the run again on the machines that are left: it goes "
                    "on from its newest checkpoint",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(watchdog.EXIT_CODE)


def _named(host: str) -> str:
    """What the user reads of a machine that is known by `RANK/NAME`, or by its address."""
    first, _, name = host.partition("/")
    return f"{name} (ranks from {first} on)" if name else host


@contextmanager
def beating(lost_s: float) -> Iterator[None]:
    """Beat for this machine, from its first rank, if the run has several machines. A collective call.

    lost_s: seconds of silence after which a machine that was heard of before counts as lost.
    """
    rank, local, on_machine = dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0")), ranks_of_machine()
    if dist.get_world_size() == on_machine:
        yield
        return
    host, token = os.environ["MASTER_ADDR"], secrets.token_hex(16).encode()
    first = Heartbeat(0, token, (host, 0), lost_s) if rank == 0 else None
    told = [(token, first.port if first else 0)]
    dist.broadcast_object_list(told)
    token, port = told[0]
    beats = first or (None if local else Heartbeat(rank, token, (host, port), lost_s))
    if beats is None:
        yield
        return
    beats.start()
    try:
        yield
    finally:
        beats.leave()
