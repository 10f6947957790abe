"""What one host says about itself. Sent there as text and run by the interpreter that ranks will use: the standard library alone.

`request` is set by the sender: packages (names of distributions), ours (names of our packages), run_dir (a folder or None),
mark (a file that the sender has made in it, or None), meets (the port where ranks shall meet on this host, or None).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_TOOL_S = 10.0
_PORT_S = 5.0  # enough for a run that is ending
_FOLDER_S = 10.0  # a network file system whose server is gone never answers
_SEEN_S = 5.0  # enough for a new name, which no file system has cached as missing
_FABRIC = Path("/sys/class/infiniband")
_LINKS = Path("/sys/class/net")
_TELLING = ("NCCL_", "UCX_", "GLOO_", "TORCH_NCCL_")  # they have to agree, and none of them holds a secret


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """Everything, as JSON. What cannot be found out is None."""
    folders = look_at_folders(request["run_dir"], request["mark"])
    return {
        "name": socket.gethostname(),
        "addresses": own_addresses(),
        "address": first_address(),
        "port": free_port(),
        "taken": request["meets"] if request["meets"] and taken(request["meets"]) else None,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in request["packages"]},
        "code": code_hash(request["ours"]),
        "gpus": gpus(),
        "nvcc": shutil.which("nvcc") or existing(os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc"),
        "compiler": shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"),
        "ninja": shutil.which("ninja")
        or existing(str(Path(os.path.realpath(shutil.which("python3") or "")).parent / "ninja")),
        "cores": len(os.sched_getaffinity(0)),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shared_memory": space("/dev/shm"),
        "temporary": folders["temporary"](),
        "run_dir": folders["run_dir"](),
        "fabric": fabric(),
        "links": links(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_TELLING)},
        "time": time.time(),
    }


def existing(path: str) -> str | None:
    return path if os.access(path, os.X_OK) else None


def own_addresses() -> list[str]:
    """What the host's own name means to it: gloo, and others, tell other ranks this address."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({str(address[0]) for *_, address in found})


def first_address() -> str:
    """The one that DeepSpeed's launcher would take for the first host: the first of `hostname -I`."""
    try:
        found = subprocess.run(
            ["hostname", "-I"], capture_output=True, text=True, timeout=_TOOL_S, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        found = []
    return found[0] if found else "127.0.0.1"


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def taken(port: int) -> bool:
    """Whether another process listens on a port, and does not end soon."""
    deadline = time.monotonic() + _PORT_S
    while True:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is left of ended connections does not count
            with suppress(OSError):
                tried.bind(("", port))
                return False
        if time.monotonic() > deadline:
            return True
        time.sleep(0.2)


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_hash(packages: list[str]) -> str | None:
    """A hash of the files of our packages, as an import would find them; None if one is not there."""
    digest = hashlib.sha256()
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(f"{package}/{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def gpus() -> list[dict[str, str]] | None:
    """The cards by nvidia-smi; None if the host has no such program or its driver does not answer."""
    fields = ("name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[word.strip() for word in line.split(",")] for line in found.splitlines() if line.strip()]
    return [dict(zip(("name", "driver", "memory", "used", "ecc"), row, strict=False)) for row in rows]


def space(folder: str) -> dict[str, int | None] | None:
    """Bytes in all and free for this user, and free entries (inodes; None where the file system does not count them)."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    entries = found.f_favail if found.f_files else None
    return {"total": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize, "entries": entries}


def look_at_folders(run_dir: str | None, mark: str | None) -> dict[str, Callable[[], dict[str, Any] | None]]:
    """Begin to look at the folders of a run, each in a thread -> what to call for its state, some seconds from now at the latest.

    A thread that waits for a dead disk is left behind: end this process by os._exit.
    """
    silent = {"fault": f"its file system does not answer within {_FOLDER_S:g} s", "seen": None}
    deadline = time.monotonic() + _FOLDER_S

    def begun(folder: str, look: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        told: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=lambda: told.put(look()), daemon=True).start()

        def state() -> dict[str, Any]:
            try:
                return told.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return {"path": folder, **silent}

        return state

    return {
        "temporary": begun(temporary_folder(), temporary),
        "run_dir": begun(run_dir, lambda: run_folder(run_dir, mark)) if run_dir else lambda: None,
    }


def run_folder(folder: str, mark: str | None) -> dict[str, Any]:
    """Whether the run can write there, and whether it is the sender's folder: its file `mark` shows up."""
    answer: dict[str, Any] = {"path": folder, "fault": None, "seen": None}
    if mark is None:  # else the sender has made it, where all hosts see it
        with suppress(OSError):  # writing there tells it
            Path(folder).mkdir(parents=True, exist_ok=True)
    answer["fault"] = fault_of_writing(folder)
    if mark is not None:
        deadline = time.monotonic() + _SEEN_S
        while not (seen := Path(folder, mark).exists()) and time.monotonic() < deadline:
            with suppress(OSError):
                os.scandir(folder).close()  # NFS then asks its server again
            time.sleep(0.2)
        answer["seen"] = seen
    return answer | (space(folder) or {})


def temporary_folder() -> str:
    """That of the variables. Python itself passes over one that is full and takes another."""
    return next(filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))), "/tmp")


def temporary() -> dict[str, Any]:
    folder = temporary_folder()
    return {"path": folder, "fault": fault_of_writing(folder), **(space(folder) or {})}


def fault_of_writing(folder: str) -> str | None:
    """Why no file of 1 MiB can be written there; None if one can. A full disk, or a quota, is told only then."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def fabric() -> list[dict[str, Any]]:
    """Ports of InfiniBand and RoCE devices: device, state, rate in bytes/s."""
    found = []
    for port in sorted(_FABRIC.glob("*/ports/*")):
        rate = (port / "rate").read_text().split()[0]  # "400 Gb/sec (4X NDR)"
        state = (port / "state").read_text().split(":")[-1].strip()
        found.append({"device": port.parent.parent.name, "state": state, "rate": float(rate) * 1e9 / 8})
    return found


def links() -> dict[str, float]:
    """Network interfaces that are up -> bytes/s; those whose driver tells no speed are left out."""
    found = {}
    for folder in sorted(_LINKS.iterdir()) if _LINKS.is_dir() else []:
        try:
            speed = int((folder / "speed").read_text())
            up = (folder / "operstate").read_text().strip() == "up"
        except (OSError, ValueError):
            continue
        if up and speed > 0:
            found[folder.name] = speed * 1e6 / 8
    return found


if __name__ == "__main__":
    print("MMCLIP-ANSWER " + json.dumps(facts(request)), flush=True)  # type: ignore[name-defined]  # noqa: F821 (the sender's)
    os._exit(0)
