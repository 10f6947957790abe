"""TensorBoard, Weights & Biases and MLflow, by config, on the first rank. metrics.jsonl is written in any case, by `MetricsLog`.

A resumed run goes on in the same W&B and MLflow run: their ids lie in the run folder. Packages are imported when they are used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mmclip_shards.storage import write_atomic
from mmclip_shards.textfiles import read_json

from mmclip_dist.config import Config, Track

IDS = "trackers.json"
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboard"), "wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}


class Tracker(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, *, failed: bool) -> None: ...


def check_trackers(track: Track) -> None:
    """ValueError if a tracker that is asked for is not installed."""
    for name, (module, package) in _PACKAGES.items():
        if not getattr(track, name):
            continue
        found = find_spec(module)
        if found is None or found.origin is None:  # a folder of that name is not a package; W&B makes one beside a run
            raise ValueError(f"track.{name} needs a package that is missing: pip install {package}, or leave track.{name} out")


@contextmanager
def open_trackers(config: Config, step: int) -> Iterator[Tracker]:
    """All trackers of `config.track` as one; `step`: where the run goes on. ValueError if one cannot be opened."""
    folder = Path(config.run_dir)
    opened: list[Tracker] = []
    failed = True
    try:
        for name in _PACKAGES:
            if getattr(config.track, name):
                opened.append(_open(name, config, folder, step))  # noqa: PERF401 (if the next fails, this one is closed)
        yield _All(opened)
        failed = False
    finally:
        for tracker in opened:
            tracker.close(failed=failed)


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested row, named "outer/inner"."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


def _open(name: str, config: Config, folder: Path, step: int) -> Tracker:
    kinds: dict[str, type[_TensorBoard] | type[_WandB] | type[_MLflow]] = {
        "tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow,
    }  # fmt: skip
    try:
        tracker = kinds[name](config, folder, step)
    except Exception as error:  # services raise many kinds; as a ValueError it ends all ranks, not only the first
        hint = {"wandb": "; `wandb login`, or WANDB_MODE=offline", "mlflow": "; is the URI right and the server up?"}
        raise ValueError(f"track.{name} cannot start: {' '.join(str(error).split())}{hint.get(name, '')}") from error
    return tracker


class _All:
    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker.write(step, values)

    def close(self, *, failed: bool) -> None:
        raise AssertionError("open_trackers closes what it opened")


class _TensorBoard:
    def __init__(self, config: Config, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Drop rows after the step that the run resumes from, as metrics.jsonl does.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, *, failed: bool) -> None:
        self.writer.close()


class _WandB:
    """W&B accepts rising steps only, so it skips the rows that a resumed run computes again. They are equal anyway."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        import wandb

        self.run = wandb.init(
            project=config.track.wandb, name=folder.name, id=_ids(folder).get("wandb"), resume="allow", dir=str(folder),
            config=config.model_dump(mode="json"),
        )  # fmt: skip
        _remember(folder, "wandb", self.run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)


class _MLflow:
    """If the server is away, warn and go on: metrics.jsonl has every row."""

    def __init__(self, config: Config, folder: Path, step: int) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.metric, self.error, self.client = Metric, MlflowException, MlflowClient(tracking_uri=config.track.mlflow)
        known = _ids(folder).get("mlflow")
        if known:
            self.client.update_run(known, status="RUNNING")
            self.run_id = known
            return
        experiment = self.client.get_experiment_by_name("mmclip")
        number = experiment.experiment_id if experiment else self.client.create_experiment("mmclip")
        self.run_id = self.client.create_run(number, run_name=folder.name).info.run_id
        for name, value in _leaves(config.model_dump(mode="json")):
            self.client.log_param(self.run_id, name, value)
        _remember(folder, "mlflow", self.run_id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        try:
            self.client.log_batch(self.run_id, metrics=[self.metric(name, value, now, step) for name, value in values.items()])
        except self.error as error:
            print(f"warning: step {step} did not reach MLflow: {' '.join(str(error).split())}", flush=True)

    def close(self, *, failed: bool) -> None:
        try:
            self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")
        except self.error as error:
            print(f"warning: MLflow was not told of the run's end: {' '.join(str(error).split())}", flush=True)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)[:500]  # MLflow's limit of old servers


def _ids(folder: Path) -> dict[str, str]:
    path = folder / IDS
    found: dict[str, str] = read_json(path, "delete it; the trackers then begin a new run") if path.exists() else {}
    return found


def _remember(folder: Path, name: str, run: str) -> None:
    write_atomic(str(folder / IDS), json.dumps(_ids(folder) | {name: run}).encode())
