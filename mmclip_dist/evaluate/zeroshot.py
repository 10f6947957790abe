"""Zero-shot classification: how much closer an image is to "There is X." than to "No evidence of X."."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmclip_shards.document import read_document
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.storage import write_atomic
from mmclip_shards.textfiles import read_json
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmclip_dist.checkpoint.folder import read_meta, weights_hash
from mmclip_dist.checkpoint.mirror import local_checkpoint
from mmclip_dist.checkpoint.model_files import load_model
from mmclip_dist.config import Config
from mmclip_dist.data.batch import Example, collate
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.prompts import load_prompts, tokenize_prompts
from mmclip_dist.evaluate.metrics import macro_auc_interval, per_class_auc
from mmclip_dist.model.mmclip import MMCLIP

_BATCH = 128


@dataclass(frozen=True)
class ZeroShot:
    """The result; per_class holds classes with both positives and negatives, left_out the others."""

    auc_macro: float
    auc_macro_ci95: tuple[float, float]
    per_class: dict[str, float]
    left_out: tuple[str, ...]
    samples: int
    undecodable: tuple[str, ...]  # keys of the images that could not be decoded
    patients: int
    datasets: tuple[str, ...]
    checkpoint: str  # sha256 of the weights


def zero_shot(
    checkpoint: str, urls: Sequence[str], *, allow_leak: bool = False, average: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> ZeroShot:  # fmt: skip
    """Evaluate a checkpoint (or a run's or a mirror URL's newest) on packed, labelled sets. report(done, total) in samples.

    average: use the exponential average of the weights instead of the last ones. ValueError if the run kept no average, if a
    set was trained on (unless allow_leak), or if no class has positives and negatives.
    """
    with local_checkpoint(checkpoint) as folder:
        sets = labelled_sets(urls, () if allow_leak else read_meta(folder).trained_on)
        model, tokenizer, config, _ = load_model(folder, average=average)
        weights = weights_hash(folder, average=average)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    evaluation = Evaluation(sets, config, tokenizer)
    done = 0
    scored: list[Scored] = []
    for some in evaluation.rounds(model, 0, 1):
        scored += some
        done += sum(len(batch.patients) + len(batch.undecodable) for batch in some)
        if report:
            report(done, evaluation.samples)
    return evaluation.summary(scored, weights)


def labelled_sets(urls: Sequence[str], trained_on: Sequence[str]) -> list[ShardReader]:
    """Open sets to evaluate on. ValueError if one has no labels, or shares a shard (by sha256) with `trained_on`."""
    readers = [ShardReader(url, load_manifest(url)) for url in urls]
    for reader in readers:
        if not reader.manifest.labels:
            raise ValueError(f"{reader.url} has no labels to evaluate on; pack it with --labels-column")
        if set(trained_on) & {shard.sha256 for shard in reader.manifest.shards}:
            raise ValueError(
                f"{reader.url} was trained on, so its scores would say nothing; evaluate on another split or set, "
                "or pass --allow-leak"
            )
    return readers


@dataclass(frozen=True)
class Scored:
    """One batch: scores and labels [N, C], the patient of each row, and the keys of images that could not be decoded."""

    scores: np.ndarray
    labels: np.ndarray
    patients: list[str]
    undecodable: list[str]


class Evaluation:
    """Zero-shot classification on some sets, by one process, or by all ranks of a training run with a share each."""

    def __init__(self, sets: Sequence[ShardReader], config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self.sets, self.tokenizer = sets, tokenizer
        self.samples = sum(reader.manifest.samples for reader in sets)
        self.classes = tuple(dict.fromkeys(name for reader in sets for name in reader.manifest.labels))
        prompts = load_prompts(self.classes, config.prompts.file)
        self.prompts = tokenize_prompts(prompts, tokenizer, config.model.text.max_tokens)
        self.size = config.model.image.size
        self.maker = ExampleMaker(
            tokenizer, self.classes, self.size, config.model.image.grid, config.model.text.max_tokens, config.entmlm,
            augment=None,
        )  # fmt: skip

    def rounds(self, model: MMCLIP, rank: int, world: int) -> Iterator[list[Scored]]:
        """Score the rank's batches, one in each round; [] in rounds after its last batch.

        Every rank runs the same modules in every round, as ZeRO-3 needs. All ranks may stop between two rounds, so every
        caller must take or stop at the same round.
        """
        device, training = model.log_scale.device, model.training
        model.eval()
        try:
            with torch.no_grad():
                directions = class_directions(model, *(tensor.to(device) for tensor in self.prompts))
            shares = self._shares(rank, world)
            for _ in range(-(-self.samples // (_BATCH * world))):
                rows = next(shares, None)
                examples, patients, undecodable = self._examples(rows or [])
                batch = collate(examples, 0, self.tokenizer.pad_token_id) if examples else None
                images = torch.zeros(1, 1, self.size, self.size) if batch is None else batch["image"]
                with torch.no_grad():
                    scores = (model.embed_images(images.to(device)) @ directions.T).float().cpu().numpy()
                if rows is None:
                    yield []
                else:
                    labels = np.zeros((0, len(self.classes)), int) if batch is None else batch["labels"].numpy()
                    yield [Scored(scores[: len(patients)], labels, patients, undecodable)]
        finally:
            model.train(training)

    def summary(self, scored: Sequence[Scored], checkpoint: str) -> ZeroShot:
        """The result of all batches. ValueError if no image can be decoded or no class has positives and negatives."""
        undecodable = [key for batch in scored for key in batch.undecodable]
        patients = [patient for batch in scored for patient in batch.patients]
        if not patients:
            raise ValueError(
                f"none of the {self.samples} images can be decoded ({', '.join(undecodable[:3])} ...): pack the set again"
            )
        return _summarise(
            np.concatenate([batch.scores for batch in scored]), np.concatenate([batch.labels for batch in scored]),
            np.array(patients), undecodable, self.classes,
            tuple(dict.fromkeys(f"{r.manifest.dataset}/{r.manifest.split}" for r in self.sets)), checkpoint,
        )  # fmt: skip

    def _shares(self, rank: int, world: int) -> Iterator[list[tuple[ShardReader, int, int]]]:
        """Batches of (set, shard, row) of this rank: every world-th batch, in order."""
        rows = (
            (reader, number, row)
            for reader in self.sets
            for number, shard in enumerate(reader.manifest.shards)
            for row in range(shard.samples)
        )
        for index in count():
            batch = list(islice(rows, _BATCH))
            if not batch:
                return
            if index % world == rank:
                yield batch

    def _examples(self, rows: list[tuple[ShardReader, int, int]]) -> tuple[list[Example], list[str], list[str]]:
        for (reader, number), some in groupby(rows, key=lambda place: place[:2]):
            reader.prefetch(number, [row for *_, row in some])
        examples: list[Example] = []
        patients, undecodable = [], []
        for reader, number, row in rows:
            key = reader.keys(number)[row]
            members = reader.read(number, key)
            try:
                examples.append(self.maker(key, members, epoch=0))
            except ValueError:
                undecodable.append(key)
                continue
            patients.append(read_document(members).patient or key)  # unknown: a patient of its own
        return examples, patients, undecodable


def class_directions(model: MMCLIP, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean positive minus mean negative prompt embedding of each class. tokens, mask [R, 2C, T] -> [C, E].

    The inner product of an image with it is CheXzero's difference of similarities, averaged over R templates.
    """
    embedded = torch.stack([model.embed_texts(t, m) for t, m in zip(tokens, mask, strict=True)]).mean(0)
    present, absent = embedded.chunk(2)
    return present - absent


