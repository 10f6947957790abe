"""`mmclip launch ray-job`: hand an offline stage to a Ray cluster, from any machine that reaches its job server."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

from mmclip_dist.cli import app
from mmclip_dist.errors import SECRET, Mendable
from mmclip_launch.findings import errors
from mmclip_launch.frozen import OURS
from mmclip_launch.probe import code_hash
from mmclip_launch.ray_cluster import judge_cluster, token
from mmclip_launch.ray_package import Files, fill, pinned

STAGES = ("entities", "attention")
_POLL_S = 0.5
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
INTERRUPTED = 130


def entrypoint(words: Sequence[str]) -> list[str]:
    """The job's command: a stage, by the code that travels with it.

    ValueError unless the words begin with a stage, sets are named so that the cluster finds them, and nothing secret is in them.
    As the stage does (a usage error), if it would refuse them.
    """
    if not words or words[0] not in STAGES:
        raise ValueError(f"name a stage, {' or '.join(STAGES)}: mmclip launch ray-job -- entities SET/train --workers 64")
    for place, word in enumerate(words[1:]):
        value = word.partition("=")[2] if word.startswith("--") else word
        relative = value and "://" not in value and not value.startswith(("/", "-"))
        if relative and (place == 0 or Path(value).is_dir()):
            raise ValueError(f"{value} is relative, and a job starts in another folder: give the full path or a URL")
        if SECRET.search(word):
            raise ValueError(
                "a URL has a password or a signature in it, and Ray shows a job's command to everybody: give keys to the "
                "cluster's nodes instead (launch/README.md, Credentials of a store)"
            )
    stages = typer.main.get_group(app)
    with stages.make_context("mmclip", [words[0]]) as above:
        stages.commands[words[0]].make_context(words[0], list(words[1:]), parent=above)
    return ["python", "-m", "mmclip_launch.cli", *words]


def submit_ray(
    address: str, words: Sequence[str], *, more: Sequence[Path] = (), excludes: Sequence[str] = (), pip: Path | None = None,
    dry: bool = False,
) -> int:  # fmt: skip
    """Run a stage on a Ray cluster and wait -> its exit code; 130 after Ctrl-C, which leaves it running.

    more, excludes: as in `Files.of`. pip: a file of pinned requirements, for nodes that lack them. Mendable if the cluster is not
    fit or refuses us. OSError if the connection is lost; the job then goes on.
    """
    command, files = entrypoint(words), Files.of(words[1:], more, excludes)
    requirements = pinned(pip) if pip else []
    if dry:
        print(shlex.join(command))
        print(f"with {', '.join(OURS)}" + "".join(f", {path}" for path in files.paths))
        for line in requirements:
            print(f"pip: {line}")
        return 0
    found = judge_cluster(address)
    for finding in found:
        print(finding, file=sys.stderr, flush=True)
    if errors(found):
        raise Mendable("nothing was submitted: see above")
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), files)
        environment: dict[str, Any] = {"working_dir": folder}
        if requirements:
            environment["pip"] = {"packages": requirements, "pip_check": False}
        client = _client(address)
        told = {"mmclip-dist": version("mmclip-dist"), "code": str(code_hash(list(OURS)))}
        name = f"mmclip-{words[0]}-{secrets.token_hex(4)}"
        try:
            client.submit_job(entrypoint=shlex.join(command), submission_id=name, runtime_env=environment, metadata=told)
        except RuntimeError as error:
            raise OSError(f"the cluster took no job: {' '.join(str(error).split())}") from None
    return follow(client, address, name)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray prefers to the address that it is given
    known = token()
    return JobSubmissionClient(address, headers={"Authorization": f"Bearer {known}"} if known else None)


def follow(client: Any, address: str, name: str) -> int:
    """Print the job's output until it ends -> its exit code. Ctrl-C ends the printing alone."""
    import aiohttp

    later = f"follow it: ray job logs {name} --follow --address {address}; stop it: ray job stop {name} --address {address}"

    async def print_output() -> None:
        async for text in client.tail_job_logs(name):
            print(text, end="", flush=True)

    try:
        print(f"submitted as {name}", file=sys.stderr, flush=True)  # here: whoever reads it may press Ctrl-C at once
        asyncio.run(print_output())
        while (job := client.get_job_info(name)).status not in _ENDED:
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        print(f"detached; the job goes on. {later}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        raise OSError(f"the connection to {address} is lost ({type(error).__name__}); the job goes on. {later}") from None
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        print(f"{name} was stopped; the same command goes on", file=sys.stderr, flush=True)
    elif job.driver_exit_code is None:  # it did not even start
        print(f"failed: {' '.join(str(job.message).split())}", file=sys.stderr, flush=True)
    return job.driver_exit_code or 1
