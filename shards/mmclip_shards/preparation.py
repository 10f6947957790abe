"""Make the samples of records in parallel: in order, few in memory, and a reason in place of an image that cannot be used."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmclip_shards import storage
from mmclip_shards.images import PreparedImage, Rendering, prepare_image
from mmclip_shards.journal import image_mark, write_at_once
from mmclip_shards.manifest import Shard
from mmclip_shards.processes import WorkerDiedError, in_order
from mmclip_shards.rawpath import RemotePath, ahead
from mmclip_shards.schema import Record, canonical_json, sample_document
from mmclip_shards.split import hash_patient
from mmclip_shards.storage import Url
from mmclip_shards.writer import Sample, write_shard

_PORTION = 16  # records of remote images that a worker gets at a time: the first of them has nobody before it to be read under
_READ_AHEAD = 8  # remote images that a worker asks for at a time: enough for 10 ms an image and 50 ms an answer

Job = tuple[str, Record]
"""A split, and a record of it."""

Prepared = tuple[str, dict[str, bytes] | str]
"""The mark of a raw image (`image_mark`), and the sample, suffix -> bytes, or why its image cannot be used."""


ReadImage = tuple[str, bytes | str]
"""The mark of an image file, and its bytes, or why it cannot be read."""


@dataclass(frozen=True)
class SampleMaker:
    """Makes the sample of a record, as `pack` was told to."""

    dataset: str
    label_names: tuple[str, ...]
    patient_key: bytes = field(repr=False)
    numbering: str | None
    short_side: int
    rendering: Rendering

    def all_of(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, str, dict[str, bytes] | str]]:
        """Each job in order, with what is made of its record. Remote images are read while those before them are made."""
        remote = ((job, job[1].image if isinstance(job[1].image, RemotePath) else None) for job in jobs)
        for job, read in ahead(lambda image: None if image is None else read_image(image), remote, _READ_AHEAD):
            yield job, *self(job[1], read)

    def __call__(self, record: Record, read: ReadImage | None = None) -> Prepared:
        """read: of the record's image, if it was read before."""
        mark, image = prepare_one(record, self.short_side, self.rendering, read)
        if isinstance(image, str):
            return mark, image
        document = sample_document(
            record,
            label_names=self.label_names,
            patient_hash=hash_patient(record.patient, self.patient_key, self.numbering),
            dataset=self.dataset,
            width=image.width,
            height=image.height,
            boxes=image.boxes,
        )
        return mark, {image.suffix: image.data, "json": canonical_json(document)}


class Workers(Protocol):
    """Who makes samples and writes shards for `pack`: `Processes` of this machine, or those of a cluster."""

    @property
    def ahead(self) -> int:
        """How many shards may be on their way to the store while the next one is made."""

    def prepare(
        self, jobs: Iterator[Job], make: SampleMaker, samples_per_shard: int
    ) -> Generator[tuple[Job, str, Any], None, None]:
        """Each job in order, with the mark of its image, and its sample or why it is left out (a str). Holds a bounded number."""

    def write(self, url: Url, number: int, samples: list[tuple[str, Any]]) -> Callable[[], Shard]:
        """Begin to publish a shard of samples that `prepare` gave -> a function that waits for the end (`write_shard`)."""


class Processes:
    """Worker processes of this machine; one is the caller itself.

    If there are more, a thread publishes each shard while they make the next one: they would else stand still for half a second
    a shard of 1,000 samples on a local disk, and longer on an object store.
    """

    def __init__(self, count: int) -> None:
        self.count, self.ahead = count, int(count > 1)
        self._publisher: ThreadPoolExecutor | None = None

    def prepare(
        self, jobs: Iterator[Job], make: SampleMaker, samples_per_shard: int
    ) -> Generator[tuple[Job, str, Any], None, None]:
        """See `Workers`."""
        if self.count == 1:
            yield from make.all_of(jobs)
            return
        self._publisher = ThreadPoolExecutor(1, "mmclip-publish")
        try:
            with closing(in_order(partial(_make_all, make), _portions(jobs), self.count)) as portions:
                for some, made in portions:
                    yield from ((job, *each) for job, each in zip(some, made, strict=True))
        except WorkerDiedError as error:
            raise ValueError(f"{error}; finished shards are kept") from error
        finally:
            self._publisher.shutdown()  # a shard that is on its way when a pack stops is there before the next pack looks

    def write(self, url: Url, number: int, samples: list[Sample]) -> Callable[[], Shard]:
        """See `Workers`."""
        if self._publisher is None:
            return write_at_once(url, number, samples)
        return self._publisher.submit(write_shard, url, number, samples).result


def _portions(jobs: Iterator[Job]) -> Iterator[list[Job]]:
    """What a worker gets at a time: one record, or some whose images are remote, so that it can read ahead."""
    for remote, alike in groupby(jobs, key=lambda job: isinstance(job[1].image, RemotePath)):
        while some := list(islice(alike, _PORTION if remote else 1)):
            yield some


def _make_all(make: SampleMaker, jobs: list[Job]) -> list[Prepared]:
    return [(mark, made) for _, mark, made in make.all_of(jobs)]


def read_image(image: Path | RemotePath) -> ReadImage:
    """Read an image file whole; of a store, by one request. OSError when a store fails."""
    try:
        if isinstance(image, RemotePath):
            data, mark = storage.read_versioned(image, bytes)
            return mark, data
        mark = image_mark(image)  # first: of a file that is replaced meanwhile, it is that of the old one
        return mark, image.read_bytes()
    except OSError as error:
        if isinstance(image, RemotePath) and not isinstance(error, FileNotFoundError):
            raise
        # The system's own words and no path, which may name the patient.
        return image_mark(image), f"not a usable JPEG, PNG or WebP: {os.strerror(error.errno or errno.ENOENT)}"


def prepare_one(
    record: Record, short_side: int, rendering: Rendering, read: ReadImage | None = None
) -> tuple[str, PreparedImage | str]:
    """The mark of a record's image (`image_mark`), and the image as a shard would hold it, or why it would be left out.

    A remote image that cannot be decoded is asked for again: its store may have sent damaged bytes. OSError when a store fails.
    """
    image, boxes = record.image, record.boxes
    content: bytes | np.ndarray | str
    if callable(image):
        mark = image_mark(image)
        content, boxes = image()
    elif isinstance(image, Path | RemotePath):
        mark, content = read or read_image(image)
    else:
        mark, content = image_mark(image), image
    if isinstance(content, str):
        return mark, content

    def prepare(content: bytes | np.ndarray) -> PreparedImage:
        return prepare_image(content, short_side, boxes, rendering)

    try:
        try:
            return mark, prepare(content)
        except ValueError:
            if not isinstance(image, RemotePath):
                raise
            prepared, mark = storage.read_versioned(image, prepare)
            return mark, prepared
    except ValueError as error:
        return mark, str(error).removeprefix("image data is ")


def cannot_be_used(record: Record, short_side: int, rendering: Rendering) -> bool:
    """Whether a record's image would be left out."""
    return isinstance(prepare_one(record, short_side, rendering)[1], str)
