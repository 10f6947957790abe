"""What the answers of hosts mean for a run: findings, each with its mend. Nothing here touches a host."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from mmclip_dist.errors import masked
from mmclip_dist.plan.cards import card_of_device
from mmclip_dist.run.mounts import MEND
from mmclip_launch.hosts import Answer, Host

Level = Literal["ok", "warning", "error", "not checked"]
Facts = Mapping[str, Any]
"""What `mmclip_launch.probe` says of a host."""

PACKAGES = (
    "mmclip-dist", "torch", "deepspeed", "transformers", "tokenizers", "triton", "numpy", "webdataset", "ray", "s3fs",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip
"""Distributions that have to be of one version on all hosts."""
_NEEDED = ("torch", "deepspeed", "transformers")  # of these; others come with another store, card or command

_GIB = 2**30
CPU_RANKS = 2
"""Of a machine without GPUs that no hostfile names."""
_DISK, _DISK_TIGHT = 1 * _GIB, 20 * _GIB
_SHARED_MEMORY = 1 * _GIB  # of a host with several GPUs: NCCL takes some 10 MB for each pair of ranks
_ENTRIES = 1000  # inodes
_IN_USE = 0.05  # of a card's memory
_OPEN_FILES = 4096  # ranks raise their own limit to the hard one
_SKEW, _SKEW_REFUSED = 2.0, 300.0  # seconds; AWS refuses signatures from 900 s on, others earlier
_OF_LINK = 0.6  # what an all-reduce over NCCL reaches at least where all is well
_GLOO = 0.1e9  # bytes/s that gloo, which adds on one core, reaches at least
_SLOW_READER = 0.5  # of the median host
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|PWD|CRED", re.IGNORECASE)
_PLACE = re.compile(r"(FILE|PATH|DIR)$")  # a variable that names a file holds no secret


@dataclass(frozen=True)
class Finding:
    """What was found on a host (on all, if it is empty), and what to do about it."""

    level: Level
    check: str
    host: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        where = f"{self.host}: " if self.host else ""
        return masked(f"{self.level}: {self.check}: {where}{self.text}" + (f": {self.mend}" if self.mend else ""))


def errors(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def error(check: str, host: str, text: str, mend: str) -> Finding:
    return Finding("error", check, host, text, mend)


def warning(check: str, host: str, text: str, mend: str) -> Finding:
    return Finding("warning", check, host, text, mend)


def ok(check: str, host: str, text: str) -> Finding:
    return Finding("ok", check, host, text)


def unchecked(check: str, host: str, text: str, mend: str = "") -> Finding:
    return Finding("not checked", check, host, text, mend)


# -- Hosts that do not answer ----------------------------------------------------------------------------------

_SSH = (
    ("Could not resolve hostname", "mend the name in the hostfile, or add it to /etc/hosts or DNS"),
    ("Permission denied", "let this user in without a password: ssh-copy-id HOST"),
    ("Host key verification failed", "take its key once: ssh-keyscan HOST >> ~/.ssh/known_hosts"),
    ("Connection refused", "start sshd there, or name its port in ~/.ssh/config"),
    ("timed out", "is it on, and does a firewall let port 22 through?"),
    ("No route to host", "is it on, and on this network?"),
    ("Network is unreachable", "is it on this network?"),
    ("can't cd to", "all hosts need this folder: use a file system that they share"),
    (
        "No such file or directory",
        "install the same environment at the same path there, or on a file system that they share",
    ),
    ("not found", "install the same environment at the same path there, or on a file system that they share"),
    ("No space left", "free some disk there"),
    ("no answer within", "log in and see what holds it up: a full disk, a dead network file system"),
)


def judge_answers(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    silent = [answer for answer in answers.values() if answer.value is None]
    for answer in silent:
        said = " ".join([answer.fault, *answer.printed])
        mend = next((mend for words, mend in _SSH if words in said), "log in and try it there")
        yield error("host", answer.host.name, answer.fault, mend.replace("HOST", answer.host.name))
    if not silent:
        yield ok("host", "", f"{counted(len(answers), 'host')} answered")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def judge_passed_variables(variables: Mapping[str, tuple[Path, str]]) -> Iterator[Finding]:
    """Secrets that DeepSpeed's launcher would print and show in lists of processes."""
    places = {name: str(path) for name, (path, _) in variables.items()}
    places |= {name: "the environment" for name in os.environ if name.startswith("MLFLOW")}
    mend = "DeepSpeed prints it and shows it in lists of processes; keep it in a file on each host, and name that file here"
    for name, place in places.items():
        if _SECRET.search(name) and not _PLACE.search(name):
            yield error("credentials", "", f"{name} stands in {place}", mend)


