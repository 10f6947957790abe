"""Bad steps, spikes, stop requests, hung collective calls, and writers whose disk is full."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmclip_dist.checkpoint.folder import entry_of
from mmclip_dist.checkpoint.writer import CheckpointWriter, read_back
from mmclip_dist.config import Health as Limits
from mmclip_dist.engine import watchdog
from mmclip_dist.engine.finite import poisoned, skip_non_finite
from mmclip_dist.engine.random_state import random_state, set_random_state
from mmclip_dist.run import stop as stop_module
from mmclip_dist.run.health import Health, is_spike
from mmclip_dist.run.stop import STOP_FILE, STOPPED, StopRequest
from tests.engine import two_ranks
from tests.ranks import run_ranks


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_a_bad_step_changes_nothing_at_any_stage(tmp_path: Path) -> None:
    code, outputs = run_ranks(two_ranks.bad_steps, tmp_path, ranks=2, folder=tmp_path)
    assert code == 0, outputs
    assert all("all stages and precisions" in output for output in outputs)


def test_a_loss_that_is_not_finite_poisons_the_gradients_and_another_is_left_alone() -> None:
    for value, finite in ((2.0, True), (torch.inf, False), (-torch.inf, False), (torch.nan, False)):
        weight = torch.tensor(3.0, requires_grad=True)
        loss = weight * 2 + value
        guarded = poisoned(loss)
        guarded.backward()
        assert weight.grad is not None and bool(weight.grad.isfinite()) == finite
        if finite:
            assert weight.grad == 2 and torch.equal(guarded, loss)


def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_state_of_a_bare_optimizer() -> None:
    """Under stage 0 in float32 DeepSpeed leaves the check to the optimizer; the second gradient is finite."""
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    skip_non_finite(optimizer)

    def step(first: float) -> list[torch.Tensor]:
        for weight, value in zip(weights, (first, 1.0), strict=True):
            weight.grad = torch.full((2,), value)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [value.detach().clone() for value in [*weights, *states]]

    before = step(1.0)
    assert not optimizer.overflow
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert all(map(torch.equal, before, step(bad))) and optimizer.overflow
    after = step(1.0)
    assert not optimizer.overflow and not any(map(torch.equal, before[:2], after[:2]))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trouble-0.jsonl").read_text().splitlines()]


def test_bad_steps_in_a_row_stop_the_run_and_are_listed(tmp_path: Path, one_rank: None, capsys: pytest.CaptureFixture) -> None:
    health = Health(tmp_path, Limits(max_bad_steps=3))
    health.check(1, ["a"], 1.0, applied=True)
    health.check(2, ["b"], float("nan"), applied=False)
    health.check(3, ["c"], 2.0, applied=False)
    health.check(4, ["d"], 1.0, applied=True)  # the row ends
    health.check(5, ["e"], 1.0, applied=False)
    health.check(6, ["f"], 1.0, applied=False)
    with pytest.raises(ValueError, match=r"3 steps in a row, up to step 7; .*/trouble-\*.jsonl"):
        health.check(7, ["g", "h"], float("inf"), applied=False)
    assert health.skipped == 5
    assert [(row["step"], row["kind"], row["loss"], row["keys"]) for row in rows(tmp_path)] == [
        (2, "skipped", None, ["b"]), (3, "skipped", 2.0, ["c"]), (5, "skipped", 1.0, ["e"]), (6, "skipped", 1.0, ["f"]),
        (7, "skipped", None, ["g", "h"]),
    ]  # fmt: skip
    assert "step 2  step skipped" in capsys.readouterr().out


def test_a_loss_of_nan_hides_no_later_spike(tmp_path: Path, one_rank: None) -> None:
    health = Health(tmp_path, Limits())
    for step in range(40):
        health.check(step, ["lost"], float("nan"), applied=True)
    for step in range(40, 60):
        health.check(step, ["calm"], 5 + 0.01 * (step % 3), applied=True)
    health.check(60, ["wild"], 50.0, applied=True)
    assert [(row["step"], row["kind"]) for row in rows(tmp_path)] == [(60, "spike")]


def test_a_spike_is_listed_and_noise_is_not(tmp_path: Path, one_rank: None) -> None:
    health = Health(tmp_path, Limits())
    noise = torch.randn(300, generator=torch.Generator().manual_seed(0)).mul(0.1).tolist()
    for step, value in enumerate(noise):
        health.check(step, ["calm"], 5 - step * 0.005 + value, applied=True)
    assert not (tmp_path / "trouble-0.jsonl").exists()
    health.check(300, ["wild"], 6.0, applied=True)
    assert [(row["step"], row["kind"], row["keys"]) for row in rows(tmp_path)] == [(300, "spike", ["wild"])]
    assert not is_spike(100.0, [1.0] * 15, 8)  # too few to tell
    assert is_spike(1.1, [1.0] * 16, 8) and not is_spike(1.005, [1.0] * 16, 8) and not is_spike(0.1, [1.0] * 16, 8)


def test_signals_and_the_stop_file_ask_for_a_stop(tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        stop = StopRequest(tmp_path)
        assert not stop.requested(cpu)
        os.kill(os.getpid(), number)
        assert stop.requested(cpu) and stop.agreed
        stop.ask("its launcher is gone")  # afterwards, and because of it
        stop.leave_mark(12)
        assert json.loads((tmp_path / STOPPED).read_text()) == {"step": 12, "reason": number.name, "exit_code": 75}
    (tmp_path / STOP_FILE).touch()
    stop = StopRequest(tmp_path)
    stop.forget_file()  # of an earlier run
    assert not stop.requested(cpu) and not (tmp_path / STOPPED).exists()
    (tmp_path / STOP_FILE).touch()
    assert not stop.requested(cpu)  # it has just looked
    monkeypatch.setattr(stop_module, "_LOOK_S", 0.0)
    assert stop.requested(cpu)
    stop.leave_mark(3)
    assert not (tmp_path / STOP_FILE).exists()
    monkeypatch.setenv("LOCAL_RANK", "1")
    (tmp_path / STOP_FILE).touch()
    assert not StopRequest(tmp_path).requested(cpu)  # one process of a machine looks


@pytest.mark.slow
def test_a_stop_asked_of_one_rank_stops_both_at_one_step(tmp_path: Path) -> None:
    code, outputs = run_ranks(two_ranks.stopping, tmp_path, ranks=2, folder=tmp_path)
    assert code == 0 and all("stopped at 7" in output for output in outputs), outputs


@pytest.mark.slow
def test_a_hung_call_ends_and_names_rank_and_step(tmp_path: Path) -> None:
    code, outputs = run_ranks(two_ranks.hanging, tmp_path, ranks=2, folder=tmp_path, timeout=50)
    assert code == watchdog.EXIT_CODE and "hangs" not in outputs[1]
    here = socket.gethostname()
    assert f"failed: rank 0 on {here} hangs: no progress for 3 s at step 3, in: forward" in outputs[0]
    assert "all_reduce" in outputs[0]  # where


@pytest.mark.slow
def test_what_one_rank_does_alone_lets_the_others_wait_without_a_time_out(tmp_path: Path) -> None:
    code, outputs = run_ranks(two_ranks.alone, tmp_path, ranks=2, folder=tmp_path)
    assert code == 0, outputs
    here = socket.gethostname()
    for number, output in enumerate(outputs):
        told = [line.removeprefix(f"rank {number}: ") for line in output.splitlines() if line.startswith(f"rank {number}: ")]
        assert told == [
            "no space", f"rank 1 on {here}: it refuses", f"rank 0 on {here}: or fail; rank 1 on {here}: both refuse", "all alike",
        ]  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, True])
def test_files_are_read_back_and_a_change_after_the_call_is_not_in_them(tmp_path: Path, asynchronous: bool) -> None:
    writer = CheckpointWriter(asynchronous)
    state = {"a": torch.arange(1000.0), "nested": [torch.ones(3), "text"]}
    writer.save(state, str(tmp_path / "x.pt"))
    state["a"].zero_()
    files, failed = writer.finished()
    assert failed is None and files == {tmp_path / "x.pt": entry_of(tmp_path / "x.pt")}
    found = writer.load(str(tmp_path / "x.pt"))
    assert torch.equal(found["a"], torch.arange(1000.0)) and found["nested"][1] == "text"
    assert writer.finished() == ({}, None) and not writer.busy


@pytest.mark.parametrize("asynchronous", [False, True])
def test_after_a_failure_was_told_files_are_written_again(tmp_path: Path, asynchronous: bool) -> None:
    """A copy to the mirror that failed must not end all later ones."""
    writer = CheckpointWriter(asynchronous)

    def fails() -> Any:
        raise OSError("the store is down")

    writer.write(fails)
    assert writer.finished() == ({}, "the store is down")
    writer.save({"a": torch.ones(3)}, str(tmp_path / "x.pt"))
    assert writer.finished() == ({tmp_path / "x.pt": entry_of(tmp_path / "x.pt")}, None)


def test_a_file_that_reads_back_otherwise_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    entry = read_back(path)
    path.write_bytes(b"abd")
    with pytest.raises(OSError, match="does not read back"):
        read_back(path, entry)


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from mmclip_dist.checkpoint.writer import CheckpointWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
writer = CheckpointWriter(sys.argv[2] == "True")
writer.save({"a": torch.zeros(100)}, str(Path(sys.argv[1]) / "small.pt"))
writer.save({"a": torch.zeros(1_000_000)}, str(Path(sys.argv[1]) / "large.pt"))
files, failed = writer.finished()
print([path.name for path in files], failed)
"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_told_and_raises_only_when_asked(tmp_path: Path, asynchronous: bool) -> None:
    found = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(asynchronous)], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert "['small.pt'] [Errno 27] File too large" in found.stdout


def test_random_states_return() -> None:
    import random

    import numpy as np

    state = random_state()
    first = random.random(), np.random.random(), torch.rand(3)  # noqa: NPY002
    set_random_state(state)
    second = random.random(), np.random.random(), torch.rand(3)  # noqa: NPY002
    assert first[:2] == second[:2] and torch.equal(first[2], second[2])
