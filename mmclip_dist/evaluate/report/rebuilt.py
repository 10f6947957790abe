"""What the two masked terms rebuild of held-out samples: hidden patches of images, and masked entities of reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmclip_shards.document import check_spans, parse_json
from mmclip_shards.schema import ENTITIES_SUFFIX
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmclip_dist.data.transforms import PIXEL_DEVIATION, PIXEL_MEAN
from mmclip_dist.evaluate.report.held_out import HeldOut, NotShown
from mmclip_dist.evaluate.report.pictures import data_uri, viridis
from mmclip_dist.evaluate.report.view import Piece, pieces
from mmclip_dist.model.inputs import Plan
from mmclip_dist.model.masking import patch_pixels

_IMAGES, _REPORTS = 4, 4
_LONG_SIDE = 224  # pixels of an embedded picture at most
_HIDDEN = 96.0  # grey of a hidden patch
_WORST = 2.0  # the error at the end of the colours: 1 is that of a flat patch


@dataclass(frozen=True)
class RebuiltImage:
    """Data URIs of the image as the model sees it, the mask, the visible part, the reconstruction and the error. loss: mean
    squared error of the hidden patches' normalised pixels; hidden: share of the patches; guide: the text, in words."""

    original: str
    mask: str
    visible: str
    rebuilt: str
    error: str
    loss: float
    hidden: float
    guide: str


def rebuilt_images(held: HeldOut) -> tuple[RebuiltImage, ...] | NotShown:
    """AttMIM on the first samples, those with a report first. Their text helps to rebuild, and guides the masks where training's
    are not random."""
    if not held.config.loss.image:
        return NotShown("the run was trained without the image term (loss.image=0)")
    order = sorted(range(len(held.samples)), key=lambda row: not held.samples[row].document.report)[:_IMAGES]
    if not order:
        return NotShown("no sample can be read")
    batch = held.batch([held.members(row) for row in order])
    with torch.inference_mode():
        masked = held.model.image_masks(batch)
        predicted = held.model.rebuild_images(batch, masked).float()
    image, patch = batch["image"], held.model.image.patch
    error = (predicted - patch_pixels(image, patch)).square().mean(2)  # [B, P]
    pixels = F.unfold(image, kernel_size=patch, stride=patch).transpose(1, 2)
    variance, mean = torch.var_mean(pixels, dim=2, keepdim=True, correction=0)
    hidden = masked[:, :, None]
    views = {
        "original": pixels, "mask": torch.where(hidden, 1.0, 0.0).expand_as(pixels), "visible": pixels,
        "rebuilt": torch.where(hidden, predicted * variance.sqrt() + mean, pixels),
    }  # fmt: skip
    grey = {name: _grey(value, image.shape[-1], patch) for name, value in views.items() if name != "mask"}
    wide = np.repeat(np.repeat(masked.unflatten(1, (held.config.model.image.grid, -1)).numpy(), patch, 1), patch, 2)
    grey["visible"] = np.where(wide, _HIDDEN, grey["visible"])
    grey["mask"] = np.where(wide, 0.0, 255.0)
    return tuple(
        RebuiltImage(
            **{name: _picture(value[row]) for name, value in grey.items()},
            error=_picture(_colours(error[row] * masked[row], wide[row], patch)),
            loss=float(error[row][masked[row]].mean()), hidden=float(masked[row].float().mean()),
            guide="its report" if batch["report_id"][row] >= 0 else "the prompts of its findings",
        )
        for row in range(len(order))
    )  # fmt: skip


def _grey(patches: Tensor, side: int, patch: int) -> np.ndarray:
    """Normalised pixels of patches [B, P, patch^2] -> grey values of images [B, S, S]."""
    whole = F.fold(patches.transpose(1, 2), (side, side), kernel_size=patch, stride=patch)[:, 0].numpy()
    return np.asarray(255 * (whole * PIXEL_DEVIATION + PIXEL_MEAN))


