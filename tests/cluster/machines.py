"""Several machines on this one: namespaces with their own name, processes, network and sshd, on one Ethernet switch.

They share this machine's files, as hosts with a shared file system do. `Machines.cut` takes one off the network, `Machines.end`
switches it off. Nothing outside the namespaces changes, and all ends with the process that made them, also if that is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conftest import wait_for

TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "ssh": "openssh-client", "pdsh": "pdsh"}
SSHD = Path("/usr/sbin/sshd")
NET = "10.77.0"
STORE = f"{NET}.100"

# The first process of a machine. A shell, because it takes over and ends orphans as an init does.
_BOOT = """
hostname "$NAME"
mount -t tmpfs tmpfs /run && mkdir -p /run/sshd
mount --bind "$SSH" /etc/ssh
mount --bind "$FOLDER/hosts" /etc/hosts
ip link set lo up
touch "$FOLDER/$NAME.up"
until ip address show dev eth0 2>/dev/null | grep -q "inet "; do
  read -r -t 0.05
  [ $? -gt 128 ] || exit # the input has ended, and with it the process that made this machine: the switch stays in this loop
done
/usr/sbin/sshd -f /etc/ssh/sshd_config -E "$FOLDER/$NAME.sshd.log"
touch "$FOLDER/$NAME.ready"
cat # until the process that made this machine ends
true # bash would become the last command, which takes care of no orphans
"""
_SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PidFile none
"""
_SSH = """
Host *
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking accept-new
  LogLevel ERROR
"""


def missing() -> str:
    """Why there can be no such machines here; an empty text if there can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    absent = sorted(
        {package for tool, package in TOOLS.items() if not shutil.which(tool)}
        | ({"openssh-server"} if not SSHD.exists() else set())
    )
    if absent:
        return f"needs Debian's packages {', '.join(absent)}"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else ""


class Machines:
    """A switch with machines at 10.77.0.1, .2, ..., and the store's address, STORE, on the switch itself."""

    def __init__(self, folder: Path) -> None:
        self.pids: dict[str, int] = {}
        self._roots: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, str] = {}
        self.folder = folder
        (folder / "ssh").mkdir(parents=True)
        for name, text in {"sshd_config": _SSHD, "ssh_config": _SSH}.items():
            (folder / "ssh" / name).write_text(text.format(folder=folder / "ssh"))
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "ssh" / "key"], check=True)
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        self._start("switch")
        self.inside(
            "switch", "ip link add switch type bridge", f"ip address add {STORE}/24 dev switch", "ip link set switch up"
        )

    def _start(self, name: str) -> None:
        new = ["--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc"]
        for mark in ("up", "ready"):
            (self.folder / f"{name}.{mark}").unlink(missing_ok=True)
        environment = os.environ | {"NAME": name, "FOLDER": str(self.folder), "SSH": str(self.folder / "ssh")}
        with (self.folder / "boot.log").open("ab") as log:
            root = subprocess.Popen(
                ["unshare", *new, "bash", "-c", _BOOT], env=environment, stdin=subprocess.PIPE, stderr=log
            )
        self._roots[name] = root
        wait_for(lambda: root.poll() is not None or (self.folder / f"{name}.up").exists(), 20)
        self.pids[name] = psutil.Process(root.pid).children()[0].pid

    def add(self, name: str, number: int) -> None:
        """Switch a machine on, at 10.77.0.NUMBER; sshd answers."""
        if name not in self.hosts.read_text():
            with self.hosts.open("a") as file:
                file.write(f"{NET}.{number} {name}\n")
        self._start(name)
        self._ports[name] = f"port{number}"
        mac = f"02:00:00:00:00:{number:02x}"  # the same after each start: others remember it
        self.inside(
            "switch", f"ip link add port{number} type veth peer name eth0 address {mac} netns {self.pids[name]}",
            f"ip link set port{number} master switch", f"ip link set port{number} up",
        )  # fmt: skip
        self.inside(name, f"ip address add {NET}.{number}/24 dev eth0", "ip link set eth0 up")
        wait_for((self.folder / f"{name}.ready").exists, 20)

    def enter(self, name: str) -> list[str]:
        """What stands before a command that shall run on the machine."""
        return ["nsenter", "-t", str(self.pids[name]), "--net", "--uts", "--mount", "--ipc", "--pid", "--"]

    def sees(self, name: str, path: Path) -> Path:
        """A path of the machine, as this process sees it: a machine may have mounted a disk of its own there."""
        return Path(f"/proc/{self.pids[name]}/root") / path.relative_to("/")

    def inside(self, name: str, *commands: str) -> None:
        """Run commands that see the network of the machine, and else what this process sees."""
        for command in commands:
            subprocess.run(["nsenter", "-t", str(self.pids[name]), "--net", "--", *command.split()], check=True)

    def cut(self, name: str) -> None:
        """Pull the cable: nobody is told."""
        self.inside("switch", f"ip link set {self._ports[name]} down")

    def end(self, name: str) -> None:
        """Switch off: every process there dies at once."""
        root = self._roots.pop(name)
        psutil.Process(self.pids.pop(name)).kill()
        root.wait()
        assert root.stdin
        root.stdin.close()
        if port := self._ports.pop(name, None):  # the kernel removes it with the machine's network, but later
            gone = ["nsenter", "-t", str(self.pids["switch"]), "--net", "--", "ip", "link", "delete", port]
            subprocess.run(gone, stderr=subprocess.DEVNULL, check=False)


@contextmanager
def machines(folder: Path, *names: str) -> Iterator[Machines]:
    made = Machines(folder)
    try:
        for number, name in enumerate(names, 1):
            made.add(name, number)
        yield made
    finally:
        for name in reversed(list(made.pids)):
            made.end(name)


_SERVE = f"""
import json, os, sys
from pathlib import Path
from mmclip_shards import storage
from mmclip_shards.testing.s3_server import S3Server
with S3Server("{STORE}") as server:
    os.environ.update(server.environment())
    folder = Path(sys.argv[1])
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.upload(path, f"{{server.url}}/{{path.relative_to(folder).as_posix()}}")
    print(json.dumps([server.url, server.environment()]), flush=True)
    sys.stdin.read()
"""


@contextmanager
def store(made: Machines, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """An S3 server at STORE that holds the files of a folder -> its URL, and the variables that a client needs."""
    process = subprocess.Popen(
        [*made.enter("switch"), sys.executable, "-c", _SERVE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        url, variables = json.loads(process.stdout.readline())
        yield url, variables
    finally:
        process.stdin.close()
        process.wait(20)
