"""What tests of the engine run on two ranks, each with a folder of its own (`run_ranks`)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from mmclip_dist.config import load_config
from mmclip_dist.engine import collective
from mmclip_dist.engine.deepspeed_engine import build_engine, deepspeed_json, start_distributed
from mmclip_dist.engine.finite import poisoned
from mmclip_dist.run.stop import StopRequest


class Toy(torch.nn.Module):
    """Two weights in two groups. Of even sizes: what stage 3 pads a share with is whatever was in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.arange(20.0).reshape(4, 5) / 20)
        self.bias = torch.nn.Parameter(torch.ones(4))

    def forward(self, inputs: torch.Tensor, fault: str) -> torch.Tensor:
        loss = (inputs.to(self.matrix.dtype) @ self.matrix.T + self.bias).float().square().mean()
        if fault == "loss":  # not finite, with gradients that are
            return loss + torch.inf
        if fault == "gradient":  # infinite times nothing; the loss is finite
            return loss + (self.matrix.float() * 0).sum().sqrt()
        return loss


def state_of(engine: Any) -> list[torch.Tensor]:
    """This rank's share of weights and optimizer state, copied."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    shares = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or getattr(
        engine.optimizer, "single_partition_of_fp32_groups", []
    )
    return [value.detach().clone() for value in [*states, *shares, *masters]]


def bad_steps(folder: Path) -> None:
    """At every stage and precision: a step that one rank spoils changes nothing on either, and the next ones are as if it had
    not been."""
    rank, _, device = start_distributed(1, 120)
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            ends = []
            for faults in (["", "", ""], ["", "loss", "gradient", "", ""]):
                config = load_config(
                    "quickstart", [f"zero_stage={stage}", f"precision={precision}", "optim.global_batch=64", "optim.lr=1"]
                )
                engine = build_engine(Toy(), config, deepspeed_json(config, 2, gpu=False))
                good = 0
                for step, fault in enumerate(faults):
                    before = state_of(engine)
                    inputs = torch.full((2, 5), float(good + rank), device=device)
                    loss = engine(inputs, fault if rank == step % 2 else "")
                    engine.backward(poisoned(loss))
                    engine.step()
                    after = state_of(engine)
                    same = len(before) == len(after) and all(map(torch.equal, before, after))
                    assert same == bool(fault), (stage, precision, step, fault)
                    assert engine.was_step_applied() == (not fault), (stage, precision, step, fault)
                    good += not fault
                assert engine.skipped_steps == len(faults) - good
                assert engine.global_steps == len(faults)
                ends.append(state_of(engine))
            assert all(map(torch.equal, *ends)), (stage, precision)
    print("all stages and precisions")


def stopping(folder: Path) -> None:
    """Only rank 1 gets the signal; both leave the loop at the same step, and evaluation too."""
    rank, _, device = start_distributed(1, 120)
    stop = StopRequest(folder)
    assert not stop.requested(device)
    step = 0
    while not stop.requested(device):
        step += 1
        time.sleep(0.002 * rank)
        if rank == 1 and step == 7:
            os.kill(os.getpid(), signal.SIGUSR1)
    assert step == 7 and stop.agreed
    batches = 0
    while batches < 50 and not stop.requested(device):  # evaluation, begun afterwards, ends at once
        batches += 1
    assert batches == 0
    print(f"stopped at {step}")


def hanging(folder: Path) -> None:
    """Rank 1 never joins the collective call of step 3."""
    from mmclip_dist.engine import watchdog

    rank, _, device = start_distributed(1, 3)
    for step in range(1, 10):
        watchdog.beat("forward, backward or optimizer step", step)
        if rank == 1 and step == 3:
            for _ in range(50):  # not hung, but elsewhere
                watchdog.beat("elsewhere")
                time.sleep(0.2)
            os._exit(0)
        collective.sums(device, value=1.0)


def alone(folder: Path) -> None:
    """What the first rank does alone takes longer than the time-out of a collective call; then it fails."""
    rank, _, _ = start_distributed(1, 3)

    def slow() -> str:
        time.sleep(8)
        return f"by {rank}"

    assert collective.first_rank_does(slow, "sleeping") == "by 0"

    def failing() -> None:
        raise OSError("no space")

    try:
        collective.first_rank_does(failing, "failing")
    except collective.AgreedFailure as error:
        print(f"rank {rank}: {error}")
    try:
        with collective.agreed():
            if rank == 1:
                raise ValueError("it refuses")
    except collective.AgreedError as error:
        print(f"rank {rank}: {error}")
    try:
        with collective.agreed():
            raise ValueError("both refuse") if rank else OSError("or fail")
    except collective.AgreedFailure as error:
        print(f"rank {rank}: {error}")
    try:
        with collective.agreed():
            raise ValueError("all alike")
    except collective.AgreedError as error:
        print(f"rank {rank}: {error}")
