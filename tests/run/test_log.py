"""The progress line and its row: what they count, and that nothing unknown is made up."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmclip_dist.plan import cost
from mmclip_dist.plan.cards import card_named
from mmclip_dist.run import log
from mmclip_dist.run.log import ProgressLog, as_built, load_of_steps, progress_line
from mmclip_dist.run.metrics import EVALUATIONS, read_metrics
from tests.batches import in_passes
from tests.model.synthetic_batch import batch_of, config_of, load_of, model_of

CPU = torch.device("cpu")


@pytest.fixture
def one_rank(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(log, "time", types.SimpleNamespace(monotonic=lambda: self.now, process_time=lambda: self.now / 2))


def engine_of(model: Any) -> Any:
    """As much of a stage-0 engine as the log asks for."""
    return types.SimpleNamespace(module=model, optimizer=None, zero_optimization_stage=lambda: 0)


class Rows:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, values: Any) -> None:
        self.rows.append((step, dict(values)))

    def close(self, *, failed: bool) -> None: ...


def test_a_row_of_two_steps(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four seconds for two steps of 4 samples, one of them waiting; steps 4 and 5 of 12, then one more."""
    config = config_of("optim.steps=12", "optim.stop_at=null", batch=4)
    load, clock, tracker = load_of(config), Clock(monkeypatch), Rows()
    model = model_of(config, load.prompts // 2)
    log = ProgressLog(config.model_copy(update={"run_dir": str(tmp_path)}), tracker, 3, CPU)

    def batches() -> Any:
        while True:
            clock.now += 0.5
            yield in_passes(batch_of(config, load), model, None)

    stream = batches()
    for _ in range(2):
        log.wait_for(stream)
        clock.now += 1.5
    losses = {"contrastive": torch.tensor(2.0), "image": torch.tensor(0.5)}
    log.write(5, losses, 1e-3, engine_of(model))
    (row,) = read_metrics(tmp_path)
    assert row["step"] == 5 and row["samples"] == 20 and row["loss"] == {"contrastive": 2.0, "image": 0.5} and row["lr"] == 1e-3
    assert row["samples_per_s"] == row["samples_per_s_per_rank"] == 2.0 and row["data_wait"] == 0.25
    assert row["eta_s"] == 14.0 and row["temperature"] == pytest.approx(config.model.temperature)
    assert 0 < row["memory_gib"] <= row["memory_peak_gib"]
    assert "mfu" not in row and "device_peak_gib" not in row  # a CPU has no peak in the table
    line = capsys.readouterr().out
    assert "step 5/12  contrastive 2.0000" in line and "0:00:14 left" in line and "MFU" not in line and "device" not in line
    assert tracker.rows[0][0] == 5 and tracker.rows[0][1]["loss/image"] == 0.5

    log.evaluated(5, {"macro": 0.75, "Nodule": 0.75})
    log.evaluated(6, None)
    assert read_metrics(tmp_path, EVALUATIONS) == [{"step": 5, "auc": {"macro": 0.75, "Nodule": 0.75}}]
    assert tracker.rows[-1] == (5, {"auc/macro": 0.75, "auc/Nodule": 0.75})
    assert "macro AUC 0.7500" in (told := capsys.readouterr().out) and "broken off by a stop" in told

    with log.aside():  # an evaluation and a save of an hour: no training time
        clock.now += 3600
    log.wait_for(stream)
    clock.now += 0.5
    log.write(6, losses, 1e-3, engine_of(model))  # counts start anew
    row = read_metrics(tmp_path)[-1]
    assert row["samples_per_s"] == 4.0 and row["eta_s"] == 6.0 and row["data_wait"] == 0.5 and row["aside_s"] == 3600
    assert row["processor_s"] == 0.5
    log.wait_for(stream)
    clock.now += 0.5
    log.write(7, losses, 1e-3, engine_of(model))
    assert read_metrics(tmp_path)[-1]["aside_s"] == 0 and read_metrics(tmp_path)[-1]["samples_per_s"] == 4.0


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989e12), ("fp32", 67e12)])
def test_mfu_is_of_the_work_that_the_batches_hold(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, peak: float
) -> None:
    config = config_of(batch=4, precision=precision)
    load, clock = load_of(config, tokens=30, masked=7, scored=True), Clock(monkeypatch)
    log = ProgressLog(config.model_copy(update={"run_dir": str(tmp_path)}), None, 0, CPU)
    log.card = card_named("h100")
    seconds, model = 1e-4, model_of(config, load.prompts // 2)
    for _ in range(2):
        data = batch_of(config, load)
        data["tokens"] = torch.nn.functional.pad(data["tokens"], (0, 10))
        data["token_mask"] = torch.nn.functional.pad(data["token_mask"], (0, 10))  # padding is no work
        log.wait_for(iter([in_passes(data, model, None)]))
        clock.now += seconds
    log.write(2, {"image": torch.tensor(0.5)}, 1e-3, engine_of(model))
    flops = cost.training_flops(cost.pieces(config, load, 2))
    assert read_metrics(tmp_path)[0]["mfu"] == pytest.approx(flops / seconds / peak, rel=0.01)


def test_the_work_of_a_step_is_that_of_one_rank() -> None:
    """Of two ranks' 16 samples in two steps 12 had a report, of 20 tokens and 5 masked ones; 4 images had no stored scores."""
    model = model_of(config_of(batch=16), 6)
    counts = {"reports": 24.0, "tokens": 480.0, "masked": 120.0, "scored": 8.0}
    load = load_of_steps(counts, model, batch=16, world=2, steps=2)
    assert (load.images, load.reports, load.tokens, load.masked) == (8, 6, 20, 5)
    assert (load.texts, load.scored, load.prompts) == (12, 0.25, 12)
    alone = load_of_steps(dict.fromkeys(counts, 0.0), model, batch=16, world=2, steps=2)  # no report at all
    assert (alone.reports, alone.tokens, alone.masked, alone.texts) == (0, 0, 0, 0)


def test_pretrained_encoders_count_with_their_own_shapes() -> None:
    config = config_of(batch=4)
    model = model_of(config, 6)
    asked = config.model_copy(update={"model": config.model.model_copy(update={"image": config.model.image.model_copy(
        update={"width": 12, "depth": 1, "heads": 1})})})  # fmt: skip
    assert as_built(asked, model) == config


def test_what_a_gpu_adds_to_the_line() -> None:
    row = {
        "step": 10, "loss": {"image": 0.5}, "lr": 1e-4, "temperature": 0.07, "samples_per_s": 8192.0,
        "samples_per_s_per_rank": 1024.0, "data_wait": 0.01,
        "memory_peak_gib": 3.25, "device_peak_gib": 61.5, "mfu": 0.412, "eta_s": 90_061.4,
        "read": {"mb_per_s": 12.0, "requests": 3, "retries": 1, "cache_hits": 0},
    }  # fmt: skip
    assert progress_line(row, 500) == (
        "step 10/500  image 0.5000  lr 1.00e-04  temperature 0.0700  8192 samples/s (1024.0 a rank)  MFU 41.2%  "
        "data wait 1% (12 MB/s, 1 retries, 0 cache hits)  memory 3.2, device 61.5 GiB  1 day, 1:01:01 left"
    )
