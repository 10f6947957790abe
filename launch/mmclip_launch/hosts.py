"""The hosts of a run: who they are (a hostfile), and how a program is run on each of them (ssh, as DeepSpeed's launcher does)."""

from __future__ import annotations

import json
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmclip_shards.home import home
from mmclip_shards.textfiles import read_text

LOCAL = "localhost"
ANSWER = "MMCLIP-ANSWER "
"""How the line begins that holds a program's answer: shells of other hosts may print more."""

_LINE = re.compile(r"([\w.][\w.:@-]*)\s+slots=(\d+)\s*(#.*)?")  # a name never looks like an option of ssh
# What DeepSpeed's launcher passes on to other hosts, without MLFLOW*, which holds a password (deepspeed.launcher.runner,
# EXPORT_ENVS, and export_envs of the accelerator). tests/launch/test_hosts.py compares.
PASSED_ON = ("PYTHON", "MV2", "UCX", "NCCL")
CONNECT_S = 8
_LEAVE_S = 2.0  # for a program that has answered
# A host that is cut off answers no more; without these the launcher would wait for the kernel's time-out, a quarter of an hour.
ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: the name, and the number of ranks there."""

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file, in its order: lines `NAME slots=N`. ValueError with number and mend of the first wrong line."""
    mend = "write lines `NAME slots=N`, such as `node-1 slots=8`"
    if not path.is_file():
        raise ValueError(f"{path} is no hostfile: it is not there, or is a folder; {mend} into a file, and name that")
    hosts: dict[str, Host] = {}
    for number, line in enumerate(read_text(path, mend).splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found, where = _LINE.fullmatch(text), f"{path}, line {number}"
        if not found:
            raise ValueError(f"{where}: {text!r} is not `NAME slots=N`, such as `node-1 slots=8`")
        name, slots = found[1], int(found[2])
        if not slots:
            raise ValueError(f"{where}: {name} has no slots: give it the number of its GPUs, or delete the line")
        if name in hosts:
            raise ValueError(f"{where}: {name} stands there twice: delete one line")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise ValueError(f"{path} names no host: {mend}")
    return tuple(hosts.values())


def over_ssh(hosts: Sequence[Host]) -> bool:
    """Whether ssh leads to the hosts. Not if the only one is this machine."""
    return [host.name for host in hosts] != [LOCAL]


def first_hosts(hosts: tuple[Host, ...] | None, count: int | None) -> tuple[Host, ...] | None:
    """The first `count` hosts, or all. ValueError if there are fewer."""
    if count is None:
        return hosts
    if count > len(hosts or (LOCAL,)):
        raise ValueError(
            f"--nodes {count}, but the hostfile names {len(hosts)}: name more hosts"
            if hosts else f"--nodes {count} needs a list of them: --hostfile FILE, with lines `NAME slots=GPUS`"
        )
    return hosts[:count] if hosts else None


def hostfile_text(hosts: Iterable[Host]) -> str:
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def deepspeed_env() -> dict[str, tuple[Path, str]]:
    """Variables of `.deepspeed_env`, which DeepSpeed's launcher sets on every host -> the file and the value."""
    found = {}
    for folder in (home(), Path()):
        path = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if path.is_file():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                name, sign, value = line.partition("=")
                if not sign:  # DeepSpeed fails there with `not enough values to unpack`
                    raise ValueError(
                        f"{path}, line {number}: {line!r} is not NAME=VALUE: delete the line, even if it is empty"
                    )
                found[name.strip()] = (path, value.strip())
    return found


def for_pdsh(word: str) -> str:
    """What to give DeepSpeed's launcher for pdsh so that a program on the hosts gets `word`.

    The launcher puts a word with a space between double quotes and escapes the double quotes in it; other words go to the hosts'
    shells as they are. pdsh takes %h, %n and %u for its own, and %% for %.
    """
    quoted = re.sub(r"[\\$`]", r"\\\g<0>", word) if " " in word else shlex.quote(word)
    return quoted.replace("%", "%%")


def for_pdsh_export(value: str) -> str:
    """The same for a value in `.deepspeed_env`: the launcher puts it between double quotes if a shell would change it."""
    return re.sub(r'[\\$`"]', r"\\\g<0>", value).replace("%", "%%")


def check_unquoted(*paths: str) -> None:
    """ValueError if DeepSpeed's launcher, which sends these paths to the hosts without quotes, would send others."""
    for path in paths:
        if re.search(r"[^\w@+=:,./-]", path):
            raise ValueError(
                f"{path}: its name goes unquoted through DeepSpeed's launcher to the shells of the hosts: start from a folder, "
                "and with an interpreter, whose paths hold nothing but letters, digits and @+=:,./-_"
            )


def environment_of_ranks() -> dict[str, str]:
    """The variables that ranks on other hosts see, beside those of a login there."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    passed["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
    return passed | {name: value for name, (_, value) in deepspeed_env().items()}


@dataclass
class Answer:
    """What came back from a host. value: of its program; None if there is none, and then `fault` says why. times: of this
    machine's clock, before the program was sent and after it had answered."""

    host: Host
    value: dict[str, Any] | None = None
    fault: str = ""
    times: tuple[float, float] = (0.0, 0.0)
    printed: list[str] = field(default_factory=list)


def ssh_command(name: str, command: str) -> list[str]:
    """Run a shell command on a host, never asking for anything. PDSH_SSH_ARGS_APPEND counts, as for the launcher."""
    more = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", *ALIVE, *more, name, command]


def run_everywhere(
    hosts: Sequence[Host], program: str, requests: Mapping[str, Mapping[str, Any]], timeout_s: float, *, by_ssh: bool
) -> dict[str, Answer]:
    """Run a Python program on all hosts at once -> name -> its answer.

    program: text that finds `request`, a dict, and prints `ANSWER` and JSON. It goes through standard input, so that neither
    it nor the variables for the ranks are in a list of processes. requests: by name of the host. by_ssh: else on this machine.
    """
    passed = environment_of_ranks() if by_ssh else {}

    def one(host: Host) -> Answer:
        head = f"import json, os, sys\nos.environ.update(json.loads({json.dumps(passed)!r}))\n"
        head += "sys.path[1:1] = os.environ.get('PYTHONPATH', '').split(os.pathsep)\n"
        names = f"{{'__name__': '__main__', 'request': json.loads({json.dumps(requests[host.name])!r})}}"
        text = f"{head}exec(compile({program!r}, '<sent by mmclip>', 'exec'), {names})\n"
        python = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.quote(sys.executable)} -"
        command = ssh_command(host.name, python) if by_ssh else [sys.executable, "-"]
        return ask(host, command, text, timeout_s)

    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        return {answer.host.name: answer for answer in pool.map(one, hosts)}


