"""Fine-tuning: the image encoder and a head trained on shares of the labels, chosen on validation patients, tested once.

A share and a seed are a cell: a run folder of its own, trained by `fit.py` as pretraining is, so that it goes on after a kill. A
finished cell leaves its scores and is not run again.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import signal
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from mmclip_shards.document import read_document
from mmclip_shards.manifest import manifest_hash
from mmclip_shards.reader import ShardReader
from mmclip_shards.storage import write_atomic
from mmclip_shards.textfiles import read_json, read_text
from PIL import Image
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor

from mmclip_dist.checkpoint.folder import WEIGHTS, checkpoint_path, checkpoints_of, scores_of
from mmclip_dist.config import (
    Augment,
    Checkpoint,
    Config,
    Data,
    Evaluation,
    FineTune,
    Loss,
    Optim,
    Precision,
    Section,
    Source,
    config_hash,
)  # fmt: skip
from mmclip_dist.data.training import open_training_data
from mmclip_dist.data.transforms import WHOLE, crop_image
from mmclip_dist.engine import watchdog
from mmclip_dist.engine.collective import agreed, first_rank_does, gathered
from mmclip_dist.engine.deepspeed_engine import start_distributed
from mmclip_dist.evaluate.classification import per_class_auc
from mmclip_dist.evaluate.encoders import Encoder, Trained
from mmclip_dist.evaluate.protocol import Columns, Protocol, load_named
from mmclip_dist.evaluate.reading import Known, LabelledImages
from mmclip_dist.fit import Place, Work, fit
from mmclip_dist.model.classifier import Classifier, Weights
from mmclip_dist.run.stop import EXIT_CODE, StopRequest

SETTINGS, SCORES = "finetune.json", "scores.npz"
_DOCUMENT = ("json", "txt")
_MOST_STREAMS = 64
_REFERENCE_BATCH = 1024  # to which optim.lr refers; a recipe's rate is that of its own batch
_TIMEOUT_S = 600.0  # without progress


# -- Recipes ----------------------------------------------------------------------------------------------------------


class Course(Section):
    """What depends on the share of the labels. lr: the peak, at the recipe's batch; warmup, every: steps of the warm-up, and
    between two evaluations on the validation set."""

    lr: float = Field(gt=0)
    steps: int = Field(gt=0)
    warmup: int = Field(0, ge=0)
    every: int = Field(gt=0)

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.warmup >= self.steps:
            raise ValueError(f"a warm-up of {self.warmup} steps leaves none of {self.steps}: lower it")
        return self


class Recipe(Section):
    """The content of a recipe's file: how to fine-tune.

    source: where it comes from, and how it departs from that; courses: share of the labels -> its course; encoder_rate: the rate
    of the encoder relative to the head's; the other names are those of the configuration.
    """

    name: str
    source: str
    optimizer: Literal["sgd", "adamw"] = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)  # of sgd, the first one is the momentum
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    batch: int = Field(gt=0)
    micro_batch: int | None = Field(None, gt=0)
    schedule: Literal["cosine", "linear"] = "cosine"
    layer_decay: float = Field(1.0, gt=0, le=1)
    encoder_rate: float = Field(1.0, gt=0, le=1)
    precision: Precision = "fp32"
    augment: Augment = Augment()
    smoothing: float = Field(0.0, ge=0, lt=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    head_norm: bool = False
    head_deviation: float = Field(2e-5, ge=0)
    patience: int | None = Field(None, gt=0)
    courses: dict[float, Course]

    def course(self, share: float) -> Course:
        """ValueError for a share that the recipe has no values for."""
        if share not in self.courses:
            known = ", ".join(f"{one:g}" for one in sorted(self.courses))
            raise ValueError(
                f"recipe {self.name} has no values for a share of {share:g} of the labels, only for {known}: name one of them "
                "with --share, or give it a course in a file of your own (--recipe FILE.yaml)"
            )
        return self.courses[share]


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a YAML file of the same form. ValueError in one line if there is none or it is odd."""
    return load_named(name, "recipes", Recipe, "recipe")


