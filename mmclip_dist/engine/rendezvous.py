"""Where the ranks meet: torch's store at MASTER_ADDR:MASTER_PORT and gloo, both on the interface of the cluster alone.

By itself the store listens on all interfaces without a password, and gloo on the address of the machine's own name: that may be
a public one, or a loopback one (Debian) that other machines wait for in vain. NCCL listens on the interface that it chooses
(NCCL_SOCKET_IFNAME).
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from mmclip_dist.errors import Mendable
from mmclip_dist.launcher import ranks_of_machine

_GLOO = "GLOO_SOCKET_IFNAME"
_ANY_PORT = 9  # only the route counts: nothing is sent


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store of all ranks, this process's rank and the number of ranks, as the launcher's environment tells them.

    A collective call. ValueError without these variables, Mendable where the port is taken, OSError where the ranks cannot meet
    within `timeout`.
    """
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ValueError(f"a launcher has to set {', '.join(missing)}: start the ranks by deepspeed or torchrun")
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    _choose_interface_of_gloo(host)
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the store, which ranks only join
    try:
        if os.environ["RANK"] == "0" and not of_torchrun:
            if address := address_to_listen_on(host, int(port), socket.SOCK_STREAM):
                return _listen(address, host, timeout)
            _warn(host, port)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        return store, rank, world
    except (OSError, dist.DistError) as error:
        if "EADDRINUSE" in str(error) or "Address already in use" in str(error):
            mend = "choose another one with `deepspeed --master_port`, or MASTER_PORT"
            raise Mendable(f"port {port}, where the ranks meet, is in use: {mend}") from error
        raise OSError(
            f"the ranks could not meet at {host}: {error}. The first rank listens on the address that this name has there: where "
            "it means another one here, name the address itself"
        ) from error


def _listen(address: tuple[Any, ...], host: str, timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The first rank's part of `meet`."""
    world = int(os.environ["WORLD_SIZE"])
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listening = socket.create_server(address, family=family, backlog=max(world, socket.SOMAXCONN))
    port = listening.getsockname()[1]  # where the launcher asked for any, 0
    store = dist.TCPStore(
        host, port, world, is_master=True, timeout=timeout, master_listen_fd=listening.detach(),
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",  # as torch reads it
    )  # fmt: skip
    return store, 0, world


def _warn(host: str, port: str) -> None:
    own = _own_address(host, 0, socket.SOCK_STREAM)
    why = "is no address of this machine (a service's, or behind NAT?)"
    mend = "let a firewall keep it among the run's hosts"
    if own is not None:
        why = f"means {own[0]} to this machine, which no other one reaches"
        mend = "give the name its real address in /etc/hosts, or set MASTER_ADDR to the address"
    print(
        f"warning: MASTER_ADDR={host} {why}: port {port}, where the ranks meet, listens on all interfaces: {mend}",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def address_to_listen_on(host: str, port: int, kind: socket.SocketKind) -> tuple[Any, ...] | None:
    """The first address of MASTER_ADDR that is this machine's, as `socket.bind` takes it.

    None if others reach the first rank by an address that this machine does not have, or cannot know.
    """
    address = _own_address(host, port, kind)
    return None if address is not None and _here_alone(host, str(address[0])) else address


def _own_address(host: str, port: int, kind: socket.SocketKind) -> tuple[Any, ...] | None:
    try:
        found = [address for *_, address in socket.getaddrinfo(host, port, type=kind)]
    except OSError:  # no address yet: other machines may learn one
        return None
    return next((each for each in found if _loopback(str(each[0])) or source_towards(str(each[0])) == each[0]), None)


def _here_alone(host: str, address: str) -> bool:
    """Whether a name means a loopback address here, and there are other machines, to which it must mean another one."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > ranks_of_machine()
    return several and _loopback(address) and not _literal(host)


def _choose_interface_of_gloo(host: str) -> None:
    """The one that leads to the first rank, unless the user has named one. Other gloo groups of this process take it, too."""
    if _GLOO in os.environ:
        return
    try:
        source = source_towards(str(socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0][4][0]))
    except OSError:
        return
    if source and not _here_alone(host, source) and (name := _interface_of(source)):
        os.environ[_GLOO] = name


def _interface_of(address: str) -> str | None:
    """The interface that has this address first: gloo takes an interface's first one."""
    for name, found in psutil.net_if_addrs().items():
        own = [each.address for each in found if each.family in (socket.AF_INET, socket.AF_INET6)]
        if own and (own[0] == address or (_loopback(own[0]) and _loopback(address))):
            return name
    return None


def source_towards(address: str) -> str | None:
    """The address of this machine from which it reaches another one; the same if that is its own; None without a route."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _ANY_PORT))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _literal(host: str) -> bool:
    """Whether it is an address, which means the same on all machines, and no name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
