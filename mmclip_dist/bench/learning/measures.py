"""What a checkpoint has learned, as arrays with one row a held-out sample: so that arms are compared on the same patients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmclip_shards.document import json_fields, read_document
from mmclip_shards.reader import iterate
from torch import Tensor
from torch.nn import functional as F

from mmclip_dist.checkpoint.model_files import load_model
from mmclip_dist.data.batch import Batch, Example, collate
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.prompts import load_prompts, tokenize_prompts
from mmclip_dist.evaluate.pointing import covered, pointed
from mmclip_dist.evaluate.probe import SHARES, Featured, probe
from mmclip_dist.evaluate.retrieval import hits, ranks
from mmclip_dist.evaluate.zeroshot import class_directions
from mmclip_dist.model.inputs import Plan
from mmclip_dist.model.masking import patch_pixels
from mmclip_dist.model.mmclip import MMCLIP

_BATCH = 250


@dataclass(frozen=True)
class HeldOut:
    """A labelled set in memory. labels [N, C]; boxes: finding -> rectangles [n, 4] (left, top, right, bottom in shares of the
    image), of each sample."""

    examples: list[Example]
    patients: np.ndarray
    labels: np.ndarray
    boxes: list[dict[str, np.ndarray]]

    def batches(self, padding: int) -> Iterator[Batch]:
        for start in range(0, len(self.examples), _BATCH):
            yield collate(self.examples[start : start + _BATCH], 0, padding)


def read_held_out(url: str, maker: ExampleMaker, entities: str | None = None) -> HeldOut:
    """Read a set whole. entities: its sidecar, where masked entities are to be measured."""
    spans = dict(iterate(entities)) if entities else {}
    examples, patients, boxes = [], [], []
    for key, members in iterate(url):
        examples.append(maker(key, {**members, **spans.get(key, {})}, epoch=0))
        fields = json_fields(members["json"])
        patients.append(read_document(members).patient or key)
        found: dict[str, list[list[float]]] = {}
        for box in fields.get("boxes", []):
            left, top = box["x"] / fields["width"], box["y"] / fields["height"]
            corners = [left, top, left + box["width"] / fields["width"], top + box["height"] / fields["height"]]
            found.setdefault(box["label"], []).append(corners)
        boxes.append({name: np.array(rows) for name, rows in found.items()})
    labels = np.stack([example["labels"].numpy() for example in examples])
    return HeldOut(examples, np.array(patients), labels, boxes)


def measure_to(task: tuple[Path, Mapping[str, str], str, Path]) -> None:
    """Write what `measure` finds to a file: the work of one process."""
    checkpoint, sets, entities, out = task
    torch.set_num_threads(1)
    partial = out.with_suffix(".part.npz")
    np.savez_compressed(partial, **measure(checkpoint, sets, entities))
    partial.replace(out)


def measure(checkpoint: Path, sets: Mapping[str, str], entities: str | None) -> dict[str, np.ndarray]:
    """Arrays by name (see `compare.METRICS`) of the sets `test`, `validation` and `probe`. entities: the sidecar of `test`."""
    model, tokenizer, config, meta = load_model(checkpoint)
    image = config.model.image
    maker = ExampleMaker(
        tokenizer, meta.diseases, image.size, image.grid, config.model.text.max_tokens, config.entmlm, augment=None
    )
    test = read_held_out(sets["test"], maker, entities)
    validation, probe = (read_held_out(sets[name], maker) for name in ("validation", "probe"))
    tokens, mask = tokenize_prompts(load_prompts(meta.diseases, config.prompts.file), tokenizer, config.model.text.max_tokens)
    padding = tokenizer.pad_token_id
    with torch.inference_mode():
        directions = class_directions(model, tokens, mask)
        seen = encoded(model, test, padding)
        pooled = {"test": seen.mean(1)}
        pooled |= {name: encoded(model, held, padding).mean(1) for name, held in (("validation", validation), ("probe", probe))}
        embeddings = F.normalize(model.image_head(pooled["test"]), dim=-1)
        arrays = {
            "patients": test.patients, "labels": test.labels,
            "zeroshot": (embeddings @ directions.T).numpy(),
            **retrieval(model, test, embeddings, padding),
            **pointing(model, test, seen, directions, meta.diseases),
        }  # fmt: skip
        if config.loss.image:
            arrays |= reconstruction(model, test, padding)
        if config.loss.entity and entities:
            arrays |= masked_entities(model, test, padding)
    features = {name: value.numpy() for name, value in pooled.items()}
    return arrays | linear_probe(features, probe, validation)


def encoded(model: MMCLIP, held: HeldOut, padding: int) -> Tensor:
    """Patch features of whole images [N, P, D]."""
    return torch.cat([model.image.encode(model.image.embed(batch["image"])) for batch in held.batches(padding)])


def linear_probe(features: Mapping[str, np.ndarray], train: HeldOut, validation: HeldOut) -> dict[str, np.ndarray]:
    """Scores [subsets, N, C] of the test images, by the share of the probe's labels that logistic regression was fitted on."""
    fitted, chosen = (
        Featured(features[name], held.labels, held.patients) for name, held in (("probe", train), ("validation", validation))
    )
    return {f"probe_{share:g}": probe(fitted, chosen, features["test"], share).test.astype(np.float32) for share in SHARES}


