"""Runs on machines with little or odd: few open files, a clock that jumps."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mmclip_dist import fit, train
from mmclip_dist.checkpoint.folder import newest_checkpoint
from mmclip_dist.run.marks import EXIT_CODE, STOPPED
from mmclip_dist.run.metrics import read_metrics
from tests.conftest import LONG
from tests.launched import Finished, final_weights, last_step
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

SHORT = ("optim.steps=12", "checkpoint.every=12", "log_every=1", "data.workers=2")


def with_few_files(arguments: list[str]) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    return train.main(arguments)


def with_a_jump(arguments: list[str]) -> int:
    """At step 5 the clock jumps: an hour ahead on one rank, an hour back on the other."""
    set_rate, true_time, steps = fit.set_learning_rate, time.time, count(1)

    def jumping(*of: Any) -> float:
        if next(steps) == 5:
            hour = 3600 if os.environ["RANK"] == "0" else -3600
            time.time = lambda: true_time() + hour
            print(f"the clock jumps by {hour} s", flush=True)
            time.sleep(2.5)  # the watchdog looks once a second
        return set_rate(*of)

    fit.set_learning_rate = jumping
    return train.main(arguments)


def with_a_slow_first_rank(arguments: list[str]) -> int:
    if os.environ["RANK"] == "0":
        time.sleep(2.0)
    return train.main(arguments)


def with_an_error_of_the_second_rank(arguments: list[str]) -> int:
    """The first one waits where ranks meet."""
    train._OTHER_RANK_S = 1.0
    if os.environ["RANK"] == "1":
        arguments = [*arguments, "optim.stepps=3"]
    return train.main(arguments)


def at_a_taken_port(arguments: list[str]) -> int:
    """The first rank is to listen where another program does."""
    with socket.socket() as taken:
        if os.environ["RANK"] == "0":
            taken.bind(("", 0))
            taken.listen()
            os.environ["MASTER_PORT"] = str(taken.getsockname()[1])
        return train.main(arguments)


def with_nobody_reading(arguments: list[str]) -> int:
    """As where a launcher that reads the ranks by ssh is killed."""
    set_rate, steps = fit.set_learning_rate, count(1)

    def left(*of: Any) -> float:
        if next(steps) == 3:
            for stream in (1, 2):
                reading, writing = os.pipe()
                os.dup2(writing, stream)
                os.close(writing)
                os.close(reading)
        return set_rate(*of)

    fit.set_learning_rate = left
    return train.main(arguments)


def with_ctrl_c(arguments: list[str]) -> int:
    """A terminal sends SIGINT to the launcher and to the ranks alike."""
    set_rate, steps = fit.set_learning_rate, count(1)

    def pressed(*of: Any) -> float:
        if next(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return set_rate(*of)

    fit.set_learning_rate = pressed
    return train.main(arguments)


def run(target: Any, overrides: list[str], folder: Path) -> Finished:
    code, outputs = run_ranks(target, ["quickstart", *overrides], ranks=2, folder=folder)
    return Finished(code, "".join(outputs))


def test_256_open_files_are_enough_for_two_loaders_and_too_few_for_many(sets, tmp_path: Path) -> None:
    enough = run(with_few_files, [*sets.overrides(tmp_path / "run"), *SHORT, "optim.steps=4"], tmp_path)
    assert enough.returncode == 0, enough.output[-3000:]
    many = (*SHORT, "data.workers=40")
    refused = run(with_few_files, [*sets.overrides(tmp_path / "other"), *many], tmp_path)
    assert refused.returncode == 2 and len(refused.errors) == 1, refused.output[-3000:]
    assert "needs about 276 open files, but may open 256: raise the limit (`ulimit -n" in refused.errors[0]


def test_bad_input_is_told_once_though_the_rank_that_tells_it_is_the_last(sets, tmp_path: Path) -> None:
    """The launcher ends all ranks as soon as one has failed."""
    found = run(with_a_slow_first_rank, [*sets.overrides(tmp_path / "run"), "model.image.dept=3"], tmp_path)
    assert found.returncode == 2 and len(found.errors) == 1, found.output
    assert "did you mean model.image.depth" in found.errors[0]


def test_an_error_of_the_second_rank_alone_is_told(sets, tmp_path: Path) -> None:
    found = run(with_an_error_of_the_second_rank, [*sets.overrides(tmp_path / "run"), *SHORT], tmp_path)
    assert found.returncode == 2 and len(found.errors) == 1 and "optim.stepps" in found.errors[0], found.output


def test_a_port_that_another_program_holds_is_one_line(sets, tmp_path: Path) -> None:
    found = run(at_a_taken_port, [*sets.overrides(tmp_path / "run"), *SHORT], tmp_path)
    assert found.returncode == 2 and len(found.errors) == 1 and "Traceback" not in found.output, found.output
    assert "where the ranks meet, is in use: choose another one" in found.errors[0]


def test_a_clock_that_jumps_by_an_hour_changes_nothing(sets, unbroken: Callable[[int], Path], tmp_path: Path) -> None:
    """The watchdog's time is far shorter. Rates and the time left are told as if nothing had been."""
    limits = ("health.timeout_s=60", *LONG, "optim.stop_at=12")
    jumped = run(with_a_jump, [*sets.overrides(tmp_path / "odd"), *limits], tmp_path / "logs")
    assert jumped.returncode == 0 and jumped.output.count("the clock jumps by") == 2, jumped.output[-3000:]
    rows = read_metrics(tmp_path / "odd")
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert 0 <= row["eta_s"] < 600 and row["samples_per_s"] > 0.1 and 0 <= row["data_wait"] <= 1, row
    assert final_weights(tmp_path / "odd", 12) == final_weights(unbroken(1), 12)


@pytest.mark.parametrize(("target", "why"), [(with_nobody_reading, "nobody reads its std"), (with_ctrl_c, "SIGINT")])
def test_a_run_whose_terminal_is_left_stops_and_saves(sets, tmp_path: Path, target: Any, why: str) -> None:
    stopped = run(target, [*sets.overrides(tmp_path / "run"), *SHORT], tmp_path)
    assert stopped.returncode == EXIT_CODE, stopped.output[-3000:]
    assert 3 <= last_step(tmp_path / "run") < 12 and newest_checkpoint(tmp_path / "run") is not None
    assert why in (tmp_path / "run" / STOPPED).read_text()
