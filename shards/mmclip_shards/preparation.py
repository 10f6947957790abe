"""Make the samples of records in parallel: in order, few in memory, and a reason in place of an image that cannot be used."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmclip_shards import storage
from mmclip_shards.images import PreparedImage, Rendering, prepare_image
from mmclip_shards.journal import image_mark, write_at_once
from mmclip_shards.manifest import Shard
from mmclip_shards.rawpath import RemotePath
from mmclip_shards.schema import Record, canonical_json, sample_document
from mmclip_shards.split import hash_patient
from mmclip_shards.storage import Url
from mmclip_shards.writer import Sample

_WINDOW_PER_WORKER = 8

Job = tuple[str, Record]
"""A split, and a record of it."""

Prepared = tuple[str, dict[str, bytes] | str]
"""The mark of a raw image (`image_mark`), and the sample, suffix -> bytes, or why its image cannot be used."""


@dataclass(frozen=True)
class SampleMaker:
    """Makes the sample of a record, as `pack` was told to."""

    dataset: str
    label_names: tuple[str, ...]
    patient_key: bytes = field(repr=False)
    short_side: int
    rendering: Rendering

    def __call__(self, record: Record) -> Prepared:
        mark, image = prepare_one(record, self.short_side, self.rendering)
        if isinstance(image, str):
            return mark, image
        document = sample_document(
            record,
            label_names=self.label_names,
            patient_hash=hash_patient(record.patient, self.patient_key),
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


@dataclass(frozen=True)
class Processes:
    """Worker processes of this machine; one is the caller itself."""

    count: int
    ahead: int = 0

    def prepare(
        self, jobs: Iterator[Job], make: SampleMaker, samples_per_shard: int
    ) -> Generator[tuple[Job, str, Any], None, None]:
        """See `Workers`."""
        if self.count == 1:
            for job in jobs:
                yield job, *make(job[1])
            return
        # Spawn, do not fork: a child of a process with threads (torch, fsspec) may inherit a lock that nobody releases.
        pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), end_with_parent)
        window: deque[tuple[Job, Future[Prepared]]] = deque()
        try:
            for job in jobs:
                window.append((job, pool.submit(make, job[1])))
                if len(window) >= self.count * _WINDOW_PER_WORKER:
                    first, future = window.popleft()
                    yield first, *future.result()
            while window:
                first, future = window.popleft()
                yield first, *future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a packing worker died, most likely for lack of memory: pack with fewer workers; finished shards are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def write(self, url: Url, number: int, samples: list[Sample]) -> Callable[[], Shard]:
        """See `Workers`."""
        return write_at_once(url, number, samples)


def end_with_parent() -> None:
    """In a worker: end when the packing process was killed. Otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prepare_one(record: Record, short_side: int, rendering: Rendering) -> tuple[str, PreparedImage | str]:
    """The mark of a record's image (`image_mark`), and the image as a shard would hold it, or why it would be left out.

    A remote image is one request, and is asked for again if it cannot be decoded: its store may have sent damaged bytes.
    OSError when a store fails.
    """
    image, boxes = record.image, record.boxes
    if callable(image):
        image, boxes = image()

    def make(data: bytes | np.ndarray) -> PreparedImage:
        return prepare_image(data, short_side, boxes, rendering)

    try:
        if isinstance(image, RemotePath):
            prepared, mark = storage.read_versioned(image, make)
            return mark, prepared
        mark = image_mark(record.image)  # before the image is read: of one that is replaced meanwhile, it is that of the old one
        return mark, make(image.read_bytes() if isinstance(image, Path) else image)
    except ValueError as error:
        reason = str(error).removeprefix("image data is ")
    except OSError as error:
        if isinstance(image, RemotePath) and not isinstance(error, FileNotFoundError):
            raise  # the store, not this image
        # The system's own words and no path, which may name the patient.
        reason = f"not a usable JPEG, PNG or WebP: {os.strerror(error.errno or errno.ENOENT)}"
    return image_mark(record.image), reason


def cannot_be_used(record: Record, short_side: int, rendering: Rendering) -> bool:
    """Whether a record's image would be left out."""
    return isinstance(prepare_one(record, short_side, rendering)[1], str)