# -- Which samples ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """The samples of a set that have a label. shards, rows: places [N]; keys, patients [N]; labels [N, C]: 1, 0, -1 unknown."""

    shards: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    patients: np.ndarray
    labels: np.ndarray

    def one_kind(self, classes: Sequence[str], samples: np.ndarray | None = None) -> dict[str, str]:
        """Class -> what some samples, by default all, have none of."""
        labels = self.labels if samples is None else self.labels[samples]
        lacking = {name: [kind for kind, value in (("positives", 1), ("negatives", 0)) if not (labels[:, c] == value).any()]
                   for c, name in enumerate(classes)}  # fmt: skip
        return {name: f"no {' and no '.join(kinds)}" for name, kinds in lacking.items() if kinds}

    def by_shard(self, samples: np.ndarray, shards: int) -> list[list[int]]:
        """The rows of each shard that some samples take."""
        return [np.sort(self.rows[samples[self.shards[samples] == shard]]).tolist() for shard in range(shards)]


def labelled(reader: ShardReader, columns: Columns, classes: Sequence[str], *, exclusive: bool) -> Labelled:
    """Read every document of a set. exclusive: only samples with exactly one of the classes. ValueError if none has a label."""
    places: list[tuple[int, int, str, str]] = []
    labels: list[list[int]] = []
    for shard in range(len(reader.manifest.shards)):
        for row, key in enumerate(reader.keys(shard)):
            try:
                document = read_document(reader.read(shard, key, _DOCUMENT))
            except ValueError:
                continue  # training lists it in its quarantine
            own = [-1] * len(classes)
            for name, column in columns.labels.items():
                value = document.labels.get(name)
                own[column] = value if value in (0, 1) else -1
            if own.count(1) == 1 if exclusive else any(value >= 0 for value in own):
                places.append((shard, row, key, document.patient or key))  # unknown: a patient of its own
                labels.append(own)
    if not places:
        what = "exactly one of the classes" if exclusive else "a label of the classes"
        raise ValueError(f"no sample of {reader.url} has {what} {', '.join(classes[:5])}: pack it with its labels")
    shards, rows, keys, patients = zip(*places, strict=True)
    return Labelled(np.array(shards), np.array(rows), np.array(keys), np.array(patients), np.array(labels))


def subset(found: Labelled, share: float, seed: int) -> np.ndarray:
    """Numbers of the samples of whole patients who have at least a share of the samples, and no patient more than it takes.

    A patient's turn is a hash of seed and patient, so that subsets do not depend on the order of a set, and the smaller one is in
    the larger one.
    """
    names, number, counts = np.unique(found.patients, return_inverse=True, return_counts=True)
    turns = np.array([xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) for name in names], dtype=np.uint64)
    order = np.argsort(turns, kind="stable")
    taken = order[: np.searchsorted(np.cumsum(counts[order]), share * len(number)) + 1]
    return np.flatnonzero(np.isin(number, taken))


def listed(found: Labelled, path: str) -> tuple[np.ndarray, int]:
    """The samples that a text file lists, and how many of its lines name none: the first word of a line is a key, or a file whose
    name without its ending is one. ValueError if it lists none."""
    words = [line.split()[0] for line in read_text(path, "save it as UTF-8").splitlines() if line.strip()]
    known = set(found.keys.tolist())
    wanted = {word if word in known else Path(word).stem for word in words}
    samples = np.flatnonzero(np.isin(found.keys, list(wanted)))
    if not len(samples):
        raise ValueError(f"{path} lists no key of the training set, whose keys are like {found.keys[0]!r}: name those")
    return samples, len(wanted) - len(samples)


# -- Scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Logits and labels [N, C] of the images of a set, patients [N], and keys of the images that cannot be decoded."""

    scores: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    undecodable: np.ndarray


