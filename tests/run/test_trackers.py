"""Trackers: TensorBoard for real; Weights & Biases and MLflow through stand-ins with the part of their interface that we use, and
for real where they are installed."""

from __future__ import annotations

import json
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from mmclip_dist.config import Config, load_config
from mmclip_dist.run import trackers
from mmclip_dist.run.trackers import check_trackers, flat, open_trackers
from tests.conftest import wait_for

ROW = {"step": 2, "loss": {"contrastive": 1.5, "image": 0.25}, "lr": 1e-4, "eta_s": 3, "note": "no number", "flag": True}


def config_at(folder: Path, *overrides: str) -> Config:
    return load_config("quickstart", [f"run_dir={folder}", *overrides])


def test_rows_are_flattened_to_their_numbers() -> None:
    assert flat(ROW) == {"step": 2.0, "loss/contrastive": 1.5, "loss/image": 0.25, "lr": 1e-4, "eta_s": 3.0}


@pytest.mark.parametrize(
    ("override", "package"),
    [("track.tensorboard=true", "tensorboard"), ("track.wandb=p", "wandb"), ("track.mlflow=x", "mlflow-skinny")],
)
def test_a_missing_package_is_named_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, package: str
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {package}, or leave track"):
        check_trackers(config_at(tmp_path, override).track)
    check_trackers(config_at(tmp_path).track)


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B leaves `wandb/` where it ran; Python would import it."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "site-packages" not in path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="pip install wandb"):
        check_trackers(config_at(tmp_path, "track.wandb=p").track)


def test_without_a_tracker_nothing_is_written(tmp_path: Path) -> None:
    with open_trackers(config_at(tmp_path), 0) as tracker:
        tracker.write(1, flat(ROW))
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_the_rows_and_drops_those_that_are_computed_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_at(tmp_path, "track.tensorboard=true")

    def shown() -> list[tuple[int, Any]]:
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss/image")]

    for start, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        with open_trackers(config, start) as tracker:
            for step in steps:
                tracker.write(step, {"loss/image": start + step / 10})
                wait_for(lambda: shown()[-1:] == [(step, start + step / 10)])  # noqa: B023 (while the run goes on; called at once)
    assert shown() == [(2, 0.2), (4, 0.4), (6, 4.6), (8, 4.8)]


