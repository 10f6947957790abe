"""What the demo shows of one image: scores of findings, where the model looks for them, and the reports that lie nearest."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmclip_shards.document import read_document
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from PIL import Image

from mmclip_dist.data.prompts import load_prompts
from mmclip_dist.evaluate.report.pictures import data_uri, heat_map
from mmclip_dist.inference import MMCLIPModel, decoded

MAX_FINDINGS = 20
_MAX_LETTERS = 80  # of a finding
_HEATS = 3  # heat maps, of the findings with the highest scores
_NEAREST = 3
_LONG_SIDE = 512  # pixels of an embedded picture


@dataclass(frozen=True)
class Scored:
    """probability: of the present against the absent prompts, not calibrated; heat: a data URI, or None."""

    finding: str
    score: float
    probability: float
    heat: str | None


@dataclass(frozen=True)
class Nearby:
    """A report of the set given, and its cosine with the image."""

    key: str
    text: str
    cosine: float


@dataclass(frozen=True)
class Answer:
    """picture: a data URI; width, height: of the image, in pixels; findings: by falling score."""

    picture: str
    width: int
    height: int
    findings: tuple[Scored, ...]
    nearby: tuple[Nearby, ...]


class Reports:
    """The reports of a packed set, embedded once. Equal reports count once."""

    def __init__(self, model: MMCLIPModel, url: str, progress: Callable[[int, int], None] | None = None) -> None:
        """ValueError if the set cannot be read or has no report."""
        total = load_manifest(url).samples
        found: dict[str, str] = {}
        for number, (key, members) in enumerate(iterate(url), 1):
            found.setdefault(read_document(members).report, key)
            if progress:
                progress(number, total)
        found.pop("", None)
        if not found:
            raise ValueError(f"{url} has no reports to search: name a set with reports, or start without --data")
        self._keys, self._texts = list(found.values()), list(found)
        self._embedded = model.encode_text(self._texts)

    def nearest(self, image: torch.Tensor) -> tuple[Nearby, ...]:
        """image: its embedding [E]."""
        cosines, places = (self._embedded @ image).topk(min(_NEAREST, len(self._keys)))
        return tuple(
            Nearby(self._keys[place], self._texts[place], cosine)
            for place, cosine in zip(places.tolist(), cosines.tolist(), strict=True)
        )


def parse_findings(text: str) -> list[str]:
    """One finding a line, or separated by commas; each once. ValueError for none, too many, or one that is too long."""
    found = list(dict.fromkeys(" ".join(word.split()) for word in re.split(r"[,;\n]", text) if word.strip()))
    if not found:
        raise ValueError("No finding is given: write at least one, such as edema.")
    if len(found) > MAX_FINDINGS or max(map(len, found)) > _MAX_LETTERS:
        raise ValueError(f"At most {MAX_FINDINGS} findings of at most {_MAX_LETTERS} letters are scored at once.")
    return found


def answer(model: MMCLIPModel, image: bytes, findings: Sequence[str], reports: Reports | None = None) -> Answer:
    """ValueError for bytes that are no JPEG, PNG or DICOM radiograph, and for a finding without a word."""
    picture = decoded(image)
    prompts = load_prompts(findings)
    present, absent = (
        {name: [texts[half + place] for texts in prompts.texts] for place, name in enumerate(findings)}
        for half in (0, len(findings))
    )
    found = model.zero_shot(picture, present, absent)
    assert found.probabilities is not None
    order = found.scores[0].argsort(descending=True, stable=True).tolist()
    heats = {place: model.attention_map(picture, present[findings[place]][0]) for place in order[:_HEATS]}
    width, height = picture.size
    shown = picture.copy()
    shown.thumbnail((_LONG_SIDE, _LONG_SIDE), Image.Resampling.BICUBIC)
    return Answer(
        data_uri(shown, "JPEG", quality=88), width, height,
        tuple(
            Scored(
                findings[place], float(found.scores[0, place]), float(found.probabilities[0, place]),
                data_uri(heat_map(heats[place].numpy().astype(np.float64)), "PNG") if place in heats else None,
            )
            for place in order
        ),
        reports.nearest(model.encode_image(picture)[0]) if reports else (),
    )  # fmt: skip