def _summarise(
    scores: np.ndarray, labels: np.ndarray, patients: np.ndarray, undecodable: Sequence[str], classes: Sequence[str],
    datasets: tuple[str, ...], checkpoint: str,
) -> ZeroShot:  # fmt: skip
    aucs = per_class_auc(scores, labels)
    measured = ~np.isnan(aucs)
    if not measured.any():
        raise ValueError("no class has both positive and negative samples here: evaluate on a larger labelled split")
    interval = macro_auc_interval(scores[:, measured], labels[:, measured], patients)
    return ZeroShot(
        auc_macro=float(aucs[measured].mean()),
        auc_macro_ci95=interval,
        per_class={name: float(auc) for name, auc, known in zip(classes, aucs, measured, strict=True) if known},
        left_out=tuple(name for name, known in zip(classes, measured, strict=True) if not known),
        samples=len(scores),
        undecodable=tuple(undecodable),
        patients=len(np.unique(patients)),
        datasets=datasets,
        checkpoint=checkpoint,
    )


def save_result(result: ZeroShot, path: Path) -> None:
    write_atomic(str(path), (json.dumps(asdict(result), indent=2) + "\n").encode())


def load_result(path: Path) -> ZeroShot:
    values = read_json(path, "evaluate again")
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return ZeroShot(**fields)
