"""Prepare the images of records in parallel: in order, few in memory, and a reason in place of an image that cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from mmclip_shards.images import PreparedImage, Rendering, prepare_image
from mmclip_shards.journal import image_mark
from mmclip_shards.schema import Box, RawImage, Record

_WINDOW_PER_WORKER = 8

Job = tuple[str, Record]
"""A split, and a record of it."""

Prepared = tuple[str, PreparedImage | str]
"""The mark of a raw image (`image_mark`), and the image as a shard holds it, or why it cannot be used."""


def prepare_all(
    jobs: Iterator[Job], short_side: int, rendering: Rendering, workers: int
) -> Generator[tuple[Job, Prepared], None, None]:
    """Each job with its prepared image, in order. Holds a bounded number in memory."""
    if workers == 1:
        for job in jobs:
            yield job, _prepare(job[1].image, job[1].boxes, short_side, rendering)
        return
    # Spawn, do not fork: a child of a process with threads (torch, fsspec) may inherit a lock that nobody releases.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    window: deque[tuple[Job, Future[Prepared]]] = deque()
    try:
        for job in jobs:
            window.append((job, pool.submit(_prepare, job[1].image, job[1].boxes, short_side, rendering)))
            if len(window) >= workers * _WINDOW_PER_WORKER:
                first, future = window.popleft()
                yield first, future.result()
        while window:
            first, future = window.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a packing worker died, most likely for lack of memory: pack with fewer workers; finished shards are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: end when the packing process was killed. Otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare(image: RawImage, boxes: Sequence[Box], short_side: int, rendering: Rendering) -> Prepared:
    mark = image_mark(image)  # before the image is read: if it is replaced meanwhile, the mark is that of the old one
    if callable(image):
        image, boxes = image()
    try:
        return mark, prepare_image(image, short_side, boxes, rendering)
    except ValueError as error:
        return mark, str(error).removeprefix(f"{image} is " if isinstance(image, Path) else "image data is ")


def prepare_one(record: Record, short_side: int, rendering: Rendering) -> PreparedImage | str:
    """A record's image as a shard would hold it, or why it would be left out."""
    return _prepare(record.image, record.boxes, short_side, rendering)[1]


def cannot_be_used(record: Record, short_side: int, rendering: Rendering) -> bool:
    """Whether a record's image would be left out."""
    return isinstance(prepare_one(record, short_side, rendering), str)
