"""Synthetic chest radiographs with reports: the default data, and the test bed of the method.

Nothing here is real: no patient, no scan, no copied text. For each image it is known which findings it shows, where, and
how severe. So a test can judge a model's attention, not only its predictions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mmclip_shards.datasets.synthetic.drawing import draw
from mmclip_shards.datasets.synthetic.reports import write_report
from mmclip_shards.datasets.synthetic.studies import FINDINGS, sample_study
from mmclip_shards.schema import Box, Record

__all__ = ["FINDINGS", "Drawing", "check_range", "study_record", "synthetic_records"]

LARGEST_INDEX = 10**6
"""Keys have six digits, so sorting by key sorts by index."""


def synthetic_records(
    count: int, *, seed: int, size: int = 128, unpaired: bool = False, start: int = 0
) -> Iterator[Record]:
    """Yield studies `start` to `start + count - 1` in key order, as uint8 images [size, size].

    Record i depends only on seed, unpaired, i and size, so slices from different processes fit together. A patient has 1 to 3
    consecutive studies. Unpaired records have labels and boxes and an empty report. ValueError at the first record when the
    range, the seed or the size cannot be used.
    """
    check_range(count, seed=seed, size=size, start=start)
    for index in range(start, start + count):
        drawing = Drawing(index, seed, size, unpaired)
        image, boxes = drawing()
        yield replace(study_record(drawing), image=image, boxes=boxes)


def check_range(count: int, *, seed: int, size: int, start: int = 0) -> None:
    """ValueError for studies that cannot be drawn."""
    if count < 0 or start < 0 or start + count > LARGEST_INDEX:
        raise ValueError(f"studies {start} to {start + count} asked for: choose a range within 0 to {LARGEST_INDEX}")
    if seed < 0:
        raise ValueError(f"seed is {seed}: choose a whole number of at least 0")
    if size < 32:
        raise ValueError(f"image size is {size}: choose at least 32 pixels, below that no finding can be seen")


@dataclass(frozen=True)
class Drawing:
    """The image of study `index`, drawn when it is called. It holds no pixels, so it travels to another process for nothing."""

    index: int
    seed: int
    size: int
    unpaired: bool

    def __call__(self) -> tuple[np.ndarray, tuple[Box, ...]]:
        return draw(sample_study(self.index, seed=self.seed, unpaired=self.unpaired), self.size)


def study_record(drawing: Drawing) -> Record:
    """The record of a study, whose image is not drawn yet."""
    index, seed, unpaired = drawing.index, drawing.seed, drawing.unpaired
    study = sample_study(index, seed=seed, unpaired=unpaired)
    present = {finding.name for finding in study.findings}
    key = f"synthetic-{'unpaired-' if unpaired else ''}{index:06d}"
    # The wording has its own generator, so a change of the text does not change the images.
    report = None if unpaired else write_report(study, np.random.default_rng((seed, 0, 4, index)))
    return Record(
        key=key,
        image=drawing,
        patient=study.patient,
        source=f"synthetic/{seed}/{key}",
        report=report.text if report else "",
        findings=report.findings if report else None,
        impression=report.impression if report else None,
        labels={name: int(name in present) for name in FINDINGS},
        view=study.view,
    )