def ask(host: Host, command: Sequence[str], text: str, timeout_s: float) -> Answer:
    """Run a command that reads `text` and answers by a line that begins with `ANSWER`."""
    answer = Answer(host)
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
    except FileNotFoundError:
        answer.fault = f"{command[0]} is not installed here"
        return answer
    errors: list[str] = []
    lines: queue.Queue[str | None] = queue.Queue()
    # Threads, because any of the three pipes can be stuck, and stay open for as long as a process cannot be killed.
    works = (
        partial(_send, process, text),
        partial(_listen, process, lines),
        partial(errors.extend, process.stderr or ()),
    )
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    sent, deadline, late = time.time(), time.monotonic() + timeout_s, False
    try:
        while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            if line.startswith(ANSWER):
                answer.value, answer.times = json.loads(line.removeprefix(ANSWER)), (sent, time.time())
                break
            answer.printed.append(line.rstrip())
    except queue.Empty:
        late = True
    patience_s = _LEAVE_S if answer.value is not None else max(_LEAVE_S, deadline - time.monotonic())
    code = _end(process, 0.0 if late else patience_s)
    threads[-1].join(1)
    answer.printed += [line.rstrip() for line in errors]
    if answer.value is None:
        last = next((line for line in reversed(answer.printed) if line.strip()), "it said nothing")
        answer.fault = f"no answer within {timeout_s:g} s" if late else f"code {code}: {last}"
    return answer


def _send(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin
    with suppress(BrokenPipeError):  # the command has ended: its messages say why
        process.stdin.write(text)
        process.stdin.close()


def _listen(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str], patience_s: float) -> int | None:
    """The exit code; None of a process that cannot be killed, as it waits for a dead disk: it is left behind."""
    for wait_s in (patience_s, _LEAVE_S):
        try:
            return process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.poll()
