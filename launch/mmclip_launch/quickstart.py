"""`mmclip quickstart`: the whole job on this machine, from images and reports to an evaluated model and a web page.

Each stage runs the command that a cluster user types, on small data: entities and attention as Ray jobs, training through the
`deepspeed` launcher. Finished stages are listed in `quickstart.json`; the next run skips them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from mmclip_shards.datasets.synthetic.set import pack_synthetic
from mmclip_shards.manifest import find_split, load_manifest
from mmclip_shards.storage import exists, list_folder, write_atomic
from mmclip_shards.textfiles import read_json

from mmclip_dist.commands.progress import progress_bar
from mmclip_dist.config import Config, load_config
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.data.loader import build_order
from mmclip_dist.data.tokenizer import save_tokenizer, tokenizer_of_sets
from mmclip_dist.run.folder import locked
from mmclip_dist.run.metrics import read_metrics
from mmclip_dist.run.orphans import OWNER
from mmclip_dist.run.stop import EXIT_CODE
from mmclip_launch.deepspeed_command import accelerator_environment, check_ranks, local_ranks, train_command
from mmclip_launch.processes import child, environment, last_lines
from mmclip_launch.ray_jobs import cores, local_cluster, run_jobs

RECIPE = "quickstart"
STATE, SUMMARY = "quickstart.json", "summary.json"
ZERO_SHOT = {"train": "zeroshot.json", "control": "control.json"}  # of the runs that are evaluated
_POLL_S = 0.5


@dataclass(frozen=True)
class Synthetic:
    """How many synthetic radiographs are drawn, and their size in pixels. None of them is real."""

    paired: int = 5000
    unpaired: int = 4000
    size: int = 72
    seed: int = 1  # not 0: the recipe was tuned on the images of seed 0, so evaluation on them would look too good


@dataclass(frozen=True)
class Job:
    """The input of a quick start.

    paired, unpaired, evaluation: URLs of packed sets. All three empty: synthetic radiographs are drawn and packed.
    overrides: of the recipe. Its `optim.stop_at` is the step at which the contrastive warm-up ends.
    """

    out: Path
    paired: tuple[str, ...] = ()
    unpaired: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    synthetic: Synthetic = Synthetic()

    @property
    def drawn(self) -> bool:
        return not (self.paired or self.unpaired or self.evaluation)

    @cached_property
    def config(self) -> Config:
        return load_config(RECIPE, self.overrides)

    @property
    def ranks(self) -> int:
        return local_ranks(self.config.data.streams)

    # -- Where things are -----------------------------------------------------------------------------------------

    def sets(self) -> list[str]:
        """Packed training sets: those with reports, then the unpaired ones."""
        if self.drawn:
            return [str(self.out / "data" / name / "train") for name in ("paired", "unpaired")]
        return [find_split(url, "train") for url in (*self.paired, *self.unpaired)]

    def with_reports(self) -> list[str]:
        return self.sets()[: 1 if self.drawn else len(self.paired)]

    def evaluation_sets(self) -> list[str]:
        if self.drawn:
            return [str(self.out / "data" / "paired" / "test")]
        return [find_split(url, "test") for url in self.evaluation]

    def sidecar(self, kind: str, base: str) -> str:
        """The folder of a set's sidecars. It is in the job's own folder: nothing is written to the user's sets."""
        return str(self.out / "sidecars" / kind / f"{self.sets().index(base)}")

    def phase(self, name: str) -> Path:
        return self.out / name

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"

    def settings(self) -> dict[str, Any]:
        """Everything that the outputs depend on. A folder with other settings belongs to another job and is refused."""
        given: dict[str, Any] = {"recipe": self.config.model_dump(mode="json"), "ranks": self.ranks}
        if self.drawn:
            return given | {"synthetic": vars(self.synthetic)}
        urls = {"paired": self.paired, "unpaired": self.unpaired, "eval": self.evaluation}
        return given | {name: list(value) for name, value in urls.items()}