# -- One host ---------------------------------------------------------------------------------------------------------


def judge_host(host: Host, facts: Facts) -> Iterator[Finding]:
    """What needs no other host to see."""
    yield from judge_gpus(host, facts)
    yield from judge_port(host.name, facts)
    yield from judge_disks(host.name, facts)
    yield from judge_limits(host.name, facts)
    yield from judge_build(host.name, facts)


def judge_gpus(host: Host, facts: Facts) -> Iterator[Finding]:
    cards, version = facts["gpus"], facts["packages"]["torch"] or ""
    if not cards:
        if host.slots > max(facts["cores"], CPU_RANKS):
            mend = f"write slots={facts['cores']} or fewer, or see why its cards are missing: nvidia-smi, dmesg"
            yield error("GPUs", host.name, f"slots={host.slots}, but it has no GPU and {counted(facts['cores'], 'core')}", mend)
        else:
            yield unchecked("GPUs", host.name, "no GPU: nvidia-smi is not there or its driver does not answer")
        return
    yield ok("GPUs", host.name, f"{len(cards)} x {cards[0]['name']}, driver {cards[0]['driver']}")
    if len(cards) < host.slots:
        mend = f"write slots={len(cards)}, or see why a card is missing: nvidia-smi, dmesg"
        yield error("GPUs", host.name, f"slots={host.slots}, but it has {counted(len(cards), 'GPU')}", mend)
    if host.slots < len(cards):
        unused = f"{len(cards) - host.slots} of {len(cards)} GPUs are not used"
        yield warning("GPUs", host.name, unused, f"write slots={len(cards)}")
    if len(kinds := sorted({card["name"] for card in cards})) > 1:
        yield warning("GPUs", host.name, f"cards differ: {', '.join(kinds)}", "the slowest sets the pace")
    if "+cpu" in version:
        yield error("GPUs", host.name, f"torch {version} cannot use its GPUs", "install torch with CUDA")
    for number, card in enumerate(cards):
        if card["ecc"].isdigit() and int(card["ecc"]):
            mend = "leave the host out and have the card replaced"
            yield error("GPUs", host.name, f"GPU {number} has {card['ecc']} uncorrected memory errors", mend)
        if float(card["used"]) > _IN_USE * float(card["memory"]):
            mend = "end the other program: nvidia-smi names it"
            yield warning("GPUs", host.name, f"GPU {number}: {card['used']} of {card['memory']} MiB are in use", mend)


def judge_port(host: str, facts: Facts) -> Iterator[Finding]:
    """Ranks of two runs that meet at one port would wait for each other in vain."""
    if port := facts["taken"]:
        mend = f"wait for the run that uses it, or take another: MASTER_PORT={port + 1} before the command"
        yield error("port", host, f"port {port}, where the ranks would meet, is in use", mend)


def judge_disks(host: str, facts: Facts) -> Iterator[Finding]:
    run, temporary = facts["run_dir"], facts["temporary"]
    disks = [("temporary files", temporary, "set TMPDIR to a larger disk, or free some")]
    if run:
        disks.append(("run_dir", run, "free some, or set run_dir to another folder"))
        if run["seen"] is False:
            mend = "set run_dir to a folder that all hosts share, or checkpoint.host_local=true"
            yield error("run_dir", host, f"{run['path']} is not the folder that this machine sees", mend)
        elif run["fault"]:
            mend = "mend its rights or free some disk, or name another folder"
            mend = MEND if "does not answer" in run["fault"] else mend
            yield error("run_dir", host, f"{run['path']} cannot be written to: {run['fault']}", mend)
    if temporary["fault"]:
        told = f"temporary files: {temporary['path']} cannot be written to: {temporary['fault']}"
        yield error("disk", host, told, disks.pop(0)[-1])
    for what, disk, mend in disks:
        if "free" not in disk:  # the folder is not there, and that was said
            continue
        if disk["entries"] is not None and disk["entries"] < _ENTRIES:
            left = f"{what}: no more files can be made in {disk['path']}: {disk['entries']} inodes are free"
            yield error("disk", host, left, mend)
        text = f"{what}: {disk['free'] / _GIB:.1f} GiB free in {disk['path']}"
        if disk["free"] >= _DISK_TIGHT:
            yield ok("disk", host, text)
        else:
            yield (error if disk["free"] < _DISK else warning)("disk", host, text, mend)


