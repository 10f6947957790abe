"""What tests of the engine run on two ranks, each with a folder of its own (`run_ranks`)."""

from __future__ import annotations

import json
import os
import signal
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmclip_shards.chunks import Tally

from mmclip_dist.config import Health, load_config
from mmclip_dist.data.tokenizer import load_tokenizer
from mmclip_dist.engine import collective
from mmclip_dist.engine.deepspeed_engine import build_engine, deepspeed_json, start_distributed
from mmclip_dist.engine.finite import poisoned
from mmclip_dist.engine.gradient_cache import forward_backward
from mmclip_dist.engine.optimizer import Lamb
from mmclip_dist.model.build import build_model
from mmclip_dist.model.inputs import planned
from mmclip_dist.run.guard import Guard
from mmclip_dist.run.log import ProgressLog
from mmclip_dist.run.metrics import read_metrics
from mmclip_dist.run.stop import StopRequest
from tests.batches import DISEASES, in_passes
from tests.model.synthetic_batch import batch_of, config_of, load_of, model_of


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
                counted = {int(state["step"]) for state in engine.basic_optimizer.state.values()}
                assert counted == {good}, (stage, precision, counted)  # Adam's bias correction starts at its first step
                assert engine.global_steps == len(faults)
                ends.append(state_of(engine))
            assert all(map(torch.equal, *ends)), (stage, precision)
    print("all stages and precisions")


class Summing:
    """An engine that, like DeepSpeed's, holds the mean of the ranks' gradients after the last part."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Nothing to do: `gradients` sums."""

    def gradients(self) -> list[torch.Tensor]:
        found = [weight.grad for weight in self.module.parameters() if weight.grad is not None]
        for gradient in found:
            torch.distributed.all_reduce(gradient)
        return found


def caching(overrides: list[str], folder: Path) -> None:
    """Parts of a rank's batch give the gradients of the whole one, however unequally masked tokens are spread over ranks."""
    rank, _, _ = start_distributed(1, 120)
    batch = torch.load(folder / "batches.pt", weights_only=False)[rank]
    ends = []
    config = load_config("quickstart", overrides)
    for micro in (None, 2, 1):
        engine = Summing(build_model(config, load_tokenizer(str(config.model.text.tokenizer)), DISEASES))
        losses = forward_backward(engine, in_passes(batch, engine.module, micro), config.loss)
        ends.append((losses, engine.gradients()))
    (whole_losses, whole), *parted = ends
    assert max(float(gradient.abs().max()) for gradient in whole) > 1e-3
    for losses, gradients in parted:
        torch.testing.assert_close(losses, whole_losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, whole, rtol=1e-4, atol=1e-6)
    print("parts add up")


def uneven(overrides: list[str], folder: Path) -> None:
    """Ranks with 5 and 3 of 8 samples find the losses and gradients of the whole batch, in any number of passes."""
    rank, _, _ = start_distributed(1, 120)
    batch, expected = torch.load(folder / "batches.pt", weights_only=False)[rank], torch.load(folder / "whole.pt")
    config = load_config("quickstart", overrides)
    for passes in (1, 2, 3):
        engine = Summing(build_model(config, load_tokenizer(str(config.model.text.tokenizer)), DISEASES))
        losses = forward_backward(engine, planned(batch, engine.module.text.width, passes, config.shares), config.loss)
        gradients = [gradient / 2 for gradient in engine.gradients()]
        for name, loss in losses.items():
            mean = collective.sums(loss.device, loss=loss.detach())["loss"] / 2
            assert mean == pytest.approx(expected["losses"][name], rel=1e-5)
        torch.testing.assert_close(gradients, expected["gradients"], rtol=1e-4, atol=1e-6)
    print("unequal shares add up")


def lamb(folder: Path) -> None:
    """Ranks that hold unequal shares of a matrix step as one that holds all of it."""
    rank, _, _ = start_distributed(1, 120)
    whole = torch.nn.Parameter(torch.arange(1.0, 13.0))
    own = [slice(0, 9), slice(9, 12)][rank]
    share = torch.nn.Parameter(whole.detach()[own].clone())
    optimizers = [
        Lamb([{"params": [weight], "weight_decay": 0.5, "lr": 0.1}], betas=(0.9, 0.95), sharded=sharded)
        for weight, sharded in ((whole, False), (share, True))
    ]
    for step in range(3):
        whole.grad = torch.arange(12.0).add(step).sin()
        share.grad = whole.grad[own].clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(share.detach(), whole.detach()[own])
    print("shares step as the whole")


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


def watching(folder: Path) -> None:
    """One rank's news reach both: what guards a run, and what its log says, are of the global batch."""
    rank, _, device = start_distributed(1, 120)
    guard = Guard(folder, StopRequest(folder), Health(max_bad_steps=3), 0.5, device)
    batch: Any = {"keys": [f"{rank}-{row}" for row in range(4 + rank)], "replaced": [("x", "cut")] if rank else []}
    loss = torch.tensor(1.0 + 2 * rank)
    guard.after_step(1, batch, loss, applied=True, writing=rank == 1)
    guard.after_step(2, batch, loss, applied=False, writing=False)
    assert guard.writing and not guard.stop.agreed
    guard.finish()
    assert not guard.writing and (guard.quarantine.bad, guard.quarantine.seen, guard.health.skipped) == (2, 18, 1)
    (row,) = [json.loads(line) for line in (folder / f"trouble-{rank}.jsonl").read_text().splitlines()]
    assert (row["step"], row["loss"], row["keys"]) == (2, 2.0, batch["keys"])  # the mean loss, this rank's samples

    config = config_of("optim.steps=12", "optim.stop_at=null", batch=8).model_copy(update={"run_dir": str(folder)})
    load = load_of(config, ranks=2)
    log = ProgressLog(config, None, 0, device)

    def slow() -> Iterator[Any]:
        while True:
            time.sleep(0.5 * rank)
            yield in_passes(batch_of(config, load) | {"reading": Tally(requests=2 + rank)}, module, None)

    module = model_of(config, load.prompts // 2)
    log.wait_for(slow())
    engine = types.SimpleNamespace(module=module, optimizer=None, zero_optimization_stage=lambda: 0)
    log.write(1, {"image": torch.tensor(1.0 + rank)}, 1e-3, engine)
    if rank == 0:
        (row,) = read_metrics(folder)
        assert row["loss"] == {"image": 1.5} and row["samples"] == 8 and row["read"]["requests"] == 5
        assert row["samples_per_s"] / row["samples_per_s_per_rank"] - 2 < 0.1
        assert 0.5 < row["data_wait"] <= 1  # rank 1 waited, and rank 0 for it
    print("both know")


def alone(folder: Path) -> None:
    """What the first rank does alone takes longer than the time-out of a collective call; then it fails."""
    rank, _, _ = start_distributed(1, 3)
    done: list[int] = []

    def slow() -> str:
        done.append(rank)
        time.sleep(8)
        return f"by {rank}"

    assert collective.first_rank_does(slow, "sleeping") == "by 0"
    assert done == ([0] if rank == 0 else [])

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