class Progress:
    """The finished stages, kept in quickstart.json. ValueError if the folder belongs to another job."""

    def __init__(self, job: Job) -> None:
        self.path, self.settings = job.out / STATE, json.loads(json.dumps(job.settings()))
        self.stages: list[tuple[str, float]] = []
        if self.path.exists():
            document = read_json(self.path, "delete the folder to start anew")
            if document["settings"] != self.settings:
                changed = [key for key in {**document["settings"], **self.settings}
                           if document["settings"].get(key) != self.settings.get(key)]  # fmt: skip
                raise ValueError(
                    f"{job.out} holds a quick start of another configuration (differs in {', '.join(sorted(changed))}); "
                    "name another --out, or delete that folder to start anew"
                )
            self.stages = [(stage["name"], stage["seconds"]) for stage in document["stages"]]
        elif job.out.exists() and any(path.name != ".lock" for path in job.out.iterdir()):
            raise ValueError(f"{job.out} is not empty and no quick start made it; name another --out")

    def done(self, name: str) -> bool:
        return any(stage == name for stage, _ in self.stages)

    def record(self, name: str, seconds: float) -> None:
        self.stages.append((name, round(seconds, 1)))
        self.save()

    def save(self) -> None:
        stages = [{"name": name, "seconds": seconds} for name, seconds in self.stages]
        document = {"settings": self.settings, "stages": stages}
        write_atomic(str(self.path), json.dumps(document, indent=2).encode())


def quickstart(job: Job) -> dict[str, Any]:
    """Run the stages that are not finished -> the summary, which is also written to summary.json."""
    check(job)
    with locked(job.out):
        progress = Progress(job)
        progress.save()
        stages: dict[str, Callable[[Job], None]] = {
            "pack": pack, "tokenizer": make_tokenizer, "entities": entities, "warmup": warmup, "attention": attention,
            "train": train, "control": control, "evaluate": evaluate,
        }  # fmt: skip
        for name, run in stages.items():
            if progress.done(name):
                print(f"{name}: done before, skipped")
                continue
            started = time.monotonic()
            run(job)
            progress.record(name, time.monotonic() - started)
        if not progress.done("report"):
            started = time.monotonic()
            write_report(job, progress.stages)
            progress.record("report", time.monotonic() - started)
        summary = summarise(job, progress.stages)
        write_atomic(str(job.out / SUMMARY), (json.dumps(summary, indent=2) + "\n").encode())
        return summary


def check(job: Job) -> None:
    """ValueError for everything that is known to fail later. Call it before anything is written."""
    if not job.drawn:
        if not (job.paired and job.evaluation):
            raise ValueError(
                "with sets of your own, name at least one --paired and one --eval (or none for synthetic data)"
            )
        manifests = [load_manifest(url) for url in job.sets()]
        build_order([JoinedSet(source) for source in phase_config(job, "warmup").data.sources], job.config.data, 0)
        if not any(manifest.labels for manifest in map(load_manifest, job.evaluation_sets())):
            raise ValueError("no --eval set has labels; pack one with --labels-column")
        trained = {shard.sha256 for manifest in manifests for shard in manifest.shards}
        for url in job.evaluation_sets():
            if trained & {shard.sha256 for shard in load_manifest(url).shards}:
                raise ValueError(f"{url} is trained on, so it cannot be evaluated on; name another split as --eval")
    job.config.check_world(job.ranks)


# -- Stages -----------------------------------------------------------------------------------------------------------


def pack(job: Job) -> None:
    """Draw and pack synthetic radiographs. Does nothing for sets given by URL: they are packed already."""
    if not job.drawn:
        print(f"pack: {len(job.sets())} packed sets given")
        return
    drawn = job.synthetic
    parts = {
        "paired": (drawn.paired, {"train": 0.8, "val": 0.05, "test": 0.15}),
        "unpaired": (drawn.unpaired, {"train": 1.0}),
    }
    for name, (count, splits) in parts.items():
        with progress_bar(f"pack {name}", "images") as report:
            pack_synthetic(
                str(job.out / "data" / name), count, seed=drawn.seed, size=drawn.size, splits=splits,
                unpaired=name == "unpaired", workers=cores(), progress=report,
            )  # fmt: skip