def judge_limits(host: str, facts: Facts) -> Iterator[Finding]:
    shared, hard, ports = facts["shared_memory"], facts["files"][1], facts["fabric"]
    if shared and len(facts["gpus"] or ()) > 1 and shared["free"] < _SHARED_MEMORY:
        mend = "docker run --shm-size=8g; in Kubernetes an emptyDir with medium: Memory at /dev/shm"
        free = f"{shared['free'] / 2**20:.0f} MiB are free in /dev/shm: too few for NCCL"
        yield error("shared memory", host, free, mend)
    elif shared:
        yield ok("shared memory", host, f"{shared['free'] / _GIB:.1f} GiB free")
    if 0 <= hard < _OPEN_FILES:
        mend = f"raise the hard limit: nofile {16 * _OPEN_FILES} in limits.conf, or docker run --ulimit nofile={16 * _OPEN_FILES}"
        yield warning("open files", host, f"a process may open {hard}", mend)
    else:
        yield ok("open files", host, f"a process may open {hard if hard >= 0 else 'any number'}")
    if ports and 0 <= facts["locked_memory"] < _GIB:
        mend = "memlock unlimited in limits.conf and for sshd; docker run --ulimit memlock=-1"
        lockable = f"a process may lock {facts['locked_memory'] // 2**20} MiB: InfiniBand needs more"
        yield error("fabric", host, lockable, mend)
    for port in ports:
        if port["state"] != "ACTIVE":
            mend = "leave it out by NCCL_IB_HCA, or have the cable looked at"
            yield warning("fabric", host, f"port of {port['device']} is {port['state']}", mend)


def judge_build(host: str, facts: Facts) -> Iterator[Finding]:
    """DeepSpeed compiles its fused and its CPU optimizers when they are first used."""
    needed = {"a C++ compiler": facts["compiler"], "ninja": facts["ninja"]}
    needed |= {"nvcc": facts["nvcc"]} if facts["gpus"] else {}
    missing = [name for name, path in needed.items() if path is None]
    if missing:
        mend = "optim.name=deepspeed and offload need it: apt install g++ ninja-build, and CUDA's toolkit (CUDA_HOME) with GPUs"
        yield warning("compiler", host, f"no {', no '.join(missing)}", mend)
    else:
        yield ok("compiler", host, "DeepSpeed's ops can be built")


def judge_clock(host: str, there: float, sent: float, received: float) -> Iterator[Finding]:
    """there: what the host's clock showed at some moment between two of this machine's. Only what is certain counts."""
    skew = min(0.0, there - sent) + max(0.0, there - received)
    if abs(skew) > _SKEW:
        way = "ahead of" if skew > 0 else "behind"
        mend = "keep clocks by chrony or ntpd; object stores refuse requests with a wrong time"
        judged = error if abs(skew) > _SKEW_REFUSED else warning
        yield judged("clock", host, f"{abs(skew):.0f} s {way} this machine", mend)


# -- Hosts side by side -----------------------------------------------------------------------------------------------


def judge_agreement(hosts: Sequence[Host], known: Mapping[str, Facts]) -> Iterator[Finding]:
    """Versions, code, cards, drivers, variables and slots: the hosts that differ from the most are named. And which are one."""
    install = "install the same environment on all hosts: pip install -c constraints.txt"

    def of(*path: str) -> dict[str, Any]:
        found: dict[str, Any] = dict(known)
        for name in path:
            found = {host: facts[name] for host, facts in found.items()}
        return found

    versions = [*differing(error, "versions", "Python", of("python"), install)]
    for package in PACKAGES:
        versions += differing(error, "versions", package, of("packages", package), install)
    for package in _NEEDED:
        if not any(of("packages", package).values()):
            versions.append(error("versions", "", f"{package} is not installed", install))
    same_code = "bring the same commit to all hosts, or use a folder that they share"
    versions += differing(error, "versions", "our code is", of("code"), same_code)
    yield from versions
    if not any(of("code").values()):
        yield error("versions", "", "mmclip_dist is not installed", install)
    elif not versions:
        facts = next(iter(known.values()))
        shown = ", ".join(f"{name} {facts['packages'][name]}" for name in PACKAGES[:3])
        yield ok("versions", "", f"Python {facts['python']}, {shown}, code {facts['code']}")
    counts = {host: len(cards or ()) for host, cards in of("gpus").items()}
    if any(counts.values()):
        yield from differing(
            error,
            "GPUs",
            "it has GPUs:",
            {host: count > 0 for host, count in counts.items()},
            "train on hosts with GPUs alone",
        )
        kinds = {host: cards[0] for host, cards in of("gpus").items() if cards}
        yield from differing(
            warning, "GPUs", "card", {host: card["name"] for host, card in kinds.items()}, "the slowest sets the pace"
        )
        yield from differing(
            warning, "GPUs", "driver", {host: card["driver"] for host, card in kinds.items()}, "install the same driver"
        )
    machines: dict[tuple[str, ...], str] = {}
    for host, facts in known.items():
        first = machines.setdefault((facts["name"], *facts["addresses"]), host)
        if first != host:  # two launchers would start there, and their ranks take the same cards
            yield error("hostfile", host, f"it is the same machine as {first}", "delete one of the two lines")
    mend = "use the same number of GPUs on all hosts: ranks wait for each other at every step"
    yield from differing(warning, "hostfile", "slots", {host.name: host.slots for host in hosts}, mend)
    yield from differing(error, "fabric", "variables", of("variables"), "set the same ones everywhere: .deepspeed_env")


