"""What ranks listen on: nothing but the address by which the others reach them, unless that is not theirs, which is told."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from mmclip_launch.deepspeed_command import free_port

from mmclip_dist.engine import rendezvous
from mmclip_dist.engine.heartbeat import beating
from mmclip_dist.errors import Mendable
from tests.ranks import run_ranks

ALL = ("0.0.0.0", "::")
SOON = timedelta(seconds=60)


def listening_ranks() -> None:
    """Meet, add, beat as on two machines, and print on what this process listens."""
    store, rank, world = rendezvous.meet(SOON)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=SOON)
    value = torch.ones(())
    dist.all_reduce(value)
    with beating(30.0):
        dist.barrier(dist.new_group([0, 1]))  # a group of its own listens on its own
        bound = [
            each.laddr
            for each in psutil.Process().net_connections("inet")
            if each.status in ("LISTEN", "NONE") and each.laddr
        ]
        print(
            f"sum {value:g}", *(f"on {where.ip} {where.port}" for where in bound), f"master {os.environ['MASTER_PORT']}"
        )
        dist.barrier()
    dist.destroy_process_group()


def listened(outputs: list[str]) -> list[set[str]]:
    """The addresses that each rank listens on; on the first one, at least the store, gloo and the beats."""
    assert all("sum 2" in output for output in outputs), outputs
    words = [output.split() for output in outputs]
    assert words[0].count("on") >= 3 and words[1].count("on") >= 1, outputs
    assert words[0][-1] in [word for number, word in enumerate(words[0]) if words[0][number - 2] == "on"], outputs
    return [{told[number + 1] for number, word in enumerate(told) if word == "on"} for told in words]


def test_ranks_listen_only_where_the_others_reach_them(tmp_path: Path) -> None:
    code, outputs = run_ranks(listening_ranks, ranks=2, folder=tmp_path, LOCAL_WORLD_SIZE="1")
    assert code == 0 and listened(outputs) == [{"127.0.0.1"}, {"127.0.0.1"}], outputs


def test_an_address_of_no_machine_still_works_and_is_told(tmp_path: Path) -> None:
    """As that of a Kubernetes service, or of a host whose container translates addresses: all interfaces, in one line."""
    code, outputs = run_ranks(listening_ranks, ranks=2, folder=tmp_path, LOCAL_WORLD_SIZE="1", MASTER_ADDR="0.0.0.0")
    assert code == 0 and listened(outputs)[0] & {*ALL}, outputs
    told = [line for line in "".join(outputs).splitlines() if line.startswith("warning:")]
    assert len(told) == 1 and "MASTER_ADDR=0.0.0.0 is no address of this machine" in told[0], outputs
    assert "listens on all interfaces: let a firewall keep it" in told[0]


def test_ranks_join_the_store_of_torchrun(tmp_path: Path) -> None:
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    words = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "2"}
    code, outputs = run_ranks(joins, ranks=2, folder=tmp_path, **words)
    assert code == 0 and agent.get("came") == b"2" and not "".join(outputs), outputs


def joins() -> None:
    store, _, _ = rendezvous.meet(SOON)
    assert not [each for each in psutil.Process().net_connections("inet") if each.status == psutil.CONN_LISTEN]
    store.add("came", 1)


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the first of two ranks, each on a machine of its own."""
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # and is taken back afterwards


def meaning(*addresses: str) -> object:
    """getaddrinfo where every name means that."""
    found = [(socket.AF_INET6 if ":" in each else socket.AF_INET, each) for each in addresses]
    return lambda host, port, type: [(family, type, 0, "", (each, port or 0)) for family, each in found]


@pytest.mark.usefixtures("of_two")
@pytest.mark.parametrize(
    ("host", "addresses", "own"),
    [
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("node", ["127.0.1.1"], None),  # Debian's own name of a host: others know another address
        ("node", ["192.0.2.1"], None),  # RFC 5737: no machine's
        ("node", ["0.0.0.0"], None),
        ("node", ["::"], None),
    ],
)
def test_the_first_rank_listens_on_an_address_that_others_may_know(
    host: str, addresses: list[str], own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", meaning(*addresses))
    found = rendezvous.address_to_listen_on(host, 5, socket.SOCK_STREAM)
    assert (found and found[0]) == own


@pytest.mark.usefixtures("of_two")
def test_a_name_that_means_loopback_is_enough_for_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", meaning("192.0.2.1", "127.0.1.1"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert rendezvous.address_to_listen_on("node", 5, socket.SOCK_STREAM) == ("127.0.1.1", 5)


@pytest.mark.usefixtures("of_two")
def test_a_name_without_an_address_yet_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert rendezvous.address_to_listen_on("node", 5, socket.SOCK_STREAM) is None


@pytest.mark.usefixtures("of_two")
@pytest.mark.parametrize(
    ("host", "several", "chosen"),
    [("127.0.0.1", True, "lo"), ("node", False, "lo"), ("node", True, None)],  # node means 127.0.1.1 here
)
def test_gloo_takes_the_interface_that_leads_to_the_first_rank(
    host: str, several: bool, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1" if several else "2")
    monkeypatch.setattr(socket, "getaddrinfo", meaning("127.0.0.1" if host == "127.0.0.1" else "127.0.1.1"))
    rendezvous._choose_interface_of_gloo(host)
    assert os.environ.pop("GLOO_SOCKET_IFNAME", None) == chosen
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "of the user")
    rendezvous._choose_interface_of_gloo(host)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "of the user"


@pytest.mark.usefixtures("of_two")
def test_a_port_that_is_taken_and_a_missing_variable_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(Mendable, match=f"port {port}, where the ranks meet, is in use: choose another one"):
            rendezvous.meet(SOON)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="a launcher has to set MASTER_PORT"):
        rendezvous.meet(SOON)


@pytest.mark.usefixtures("of_two")
def test_ranks_that_never_come_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(OSError, match=r"the ranks could not meet at 127\.0\.0\.1: "):
        rendezvous.meet(timedelta(seconds=1))
