"""Training across two machines with addresses, sshd and a store of their own: DeepSpeed's launcher by pdsh over ssh."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mmclip_dist.checkpoint.folder import checkpoint_path
from mmclip_dist.run.marks import EXIT_CODE
from mmclip_dist.run.metrics import read_metrics
from tests.cluster.conftest import COMMON, LOST_S, Cluster, ended
from tests.cluster.machines import NET
from tests.conftest import STEPS, Sets, wait_for
from tests.launched import final_weights, last_step, run_training

pytestmark = pytest.mark.slow

ALIVE_S = 20  # ssh gives a silent host up


def test_a_host_cut_off_ends_the_run_soon_and_the_same_command_goes_on_bit_for_bit(
    cluster: Cluster, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    overrides = cluster.overrides(run, "zero_stage=1")
    command = ("launch", "deepspeed", "quickstart", *overrides, "--hostfile", "hosts")
    broken = cluster.start(*command)
    wait_for(lambda: broken.poll() is not None or last_step(run) >= 6)
    if broken.poll() is not None:
        raise AssertionError(broken.communicate()[0])
    for number, host in enumerate(("host-a", "host-b"), 1):
        listening = cluster.listening(host)
        assert listening and {address for address, _ in listening} == {f"{NET}.{number}"}, listening
    assert len(cluster.listening("host-a")) >= 3  # the store, gloo, the beats
    cluster.made.cut("host-b")
    began = time.monotonic()
    output, _ = broken.communicate(timeout=LOST_S + ALIVE_S + 30)
    print(
        f"the launcher ended {time.monotonic() - began:.0f} s after the cut, at step {last_step(run)}, code {broken.returncode}"
    )
    assert broken.returncode != 0 and 6 <= last_step(run) < STEPS, output[-4000:]
    told = [line for line in output.splitlines() if "no sign of life from machine host-b (ranks from 1 on)" in line]
    assert len(told) == 1 and "failed: host-a" in told[0], output[-4000:]

    cluster.made.end("host-b")
    began = time.monotonic()
    refused = cluster.run(*command)
    print(f"refused after {time.monotonic() - began:.0f} s: {refused.output}")
    assert refused.returncode == 2 and time.monotonic() - began < 30
    assert "error: host: host-b: " in refused.output and "is it on" in refused.output

    cluster.made.add("host-b", 2)
    resumed = cluster.run(*command)
    assert resumed.returncode == 0 and last_step(run) == STEPS, resumed.output[-4000:]
    assert [row["step"] for row in read_metrics(run)] == list(range(1, STEPS + 1))
    assert (
        len(list((run / "code").iterdir())) == 1
        and json.loads((run / "submitted.json").read_text())["target"] == "deepspeed"
    )
    assert "not-a-secret" not in output + resumed.output
    written = [path for path in run.rglob("*") if path.is_file() and "code" not in path.relative_to(run).parts]
    assert not [path for path in written if b"not-a-secret" in path.read_bytes()]

    assert final_weights(run, STEPS) == final_weights(unbroken(1), STEPS)


def test_pods_without_ssh_stop_together_and_go_on_bit_for_bit_at_zero_2(
    cluster: Cluster, sets: Sets, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    """Each host starts its own ranks, as `templates/job.yaml` does; SIGTERM reaches one of them, as when its node is drained."""
    run, steps = tmp_path / "run", 24
    words = ["quickstart", *cluster.overrides(run, f"optim.stop_at={steps}", "zero_stage=2")]

    def pods() -> list[subprocess.Popen[str]]:
        pod = cluster.variables | {"NODES": "2", "FIRST": "host-a", "GPUS": "1", "RUN_DIR": str(run)}
        return [
            cluster.start(*words, host=host, module="mmclip_launch.node", variables=pod | {"NODE": str(number)})
            for number, host in enumerate(("host-a", "host-b"))
        ]

    first, second = pods()
    wait_for(lambda: second.poll() is not None or last_step(run) >= 6)
    for process in psutil.Process(second.pid).children():  # of nsenter
        process.send_signal(signal.SIGTERM)
    stopped = [ended(first), ended(second)]
    assert [each.returncode for each in stopped] == [EXIT_CODE] * 2, stopped
    assert 6 <= last_step(run) < steps
    run_training([*sets.overrides(run), *COMMON, f"optim.stop_at={steps}", "zero_stage=2"], tmp_path)  # with the sets on a disk
    assert [row["step"] for row in read_metrics(run)] == list(range(1, steps + 1))
    assert final_weights(run, steps) == final_weights(unbroken(2), steps)


def test_hosts_with_disks_of_their_own_go_on_after_one_is_lost_bit_for_bit_at_zero_3(
    cluster: Cluster, unbroken: Callable[[int], Path], tmp_path: Path
) -> None:
    run, steps = tmp_path / "run", 24
    run.mkdir()
    own_disk = ["mount", "-t", "tmpfs", "tmpfs", str(run)]
    store = f"{cluster.url}/{tmp_path.name}"
    own = ("checkpoint.host_local=true", f"checkpoint.url={store}")
    overrides = cluster.overrides(run, f"optim.stop_at={steps}", "zero_stage=3", *own)
    command = ("launch", "deepspeed", "quickstart", *overrides, "--hostfile", "hosts")
    subprocess.run([*cluster.made.enter("host-b"), *own_disk], check=True)
    broken = cluster.start(*command)
    wait_for(lambda: broken.poll() is not None or last_step(run) >= 10)
    assert broken.poll() is None, ended(broken).output[-4000:]
    code = [cluster.made.sees(host, run) / "code" for host in ("host-a", "host-b")]
    assert not code[0].samefile(code[1]) and len({path.name for folder in code for path in folder.iterdir()}) == 1
    cluster.made.end("host-b")  # and its disk is gone
    output = ended(broken).output
    assert broken.returncode != 0 and 10 <= last_step(run) < steps, output[-4000:]

    cluster.made.add("host-b", 2)
    subprocess.run([*cluster.made.enter("host-b"), *own_disk], check=True)
    resumed = cluster.run(*command)
    assert resumed.returncode == 0 and last_step(run) == steps, resumed.output[-4000:]
    assert [row["step"] for row in read_metrics(run)] == list(range(1, steps + 1))
    saved = [checkpoint_path(cluster.made.sees(host, run), steps) for host in ("host-a", "host-b")]
    parts = [{path.name for path in folder.iterdir()} for folder in saved]
    assert "random-00000.pt" in parts[0] - parts[1] and "random-00001.pt" in parts[1] - parts[0]
    assert final_weights(run, steps) == final_weights(unbroken(3), steps)


def test_doctor_looks_at_both_hosts_though_their_names_mean_loopback_to_them(cluster: Cluster, tmp_path: Path) -> None:
    """As Debian's /etc/hosts has it: gloo would tell the others this address."""
    debian = tmp_path / "hosts"
    debian.write_text("127.0.0.1 localhost\n127.0.1.1 host-a host-b\n")
    for host in ("host-a", "host-b"):
        subprocess.run([*cluster.made.enter(host), "mount", "--bind", str(debian), "/etc/hosts"], check=True)
    try:
        look_at_both_hosts(cluster, tmp_path)
    finally:
        for host in ("host-a", "host-b"):
            subprocess.run([*cluster.made.enter(host), "umount", "/etc/hosts"], check=True)


