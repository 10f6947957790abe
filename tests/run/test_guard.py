"""One decision after each step: stop, undecodable samples, numerical trouble, and whether a checkpoint is still being written."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmclip_dist.config import Health as Limits
from mmclip_dist.engine.collective import AgreedError
from mmclip_dist.engine.feed import Feed
from mmclip_dist.run.guard import Guard
from mmclip_dist.run.stop import StopRequest
from tests.engine import two_ranks
from tests.model.synthetic_batch import batch_of, config_of, load_of
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.fixture
def guard(tmp_path: Path):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Guard(tmp_path, StopRequest(tmp_path), Limits(max_bad_steps=2), 0.1, CPU)
    dist.destroy_process_group()
    for number, handler in before.items():
        signal.signal(number, handler)


def batch(bad: int = 0, samples: int = 10) -> Any:
    return {"keys": [f"k{number}" for number in range(samples)], "replaced": [(f"b{number}", "cut") for number in range(bad)]}


def test_a_quiet_step_changes_nothing(guard: Guard) -> None:
    guard.after_step(1, batch(), torch.tensor(2.0), applied=True, writing=False)
    assert guard.quarantine.seen == 0  # judged one step late
    guard.finish()
    assert not guard.stop.agreed and not guard.writing
    assert guard.quarantine.seen == 10 and guard.quarantine.bad == 0 and guard.health.skipped == 0


def test_a_request_of_one_rank_stops_all_and_writing_is_shared(guard: Guard) -> None:
    guard.stop.ask("a test")
    guard.after_step(1, batch(), torch.tensor(2.0), applied=True, writing=True)
    assert not guard.stop.agreed
    guard.after_step(2, batch(), torch.tensor(2.0), applied=True, writing=False)
    assert guard.stop.agreed and guard.writing
    guard.finish()
    assert not guard.writing


def test_bad_samples_are_counted_and_too_many_end_the_run(guard: Guard, tmp_path: Path) -> None:
    guard.after_step(1, batch(bad=2), torch.tensor(2.0), applied=True, writing=False)
    with pytest.raises(AgreedError, match="4 of 20 samples could not be decoded"):
        guard.after_step(2, batch(bad=2), torch.tensor(2.0), applied=True, writing=False)
        guard.finish()
    assert len((tmp_path / "quarantine-0.jsonl").read_text().splitlines()) == 4


def test_steps_that_were_not_applied_are_listed_with_their_loss_and_end_the_run(guard: Guard, tmp_path: Path) -> None:
    guard.after_step(1, batch(), torch.tensor(torch.inf), applied=False, writing=False)
    guard.after_step(2, batch(), torch.tensor(3.0), applied=False, writing=False)
    with pytest.raises(AgreedError, match="2 steps in a row, up to step 2"):
        guard.after_step(3, batch(), torch.tensor(3.0), applied=False, writing=False)
    rows = [json.loads(line) for line in (tmp_path / "trouble-0.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["keys"]) for row in rows] == [(1, None, batch()["keys"]), (2, 3.0, batch()["keys"])]


def test_every_batch_comes_with_its_own_counts(guard: Guard) -> None:
    config = config_of(batch=4)

    def batches() -> Iterator[Any]:
        for step in count():
            made = batch_of(config, load_of(config))
            made["report_id"][: step % 4] = -1
            yield made

    counted = guard.counted(Feed(batches(), 64, 1, (1.0, 1.0), CPU))
    for step in range(6):
        found = next(counted)
        assert (found["counts"].paired, found["counts"].unpaired) == ((4 - step % 4,), (step % 4,))
        assert found["counts"].masked == (len(found["plan"].masked),) and found["counts"].rebuilt == (4,)
        guard.after_step(step + 1, found, torch.tensor(2.0), applied=True, writing=False)
    guard.finish()
    assert guard.quarantine.seen == 24


@pytest.mark.slow
def test_news_of_one_rank_reach_both_and_the_log_is_of_the_global_batch(tmp_path: Path) -> None:
    code, outputs = run_ranks(two_ranks.watching, tmp_path, ranks=2, folder=tmp_path / "logs")
    assert code == 0 and all("both know" in output for output in outputs), outputs
    assert len((tmp_path / "quarantine-1.jsonl").read_text().splitlines()) == 2  # of both steps
    assert not (tmp_path / "quarantine-0.jsonl").exists()