def test_tensorboard_gets_every_row_at_once_and_forgets_those_after_the_resumed_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a stand-in for torch's SummaryWriter, which needs the tensorboard package."""
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, *, purge_step: int | None) -> None:
            calls.append(("open", Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def flush(self) -> None:
            calls.append(("flush",))

        def close(self) -> None:
            calls.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for start in (0, 4):
        with open_trackers(config_at(tmp_path, "track.tensorboard=true"), start) as tracker:
            tracker.write(start + 2, {"lr": 1.0})
    assert calls == [
        ("open", "tensorboard", None), ("lr", 1.0, 2), ("flush",), ("close",),
        ("open", "tensorboard", 5), ("lr", 1.0, 6), ("flush",), ("close",),
    ]  # fmt: skip


class WandbStandIn(types.ModuleType):
    """`wandb.init` as documented -> a run with id, log(data, step) and finish(exit_code)."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[Any, ...]] = []

    def init(self, *, project: str, name: str, id: str | None, resume: str, dir: str, config: dict) -> Any:
        self.calls.append(("init", project, id, resume, config["optim"]["steps"]))
        run = types.SimpleNamespace(id=id or "new1")
        run.log = lambda data, *, step: self.calls.append(("log", step, data["lr"]))
        run.finish = lambda exit_code: self.calls.append(("finish", exit_code))
        return run


def test_wandb_goes_on_in_the_same_run_and_learns_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = WandbStandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = config_at(tmp_path, "track.wandb=lungs", "optim.steps=700")
    with pytest.raises(RuntimeError), open_trackers(config, 0) as tracker:
        tracker.write(2, flat(ROW))
        raise RuntimeError("the run breaks")
    with open_trackers(config, 2) as tracker:
        tracker.write(4, flat(ROW))
    assert wandb.calls == [
        ("init", "lungs", None, "allow", 700), ("log", 2, 1e-4), ("finish", 1),
        ("init", "lungs", "new1", "allow", 700), ("log", 4, 1e-4), ("finish", 0),
    ]  # fmt: skip


class MlflowStandIn:
    """`MlflowClient` and `Metric` as documented, as far as we call them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.down = False
        stand_in, error = self, type("MlflowException", (Exception,), {})

        class Client:
            def __init__(self, *, tracking_uri: str) -> None:
                stand_in.calls.append(("client", tracking_uri))

            def get_experiment_by_name(self, name: str) -> None:
                return None

            def create_experiment(self, name: str) -> str:
                return "7"

            def create_run(self, experiment_id: str, *, run_name: str) -> Any:
                stand_in.calls.append(("create_run", experiment_id))
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

            def update_run(self, run_id: str, *, status: str) -> None:
                stand_in.calls.append(("update_run", run_id, status))

            def log_param(self, run_id: str, key: str, value: str) -> None:
                if key == "optim.steps":
                    stand_in.calls.append(("log_param", run_id, value))

            def log_batch(self, run_id: str, *, metrics: list[Any]) -> None:
                if stand_in.down:
                    raise error("no answer")
                stand_in.calls.append(("log_batch", run_id, [(m[0], m[3]) for m in metrics]))

            def set_terminated(self, run_id: str, status: str) -> None:
                stand_in.calls.append(("set_terminated", run_id, status))

        for name, content in {
            "mlflow": {}, "mlflow.entities": {"Metric": lambda *fields: fields}, "mlflow.exceptions": {"MlflowException": error},
            "mlflow.tracking": {"MlflowClient": Client},
        }.items():  # fmt: skip
            module = types.ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = MlflowStandIn(monkeypatch)
    config = config_at(tmp_path, "track.mlflow=http://there", "optim.steps=700")
    for start in (0, 2):
        with open_trackers(config, start) as tracker:
            tracker.write(start + 2, {"lr": 1.0})
    assert mlflow.calls == [
        ("client", "http://there"), ("create_run", "7"), ("log_param", "r1", "700"), ("log_batch", "r1", [("lr", 2)]),
        ("set_terminated", "r1", "FINISHED"),
        ("client", "http://there"), ("update_run", "r1", "RUNNING"), ("log_batch", "r1", [("lr", 4)]),
        ("set_terminated", "r1", "FINISHED"),
    ]  # fmt: skip


def test_a_server_that_is_away_costs_a_warning_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = MlflowStandIn(monkeypatch)
    with open_trackers(config_at(tmp_path, "track.mlflow=http://there"), 0) as tracker:
        mlflow.down = True
        tracker.write(2, {"lr": 1.0})
    assert capsys.readouterr().err == "warning: step 2 did not reach track.mlflow: no answer\n"


class Hangs:
    """A service that answers nothing until `answer` is set, or five seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, from_the_start: bool) -> None:
        self.answer, self.from_the_start, self.steps = threading.Event(), from_the_start, list[int]()
        monkeypatch.setattr(trackers, "_TensorBoard", lambda config, folder, step: self.start())
        monkeypatch.setattr(trackers, "_START_S", 0.05)
        monkeypatch.setattr(trackers, "_END_S", {False: 0.05, True: 0.05})
        monkeypatch.setattr(trackers, "_WAITING", 3)

    def start(self) -> Any:
        if self.from_the_start:
            self.answer.wait(5)
        return self

    def write(self, step: int, values: Any) -> None:
        self.answer.wait(5)
        self.steps.append(step)

    def close(self, *, failed: bool) -> None:
        self.answer.wait(5)


def test_a_service_that_hangs_costs_rows_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Hangs(monkeypatch, from_the_start=False)
    before = time.monotonic()
    with open_trackers(config_at(tmp_path, "track.tensorboard=true"), 0) as tracker:
        for step in range(1, 11):
            tracker.write(step, {"lr": 1.0})
    assert time.monotonic() - before < 1
    first, last = capsys.readouterr().err.splitlines()
    assert "warning: track.tensorboard does not keep up, so the row of step " in first and "metrics.jsonl has it" in first
    assert last.startswith("warning: track.tensorboard hangs: it was not told of the run's end and lacks ")
    service.answer.set()


def test_a_slow_service_gets_every_row_that_found_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Hangs(monkeypatch, from_the_start=False)
    monkeypatch.setattr(trackers, "_END_S", {False: 5.0, True: 5.0})
    with open_trackers(config_at(tmp_path, "track.tensorboard=true"), 0) as tracker:
        for step in (1, 2, 3):
            tracker.write(step, {"lr": 1.0})
        service.answer.set()
    assert service.steps == [1, 2, 3]


def test_a_service_that_hangs_at_the_start_is_an_error_of_a_new_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service, config = Hangs(monkeypatch, from_the_start=True), config_at(tmp_path, "track.tensorboard=true")
    with pytest.raises(ValueError, match=r"track\.tensorboard cannot start: no answer for 0\.05 s"):
        open_trackers(config, 0).__enter__()
    capsys.readouterr()
    with open_trackers(config, 4) as tracker:
        tracker.write(6, {"lr": 1.0})
    assert "no answer for 0.05 s; is its server up? Or leave it out. The run goes on without it" in capsys.readouterr().err
    service.answer.set()


def test_a_tracker_that_cannot_start_is_an_error_and_closes_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = WandbStandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    with pytest.raises(ValueError, match=r"track\.mlflow cannot start: .*is the URI right"):
        open_trackers(config_at(tmp_path, "track.wandb=lungs", "track.mlflow=x"), 0).__enter__()
    assert wandb.calls[-1] == ("finish", 1)


def test_mlflow_learns_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = MlflowStandIn(monkeypatch)
    with pytest.raises(RuntimeError), open_trackers(config_at(tmp_path, "track.mlflow=http://there"), 0):
        raise RuntimeError("the run breaks")
    assert mlflow.calls[-1] == ("set_terminated", "r1", "FAILED")


def test_the_real_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_at(tmp_path, "track.wandb=lungs")
    for start in (0, 2):
        with open_trackers(config, start) as tracker:
            tracker.write(start + 2, flat(ROW))
    known = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(known) for name in folders)


def test_the_real_mlflow(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("alembic")  # the server of a sqlite store; a remote one needs neither it nor sqlalchemy
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = config_at(tmp_path / "run", f"track.mlflow={uri}")
    (tmp_path / "run").mkdir()
    for start in (0, 2):
        with open_trackers(config, start) as tracker:
            tracker.write(start + 2, flat(ROW))
    client = tracking.MlflowClient(tracking_uri=uri)
    run = client.get_run(json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"])
    assert run.info.status == "FINISHED" and run.data.params["optim.global_batch"] == "128"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss/image")] == [2, 4]
