"""Look at the hosts of a run before it starts: ask each of them, and judge what they say (`mmclip_launch.findings`)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from mmclip_dist.run.mounts import MEND, first_silent
from mmclip_launch.findings import (
    CPU_RANKS,
    PACKAGES,
    Facts,
    Finding,
    error,
    judge_access,
    judge_agreement,
    judge_all_reduce,
    judge_answers,
    judge_clock,
    judge_host,
    judge_passed_variables,
    judge_reading,
    unchecked,
)
from mmclip_launch.frozen import OURS
from mmclip_launch.hosts import LOCAL, Answer, Host, deepspeed_env, run_everywhere
from mmclip_launch.probe import gpus

MARK_S, PROBE_S, READ_S, ALL_REDUCE_S = 6.0, 20.0, 25.0, 100.0
_READING_S = 3.0


def program(name: str) -> str:
    """The text of a module of this package, to be run elsewhere."""
    return resources.files("mmclip_launch").joinpath(f"{name}.py").read_text()


@contextmanager
def marked(folder: Path | None) -> Iterator[str | None]:
    """A file in the run folder that other hosts shall see -> its name; None without a folder, or if it cannot be written."""
    if folder is None:
        yield None
        return
    path = folder / f".seen-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:  # the probe of this host will say so
        yield None
        return
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def probe(
    hosts: Sequence[Host], run_dir: Path | None, *, by_ssh: bool, shared: bool, meets: int | None
) -> dict[str, Answer]:
    """Ask every host for its facts (`mmclip_launch.probe`)."""
    with marked(run_dir if shared else None) as mark:
        folder = str(run_dir.absolute()) if run_dir else None
        request = {"packages": PACKAGES, "ours": OURS, "run_dir": folder, "mark": mark, "meets": None}
        requests = {host.name: request for host in hosts} | {hosts[0].name: request | {"meets": meets}}
        return run_everywhere(hosts, program("probe"), requests, PROBE_S, by_ssh=by_ssh)


def look(
    hosts: Sequence[Host], run_dir: Path | None, *, by_ssh: bool, shared: bool = True, sets: Sequence[str] = (),
    meets: int | None = None,
) -> tuple[list[Finding], dict[str, Facts]]:
    """The quick part, within half a minute: everything that the hosts say about themselves, and whether each can read these sets.
    shared: whether the run folder has to be the same everywhere. meets: the port of the first host where ranks shall meet."""
    with reading(sets, 0, hosts, by_ssh=by_ssh) as readings:
        silent = run_dir is not None and first_silent([str(run_dir)], MARK_S) is not None
        answers = probe(hosts, run_dir, by_ssh=by_ssh, shared=shared and not silent, meets=meets)
        known: dict[str, Facts] = {name: each.value for name, each in answers.items() if each.value is not None}
        found = [*judge_answers(answers), *judge_passed_variables(deepspeed_env() if by_ssh else {})]
        for name, answer in answers.items():
            if answer.value is not None:
                found += [
                    *judge_host(answer.host, answer.value),
                    *judge_clock(name, answer.value["time"], *answer.times),
                ]
        found += judge_agreement(hosts, known) if known else ()
        if silent and "run_dir" not in [finding.check for finding in found]:  # this machine may be none of the hosts
            found.append(
                error("run_dir", LOCAL, f"{run_dir}: its file system does not answer within {MARK_S:g} s", MEND)
            )
        if known:
            found += judge_access({name: answer for name, answer in readings().items() if name in known})
    return found, known


@contextmanager
def reading(
    urls: Sequence[str], seconds: float, hosts: Sequence[Host], *, by_ssh: bool
) -> Iterator[Callable[[], dict[str, Answer]]]:
    """Meanwhile let every host read these sets for so long (`mmclip_launch.reading`) -> what to call for the answers."""
    request = {"urls": list(urls), "seconds": seconds}
    with ThreadPoolExecutor(1) as aside:
        requests = {host.name: request for host in hosts if urls}
        answers = (
            aside.submit(run_everywhere, hosts, program("reading"), requests, READ_S, by_ssh=by_ssh) if urls else None
        )
        yield lambda: answers.result() if answers else {}


def local_hosts() -> tuple[Host, ...]:
    """This machine, with a rank for each of its GPUs, or two on CPUs."""
    return (Host(LOCAL, len(gpus() or ()) or CPU_RANKS),)


def examine(hosts: Sequence[Host], run_dir: Path | None, data: str | None, *, by_ssh: bool) -> Iterator[Finding]:
    """Everything, as it is found: what the hosts say, how fast each reads `data` (SET/train), how fast they add up gradients
    together."""
    with reading([data] if data else [], _READING_S, hosts, by_ssh=by_ssh) as readings:
        found, known = look(hosts, run_dir, by_ssh=by_ssh)
        yield from found
        if data is None:
            yield unchecked("storage", "", "no set was named", "name one: --data SET/train")
        yield from judge_reading({name: answer for name, answer in readings().items() if name in known})
    here = [host for host in hosts if host.name in known]
    versions = {facts["packages"]["torch"] for facts in known.values()}
    if len(here) < len(hosts) or len(versions) > 1 or None in versions:
        yield unchecked("all-reduce", "", "not all hosts can take part", "mend the errors first")
    else:
        yield from measure_all_reduce(hosts, known, by_ssh=by_ssh)


def measure_all_reduce(hosts: Sequence[Host], known: Mapping[str, Facts], *, by_ssh: bool) -> list[Finding]:
    """One rank a GPU with NCCL; without GPUs one rank a host, or two on a single one, with gloo."""
    backend = "nccl" if all(known[host.name]["gpus"] for host in hosts) else "gloo"
    cpu_ranks = CPU_RANKS if len(hosts) == 1 else 1
    ranks = [min(host.slots, len(known[host.name]["gpus"])) if backend == "nccl" else cpu_ranks for host in hosts]
    if sum(ranks) < 2:
        return [unchecked("all-reduce", "", "one rank has nothing to add up")]
    first = known[hosts[0].name]
    together = {
        "backend": backend, "world": sum(ranks), "hosts": len(hosts), "port": first["port"],
        "address": first["address"] if by_ssh else "127.0.0.1",
    }  # fmt: skip
    requests = {
        host.name: together | {"first": sum(ranks[:number]), "ranks": ranks[number]}
        for number, host in enumerate(hosts)
    }
    answers = run_everywhere(hosts, program("all_reduce"), requests, ALL_REDUCE_S, by_ssh=by_ssh)
    return judge_all_reduce(backend, hosts, known, answers)
