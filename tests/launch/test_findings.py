"""What the facts of hosts mean: one change to a sound host, one finding. And facts from the tools' own output."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmclip_launch import probe
from mmclip_launch.findings import (
    PACKAGES,
    Finding,
    judge_agreement,
    judge_all_reduce,
    judge_clock,
    judge_host,
    judge_passed_variables,
    judge_reading,
)
from mmclip_launch.hosts import Answer, Host

GIB = 2**30
HOSTS = (Host("node-1", 8), Host("node-2", 8), Host("node-3", 8))
CARD = {"name": "NVIDIA H100 80GB HBM3", "driver": "570.86", "memory": "81559", "used": "4", "ecc": "0"}


def facts() -> dict[str, Any]:
    """Of a sound host."""
    return {
        "name": "node-1", "addresses": ["10.0.0.1"], "address": "10.0.0.1", "port": 1, "taken": None, "cores": 64,
        "python": "3.11.7", "packages": dict.fromkeys(PACKAGES, "1.0"), "code": "abc", "gpus": [dict(CARD) for _ in range(8)],
        "nvcc": "/nvcc", "compiler": "/c++", "ninja": "/ninja", "files": [1024, 65536], "locked_memory": -1,
        "shared_memory": {"total": 64 * GIB, "free": 64 * GIB, "entries": 10**6},
        "temporary": {"path": "/tmp", "fault": None, "total": 100 * GIB, "free": 50 * GIB, "entries": 10**6},
        "run_dir": {"path": "/runs/one", "fault": None, "seen": True, "total": 100 * GIB, "free": 50 * GIB, "entries": 10**6},
        "fabric": [{"device": f"mlx5_{number}", "state": "ACTIVE", "rate": 50e9} for number in range(8)], "links": {},
        "variables": {"NCCL_DEBUG": "WARN"}, "time": 0.0,
    }  # fmt: skip


def known(*names: str) -> dict[str, dict[str, Any]]:
    """Sound hosts of these names."""
    return {name: changed(name=name) for name in names}


def changed(**changes: Any) -> dict[str, Any]:
    """Facts with other values; `a__b` is the entry b of a."""
    found = copy.deepcopy(facts())
    for name, value in changes.items():
        *path, last = name.split("__")
        place = found
        for step in path:
            place = place[int(step) if step.isdigit() else step]  # type: ignore[index]
        place[last] = value
    return found


def wrong(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.level != "ok"]


def test_nothing_is_wrong_with_a_sound_host() -> None:
    found = judge_agreement(HOSTS, known("node-1", "node-2", "node-3"))
    assert not wrong([*judge_host(HOSTS[0], facts()), *found])


@pytest.mark.parametrize(
    ("change", "level", "told"),
    [
        ({"gpus": [CARD] * 7}, "error", "slots=8, but it has 7 GPUs: write slots=7"),
        ({"gpus": [CARD] * 9}, "warning", "1 of 9 GPUs are not used: write slots=9"),
        ({"gpus": None}, "not checked", "no GPU: nvidia-smi is not there"),
        ({"gpus": None, "cores": 4}, "error", "slots=8, but it has no GPU and 4 cores: write slots=4 or fewer, or see why"),
        ({"taken": 29500}, "error", "port 29500, where the ranks would meet, is in use: wait for the run that uses it, or"),
        ({"gpus__3__ecc": "2"}, "error", "GPU 3 has 2 uncorrected memory errors"),
        ({"gpus__3__used": "70000"}, "warning", "GPU 3: 70000 of 81559 MiB are in use"),
        ({"gpus__3__name": "NVIDIA A100-SXM4-80GB"}, "warning", "cards differ"),
        ({"packages__torch": "2.13.0+cpu"}, "error", "torch 2.13.0+cpu cannot use its GPUs"),
        ({"run_dir__fault": "No space left on device"}, "error", "/runs/one cannot be written to: No space left on device"),
        ({"run_dir__seen": False}, "error", "/runs/one is not the folder that this machine sees"),
        ({"run_dir__free": GIB // 2}, "error", "run_dir: 0.5 GiB free in /runs/one"),
        ({"temporary__free": 2 * GIB}, "warning", "temporary files: 2.0 GiB free in /tmp: set TMPDIR"),
        ({"temporary__entries": 3}, "error", "no more files can be made in /tmp: 3 inodes are free"),
        ({"shared_memory__free": 64 * 2**20}, "error", "64 MiB are free in /dev/shm: too few for NCCL: docker run --shm-size"),
        ({"files": [256, 1024]}, "warning", "a process may open 1024: raise the hard limit"),
        ({"locked_memory": 8 * 2**20}, "error", "a process may lock 8 MiB: InfiniBand needs more: memlock unlimited"),
        ({"fabric__1__state": "DOWN"}, "warning", "port of mlx5_1 is DOWN"),
        ({"compiler": None, "nvcc": None}, "warning", "no a C++ compiler, no nvcc: optim.name=deepspeed"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_host_is_told_once_with_its_mend(change: dict[str, Any], level: str, told: str) -> None:
    (finding,) = wrong(judge_host(HOSTS[0], changed(**change)))
    assert finding.level == level and told in str(finding) and "node-1" in str(finding)


@pytest.mark.parametrize(
    ("change", "level", "told"),
    [
        ({"packages__torch": "2.12.0"}, "error", "torch 2.12.0, but 1.0 on 2 hosts"),
        ({"packages__s3fs": None}, "error", "s3fs none, but 1.0 on 2 hosts"),
        ({"python": "3.12.1"}, "error", "Python 3.12.1, but 3.11.7 on 2 hosts"),
        ({"code": "def"}, "error", "our code is def, but abc on 2 hosts: bring the same commit"),
        ({"gpus": None}, "error", "it has GPUs: False, but True on 2 hosts"),
        ({"gpus": [CARD | {"driver": "535.1"}] * 8}, "warning", "driver 535.1, but 570.86 on 2 hosts"),
        ({"variables": {}}, "error", "variables {}, but {'NCCL_DEBUG': 'WARN'} on 2 hosts"),
    ],
)
def test_the_host_that_differs_from_the_most_is_named(change: dict[str, Any], level: str, told: str) -> None:
    told_by = known("node-1", "node-2", "node-3") | {"node-1": changed(**change)}
    (finding,) = wrong(judge_agreement(HOSTS, told_by))
    assert (finding.level, finding.host) == (level, "node-1") and told in str(finding)


def test_an_odd_number_of_gpus_is_told() -> None:
    hosts = (Host("node-1", 8), Host("node-2", 7))
    (finding,) = wrong(judge_agreement(hosts, known("node-1", "node-2")))
    assert str(finding).startswith("warning: hostfile: node-2: slots 7, but 8 on 1 host")


def test_a_machine_that_stands_there_by_two_names_is_told() -> None:
    """DeepSpeed would start two launchers there, whose ranks take the same cards."""
    hosts = (Host("node-1", 8), Host("node-2", 8), Host("10.0.0.1", 8))
    (finding,) = wrong(judge_agreement(hosts, known("node-1", "node-2") | {"10.0.0.1": facts()}))
    assert str(finding) == "error: hostfile: 10.0.0.1: it is the same machine as node-1: delete one of the two lines"


@pytest.mark.parametrize("package", ["torch", "deepspeed", "transformers"])
def test_a_package_that_no_host_has_is_told(package: str) -> None:
    (finding,) = wrong(judge_agreement(HOSTS[:1], {"node-1": changed(**{f"packages__{package}": None})}))
    assert finding.level == "error" and f"{package} is not installed" in finding.text and "constraints.txt" in finding.mend


@pytest.mark.parametrize(
    ("there", "told"),
    [(100.5, None), (99.0, None), (104.9, None), (90.0, "warning: clock: node-1: 10 s behind this machine"),
     (110.0, "warning: clock: node-1: 5 s ahead"), (3700.0, "error: clock: node-1: 3595 s ahead")],
)  # fmt: skip
def test_only_a_skew_that_is_certain_counts(there: float, told: str | None) -> None:
    found = [str(finding) for finding in judge_clock("node-1", there, sent=100, received=105)]
    assert len(found) == (told is not None) and "".join(found).startswith(told or "")


def test_secrets_that_the_launcher_would_show_are_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted")
    variables = {
        name: (Path("/home/a/.deepspeed_env"), "planted")
        for name in (
            "AWS_SECRET_ACCESS_KEY",
            "WANDB_API_KEY",
            "AWS_PROFILE",
            "AWS_SHARED_CREDENTIALS_FILE",
            "RAY_AUTH_TOKEN_PATH",
        )
    }
    found = [str(finding) for finding in judge_passed_variables(variables)]
    assert [line.split(" stands")[0] for line in found] == [
        f"error: credentials: {name}" for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD")
    ]
    assert "planted" not in "".join(found)


def answers(values: dict[str, Any]) -> dict[str, Answer]:
    return {name: Answer(Host(name, 8), value) for name, value in values.items()}


def test_a_host_that_may_not_read_or_reads_slowly_is_named() -> None:
    told = {"a": {"bytes": 3e9, "seconds": 3}, "b": {"bytes": 3e8, "seconds": 3},
            "c": {"faults": ["s3://set/train cannot be read: the token has expired"]},
            "d": {"bytes": 2.7e9, "seconds": 3}}  # fmt: skip
    found = [(finding.level, finding.host, finding.text) for finding in judge_reading(answers(told))]
    assert found == [
        ("error", "c", "s3://set/train cannot be read: the token has expired"),
        ("ok", "a", "reads 1000 MB/s"),
        ("warning", "b", "reads 100 MB/s, others more than twice that"),
        ("ok", "d", "reads 900 MB/s"),
    ]


@pytest.mark.parametrize(
    ("change", "bytes_s", "told"),
    [
        ({}, 350e9, "ok: all-reduce: nccl: 350.00 GB/s, 30 us of 400.00 GB/s"),
        (
            {},
            40e9,
            "warning: all-reduce: nccl: 40.00 GB/s, 30 us, expected 240.00 GB/s of 400.00 GB/s: NCCL_DEBUG=INFO says",
        ),
        (
            {"fabric": []},
            40e9,
            "not checked: all-reduce: nccl: 40.00 GB/s, 30 us; what the link should give is not known",
        ),
        ({"fabric": [], "links": {"eth0": 12.5e9}}, 5e9, "warning: all-reduce: nccl: 5.00 GB/s, 30 us, expected 7.50"),
    ],
)
def test_the_bandwidth_is_held_against_the_narrowest_link(change: dict[str, Any], bytes_s: float, told: str) -> None:
    those = {"node-1": facts(), "node-2": changed(**change)}
    told_by = answers({"node-1": {"bytes_s": bytes_s, "latency_s": 3e-5}, "node-2": {}})
    (finding,) = judge_all_reduce("nccl", HOSTS[:2], those, told_by)
    assert str(finding).startswith(told)


def test_the_cards_of_one_host_are_held_against_nvlink() -> None:
    told_by = answers({"node-1": {"bytes_s": 100e9, "latency_s": 3e-5}})
    (finding,) = judge_all_reduce("nccl", HOSTS[:1], {"node-1": facts()}, told_by)
    assert "expected 270.00 GB/s of 450.00 GB/s" in str(finding)


def test_the_host_behind_a_firewall_is_named_and_not_those_that_wait_for_it() -> None:
    cut = {"fault": "cannot reach 10.0.0.1 port 1, where the first rank waits: timed out"}
    told_by = answers({"node-1": {"fault": "rank 0: Timed out after 15 s"}, "node-2": cut, "node-3": {}})
    (finding,) = judge_all_reduce("nccl", HOSTS, {host.name: facts() for host in HOSTS}, told_by)
    assert finding.host == "node-2" and finding.level == "error"


# -- Facts from the tools' own output -----------------------------------------------------------------------------------


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """tool(NAME, SCRIPT) puts a stand-in for a program first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return make