def retrieval(model: MMCLIP, held: HeldOut, images: Tensor, padding: int) -> dict[str, np.ndarray]:
    """Whether the report is among the first k for an image, and the other way round; an identical report is a hit. [N, 3].
    Nothing for a set in which a sample has no report."""
    if any(example["report_id"] < 0 for example in held.examples):
        return {}
    texts = torch.cat([model.embed_texts(batch["tokens"], batch["token_mask"]) for batch in held.batches(padding)])
    ids = [example["report_id"] for example in held.examples]
    by_image, by_text, _ = ranks(images.numpy(), texts.numpy(), ids, once=False)
    return {"image_to_text": hits(by_image), "text_to_image": hits(by_text)}


def pointing(
    model: MMCLIP, held: HeldOut, seen: Tensor, directions: Tensor, diseases: Sequence[str]
) -> dict[str, np.ndarray]:
    """For every finding of a sample that has boxes: its sample [n] and disease [n], whether the patch that responds most to the
    disease's prompts lies in a box [n], the share of attention in boxes [n], and the boxes' share of the image [n]."""
    patches = F.normalize(model.image_head(seen), dim=-1)
    response = (patches @ F.normalize(directions, dim=-1).T).numpy()  # [N, P, C]
    rows = []
    for sample, boxes in enumerate(held.boxes):
        for name, corners in boxes.items():
            if name in diseases:
                disease = list(diseases).index(name)
                found = pointed(response[sample, :, disease], corners)
                rows.append([sample, disease, found.hit, found.attention, found.box_share])
    table = np.array(rows, np.float32).reshape(-1, 5)
    names = ("pointed_sample", "pointed_disease", "pointed", "attention_inside", "box_share")
    return {name: table[:, column] for column, name in enumerate(names)}


def reconstruction(model: MMCLIP, held: HeldOut, padding: int) -> dict[str, np.ndarray]:
    """Squared error of masked patches inside boxes of findings [N] and elsewhere [N], nan without any. The same random half of
    the patches is masked for every arm, and rebuilt in the arm's own way."""
    errors_inside: list[Tensor] = []
    errors_elsewhere: list[Tensor] = []
    side, first = model.config.model.image.grid, 0
    for batch in held.batches(padding):
        masked = batch["noise"].argsort(1).argsort(1) < side**2 // 2
        target = patch_pixels(batch["image"], model.image.patch)
        error = (model.rebuild_images(batch, masked) - target).square().mean(2)
        boxes = held.boxes[first : first + len(error)]
        first += len(error)
        shares = np.stack([covered(np.concatenate(list(b.values())), side) if b else np.zeros(side**2) for b in boxes])
        inside = torch.from_numpy(shares >= 0.5)
        for collected, chosen in ((errors_inside, masked & inside), (errors_elsewhere, masked & ~inside)):
            count = chosen.sum(1)
            mean = (error * chosen).sum(1) / count.clamp(min=1)
            collected.append(torch.where(count > 0, mean, torch.nan))
    return {"error_inside": torch.cat(errors_inside).numpy(), "error_elsewhere": torch.cat(errors_elsewhere).numpy()}


def masked_entities(model: MMCLIP, held: HeldOut, padding: int) -> dict[str, np.ndarray]:
    """Masked tokens of each report [N], and how many of them are guessed right with its image, another one's and none [N, 3]."""
    total, right = [], []
    for batch in held.batches(padding):
        plan = Plan.of(batch, model.text.width, (1.0, 1.0))
        counts = (batch["target_tokens"] >= 0).sum(1)
        seen = model.image.encode(model.image.embed(batch["image"]))
        columns = []
        for memory in (seen, seen.roll(1, 0), seen[:, :0]):
            guessed = model.rebuild_entities(batch, plan, memory).argmax(1)
            hits = torch.zeros_like(batch["target_tokens"]).flatten()
            hits[plan.masked] = (guessed == batch["target_tokens"].flatten()[plan.masked]).long()
            columns.append(hits.view_as(batch["target_tokens"]).sum(1))
        total.append(counts)
        right.append(torch.stack(columns, 1))
    return {"masked_tokens": torch.cat(total).numpy(), "guessed": torch.cat(right).numpy()}