def differing(
    judged: Callable[[str, str, str, str], Finding], check: str, what: str, values: Mapping[str, Any], mend: str
) -> Iterator[Finding]:
    """One finding for each host whose value is not that of most hosts (of equally many, the first)."""
    usual = Counter(map(repr, values.values())).most_common(1)[0][0]
    odd = {host: value for host, value in values.items() if repr(value) != usual}
    for host, value in odd.items():
        common = next(each for each in values.values() if repr(each) == usual)
        shown, expected = ("none" if each is None else each for each in (value, common))
        yield judged(check, host, f"{what} {shown}, but {expected} on {counted(len(values) - len(odd), 'host')}", mend)


def judge_access(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """Of hosts that were asked to read sets (`mmclip_launch.reading`)."""
    for name, answer in answers.items():
        for fault in [answer.fault] if answer.value is None else answer.value.get("faults", ()):
            yield error("storage", name, fault, "mend credentials, address or network of this host")


def judge_reading(answers: Mapping[str, Answer]) -> Iterator[Finding]:
    """The same, and how fast."""
    yield from judge_access(answers)
    told = {name: answer.value for name, answer in answers.items() if answer.value and "faults" not in answer.value}
    rates = {name: each["bytes"] / each["seconds"] for name, each in told.items()}
    for name, rate in rates.items():
        if rate < _SLOW_READER * median(rates.values()):
            mend = "is its network slower, or its route to the store another one?"
            yield warning("storage", name, f"reads {rate / 1e6:.0f} MB/s, others more than twice that", mend)
        else:
            yield ok("storage", name, f"reads {rate / 1e6:.0f} MB/s")


def rate_of_link(hosts: Sequence[Host], known: Mapping[str, Facts]) -> float | None:
    """Bytes/s of the narrowest link between the ranks, as the hosts' devices tell it; None if they do not."""
    if len(hosts) == 1:
        cards = known[hosts[0].name]["gpus"]
        card = card_of_device(cards[0]["name"]) if cards else None
        return card.nvlink if card else None
    rates = []
    for host in hosts:
        facts = known[host.name]
        active = sum(port["rate"] for port in facts["fabric"] if port["state"] == "ACTIVE")
        rates.append(active or max(facts["links"].values(), default=0.0))
    return min(rates) or None


def judge_all_reduce(
    backend: str, hosts: Sequence[Host], known: Mapping[str, Facts], answers: Mapping[str, Answer]
) -> list[Finding]:
    faults = {name: (answer.value or {"fault": answer.fault}).get("fault") for name, answer in answers.items()}
    failed = {name: fault for name, fault in faults.items() if fault}
    if failed:
        # A host that cannot even reach the first one is the cause; the others then wait for it in vain.
        cut = {name: fault for name, fault in failed.items() if "cannot reach" in fault} or failed
        mend = (
            "open all TCP ports between the hosts, and name the right interface: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME in "
            ".deepspeed_env; NCCL_DEBUG=INFO says more"
        )
        return [error("all-reduce", name, fault, mend) for name, fault in cut.items()]
    told = answers[hosts[0].name].value or {}
    link, reached = rate_of_link(hosts, known), told["bytes_s"]
    text = f"{backend}: {reached / 1e9:.2f} GB/s, {told['latency_s'] * 1e6:.0f} us"
    if backend == "nccl" and link is None:
        return [unchecked("all-reduce", "", f"{text}; what the link should give is not known")]
    least = _OF_LINK * link if link else _GLOO
    least, shown = (
        min(least, _GLOO) if backend == "gloo" else least,
        f"of {link / 1e9:.2f} GB/s" if link else "(speed of the link unknown)",
    )
    if reached >= least:
        return [ok("all-reduce", "", f"{text} {shown}")]
    mend = (
        "NCCL_DEBUG=INFO says which way it takes: NET/Socket instead of NET/IB, a wrong NCCL_IB_HCA, no GPUDirect"
        if backend == "nccl" else "is another program using the network or the cores?"
    )  # fmt: skip
    return [warning("all-reduce", "", f"{text}, expected {least / 1e9:.2f} GB/s {shown}", mend)]
