"""A checkpoint and samples of held-out sets, which it has read once: what the sections of a report that show data are made of.

Only pixels, report texts, label names, boxes and scores leave these modules: no patient, no key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from mmclip_shards.document import Document, read_document
from mmclip_shards.images import decode_image
from mmclip_shards.manifest import find_split
from mmclip_shards.schema import ENTITIES_SUFFIX, IMAGE_SUFFIXES
from PIL import Image
from torch import Tensor

from mmclip_dist.checkpoint.folder import weights_hash
from mmclip_dist.checkpoint.model_files import load_model
from mmclip_dist.config import Source
from mmclip_dist.data.batch import Batch, collate
from mmclip_dist.data.example import ExampleMaker
from mmclip_dist.data.join import JoinedSet, with_sidecars
from mmclip_dist.data.prompts import load_prompts, tokenize_prompts
from mmclip_dist.evaluate.encoders import Trained
from mmclip_dist.evaluate.report.pictures import jpeg
from mmclip_dist.evaluate.report.view import spread
from mmclip_dist.evaluate.zeroshot import class_directions
from mmclip_dist.offline.clinical_text import LEXICON_MODEL, Extractor, as_json, build_extractor, require_installed

_SAMPLES = 500  # of all sets together: a report is made on a CPU, in seconds
_BATCH = 64
_DECODERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class NotShown:
    """In place of a section's content: why there is none, as the rest of a sentence that begins "Not shown: "."""

    why: str


@dataclass(frozen=True)
class Sample:
    """joined, shard, key: where it lies."""

    joined: JoinedSet
    shard: int
    key: str
    document: Document


class HeldOut:
    """A checkpoint on up to 500 samples, evenly spread over the test splits of some sets.

    classes: labels of the sets; samples: those that could be read, of `chosen`; images [N, E]: their embeddings; scores [N, C]:
    similarity to the positive minus to the negative prompts; labels [N, C]: 1, 0, or -1 for unknown. ValueError for a set that
    cannot be read.
    """

    def __init__(self, checkpoint: Path, urls: Sequence[str]) -> None:
        sets = [JoinedSet(with_sidecars(Source(url=find_split(url, "test")))) for url in urls]
        self.datasets = tuple(dict.fromkeys(f"{one.manifest.dataset}/{one.manifest.split}" for one in sets))
        self.classes = tuple(dict.fromkeys(name for one in sets for name in one.manifest.labels))
        self.total = sum(one.manifest.samples for one in sets)
        self.model, self.tokenizer, config, meta = load_model(checkpoint)
        # The kernels in PyTorch: a report is made on a CPU, wherever the model was trained.
        self.config = config.model_copy(update={"loss": config.loss.model_copy(update={"impl": "torch"})})
        self.model.config = self.config
        self.step, self.checkpoint, self._diseases = meta.step, weights_hash(checkpoint), meta.diseases
        self.encoder = Trained(self.model, self.tokenizer)
        if self.classes:
            prompts = load_prompts(self.classes, config.prompts.file)
            self._prompts = tokenize_prompts(prompts, self.tokenizer, config.model.text.max_tokens)
            # The model has the prompts of the classes it was trained on; a held-out set may have others.
            self.model.set_prompts(*self._prompts)
        places = [(one, shard, key) for one in sets for shard, key in spread(one, max(1, _SAMPLES // len(sets)))]
        self.chosen = len(places)
        self.samples: list[Sample] = []
        self.images, self.scores = self._read(places)
        known = [[sample.document.labels.get(name) for name in self.classes] for sample in self.samples]
        self.labels = np.array([[value if value in (0, 1) else -1 for value in row] for row in known], int).reshape(
            len(self.samples), len(self.classes)
        )

    def _read(self, places: Sequence[tuple[JoinedSet, int, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Fill `samples` -> their embeddings and scores."""
        width = self.config.model.embed
        embedded = [torch.zeros(0, width)]
        with torch.inference_mode(), ThreadPoolExecutor(_DECODERS) as pool:
            for first in range(0, len(places), _BATCH):
                decoded = pool.map(self._decoded, places[first : first + _BATCH])
                read = [found for found in decoded if found is not None]
                if read:
                    self.samples += [sample for sample, _ in read]
                    embedded.append(self.model.embed_images(torch.stack([pixels for _, pixels in read])))
            images = torch.cat(embedded)
            directions = class_directions(self.model, *self._prompts) if self.classes else torch.zeros(0, width)
            return images.numpy(), (images @ directions.T).numpy()

    def _decoded(self, place: tuple[JoinedSet, int, str]) -> tuple[Sample, Tensor] | None:
        """None for a sample that cannot be read: the page counts them."""
        joined, shard, key = place
        members = joined.read(shard, key)
        try:
            return Sample(joined, shard, key, read_document(members)), self.encoder.pixels(_image(members))
        except ValueError:
            return None

    @property
    def about(self) -> str:
        """How many samples of how many."""
        unread = self.chosen - len(self.samples)
        lost = f", {unread} that cannot be read left out" if unread else ""
        part = f"all {self.total:,}" if self.chosen == self.total else f"{self.chosen:,}, evenly spread, of {self.total:,}"
        return f"{part} samples of {', '.join(self.datasets)}{lost}"

    @cached_property
    def with_reports(self) -> np.ndarray:
        """Numbers of the samples that have a report."""
        return np.flatnonzero([bool(sample.document.report) for sample in self.samples])

    def members(self, row: int, *, entities: bool = False) -> dict[str, bytes]:
        """All members of a sample. entities: those of its report are found here where the set has no sidecar of them."""
        sample = self.samples[row]
        members = sample.joined.read(sample.shard, sample.key)
        if entities and ENTITIES_SUFFIX not in members:
            found = self._extract([sample.document.report])[0]
            members[ENTITIES_SUFFIX] = json.dumps([as_json(entity) for entity in found]).encode()
        return members

    @cached_property
    def _extract(self) -> Extractor:
        return build_extractor()

    def lacks_entities(self, row: int) -> str:
        """Why the entities of a sample's report are not at hand, or ""."""
        if ENTITIES_SUFFIX in self.members(row):
            return ""
        try:
            require_installed(LEXICON_MODEL)
        except ValueError as error:
            return f"the set has no sidecar of entities, and {error}"
        return ""

    def batch(self, members: Sequence[dict[str, bytes]]) -> Batch:
        """Whole images, with reports masked as in training."""
        image, text = self.config.model.image, self.config.model.text
        maker = ExampleMaker(
            self.tokenizer, self.classes or self._diseases, image.size, image.grid, text.max_tokens, self.config.entmlm,
            augment=None,
        )  # fmt: skip
        return collate([maker(str(n), one, epoch=0) for n, one in enumerate(members)], 0, self.tokenizer.pad_token_id)

    def picture(self, row: int, side: int) -> str:
        """The image as a data URI, its longer side at most `side` pixels."""
        return jpeg(_image(self.members(row)), side)


def _image(members: dict[str, bytes]) -> Image.Image:
    data = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if data is None:
        raise ValueError("the sample has no image")
    return decode_image(data)
