"""Zero-shot classification: how much closer an image is to "There is X." than to "No evidence of X."."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmclip_shards.document import read_document
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.storage import write_atomic
from torch import Tensor

from mmclip_dist.data.batch import Batch, Example, collate, to_device
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.engine.checkpoint import load_model
from mmclip_dist.engine.checkpoint_folder import read_meta, resolve_checkpoint, weights_hash
from mmclip_dist.evaluate.metrics import macro_auc_interval, per_class_auc
from mmclip_dist.model.mmclip import MMCLIP
from mmclip_dist.model.prompts import load_prompts, tokenize_prompts

_BATCH = 128


@dataclass(frozen=True)
class ZeroShot:
    """The result; per_class holds classes with both positives and negatives, left_out the others."""

    auc_macro: float
    auc_macro_ci95: tuple[float, float]
    per_class: dict[str, float]
    left_out: tuple[str, ...]
    samples: int
    undecodable: tuple[str, ...]  # keys of the images that no score could be made of
    patients: int
    datasets: tuple[str, ...]
    checkpoint: str  # sha256 of the weights


def zero_shot(
    checkpoint: str, urls: Sequence[str], *, allow_leak: bool = False, average: bool = False,
    report: Callable[[int, int], None] | None = None,
) -> ZeroShot:  # fmt: skip
    """Evaluate a checkpoint (or a run's newest) on packed, labelled sets. report(done, total) in samples.

    average: the exponential average of the weights, not the last ones. ValueError if the run kept none, if a set was trained
    on, unless allow_leak, or if no class has positives and negatives.
    """
    folder = resolve_checkpoint(checkpoint)
    manifests = [load_manifest(url) for url in urls]
    trained_on = set(read_meta(folder).trained_on)
    for url, manifest in zip(urls, manifests, strict=True):
        if not manifest.labels:
            raise ValueError(f"{url} has no labels to evaluate on; pack it with --labels-column")
        if not allow_leak and trained_on & {shard.sha256 for shard in manifest.shards}:
            raise ValueError(
                f"{url} was trained on, so its scores would say nothing; evaluate on another split or set, "
                "or pass --allow-leak"
            )
    model, tokenizer, config, _ = load_model(folder, average=average)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    classes = tuple(dict.fromkeys(name for manifest in manifests for name in manifest.labels))
    prompts = tokenize_prompts(load_prompts(classes, config.prompts.file), tokenizer, config.model.text.max_tokens)
    maker = ExampleMaker(
        tokenizer, classes, config.model.image.size, config.model.image.grid, config.model.text.max_tokens,
        config.entmlm, augment=None,
    )  # fmt: skip
    total = sum(manifest.samples for manifest in manifests)
    scores, labels = [], []
    patients: list[str] = []
    undecodable: list[str] = []
    with torch.inference_mode():
        directions = class_directions(model, *(tensor.to(device) for tensor in prompts))
        for batch, owners in _batches(urls, maker, tokenizer.pad_token_id, undecodable):
            moved = to_device(batch, device)
            scores.append((model.embed_images(moved["image"]) @ directions.T).cpu().numpy())
            labels.append(batch["labels"].numpy())
            patients += owners
            if report:
                report(len(patients) + len(undecodable), total)
    if not scores:
        raise ValueError(
            f"none of the {total} images can be decoded ({', '.join(undecodable[:3])} ...): pack the set again"
        )
    return _summarise(
        np.concatenate(scores), np.concatenate(labels), np.array(patients), undecodable, classes,
        tuple(dict.fromkeys(f"{manifest.dataset}/{manifest.split}" for manifest in manifests)),
        weights_hash(folder, average=average),
    )  # fmt: skip


def class_directions(model: MMCLIP, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean positive minus mean negative prompt embedding of each class. tokens, mask [R, 2C, T] -> [C, E].

    The inner product of an image with it is CheXzero's difference of similarities, averaged over R templates.
    """
    embedded = torch.stack([model.embed_texts(t, m) for t, m in zip(tokens, mask, strict=True)]).mean(0)
    present, absent = embedded.chunk(2)
    return present - absent


def _batches(
    urls: Sequence[str], maker: ExampleMaker, padding: int, undecodable: list[str]
) -> Iterator[tuple[Batch, list[str]]]:
    """(batch, patients) over all samples of the sets, in their order; keys that cannot be decoded go to `undecodable`."""
    for url in urls:
        reader = ShardReader(url, load_manifest(url))
        examples: list[Example] = []
        owners: list[str] = []
        for number in range(len(reader.manifest.shards)):
            for key, members in reader.samples(number):
                try:
                    examples.append(maker(key, members, epoch=0))
                except ValueError:
                    undecodable.append(key)
                    continue
                owners.append(read_document(members).patient or key)  # unknown: a patient of its own
                if len(examples) == _BATCH:
                    yield collate(examples, 0, padding), owners
                    examples, owners = [], []
        if examples:
            yield collate(examples, 0, padding), owners


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
    values = json.loads(path.read_text())
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return ZeroShot(**fields)