def make_tokenizer(job: Job) -> None:
    """Train the WordPiece vocabulary on the training reports."""
    save_tokenizer(tokenizer_of_sets(job.sets()), job.tokenizer)


def entities(job: Job) -> None:
    """Find the entities of all reports, on Ray."""
    jobs = {base: ["mmclip", "entities", base, "--out", job.sidecar("entities", base)] for base in job.with_reports()}
    _run_on_ray(job, "entities", jobs)


def warmup(job: Job) -> None:
    """Contrastive warm-up. Its checkpoint computes the attention scores."""
    _train(job, "warmup", 0)


def attention(job: Job) -> None:
    """Score the patches of every training image with the checkpoint of the warm-up, on Ray."""
    jobs = {}
    for base in job.sets():
        jobs[base] = [
            "mmclip", "attention", base, "--checkpoint", str(job.phase("warmup")), "--out", job.sidecar("attention", base),
            *(["--entities", job.sidecar("entities", base)] if base in job.with_reports() else []),
        ]  # fmt: skip
    _run_on_ray(job, "attention", jobs)


def train(job: Job) -> None:
    """MMCLIP training, resumed from the warm-up."""
    _train(job, "train", phase_config(job, "warmup").optim.last_step)


def control(job: Job) -> None:
    """Contrastive training alone, resumed from the same warm-up, for the processor time that MMCLIP training took."""
    _train(job, "control", phase_config(job, "warmup").optim.last_step)


def control_steps(job: Job) -> int:
    """The step at which the control has had MMCLIP's processor time, by what a step of the warm-up cost: the median of its rows,
    since the first steps of a process cost more."""
    warm, trained = (read_metrics(job.phase(phase)) for phase in ("warmup", "train"))
    before = [0, *(row["step"] for row in warm)]
    per_step = median(row["processor_s"] / (row["step"] - step) for row, step in zip(warm, before, strict=False))
    return int(warm[-1]["step"]) + max(1, round(sum(row["processor_s"] for row in trained) / per_step))


def evaluate(job: Job) -> None:
    """Zero-shot classification of the held-out patients, by both runs."""
    from mmclip_dist.evaluate.zeroshot import save_result, zero_shot

    for phase, name in ZERO_SHOT.items():
        with progress_bar(f"evaluate {phase}", "images") as report:
            result = zero_shot(str(job.phase(phase)), job.evaluation_sets(), report=report)
        save_result(result, job.out / name)


def write_report(job: Job, stages: Sequence[tuple[str, float]]) -> None:
    """report.html: losses, scores, attention on evaluation images."""
    from mmclip_dist.evaluate.report import build_report

    with progress_bar("report") as report:
        report(0, 1)
        build_report(job.out, stages=stages, data=job.evaluation_sets())
        report(1, 1)


# -- How a stage runs -------------------------------------------------------------------------------------------------


def phase_overrides(job: Job, phase: str) -> list[str]:
    """The recipe's overrides for `warmup`, `train` or `control`, as a cluster user would type them."""
    sources = []
    for base in job.sets():
        source: dict[str, Any] = {"url": base, "weight": load_manifest(base).samples}
        if phase == "train":
            source["attention"] = job.sidecar("attention", base)
            if base in job.with_reports():
                source["entities"] = job.sidecar("entities", base)
        sources.append(source)
    given = [
        f"run_dir={job.phase(phase)}", f"data.sources={json.dumps(sources)}", f"model.text.tokenizer={job.tokenizer}"
    ]  # fmt: skip
    resumed = ["optim.stop_at=null", f"checkpoint.start_from={job.phase('warmup')}"]
    if phase == "train":
        return [*job.overrides, *given, *resumed]
    alone = [*job.overrides, *given, "loss.image=0", "loss.entity=0"]
    return alone if phase == "warmup" else [*alone, *resumed, f"optim.steps={control_steps(job)}"]


