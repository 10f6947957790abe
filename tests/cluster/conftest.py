"""Two hosts with addresses, sshd and a store of their own, for all tests of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.machines import Machines, machines, missing, store
from tests.conftest import LONG, Sets
from tests.launched import Finished

LOST_S = 6
COMMON = (*LONG, "checkpoint.keep=2", f"health.lost_s={LOST_S}")


@dataclass
class Cluster:
    """Two hosts, and a folder from which commands are started. sources: sets in the store, at url; variables: what a client of
    the store needs."""

    made: Machines
    folder: Path
    url: str
    sources: str
    tokenizer: list[str]
    variables: dict[str, str]

    def overrides(self, run: Path, *more: str) -> list[str]:
        """Of a run on the sets in the store."""
        return [*self.tokenizer, f"run_dir={run}", f"data.sources={self.sources}", *COMMON, *more]

    def start(
        self, *words: str, host: str = "host-a", module: str = "mmclip_launch.cli", variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """`mmclip ...`, or another module, on a host. A process started by ssh has none of the variables."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
        return subprocess.Popen(
            [*self.made.enter(host), "env", "-C", str(self.folder), sys.executable, "-m", module, *words],
            env=environment | {"DS_ACCELERATOR": "cpu", **(variables or {})}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *words: str, timeout: float = 240) -> Finished:
        return ended(self.start(*words), timeout)

    def listening(self, host: str) -> list[tuple[str, str]]:
        """Address and port of all sockets on a host that wait for others, without sshd's."""
        told = subprocess.run([*self.made.enter(host), "ss", "-Htuln"], capture_output=True, text=True, check=True).stdout
        found = [line.split()[4].rpartition(":") for line in told.splitlines()]
        return [(address, port) for address, _, port in found if port != "22"]


def ended(process: subprocess.Popen[str], timeout: float = 240) -> Finished:
    output, _ = process.communicate(timeout=timeout)
    return Finished(process.returncode, output)


def skip_if_missing() -> None:
    if why := missing():
        warnings.warn(f"work across hosts is NOT TESTED: {why}", stacklevel=1)
        pytest.skip(f"work across hosts is NOT TESTED: {why}")


@pytest.fixture(scope="session")
def cluster(sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    skip_if_missing()
    folder = tmp_path_factory.mktemp("cluster")
    with machines(folder / "machines", "host-a", "host-b") as made, store(made, sets.folder) as (url, variables):
        work = folder / "work"
        work.mkdir()
        (work / "hosts").write_text("host-a slots=1\nhost-b slots=1\n")
        keys = [f"{name.lower()} = {variables.pop(name)}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        (work / "credentials").write_text("\n".join(["[default]", *keys]))
        variables |= {"AWS_SHARED_CREDENTIALS_FILE": str(work / "credentials"), "DS_ACCELERATOR": "cpu"}
        (work / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        plain = sets.overrides("unused")
        sources = next(word for word in plain if word.startswith("data.sources="))
        kept = [word for word in plain if not word.startswith(("data.sources=", "run_dir="))]
        in_store = sources.partition("=")[2].replace(str(sets.folder), url)
        yield Cluster(made, work, url, in_store, kept, variables)
