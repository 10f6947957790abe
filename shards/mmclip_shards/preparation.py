"""Make the samples of records in parallel: in order, few in memory, and a reason in place of an image that cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mmclip_shards.images import PreparedImage, Rendering, prepare_image
from mmclip_shards.journal import image_mark, write_at_once
from mmclip_shards.manifest import Shard
from mmclip_shards.schema import Record, canonical_json, sample_document
from mmclip_shards.split import hash_patient
from mmclip_shards.storage import Url
from mmclip_shards.writer import Sample, write_shard

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
        mark = image_mark(record.image)  # before the image is read: if it is replaced meanwhile, the mark is that of the old one
        image = prepare_one(record, self.short_side, self.rendering)
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
            for job in jobs:
                yield job, *make(job[1])
            return
        # Spawn, do not fork: a child of a process with threads (torch, fsspec) may inherit a lock that nobody releases.
        pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), end_with_parent)
        self._publisher = ThreadPoolExecutor(1, "mmclip-publish")
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
            self._publisher.shutdown()  # a shard that is on its way when a pack stops is there before the next pack looks

    def write(self, url: Url, number: int, samples: list[Sample]) -> Callable[[], Shard]:
        """See `Workers`."""
        if self._publisher is None:
            return write_at_once(url, number, samples)
        return self._publisher.submit(write_shard, url, number, samples).result


def end_with_parent() -> None:
    """In a worker: end when the packing process was killed. Otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prepare_one(record: Record, short_side: int, rendering: Rendering) -> PreparedImage | str:
    """A record's image as a shard would hold it, or why it would be left out."""
    image, boxes = record.image, record.boxes
    if callable(image):
        image, boxes = image()
    try:
        return prepare_image(image, short_side, boxes, rendering)
    except ValueError as error:
        return str(error).removeprefix(f"{image} is " if isinstance(image, Path) else "image data is ")


def cannot_be_used(record: Record, short_side: int, rendering: Rendering) -> bool:
    """Whether a record's image would be left out."""
    return isinstance(prepare_one(record, short_side, rendering), str)