def phase_config(job: Job, phase: str) -> Config:
    return load_config(RECIPE, phase_overrides(job, phase))


def _train(job: Job, phase: str, first_step: int) -> None:
    """Run one phase of the training through the `deepspeed` launcher. OSError if it stops or fails."""
    config = phase_config(job, phase)
    check_ranks(config, job.ranks)
    command = train_command(RECIPE, phase_overrides(job, phase), job.ranks)
    env = environment({**accelerator_environment(), OWNER: str(os.getpid())})
    log = job.out / "logs" / f"{phase}.log"
    total = config.optim.last_step - first_step
    with progress_bar(phase, "steps") as report, child(command, log, env) as process:
        while process.poll() is None:
            rows = read_metrics(job.phase(phase))
            report(rows[-1]["step"] - first_step if rows else 0, total)
            time.sleep(_POLL_S)
        if process.returncode == EXIT_CODE:
            raise OSError("training was asked to stop, and has saved: run the same command again to go on")
        if process.returncode:
            raise OSError(f"training failed with code {process.returncode}; the end of {log}:\n{last_lines(log)}")
        report(total, total)


def _run_on_ray(job: Job, stage: str, jobs: dict[str, list[str]]) -> None:
    """Run the commands of a stage as Ray jobs at the same time, on a cluster that is started for this stage."""
    import torch

    gpus = torch.cuda.device_count() if stage == "attention" else 0
    workers = max(1, (gpus or cores()) // len(jobs))
    extra = ["--workers", str(workers), *(["--gpus", "1"] if gpus else [])]
    total = sum(len(load_manifest(base).shards) for base in jobs)
    log = job.out / "logs" / f"{stage}.log"
    with progress_bar(stage, "shards") as report:
        report(0, total)
        with local_cluster(job.out / "logs" / "ray.log", cpus=max(cores(), len(jobs)), gpus=gpus) as cluster:
            run_jobs(
                cluster, [[*command, *extra] for command in jobs.values()], log,
                lambda: report(sum(_finished_shards(job.sidecar(stage, base)) for base in jobs), total),
            )  # fmt: skip


def _finished_shards(sidecar: str) -> int:
    if not exists(sidecar):
        return 0
    return sum(name.endswith(".index.json") for name in list_folder(sidecar))


def summarise(job: Job, stages: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """The figures of the whole job, read from the files that the stages wrote."""
    rows = [row for phase in ("warmup", "train") for row in read_metrics(job.phase(phase))]
    terms = {name for row in rows for name in row["loss"]}
    curves = {term: [row["loss"][term] for row in rows if term in row["loss"]] for term in sorted(terms)}
    results = {phase: read_json(job.out / name, "delete the folder to start anew") for phase, name in ZERO_SHOT.items()}
    shots = {phase: {key: found[key] for key in ("auc_macro", "per_class", "auc_macro_ci95")} for phase, found in results.items()}
    times = {phase: sum(row["processor_s"] for row in read_metrics(job.phase(phase))) for phase in ZERO_SHOT}
    return {
        "stages": [{"name": name, "seconds": seconds} for name, seconds in stages],
        "samples": rows[-1]["samples"],
        "world_size": job.ranks,
        "zero_stage": job.config.zero_stage,
        "loss": {term: {"first": values[0], "last": values[-1]} for term, values in curves.items()},
        "zero_shot": shots["train"],
        "processor_s": round(times["train"], 2),
        "control": {
            "zero_shot": shots["control"],
            "processor_s": round(times["control"], 2),
            "steps": read_metrics(job.phase("control"))[-1]["step"],
        },
        "report": str(job.out / "report.html"),
    }