def test_cards_are_read_from_nvidia_smi(tool: Callable[[str, str], None]) -> None:
    tool("nvidia-smi", 'case "$1" in --query-gpu=name,driver_version,memory.total,memory.used,ecc*) ;; *) exit 1;; esac\n'
         'echo "NVIDIA H100 80GB HBM3, 570.86, 81559, 4, 0"; echo "NVIDIA H100 80GB HBM3, 570.86, 81559, 4, [N/A]"')  # fmt: skip
    assert probe.gpus() == [CARD, CARD | {"ecc": "[N/A]"}]
    assert not wrong(judge_host(Host("node-1", 2), changed(gpus=probe.gpus())))
    tool("nvidia-smi", 'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver"; exit 9')
    assert probe.gpus() is None


def test_ports_of_the_fabric_and_links_are_read_from_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"ib/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)", "ib/mlx5_0/ports/1/state": "4: ACTIVE",
             "net/eth0/speed": "25000", "net/eth0/operstate": "up", "net/eth1/speed": "-1", "net/eth1/operstate": "down",
             }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(probe, "_FABRIC", tmp_path / "ib")
    monkeypatch.setattr(probe, "_LINKS", tmp_path / "net")
    assert probe.fabric() == [{"device": "mlx5_0", "state": "ACTIVE", "rate": 50e9}]
    assert probe.links() == {"eth0": 25e9 / 8}


def test_a_folder_of_temporary_files_that_cannot_be_written_to_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python itself takes /var/tmp or the working folder then."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = probe.temporary()
    assert found["path"] == str(tmp_path) and found["fault"] is None and found["free"] > 0 and not [*tmp_path.iterdir()]
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    (finding,) = wrong(judge_host(HOSTS[0], changed(temporary=probe.temporary())))
    told = f"temporary files: {tmp_path / 'absent'} cannot be written to: No such file or directory: set TMPDIR to a larger disk"
    assert finding.level == "error" and told in str(finding)


def test_a_full_disk_and_a_folder_of_its_own_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_SEEN_S", 0.3)
    (tmp_path / "mark").touch()
    shared = probe.run_folder(str(tmp_path), "mark")
    assert shared["seen"] is True and shared["fault"] is None and shared["free"] > 0
    absent = probe.run_folder(str(tmp_path / "elsewhere"), "other")
    assert absent["seen"] is False and absent["fault"] == "No such file or directory" and "free" not in absent
