"""The data card of a packed set as one HTML file: terms, counts, labels and which go together, views, ages, report lengths, image
sizes, some images, hashes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import ceil
from pathlib import Path

import jinja2
from mmclip_shards.images import decode_image
from mmclip_shards.manifest import Shard, load_manifest
from mmclip_shards.phi import KINDS
from mmclip_shards.schema import IMAGE_SUFFIXES
from mmclip_shards.stats import LabelCounts, SetStats, SplitStats
from mmclip_shards.storage import write_atomic
from PIL import Image

from mmclip_dist.config import Source
from mmclip_dist.data.join import JoinedSet
from mmclip_dist.evaluate.report.examples import data_uri
from mmclip_dist.evaluate.report.view import spread

TILES = 24  # images of the contact sheet of a split
_TILE = 160  # pixels of their long side: about 5 kB each
_BINS, _VIEWS, _SIZES, _TOGETHER = 24, 12, 8, 16
_YEARS = 5  # of a bar of ages


@dataclass(frozen=True)
class Bar:
    """One bar. share: of the longest, for its length; of_all: of the samples."""

    name: str
    count: int
    share: float
    of_all: float


@dataclass(frozen=True)
class LabelRow:
    """A label. parts: (value, count, share of the samples) of present, uncertain, absent and not mentioned."""

    name: str
    present: int
    parts: tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Together:
    """How often labels are present together. cells[row][column]: share of the row's samples in which the column's label is
    present, too, or None on the diagonal and where a label is never present. left_out: labels that are not shown."""

    names: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    left_out: int


@dataclass(frozen=True)
class SplitCard:
    """What the page shows of one split. tiles: data URIs, None for an image that cannot be read."""

    stats: SplitStats
    labels: tuple[LabelRow, ...]
    together: Together | None
    views: tuple[Bar, ...]
    ages: tuple[Bar, ...]
    words: tuple[Bar, ...]
    sizes: tuple[Bar, ...]
    phi: tuple[tuple[str, int], ...]
    tiles: tuple[str | None, ...]
    shards: tuple[Shard, ...]


def build_card(found: SetStats, out: Path) -> None:
    """Write the card of a set, atomically. The same set gives the same bytes. found: of `collect_stats`. ValueError or OSError
    where the set's images cannot be read."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmclip_dist.evaluate.report", "."), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    cards = [_card(split) for split in found.splits]
    page = environment.get_template("card.html").render(
        names=list(dict.fromkeys(split.dataset for split in found.splits)), cards=cards, found=found,
        terms=list(dict.fromkeys((split.dataset, split.licence, split.access) for split in found.splits)),
        samples=sum(split.samples for split in found.splits),
        reports=sum(split.samples - split.unreadable - split.without_report for split in found.splits),
    )  # fmt: skip
    write_atomic(str(out), page.encode())


def _card(split: SplitStats) -> SplitCard:
    return SplitCard(
        stats=split,
        labels=tuple(_label_rows(split)),
        together=co_occurrence(split.labels, split.together),
        views=_bars(islice(split.views.items(), _VIEWS), split.samples),
        ages=_bars(binned(split.ages_of, _YEARS), split.samples),
        words=_bars(binned(split.report_words), split.samples),
        sizes=_bars(islice(split.sizes.items(), _SIZES), split.samples),
        phi=tuple((kind, split.phi_scan[kind]) for kind in KINDS if split.phi_scan and split.phi_scan.get(kind)),
        tiles=tuple(_tiles(split.folder)),
        shards=load_manifest(split.folder).shards,
    )


def _label_rows(split: SplitStats) -> Iterator[LabelRow]:
    for name, counts in sorted(split.labels.items(), key=lambda item: (-item[1].present, item[0])):
        values = asdict(counts)
        parts = tuple((value.replace("_", " "), values[value], values[value] / split.samples) for value in _VALUES)
        yield LabelRow(name, counts.present, parts)


_VALUES = ("present", "uncertain", "absent", "not_mentioned")


def co_occurrence(labels: Mapping[str, LabelCounts], together: Mapping[str, Mapping[str, int]]) -> Together | None:
    """The labels that are present most often, against each other; None if there are fewer than two."""
    often = sorted((name for name, counts in labels.items() if counts.present), key=lambda name: (-labels[name].present, name))
    names = often[:_TOGETHER]
    if len(names) < 2:
        return None

    def both(one: str, other: str) -> float | None:
        first, second = sorted((one, other))
        return None if one == other else together.get(first, {}).get(second, 0) / labels[one].present

    return Together(tuple(names), tuple(tuple(both(row, column) for column in names) for row in names), len(often) - len(names))


def binned(histogram: Mapping[int, int], width: int | None = None) -> list[tuple[str, int]]:
    """A histogram of whole numbers in bins of equal width, from the first that holds any to the last: ("20-24", 7), ...

    width: by default one that gives at most 24 bins. The last one takes in what lies beyond the 99th percentile.
    """
    if not histogram:
        return []
    total, seen, top = sum(histogram.values()), 0, max(histogram)
    if width is None:
        for value in sorted(histogram):
            seen += histogram[value]
            if seen >= 0.99 * total:
                top = value
                break
        width = ceil((top + 1 - min(histogram)) / _BINS)
    first, last = min(histogram) // width, top // width
    counts = dict.fromkeys(range(first, last + 1), 0)
    for value, count in histogram.items():
        counts[min(value // width, last)] += count
    beyond = max(histogram) // width > last
    names = {place: str(place) if width == 1 else f"{place * width}–{place * width + width - 1}" for place in counts}
    if beyond:
        names[last] = f"{last * width} or more"
    return [(names[place], count) for place, count in counts.items()]


def _bars(counts: Iterable[tuple[str, int]], samples: int) -> tuple[Bar, ...]:
    rows: Sequence[tuple[str, int]] = list(counts)
    most = max((count for _, count in rows), default=1) or 1
    return tuple(Bar(name, count, count / most, count / samples) for name, count in rows)


def _tiles(folder: str) -> Iterator[str | None]:
    joined = JoinedSet(Source(url=folder))
    for shard, key in spread(joined, TILES):
        members = joined.read(shard, key)
        try:
            picture = decode_image(next(members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members))
        except (ValueError, StopIteration):
            yield None
            continue
        picture.thumbnail((_TILE, _TILE), Image.Resampling.BICUBIC)
        yield data_uri(picture, "JPEG", quality=80)
