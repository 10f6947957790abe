"""Zero-shot classification: how much closer an image is to prompts that state a class than to prompts that deny it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.storage import write_atomic
from mmclip_shards.textfiles import read_json
from torch import Tensor

from mmclip_dist.evaluate.classification import auc_intervals, per_class_auc, per_class_roc
from mmclip_dist.evaluate.encoders import Encoder, open_encoder
from mmclip_dist.evaluate.leaks import check, refuse_trained
from mmclip_dist.evaluate.protocol import OWN, Prompts, Protocol, check_prompts, load_protocol, matched, own_prompts
from mmclip_dist.evaluate.reading import Known, LabelledImages
from mmclip_dist.evaluate.result import MACRO, roc_curves
from mmclip_dist.model.mmclip import MMCLIP

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class ZeroShot:
    """The result; per_class holds classes with both positives and negatives, left_out the others. *_ci95: 95% intervals."""

    auc_macro: float
    auc_macro_ci95: tuple[float, float]
    per_class: dict[str, float]
    left_out: tuple[str, ...]
    samples: int
    undecodable: tuple[str, ...]  # keys of the images that could not be decoded
    patients: int
    datasets: tuple[str, ...]
    checkpoint: str  # sha256 of the weights
    per_class_ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    protocol: str = OWN
    roc: dict[str, list[float]] = field(default_factory=dict)  # as in `Measured`; empty in results that older versions wrote


def zero_shot(
    checkpoint: str, urls: Sequence[str], *, allow_leak: bool = False, average: bool = False, report: Report | None = None
) -> ZeroShot:
    """Evaluate a checkpoint (or a run's or a mirror URL's newest) on packed, labelled sets. report(done, total) in samples.

    average: use the exponential average of the weights instead of the last ones. ValueError if the run kept no average, if a
    set was trained on (unless allow_leak), or if no class has positives and negatives.
    """
    with open_encoder(checkpoint, average=average) as encoder:
        sets = labelled_sets(urls, ())
        check(sets, encoder.trained_on, encoder.seen, allow=allow_leak)
        evaluation = Evaluation(sets, load_protocol(OWN), encoder.prompts)
        return evaluation.summary(evaluation.scored(encoder, report), encoder.sha256)


def labelled_sets(urls: Sequence[str], trained_on: Sequence[str]) -> list[ShardReader]:
    """Open sets to evaluate on. ValueError if one has no labels, or shares a shard (by sha256) with `trained_on`."""
    readers = [ShardReader(url, load_manifest(url)) for url in urls]
    for reader in readers:
        if not reader.manifest.labels:
            raise ValueError(f"{reader.url} has no labels to evaluate on; pack it with --labels-column")
    refuse_trained(readers, trained_on)
    return readers


@dataclass(frozen=True)
class Scored:
    """One batch: scores [N, C] and what is known of its images."""

    scores: np.ndarray
    known: Known


class Evaluation:
    """Zero-shot classification on some sets, by one process, or by all ranks of a training run with a share each.

    prompts_file: that of the model's configuration, for a protocol without classes of its own. ValueError if the sets do not have
    what the protocol needs.
    """

    def __init__(self, sets: Sequence[ShardReader], protocol: Protocol, prompts_file: str | None) -> None:
        self.sets = sets
        self.classes, columns = matched(protocol, sets)
        self.prompts: Prompts = protocol.prompts() if protocol.classes else own_prompts(self.classes, prompts_file)
        self.unknown = tuple(dict.fromkeys(name for one in columns for name in one.unknown))
        self.images = LabelledImages(sets, columns, self.classes)
        self.samples = self.images.samples

    def check(self, encoder: Encoder) -> None:
        """ValueError for a prompt that the model would cut."""
        check_prompts(self.prompts, encoder.tokens, encoder.window)

    def rounds(self, encoder: Encoder, rank: int, world: int) -> Iterator[list[Scored]]:
        """Score the rank's batches, one in each round, as `LabelledImages.rounds` says."""
        with encoder.evaluating():
            for some in self.images.rounds(encoder, self._scores(encoder), rank, world):
                yield [Scored(scores, known) for known, (scores,) in some]

    def scored(self, encoder: Encoder, report: Report | None = None) -> list[Scored]:
        """All batches, on every rank: see `LabelledImages.all`. ValueError as of `check`."""
        self.check(encoder)
        with encoder.evaluating():
            scores = self._scores(encoder)
            return self.images.all(encoder, scores, lambda known, found: Scored(found[0], known), report)

    def _scores(self, encoder: Encoder) -> Callable[[Tensor], tuple[Tensor]]:
        directions = prompt_directions(encoder, self.prompts)
        return lambda pixels: (encoder.embed_images(pixels) @ directions.T,)

    def summary(self, scored: Sequence[Scored], checkpoint: str) -> ZeroShot:
        """The result of all batches. ValueError if no image can be decoded or no class has positives and negatives."""
        known = Known.of_all([batch.known for batch in scored])
        return _summarise(
            np.concatenate([batch.scores for batch in scored]), known.labels, np.array(known.patients), known.undecodable,
            self.classes, tuple(dict.fromkeys(f"{r.manifest.dataset}/{r.manifest.split}" for r in self.sets)), checkpoint,
        )  # fmt: skip


