"""Hand a run to those that start it: DeepSpeed's launcher on the hosts of a hostfile, Slurm, Kubernetes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmclip_shards.storage import write_atomic

from mmclip_dist.config import Config, load_config
from mmclip_dist.errors import Mendable
from mmclip_dist.run.folder import wait_for_others
from mmclip_dist.run.mounts import check_answering, first_silent
from mmclip_launch.doctor import MARK_S, local_hosts, look, program
from mmclip_launch.findings import counted, errors, judge_passed_variables
from mmclip_launch.frozen import archive, freeze, frozen_at, record, shown, variables
from mmclip_launch.hosts import (
    ALIVE,
    Host,
    check_unquoted,
    deepspeed_env,
    for_pdsh,
    for_pdsh_export,
    hostfile_text,
    over_ssh,
    run_everywhere,
)
from mmclip_launch.kubernetes import APPLY, apply, check_reachable, rendered
from mmclip_launch.kubernetes import job as job_objects
from mmclip_launch.probe import gpus
from mmclip_launch.processes import environment
from mmclip_launch.templates import template

SEND_S = 30.0
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

    @property
    def without_run_dir(self) -> tuple[str, ...]:
        """The overrides, for a target that sets the run folder itself."""
        return tuple(word for word in self.overrides if not word.startswith("run_dir="))


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

    def write(self, run_dir: Path, target: str) -> None:
        """Write the files, and what is submitted (`frozen.record`)."""
        for path, text in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(str(path), text.encode())
        record(run_dir, target, self.words, frozen_at(run_dir).name)

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.variables)

    def __str__(self) -> str:
        """As a script for a shell."""
        lines = [f"mkdir -p {shlex.quote(folder)}" for folder in dict.fromkeys(str(path.parent) for path in self.files)]
        lines += [f"printf %s {shlex.quote(text)} >{shlex.quote(str(path))}" for path, text in self.files.items()]
        return "\n".join([*lines, shown(self.words, self.environment)])


def deepspeed_command(job: Job, hosts: Sequence[Host], code: Path) -> Command:
    """DeepSpeed's launcher on these hosts, by pdsh over ssh; without ssh if the only one is this machine."""
    words = ["deepspeed", "--hostfile", str(job.run_dir / _SUBMITTED / "hostfile"), "--master_port", str(meeting_port())]
    files = {job.run_dir / _SUBMITTED / "hostfile": hostfile_text(hosts)}
    asked = [job.recipe, *job.overrides]
    if not over_ssh(hosts):
        words += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
        added = variables(code) | ({} if gpus() else {"DS_ACCELERATOR": "cpu"})
    else:
        # The launcher puts the working folder before PYTHONPATH; what this file says comes after that, and on all hosts.
        path = job.run_dir / _SUBMITTED / "deepspeed_env"
        ours = {name: for_pdsh_export(value) for name, value in variables(code).items()}
        passed = {name: value for name, (_, value) in deepspeed_env().items()} | ours
        files[path] = "".join(f"{name}={value}\n" for name, value in passed.items())
        more = " ".join([os.environ.get("PDSH_SSH_ARGS_APPEND", ""), *ALIVE]).strip()
        words += ["--force_multi"]  # else it would run a single host's ranks here, whatever the host is
        added = {"DS_ENV_FILE": str(path), "PDSH_SSH_ARGS_APPEND": more}
        asked = [for_pdsh(word) for word in asked]
    return Command([*words, "--module", "mmclip_dist.train", *asked], added, files)


def meeting_port() -> int:
    """The port of the first host where the ranks meet: MASTER_PORT, else that of DeepSpeed. ValueError if it is none."""
    port = os.environ.get("MASTER_PORT", "29500")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"MASTER_PORT={port} is no port: set a number from 1 to 65535, or unset it")
    return int(port)


def start_deepspeed(job: Job, hosts: Sequence[Host] | None, *, dry: bool) -> None:
    """Look at the hosts, then become DeepSpeed's launcher: its exit code is the run's. hosts: this machine by default.

    ValueError if the run does not fit the ranks; Mendable, after a line for each fault, if a host is not fit.
    """
    hosts = hosts or local_hosts()
    job.config.check_world(sum(host.slots for host in hosts))
    by_ssh, own_disks = over_ssh(hosts), job.config.checkpoint.host_local
    if by_ssh:
        check_launcher()
    if dry:
        show(job, deepspeed_command(job, hosts, frozen_at(job.run_dir)))
        return
    if first_silent([str(job.run_dir)], MARK_S) is None:  # else `look` names it, beside whatever else is wrong
        wait_for_others(job.run_dir)
    sets = job.config.sets
    found, _ = look(hosts, job.run_dir, by_ssh=by_ssh, shared=not own_disks, sets=sets, meets=meeting_port())
    for finding in found:
        if finding.level in ("error", "warning"):
            print(finding, file=sys.stderr, flush=True)
    if wrong := errors(found):
        raise Mendable(f"nothing was started: {counted(len(wrong), 'fault')} of the hosts, above")
    code = freeze(job.run_dir)
    if by_ssh and own_disks:
        send(code, hosts)
    command = deepspeed_command(job, hosts, code)
    command.write(job.run_dir, "deepspeed")
    print(f"$ {shlex.join(command.words)}", flush=True)
    os.execvpe(command.words[0], command.words, command.environment)


