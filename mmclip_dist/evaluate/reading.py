"""Labelled images of packed sets, in batches that some ranks share, while the next ones are decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, groupby, islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from mmclip_shards.document import json_fields, read_document
from mmclip_shards.images import decode_image
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import image_of
from PIL import Image
from torch import Tensor

from mmclip_dist.evaluate import shared
from mmclip_dist.evaluate.protocol import Columns

T = TypeVar("T")
BATCH = 128
_DECODERS = min(8, os.cpu_count() or 1)  # threads: Pillow decodes and resizes without Python's lock
Place = tuple[int, int, int]
"""A sample: numbers of its set, its shard and its row."""


@dataclass(frozen=True)
class Known:
    """What is known of the images of a batch. keys, patients, reports: one each; labels [N, C]: 1, 0, or -1 for unknown; boxes:
    class -> rectangles [n, 4] (left, top, right, bottom in shares of the image); undecodable: keys of images left out."""

    keys: list[str]
    patients: list[str]
    labels: np.ndarray
    reports: list[str]
    boxes: list[dict[int, np.ndarray]]
    undecodable: list[str]

    @classmethod
    def of_all(cls, parts: Sequence[Known]) -> Known:
        """The batches as one. ValueError if none of their images can be decoded."""
        undecodable = [key for part in parts for key in part.undecodable]
        keys = [key for part in parts for key in part.keys]
        if not keys:
            raise ValueError(
                f"none of the {len(undecodable)} images can be decoded ({', '.join(undecodable[:3])} ...): pack the set again"
            )
        return cls(
            keys, [name for part in parts for name in part.patients], np.concatenate([part.labels for part in parts]),
            [text for part in parts for text in part.reports], [own for part in parts for own in part.boxes], undecodable,
        )  # fmt: skip


@dataclass(frozen=True)
class _Sample:
    key: str
    patient: str
    labels: np.ndarray
    report: str
    boxes: dict[int, np.ndarray]
    pixels: Tensor | None  # None: the image cannot be decoded


class Eye(Protocol):
    """What images are decoded for: an `Encoder`, or a classifier. device: where pixels go; blank: an image without content
    [1, channels, S, S]."""

    @property
    def device(self) -> torch.device: ...

    @property
    def blank(self) -> Tensor: ...

    def pixels(self, image: Image.Image) -> Tensor:
        """A decoded image in mode "L" -> [channels, S, S], on the CPU."""


class LabelledImages:
    """The images of some sets, whose labels are those of `classes`. columns: of each set."""

    def __init__(self, sets: Sequence[ShardReader], columns: Sequence[Columns], classes: Sequence[str]) -> None:
        self.sets, self.columns, self.classes = sets, columns, classes
        self.samples = sum(reader.manifest.samples for reader in sets)

    def all(
        self, encoder: Eye, function: Callable[[Tensor], tuple[Tensor, ...]], keep: Callable[[Known, list[np.ndarray]], T],
        report: Callable[[int, int], None] | None = None,
    ) -> list[T]:  # fmt: skip
        """What keep(known, function(pixels)) gives of every batch, in order, on every rank. A collective call.

        report(done, total) in samples. Call it within `encoder.evaluating()`.
        """
        rank, world = shared.place()
        own: list[list[T]] = []
        done = 0
        for some in self.rounds(encoder, function, rank, world):
            own.append([keep(known, found) for known, found in some])
            done += world * sum(len(known.keys) + len(known.undecodable) for known, _ in some)
            if report:
                report(min(done, self.samples), self.samples)
        return shared.together(own)

    def rounds(
        self, encoder: Eye, function: Callable[[Tensor], tuple[Tensor, ...]], rank: int = 0, world: int = 1
    ) -> Iterator[list[tuple[Known, list[np.ndarray]]]]:
        """The rank's batches, one in each round, with what function(pixels) gives of its images; [] in rounds after its last.

        Every rank runs the same modules in every round, as ZeRO-3 needs. All ranks may stop between two rounds, so every
        caller must take or stop at the same round. Call it within `encoder.evaluating()`.
        """
        with ThreadPoolExecutor(_DECODERS) as pool:
            try:
                batches = self._ahead(pool, encoder, rank, world)
                for _ in range(-(-self.samples // (BATCH * world))):
                    samples = next(batches, None)
                    whole = [sample for sample in samples or [] if sample.pixels is not None]
                    pixels = torch.stack([s.pixels for s in whole if s.pixels is not None]) if whole else encoder.blank
                    found = [value.float().cpu().numpy()[: len(whole)] for value in function(pixels.to(encoder.device))]
                    yield [] if samples is None else [(self._known(whole, samples), found)]
            finally:
                pool.shutdown(cancel_futures=True)

    def _known(self, whole: list[_Sample], samples: list[_Sample]) -> Known:
        labels = np.stack([sample.labels for sample in whole]) if whole else np.zeros((0, len(self.classes)), int)
        return Known(
            [sample.key for sample in whole], [sample.patient for sample in whole], labels, [sample.report for sample in whole],
            [sample.boxes for sample in whole], [sample.key for sample in samples if sample.pixels is None],
        )  # fmt: skip

    def _ahead(self, pool: ThreadPoolExecutor, encoder: Eye, rank: int, world: int) -> Iterator[list[_Sample]]:
        """The rank's batches; the next one is decoded while the last one is used."""
        waiting: list[list[Future[_Sample]]] = []
        for places in self._shares(rank, world):
            for (number, shard), some in groupby(places, key=lambda place: place[:2]):
                self.sets[number].prefetch(shard, [row for *_, row in some])
            waiting.append([pool.submit(self._sample, place, encoder) for place in places])
            if len(waiting) == 2:
                yield [future.result() for future in waiting.pop(0)]
        for futures in waiting:
            yield [future.result() for future in futures]

    def _shares(self, rank: int, world: int) -> Iterator[list[Place]]:
        """Every world-th batch of places, in order."""
        rows = (
            (number, shard, row)
            for number, reader in enumerate(self.sets)
            for shard, about in enumerate(reader.manifest.shards)
            for row in range(about.samples)
        )
        for index in count():
            batch = list(islice(rows, BATCH))
            if not batch:
                return
            if index % world == rank:
                yield batch

    def _sample(self, place: Place, encoder: Eye) -> _Sample:
        number, shard, row = place
        reader, columns = self.sets[number], self.columns[number]
        key = reader.keys(shard)[row]
        members = reader.read(shard, key)
        labels = np.full(len(self.classes), -1)
        try:
            document = read_document(members)
            data = image_of(members)
            pixels = None if data is None else encoder.pixels(decode_image(data))
        except ValueError:
            return _Sample(key, key, labels, "", {}, None)
        for name, column in columns.labels.items():
            value = document.labels.get(name)
            labels[column] = value if value in (0, 1) else -1
        patient = document.patient or key  # unknown: a patient of its own
        return _Sample(key, patient, labels, document.report, _boxes(members, columns), pixels)


def _boxes(members: dict[str, bytes], columns: Columns) -> dict[int, np.ndarray]:
    fields = json_fields(members["json"]) if "json" in members else {}
    found: dict[int, list[list[float]]] = {}
    for box in fields.get("boxes") or []:
        column = columns.of_box(box["label"])
        if column is not None:
            left, top = box["x"] / fields["width"], box["y"] / fields["height"]
            corners = [left, top, left + box["width"] / fields["width"], top + box["height"] / fields["height"]]
            found.setdefault(column, []).append(corners)
    return {column: np.array(rows) for column, rows in found.items()}