@dataclass(frozen=True)
class _Eye:
    """Decodes images as an evaluation of the encoder does."""

    model: Classifier

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @property
    def blank(self) -> Tensor:
        return torch.zeros(1, 1, *[self.model.config.model.image.size] * 2)

    def pixels(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(crop_image(image, WHOLE, self.model.config.model.image.size))


def score(model: Classifier, images: LabelledImages, stop: StopRequest | None = None) -> Scored | None:
    """Score images by all ranks; None if a stop came in between. A collective call."""
    eye, own = _Eye(model), []
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for some in images.rounds(eye, lambda pixels: (model.logits(pixels),), dist.get_rank(), dist.get_world_size()):
                own.append([(replace(known, reports=[], boxes=[]), scores) for known, (scores,) in some])
                watchdog.beat("scoring images")
                if stop is not None and stop.requested(eye.device):
                    return None
    finally:
        model.train(training)
    rounds = zip_longest(*gathered(own), fillvalue=[])
    batches = [batch for of_round in rounds for of_rank in of_round for batch in of_rank]  # in the order of the set
    known = Known.of_all([known for known, _ in batches])
    scores = np.concatenate([scores for _, scores in batches])
    return Scored(scores, known.labels, np.array(known.patients), np.array(known.undecodable, dtype=str))


class Validation:
    """The evaluation of a cell while it is trained: AUROC on the validation set. ValueError if no class can be measured."""

    def __init__(self, run_dir: Path, images: LabelledImages, every: int, last: int, patience: int | None) -> None:
        self.run_dir, self.images, self.every, self.last, self.patience = run_dir, images, every, last, patience

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.last

    def missed(self, step: int) -> bool:
        """A stop at a step whose scores were due leaves a checkpoint without."""
        return step > 0 and self.due(step) and first_rank_does(lambda: self._scores().get(step) is None, "reading scores")

    def scores(self, engine: Any, stop: StopRequest) -> dict[str, float] | None:
        found = score(engine.module, self.images, stop)
        if found is None:
            return None
        aucs = per_class_auc(found.scores, found.labels)
        named = {name: float(auc) for name, auc in zip(self.images.classes, aucs, strict=True) if not np.isnan(auc)}
        return {"macro": float(np.mean(list(named.values())))} | named if named else {}

    def enough(self, step: int) -> bool:
        """Whether `patience` evaluations have passed since the best one. The checkpoints tell, so a resumed run decides alike."""
        if self.patience is None or step == 0 or step % self.every:
            return False
        return first_rank_does(lambda: step - self.best()[0] >= (self.patience or 0) * self.every, "reading scores")

    def best(self) -> tuple[int, float]:
        """Step and score of the best checkpoint, the latest of equal ones. ValueError if none was scored: training diverged."""
        known = [(value, step) for step, value in self._scores().items() if value is not None]
        if not known:
            raise ValueError(
                f"no checkpoint in {self.run_dir} has a score on the validation set: its scores are not finite, so training has "
                "diverged; lower the recipe's lr"
            )
        value, step = max(known)
        return step, value

    def _scores(self) -> Mapping[int, float | None]:
        return scores_of(checkpoints_of(self.run_dir))


# -- Cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A finished cell. n_train: images that it was trained on; step: of the best checkpoint, auroc: its macro AUROC on the
    validation set; one_kind: class -> what its training images have none of; unlisted: lines of a list that name no image."""

    test: Scored
    validation: Scored
    n_train: int
    step: int
    auroc: float
    one_kind: dict[str, str]
    unlisted: int

    def save(self, path: Path) -> None:
        about = {name: getattr(self, name) for name in _ABOUT}
        arrays = {f"{name}_{part}": value for name in _SCORED for part, value in vars(getattr(self, name)).items()}
        buffer = BytesIO()
        np.savez_compressed(buffer, about=np.array(json.dumps(about)), **arrays)
        write_atomic(str(path), buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Cell:
        try:
            with np.load(path, allow_pickle=False) as stored:
                scored = {name: Scored(**{part: stored[f"{name}_{part}"] for part in Scored.__annotations__}) for name in _SCORED}
                return cls(scored["test"], scored["validation"], **json.loads(str(stored["about"])))
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and its share and seed are scored again") from error


_SCORED, _ABOUT = ("test", "validation"), ("n_train", "step", "auroc", "one_kind", "unlisted")


class Stopped(Exception):
    """A cell was asked to stop and has saved. code: what the process ends with."""

    def __init__(self, told: str, code: int) -> None:
        super().__init__(told)
        self.code = code


class FineTuning:
    """All cells of one model on one training, validation and test set, in one folder.

    train, validation: with their columns; tests likewise, one for each test set. ValueError if the folder holds another
    fine-tuning.
    """

    def __init__(
        self, encoder: Trained, protocol: Protocol, classes: Sequence[str], recipe: Recipe, folder: Path, place: Place, *,
        train: tuple[ShardReader, Columns], validation: tuple[ShardReader, Columns],
        tests: tuple[Sequence[ShardReader], Sequence[Columns]],
    ) -> None:  # fmt: skip
        self.encoder, self.protocol, self.classes, self.recipe = encoder, protocol, tuple(classes), recipe
        self.folder, self.place, (self.train, self.columns) = folder, place, train
        self.tests = LabelledImages(*tests, self.classes)
        self.validation = LabelledImages([validation[0]], [validation[1]], self.classes)
        with agreed():
            lacking = [name for column, name in enumerate(self.classes) if column not in self.columns.labels.values()]
            if lacking:
                raise ValueError(
                    f"{self.train.url} lacks labels that the test set has, so they cannot be learned: {', '.join(lacking)}; "
                    "name another set with --train, or a protocol of the classes that both have"
                )
            self._check_folder([manifest_hash(reader.manifest) for reader in (train[0], validation[0], *tests[0])])
            self.labelled = labelled(*train, self.classes, exclusive=protocol.exclusive)
            chosen_on = labelled(*validation, self.classes, exclusive=False)
            if len(chosen_on.one_kind(self.classes)) == len(self.classes):
                raise ValueError(
                    f"{validation[0].url} has no class with both positives and negatives, so no checkpoint can be chosen on it: "
                    "name a larger one with --validation"
                )

    def _check_folder(self, sets: list[str]) -> None:
        protocol = self.protocol.model_dump(mode="json", exclude={"train_lists"})
        settings = json.loads(json.dumps({
            "checkpoint": self.encoder.sha256, "protocol": protocol, "classes": self.classes,
            "recipe": self.recipe.model_dump(mode="json"), "train": sets[0], "validation": sets[1], "test": sets[2:],
        }))  # fmt: skip
        path = self.folder / SETTINGS
        if path.is_file():
            before = read_json(path, "name another folder with --folder")
            differing = [name for name, value in settings.items() if before.get(name) != value]
            if differing:
                raise ValueError(
                    f"{self.folder} holds a fine-tuning with another {', '.join(differing)}: name another folder with --folder, "
                    "or delete this one"
                )
        elif dist.get_rank() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomic(str(path), json.dumps(settings, indent=1).encode())
            except OSError as error:
                raise ValueError(f"--folder {self.folder} cannot be written to: {error.strerror}; name another one") from error

    def cell(self, share: float, seed: int) -> Cell:
        """Train and test a cell, or load it if that was done. Stopped if a stop was asked for. A collective call."""
        try:
            return self._cell(share, seed)
        finally:
            watchdog.rest()  # figures of large sets take a while
            gc.collect()  # an engine holds itself in cycles, and the memory of the next one

    def _cell(self, share: float, seed: int) -> Cell:
        folder = self.folder / f"share-{share:g}" / f"seed-{seed}"
        if first_rank_does((folder / SCORES).is_file, "looking for scores"):
            return Cell.load(folder / SCORES)
        samples, unlisted = self.samples(share, seed)
        config = self.config(folder, share, seed, samples)
        assert config.finetune is not None
        told = f"{100 * share:g}% of the labels, seed {seed}"
        if dist.get_rank() == 0:
            patients = len(np.unique(self.labelled.patients[samples]))
            print(f"{told}: {len(samples)} images of {patients} patients, in {folder}", flush=True)
        validation = Validation(
            folder, self.validation, config.evaluation.every, config.optim.last_step, config.finetune.patience
        )  # fmt: skip
        stop = StopRequest(folder)
        with _interrupts(stop) as interrupted:
            if not fit(config, stop, self.place, partial(self._opened, config, samples, validation)):
                raise Stopped(f"{told}: stopped and saved", 130 if interrupted() else EXIT_CODE)
            step, auroc = first_rank_does(validation.best, "reading scores")
            model = self._model(config)
            model.load_state_dict(load_file(checkpoint_path(folder, step) / WEIGHTS))
            scored = [score(model.to(self.place.device), images, stop) for images in (self.tests, self.validation)]
        if scored[0] is None or scored[1] is None:
            raise Stopped(f"{told}: stopped; it is trained, and not tested yet", 130 if interrupted() else EXIT_CODE)
        cell = Cell(scored[0], scored[1], len(samples), step, auroc, self.labelled.one_kind(self.classes, samples), unlisted)
        first_rank_does(lambda: cell.save(folder / SCORES), "saving scores")
        return cell

    def samples(self, share: float, seed: int) -> tuple[np.ndarray, int]:
        """Numbers of the samples of a cell, and how many lines of a protocol's own list name none."""
        if share in self.protocol.train_lists:
            return listed(self.labelled, self.protocol.train_lists[share])
        return subset(self.labelled, share, seed), 0

    def config(self, folder: Path, share: float, seed: int, samples: np.ndarray) -> Config:
        """The configuration of a cell: the model's own, trained as the recipe says."""
        recipe, course, own = self.recipe, self.recipe.course(share), self.encoder.model.config
        names = {column: name for name, column in self.columns.labels.items()}
        workers = min(8, (os.cpu_count() or 1) // self.place.world) if torch.cuda.is_available() else 0
        return Config(
            run_dir=str(folder), seed=seed, precision=recipe.precision, log_every=50, model=own.model,
            data=Data(
                sources=(Source(url=str(self.train.url)),), streams=_streams(recipe.batch, len(samples)), workers=workers,
                max_bad_fraction=own.data.max_bad_fraction, augment=recipe.augment,
            ),
            optim=Optim(
                name=recipe.optimizer, betas=recipe.betas, weight_decay=recipe.weight_decay, clip=recipe.clip,
                layer_decay=recipe.layer_decay, encoder_rate=recipe.encoder_rate, schedule=recipe.schedule,
                global_batch=recipe.batch, micro_batch=recipe.micro_batch, lr=course.lr * _REFERENCE_BATCH / recipe.batch,
                steps=course.steps, warmup=course.warmup / course.steps,
            ),
            loss=Loss(image=0.0, entity=0.0),
            checkpoint=Checkpoint(every=course.every, keep=1, keep_best=1), evaluation=Evaluation(every=course.every),
            finetune=FineTune(
                checkpoint=self.encoder.sha256, classes=self.classes, labels=tuple(names[c] for c in range(len(names))),
                exclusive=self.protocol.exclusive, samples=config_hash(sorted(self.labelled.keys[samples].tolist())),
                smoothing=recipe.smoothing, drop_path=recipe.drop_path, head_norm=recipe.head_norm,
                head_deviation=recipe.head_deviation, patience=recipe.patience,
            ),
        )  # fmt: skip

    def _opened(self, config: Config, samples: np.ndarray, validation: Validation, held: ExitStack) -> Work:
        rows = self.labelled.by_shard(samples, len(self.train.manifest.shards))
        data = held.enter_context(open_training_data(config, self.encoder.tokenizer, self.place.world, rows))
        width = self.encoder.model.text.width
        return Work(data, self._model(config), Weights(), self.encoder.tokenizer, width, validation, enough=validation.enough)

    def _model(self, config: Config) -> Classifier:
        return Classifier(config, copy.deepcopy(self.encoder.model.image).cpu()).train()


def _streams(batch: int, samples: int) -> int:
    """The most streams that divide a batch and have a sample each."""
    return max(count for count in range(1, min(_MOST_STREAMS, samples) + 1) if batch % count == 0)


# -- The process ------------------------------------------------------------------------------------------------------


def threads_of(encoder: Encoder) -> int | None:
    """The torch threads that the model's own run had on a CPU. ValueError for a model of another package."""
    if not isinstance(encoder, Trained):
        raise ValueError(f"{encoder.name} is no run of this package, whose image encoder is fine-tuned: evaluate a probe of it")
    threads: int | None = encoder.model.config.threads
    return threads


@contextmanager
def joined(threads: int | None) -> Iterator[Place]:
    """Join the ranks of a launcher, or be the only one. threads: of torch on a CPU; None: cores / ranks."""
    alone = {} if "RANK" in os.environ else {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"
    }  # fmt: skip
    os.environ.update(alone)
    try:
        place = Place(*start_distributed(threads, _TIMEOUT_S))
        watchdog.rest()  # until training begins: sets are read first
        yield place
    finally:
        watchdog.rest()
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in alone:
            os.environ.pop(name, None)


@contextmanager
def _interrupts(stop: StopRequest) -> Iterator[Any]:
    """Inside, the first Ctrl-C asks for a stop, which saves; the second one interrupts at once. Yields whether one came."""
    came: list[int] = []

    def ask(number: int, frame: object) -> None:
        came.append(number)
        stop.ask("Ctrl-C")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def parse_shares(text: str) -> tuple[float, ...]:
    """Shares of the labels, "0.01,0.1,1.0". ValueError for what is none."""
    return tuple(_numbers(text, "--share", "shares of the labels above 0 and up to 1", float, lambda share: 0 < share <= 1))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds, "1,2,3". ValueError for what is none."""
    return tuple(_numbers(text, "--seeds", "whole numbers from 0", int, lambda seed: seed >= 0))


def _numbers(text: str, option: str, what: str, kind: Any, legal: Any) -> list[Any]:
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(value) and legal(value) for value in found) or len(set(found)) < len(found):
        raise ValueError(f"{option} {text}: give different {what}, with commas between them")
    return found