def check_launcher() -> None:
    """ValueError or Mendable for what DeepSpeed's launcher would send wrong to other hosts, or print although it is secret."""
    check_unquoted(str(Path.cwd()), sys.executable)
    for finding in judge_passed_variables(deepspeed_env()):
        raise Mendable(f"{finding.text}: {finding.mend}")


def show(job: Job, command: Command) -> None:
    """Print what would run."""
    print(f"# The code is copied first, to {frozen_at(job.run_dir)}\n{command}")


def send(code: Path, hosts: Sequence[Host]) -> None:
    """Put the copy of the code on the disks of all hosts, at the same path. Mendable if a host does not take it."""
    request = {"folder": str(code), "archive": archive(code)}
    answers = run_everywhere(hosts, program("unpack"), {host.name: request for host in hosts}, SEND_S, by_ssh=True)
    if faults := [f"{name}: {answer.fault}" for name, answer in answers.items() if answer.value is None]:
        raise Mendable(f"the code could not be put into {code} on {'; '.join(faults)}")


def slurm_command(
    job: Job, code: Path, *, nodes: int, gpus: int, options: Sequence[str], sweep: Path | None
) -> Command:
    """sbatch with our template. gpus: of each node. options: for sbatch. sweep: a file, of whose lines each is a run."""
    words = ["sbatch", f"--nodes={nodes}", f"--gpus-per-node={gpus}"]
    added = {"RUN_DIR": str(job.run_dir)} | variables(code)
    files = {}
    if sweep:
        runs = runs_of(sweep)
        for run in runs:
            load_config(job.recipe, [*job.overrides, *run]).check_world(nodes * gpus)
        words.append(f"--array=1-{len(runs)}")
        path = job.run_dir / _SUBMITTED / "sweep"
        added["SWEEP"] = str(path)
        files[path] = "".join(f"{shlex.join(run)}\n" for run in runs)
    words += [*options, str(template("train.sbatch")), job.recipe, *job.without_run_dir]
    return Command(words, added, files)


def runs_of(sweep: Path) -> list[list[str]]:
    """The overrides of each run of a sweep: those of a line. ValueError that names a line which is no run."""
    lines, runs = sweep.read_text(encoding="utf-8").removesuffix("\n").split("\n"), []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line)
        except ValueError:
            raise ValueError(f"{sweep}, line {number}: quotes do not match: {line}") from None
        if not words:
            raise ValueError(f"{sweep}, line {number} is empty: each line names one run, by key=value words")
        if any(word.startswith("run_dir=") for word in words):
            raise ValueError(f"{sweep}, line {number}: run_dir= does not stand here: the runs are run_dir/1, run_dir/2, ...")
        runs.append(words)
    return runs


def submit_slurm(
    job: Job, *, nodes: int, gpus: int, options: Sequence[str] = (), sweep: Path | None = None, dry: bool
) -> int:
    """Queue the run -> sbatch's exit code. Slurm keeps its own copy of the script, and the job uses a copy of the code."""
    job.config.check_world(nodes * gpus)
    if job.config.checkpoint.host_local:
        raise ValueError("checkpoint.host_local=true: Slurm's nodes take the code from run_dir, so they have to share it")
    command = slurm_command(job, frozen_at(job.run_dir), nodes=nodes, gpus=gpus, options=options, sweep=sweep)
    if dry:
        show(job, command)
        return 0
    if not shutil.which("sbatch"):
        raise ValueError("sbatch is not here: submit from a login node of the cluster")
    if not (os.access(Path(), os.W_OK) or any(re.match(r"-o|--output\b", option) for option in options)):
        mend = "start from a folder that you can write to, or add --option=--output=FOLDER/slurm-%j.out"
        raise ValueError(f"{Path.cwd()} cannot be written to, and Slurm starts no job that cannot write its output: {mend}")
    check_answering([str(job.run_dir)])
    freeze(job.run_dir)
    command.write(job.run_dir, "slurm")
    return subprocess.run(command.words, env=command.environment, check=False).returncode


def submit_kubernetes(job: Job, image: str, *, nodes: int, gpus: int, dry: bool) -> int:
    """Create the run's objects -> kubectl's exit code. The image freezes the code."""
    job.config.check_world(nodes * gpus)
    if Path(job.recipe).is_file():
        raise ValueError(f"{job.recipe} is not in the image: name a recipe, and give the rest as key=value")
    check_reachable(job.config)
    words = [job.recipe, *job.without_run_dir]
    text = rendered(job_objects(image, job.config.run_dir, words, nodes=nodes, gpus=gpus))
    if dry:
        print(f"# {shlex.join(APPLY)}\n{text}", end="")
        return 0
    if not shutil.which(APPLY[0]):
        raise ValueError("kubectl is not here: install it, or hand what --dry-run prints to someone who has it")
    return apply(text)
