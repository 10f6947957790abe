"""Packing on Ray: tasks make the samples of a shard's records, and one task an output shard publishes it.

The driver sees marks, reasons and counts alone, and decides where shards begin; samples go from task to task. So the bytes are
those of `pack` on one machine, also where images that cannot be used move the borders of all later shards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import ray
from mmclip_shards import storage
from mmclip_shards.manifest import Shard
from mmclip_shards.preparation import Job, SampleMaker
from mmclip_shards.schema import Record
from mmclip_shards.storage import Url
from mmclip_shards.writer import write_shard

Members = dict[str, bytes]


class _Place(NamedTuple):
    """Where a sample lies: in which result of `_make`, and at which place."""

    samples: Any
    place: int


@dataclass(frozen=True)
class RayWorkers:
    """The cluster that this process has joined (`stage.connect`), as `workers` of `mmclip_shards.pack`.

    count: tasks at once, of one CPU each. All machines must see the raw files and the destination under the same names.
    """

    count: int

    @property
    def ahead(self) -> int:
        """One shard a task."""
        return self.count

    def prepare(
        self, jobs: Iterator[Job], make: SampleMaker, samples_per_shard: int
    ) -> Generator[tuple[Job, str, Any], None, None]:
        """See `Workers`. A task gets the records of one shard, and no other."""
        maker = ray.put(make)
        waiting: deque[tuple[list[Job], Any, Any]] = deque()
        groups = _groups(jobs, samples_per_shard)
        for group in chain(groups, [None] * self.count):
            if group is not None:
                made: Any = _make.remote(maker, [_anywhere(record) for _, record in group])
                waiting.append((group, *made))
            if waiting and (group is None or len(waiting) > self.count):
                first, facts, samples = waiting.popleft()
                for place, (job, (mark, reason)) in enumerate(zip(first, _result(facts), strict=True)):
                    yield job, mark, _Place(samples, place) if reason is None else reason

    def write(self, url: Url, number: int, samples: list[tuple[str, _Place]]) -> Callable[[], Shard]:
        """See `Workers`."""
        groups = list(dict.fromkeys(place.samples for _, place in samples))
        places = [(key, groups.index(place.samples), place.place) for key, place in samples]
        path = storage.local_path(url)
        shard = _publish.remote(str(path.absolute() if path else url), number, places, *groups)
        return lambda: _result(shard)


def _groups(jobs: Iterator[Job], size: int) -> Iterator[list[Job]]:
    for _, of_split in groupby(jobs, key=lambda job: job[0]):
        while group := list(islice(of_split, size)):
            yield group


def _anywhere(record: Record) -> Record:
    """A record that means the same in a process with another working folder."""
    return replace(record, image=record.image.absolute()) if isinstance(record.image, Path) else record


@ray.remote(num_cpus=1, num_returns=2)
def _make(make: SampleMaker, records: list[Record]) -> tuple[list[tuple[str, str | None]], list[Members | None]]:
    """Of each record (mark, why it is left out), and its sample."""
    made = [(mark, sample) for _, mark, sample in make.all_of(("", record) for record in records)]
    return (
        [(mark, sample if isinstance(sample, str) else None) for mark, sample in made],
        [None if isinstance(sample, str) else sample for _, sample in made],
    )


@ray.remote(num_cpus=0)  # else it would wait for the samples of later shards, which wait in memory for it
def _publish(url: str, number: int, places: list[tuple[str, int, int]], *groups: list[Members]) -> Shard:
    """One shard. places: of each sample its key, and where it lies in `groups`."""
    return write_shard(url, number, [(key, groups[group][place]) for key, group, place in places])


def _result(reference: Any) -> Any:
    """The result of a task. ValueError for what the user can mend, OSError for a store that fails or workers that die."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        told = " ".join(str(cause or str(error).strip().splitlines()[-1]).split())
        if isinstance(cause, ValueError):
            raise ValueError(told) from None
        what = type(cause).__name__ if cause else "a packing worker died, most likely for lack of memory"
        raise OSError(f"{what}: {told}; finished shards are kept") from None