def _colours(error: Tensor, hidden: np.ndarray, patch: int) -> np.ndarray:
    """Errors of patches [P] -> colours [S, S, 3], black where nothing was hidden."""
    side = len(hidden) // patch
    shares = (error.numpy().reshape(side, side) / _WORST).clip(0, 1)
    return np.asarray(viridis(shares.repeat(patch, 0).repeat(patch, 1)) * hidden[:, :, None])


def _picture(values: np.ndarray) -> str:
    image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    image.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.BICUBIC)
    return data_uri(image, "PNG")


# -- Reports ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guess:
    """A piece of a report. piece: as in `mmclip view`; guess: what the model puts in its place, None if it was not masked; right:
    all its tokens are those of the report."""

    piece: Piece
    guess: str | None = None
    right: bool = False


@dataclass(frozen=True)
class RebuiltReport:
    """A report whose masked pieces were guessed from the rest and from the picture beside it."""

    picture: str
    guesses: tuple[Guess, ...]

    @property
    def counts(self) -> tuple[int, int]:
        """How many pieces were guessed right, of how many that were masked."""
        masked = [guess for guess in self.guesses if guess.guess is not None]
        return sum(guess.right for guess in masked), len(masked)


def rebuilt_reports(held: HeldOut) -> tuple[RebuiltReport, ...] | NotShown:
    """EntMLM on the first samples with a report."""
    if not held.config.loss.entity:
        return NotShown("the run was trained without the entity term (loss.entity=0)")
    rows = held.with_reports[:_REPORTS]
    if not len(rows):
        return NotShown(f"{', '.join(held.datasets)} has no reports")
    if why := next(filter(None, map(held.lacks_entities, rows)), ""):
        return NotShown(why)
    members = [held.members(row, entities=True) for row in rows]
    batch = held.batch(members)
    plan = Plan.of(batch, held.model.text.width, (1.0, 1.0))
    target = batch["target_tokens"]
    with torch.inference_mode():
        seen = held.model.image.encode(held.model.image.embed(batch["image"]))
        guessed = held.model.rebuild_entities(batch, plan, seen).argmax(1)
    tokens = target.flatten().index_copy(0, plan.masked, guessed).view_as(target)
    found = []
    for number, (row, own) in enumerate(zip(rows, members, strict=True)):
        report = held.samples[row].document.report
        spans = parse_json(own[ENTITIES_SUFFIX])
        check_spans(spans)
        found.append(RebuiltReport(
            held.picture(row, _LONG_SIDE),
            tuple(_guesses(held, report, spans, tokens[number].numpy(), target[number].numpy())),
        ))  # fmt: skip
    return tuple(found)


def _guesses(
    held: HeldOut, report: str, spans: Sequence[Mapping[str, Any]], guessed: np.ndarray, target: np.ndarray
) -> Iterator[Guess]:
    """The report in pieces. guessed, target [T]: tokens of the model and of the report where it was masked, -100 elsewhere. In a
    report without entities words are masked."""
    words = held.tokenizer(report, truncation=True, max_length=held.encoder.window, return_offsets_mapping=True)
    offsets = np.array(words["offset_mapping"])
    guessed, target = guessed[: len(offsets)], target[: len(offsets)]
    hidden = target >= 0
    if not spans:
        of_word = np.array([-1 if word is None else word for word in words.word_ids()])
        each = [offsets[of_word == word] for word in np.unique(of_word[hidden])]
        spans = [{"start": int(one[0, 0]), "end": int(one[-1, 1]), "label": "word"} for one in each]
    at = 0
    for piece in pieces(report, spans):
        inside = (offsets[:, 0] < at + len(piece.text)) & (offsets[:, 1] > at) & (offsets[:, 1] > offsets[:, 0])
        at += len(piece.text)
        if piece.kind is not None and inside.any() and hidden[inside].all():
            own = guessed[inside]
            yield Guess(piece, str(held.tokenizer.decode(own.tolist())), bool((own == target[inside]).all()))
        else:
            yield Guess(piece)
