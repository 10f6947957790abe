"""Hand a training run to those that start it: DeepSpeed's launcher on hosts of a hostfile, or Slurm."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmclip_shards.storage import write_atomic

from mmclip_dist.config import Config, load_config
from mmclip_dist.errors import Mendable
from mmclip_launch.doctor import local_hosts, look
from mmclip_launch.findings import errors
from mmclip_launch.frozen import freeze, frozen_at, record, shown, variables
from mmclip_launch.hosts import ALIVE, LOCAL, Host, deepspeed_env, hostfile_text
from mmclip_launch.processes import environment

_SUBMITTED = "launch"  # a folder of the run: hostfile and variables, as submitted


@dataclass(frozen=True)
class Job:
    """A run that has been checked as far as this machine can."""

    recipe: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir).absolute()


def job_of(recipe: str, overrides: Sequence[str]) -> Job:
    """ValueError if the configuration or its sources do not fit. A recipe that is a file gets its full path."""
    config = load_config(recipe, overrides)
    config.check_sources()
    return Job(str(Path(recipe).absolute()) if Path(recipe).is_file() else recipe, tuple(overrides), config)


@dataclass(frozen=True)
class Command:
    """A command, what its environment adds to this one, and files that it needs -> their text."""

    words: list[str]
    variables: dict[str, str]
    files: dict[Path, str] = field(default_factory=dict)

    def __str__(self) -> str:
        texts = [f"# {path}\n{text}" for path, text in self.files.items()]
        return "\n".join([*texts, shown(self.words, self.variables)])


def deepspeed_command(job: Job, hosts: Sequence[Host], code: Path) -> Command:
    """DeepSpeed's launcher on these hosts, by pdsh over ssh; without ssh if the only one is this machine."""
    words = ["deepspeed", "--hostfile", str(job.run_dir / _SUBMITTED / "hostfile")]
    files = {job.run_dir / _SUBMITTED / "hostfile": hostfile_text(hosts)}
    if [host.name for host in hosts] == [LOCAL]:
        words += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
        added = variables(code)
    else:
        # The launcher puts the working folder before PYTHONPATH; what this file says comes after that, and on all hosts.
        path = job.run_dir / _SUBMITTED / "deepspeed_env"
        passed = {name: value for name, (_, value) in deepspeed_env().items()} | variables(code)
        files[path] = "".join(f"{name}={value}\n" for name, value in passed.items())
        more = " ".join([os.environ.get("PDSH_SSH_ARGS_APPEND", ""), *ALIVE]).strip()
        words += ["--force_multi"]  # else it would run a single host's ranks here, whatever the host is
        added = {"DS_ENV_FILE": str(path), "PDSH_SSH_ARGS_APPEND": more}
    return Command([*words, "--module", "mmclip_dist.train", job.recipe, *job.overrides], added, files)


def start_deepspeed(job: Job, hosts: Sequence[Host] | None, *, dry: bool) -> None:
    """Look at the hosts, then become DeepSpeed's launcher: its exit code is the run's. hosts: this machine by default.

    ValueError if the run does not fit the ranks; Mendable, after a line for each fault, if a host is not fit.
    """
    hosts = hosts or local_hosts()
    job.config.check_world(sum(host.slots for host in hosts))
    if dry:
        print(deepspeed_command(job, hosts, frozen_at(job.run_dir)))
        return
    found, _ = look(hosts, job.run_dir, by_ssh=[host.name for host in hosts] != [LOCAL])
    for finding in found:
        if finding.level in ("error", "warning"):
            print(finding, file=sys.stderr, flush=True)
    if wrong := errors(found):
        raise Mendable(f"nothing was started: {len(wrong)} faults of the hosts, above")
    code = freeze(job.run_dir)
    command = deepspeed_command(job, hosts, code)
    for path, text in command.files.items():
        path.parent.mkdir(exist_ok=True)
        write_atomic(str(path), text.encode())
    record(job.run_dir, "deepspeed", command.words, code.name)
    print(f"$ {shlex.join(command.words)}", flush=True)
    environ = environment(command.variables)
    os.execvpe(command.words[0], command.words, environ)