def prompt_directions(encoder: Encoder, prompts: Prompts) -> Tensor:
    """Mean embedding of the prompts that state a class, minus that of those that deny it, if there are any [C, E].

    The inner product of an image with it is CheXzero's difference of similarities, averaged over the prompts.
    """
    texts = [text for one in prompts.values() for text in (*one.present, *one.absent)]
    embedded = encoder.embed_texts(texts)
    directions, first = [], 0
    for one in prompts.values():
        middle, last = first + len(one.present), first + len(one.present) + len(one.absent)
        stated = embedded[first:middle].mean(0)
        directions.append(stated - embedded[middle:last].mean(0) if one.absent else stated)
        first = last
    return torch.stack(directions)


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
    around = auc_intervals(scores[:, measured], labels[:, measured], patients)
    names = [name for name, known in zip(classes, measured, strict=True) if known]
    return ZeroShot(
        auc_macro=float(aucs[measured].mean()),
        auc_macro_ci95=around.macro,
        per_class=dict(zip(names, map(float, aucs[measured]), strict=True)),
        left_out=tuple(name for name, known in zip(classes, measured, strict=True) if not known),
        samples=len(scores),
        undecodable=tuple(undecodable),
        patients=len(np.unique(patients)),
        datasets=datasets,
        checkpoint=checkpoint,
        roc=roc_curves(names, per_class_roc(scores[:, measured], labels[:, measured])),
        per_class_ci95=dict(zip(names, around.classes, strict=True)),
    )


def save_result(result: ZeroShot, path: Path) -> None:
    write_atomic(str(path), (json.dumps(asdict(result), indent=2) + "\n").encode())


def load_result(path: Path) -> ZeroShot:
    """The result of `zero_shot`, or what it has in common with that of `mmclip evaluate zeroshot`. ValueError for other files."""
    values = read_json(path, "evaluate again")
    try:
        if values.get("task") == "zeroshot":
            around = _intervals(values["ci95"]["auroc"])
            return ZeroShot(
                values["auroc_macro"], around.pop(MACRO), values["auroc"], tuple(values["left_out"]), values["n"],
                tuple(values["undecodable"]), values["n_patients"], tuple(values["sets"]), values["checkpoint_sha256"],
                around, values["protocol"], values.get("roc", {}),
            )  # fmt: skip
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return ZeroShot(**fields | {"per_class_ci95": _intervals(values.get("per_class_ci95", {}))})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no result of a zero-shot evaluation ({error}): evaluate again") from error


def _intervals(stored: dict[str, list[float | None]]) -> dict[str, tuple[float, float]]:
    """A class -> its interval, as JSON holds them: null is nan."""
    nan = float("nan")
    return {name: (nan if low is None else low, nan if high is None else high) for name, (low, high) in stored.items()}
