"""TensorBoard, Weights & Biases and MLflow, by config, on the first rank. metrics.jsonl is written in any case, by `MetricsLog`.

A resumed run goes on in the same W&B and MLflow run: their ids lie in the run folder. Packages are imported when they are used.
Each tracker works in a thread of its own, so that a service that is away or hangs costs rows (metrics.jsonl has
them) and no time.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mmclip_shards.storage import write_atomic
from mmclip_shards.textfiles import read_json

from mmclip_dist.config import Config, Track
from mmclip_dist.run.rows import SeldomWarning

IDS = "trackers.json"
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboard"), "wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}
_WAITING = 256  # rows that may wait for a tracker; those that come on top are dropped
_START_S = 60.0  # a tracker may take so long to start
_END_S = {False: 30.0, True: 3.0}  # and so long to send its last rows: after an error, the job must end within seconds


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
    """All trackers of `config.track` as one; `step`: where the run goes on. ValueError if one cannot be opened at the start of a
    run. A run that goes on does so without it."""
    folder = Path(config.run_dir)
    opened: list[_Background] = []
    failed = True
    try:
        for name in _PACKAGES:
            if getattr(config.track, name):
                opened.append(_Background(name, partial(_open, name, config, folder, step)))
                try:
                    opened[-1].wait_for_start(min(_START_S, config.health.timeout_s / 2))
                except ValueError as error:
                    if step == 0:
                        raise
                    print(f"warning: {error}. The run goes on without it", file=sys.stderr, flush=True)
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
        raise ValueError(f"track.{name} cannot start: {_one_line(error)}{hint.get(name, '')}") from error
    return tracker


class _Background:
    """A tracker in a thread of its own. `write` and `close` never raise, and never wait for long."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.name, self.dropped = f"track.{name}", 0
        self._rows: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_WAITING)  # None: the run has ended
        self._trouble, self._full = SeldomWarning(), SeldomWarning()
        self._ready, self._failed = threading.Event(), True
        self._refused: ValueError | None = None
        self._thread = threading.Thread(target=self._work, args=(start,), name=self.name, daemon=True)
        self._thread.start()

    def wait_for_start(self, seconds: float) -> None:
        """ValueError if it could not start, or did not answer in time."""
        if not self._ready.wait(seconds):
            raise ValueError(f"{self.name} cannot start: no answer for {seconds:g} s; is its server up? Or leave it out")
        if self._refused is not None:
            raise self._refused

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._refused is not None:
            return
        try:
            self._rows.put_nowait((step, values))
        except queue.Full:
            self.dropped += 1
            self._full.tell(f"{self.name} does not keep up, so the row of step {step} is left out; metrics.jsonl has it")

    def close(self, *, failed: bool) -> None:
        self._failed = failed
        deadline = time.monotonic() + _END_S[failed]
        with suppress(queue.Full):
            self._rows.put(None, timeout=_END_S[failed])
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            told = f"{self.name} hangs: it was not told of the run's end and lacks {self.dropped + self._rows.qsize()} rows"
        elif self.dropped:
            told = f"{self.name} lacks {self.dropped} rows, for which it was too slow"
        else:
            return
        print(f"warning: {told}; metrics.jsonl has them", file=sys.stderr, flush=True)

    def _work(self, start: Callable[[], Tracker]) -> None:
        try:
            tracker = start()
        except ValueError as error:
            self._refused = error
            return
        finally:
            self._ready.set()
        while (row := self._rows.get()) is not None:
            try:
                tracker.write(*row)
            except Exception as error:  # services raise many kinds
                self._trouble.tell(f"step {row[0]} did not reach {self.name}: {_one_line(error)}")
        try:
            tracker.close(failed=self._failed)
        except Exception as error:
            print(f"warning: {self.name} was not told of the run's end: {_one_line(error)}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _All:
    def __init__(self, trackers: list[_Background]) -> None:
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
    def __init__(self, config: Config, folder: Path, step: int) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self.metric, self.client = Metric, MlflowClient(tracking_uri=config.track.mlflow)
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
        self.client.log_batch(self.run_id, metrics=[self.metric(name, value, now, step) for name, value in values.items()])

    def close(self, *, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


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