def look_at_both_hosts(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.folder / "addresses").write_text(f"{NET}.1 slots=1\n{NET}.2 slots=1\n")
    words = ("doctor", "--hostfile", "addresses", "--data", f"{cluster.url}/paired/train", "--run-dir", str(tmp_path / "run"))
    found = cluster.run(*words, "--json")
    findings = json.loads(found.output)
    assert found.returncode == 0, found.output
    print(*findings, sep="\n")
    assert {(each["host"]) for each in findings if each["check"] == "storage" and each["level"] == "ok"} == {
        f"{NET}.1",
        f"{NET}.2",
    }
    assert [each["level"] for each in findings if each["check"] == "all-reduce"] in (["ok"], ["warning"])


def test_a_host_with_a_small_disk_of_its_own_and_one_whose_keys_are_refused_are_named(cluster: Cluster, tmp_path: Path) -> None:
    """Here it is the same host."""
    run, keys, wrong = tmp_path / "run", cluster.folder / "credentials", tmp_path / "wrong"
    run.mkdir()
    wrong.write_text("[default]\naws_access_key_id = expired\naws_secret_access_key = planted-key\n")
    small = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(run)]
    for words in (small, ["mount", "--bind", str(wrong), str(keys)]):
        subprocess.run([*cluster.made.enter("host-b"), *words], check=True)
    began = time.monotonic()
    refused = cluster.run("launch", "deepspeed", "quickstart", *cluster.overrides(run, "optim.stop_at=4"), "--hostfile", "hosts")
    print(f"refused after {time.monotonic() - began:.0f} s:\n{refused.output}")
    subprocess.run([*cluster.made.enter("host-b"), "umount", str(keys)], check=True)
    assert refused.returncode == 2 and time.monotonic() - began < 30
    assert f"error: run_dir: host-b: {run} is not the folder that this machine sees" in refused.output
    assert f"error: disk: host-b: run_dir: 0.0 GiB free in {run}" in refused.output
    assert f"error: storage: host-b: {cluster.url}/paired/train cannot be read: " in refused.output
    assert "host-a: " not in refused.output and "planted-key" not in refused.output
