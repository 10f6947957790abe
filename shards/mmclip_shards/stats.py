"""Count what a packed set holds. Samples are streamed: memory holds only counts, and hashes of patients."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, combinations
from math import ceil

from mmclip_shards.document import read_document
from mmclip_shards.images import image_facts
from mmclip_shards.manifest import Manifest, find_sets, load_manifest, manifest_hash
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import IMAGE_SUFFIXES
from mmclip_shards.storage import Url

NO_VIEW = "(unknown)"


@dataclass(frozen=True)
class Spread:
    """Minimum, median, 95th percentile and maximum of whole numbers, by nearest rank."""

    min: int
    median: int
    p95: int
    max: int

    def __str__(self) -> str:
        return f"{self.min} / {self.median} / {self.p95} / {self.max}"


@dataclass(frozen=True)
class LabelCounts:
    """Samples by their label for one disease. The four counts add up to all samples."""

    present: int
    absent: int
    uncertain: int
    not_mentioned: int


@dataclass(frozen=True)
class SplitStats:
    """One split. manifest: hash of its manifest, which holds those of its shards; config_hash, licence, access, phi_scan,
    labels_by: as the manifest has them; bytes: of the tars; words: per report, without empty ones; widths, heights: of
    the images, in pixels; ages: of the patients, an image each, in years.

    report_words, ages_of, sizes: how many reports have so many words, images a patient of this age, images "WIDTH x HEIGHT"
    pixels. together: label -> other label that comes after it -> samples in which both are present.
    unreadable: samples whose text or JSON cannot be read; undecodable: samples whose image has no usable header.
    """

    folder: str
    dataset: str
    manifest: str
    config_hash: str
    licence: str | None
    access: str | None
    phi_scan: dict[str, int] | None
    labels_by: str | None
    split: str
    shards: int
    samples: int
    bytes: int
    views: dict[str, int]
    labels: dict[str, LabelCounts]
    together: dict[str, dict[str, int]]
    without_report: int
    words: Spread | None
    widths: Spread | None
    heights: Spread | None
    ages: Spread | None
    without_age: int
    report_words: dict[int, int]
    ages_of: dict[int, int]
    sizes: dict[str, int]
    patients: int
    without_patient: int
    images_per_patient: Spread | None
    unreadable: int
    undecodable: int


@dataclass(frozen=True)
class SetStats:
    """All splits of a set. patients: of all splits, each once. patients_in_several_splits: must be 0, or evaluation sees
    patients of the training."""

    splits: tuple[SplitStats, ...]
    patients: int
    patients_in_several_splits: int


def collect_stats(url: Url, progress: Callable[[int, int], None] | None = None) -> SetStats:
    """Count the set at `url`, or every split below it. progress(done, total): in samples.

    ValueError when there is no set, or a sample is damaged (`mmclip verify` lists all damage). Other errors as in
    `ShardReader.read`.
    """
    manifests = {folder: load_manifest(folder) for folder in find_sets(url)}
    manifests = {folder: manifest for folder, manifest in manifests.items() if manifest.kind == "base"}
    if not manifests:
        raise ValueError(f"{url} holds sidecars: name the packed set that they belong to")
    total = sum(manifest.samples for manifest in manifests.values())
    done = 0
    splits = []
    splits_of_patient: Counter[bytes] = Counter()
    for folder, manifest in manifests.items():
        counts = _Counts()
        reader = ShardReader(folder, manifest)
        for number in range(len(manifest.shards)):
            for _, members in reader.samples(number):
                counts.add(members)
                done += 1
                if progress is not None:
                    progress(done, total)
        splits.append(counts.result(folder, manifest))
        splits_of_patient.update(counts.patients.keys())
    return SetStats(tuple(splits), len(splits_of_patient), sum(count > 1 for count in splits_of_patient.values()))


def spread(histogram: Mapping[int, int]) -> Spread | None:
    """The spread of a histogram (value -> how often); None if it is empty."""
    total = sum(histogram.values())
    if not total:
        return None
    values = sorted(histogram)
    reached = list(accumulate(histogram[value] for value in values))
    median, p95 = (values[bisect_left(reached, ceil(share * total / 100))] for share in (50, 95))
    return Spread(values[0], median, p95, values[-1])


class _Counts:
    """The counts of one split, while it is read. patients: short hash -> images."""

    def __init__(self) -> None:
        self.views: Counter[str] = Counter()
        self.labels: Counter[tuple[str, int | None]] = Counter()
        self.together: Counter[tuple[str, str]] = Counter()
        self.ages: Counter[int] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.words: Counter[int] = Counter()
        self.patients: Counter[bytes] = Counter()
        self.samples = self.without_report = self.without_patient = self.unreadable = self.undecodable = 0

    def add(self, members: Mapping[str, bytes]) -> None:
        """Count one sample."""
        self.samples += 1
        try:
            facts = image_facts(next(members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), decode=False)
        except (ValueError, StopIteration):
            self.undecodable += 1
        else:
            self.sizes[facts.width, facts.height] += 1
        try:
            document = read_document(members)
        except ValueError:
            self.unreadable += 1
            return
        self.views[document.view or NO_VIEW] += 1
        self.labels.update(document.labels.items())
        self.together.update(combinations(sorted(name for name, value in document.labels.items() if value == 1), 2))
        if document.age is not None:
            self.ages[document.age] += 1
        if document.report:
            self.words[len(document.report.split())] += 1
        else:
            self.without_report += 1
        if document.patient:
            # Hash it again: a foreign set may hold raw ids, and none may stay in memory.
            self.patients[
                hashlib.blake2b(document.patient.encode("utf-8", "surrogatepass"), digest_size=12).digest()
            ] += 1
        else:
            self.without_patient += 1

    def result(self, folder: str, manifest: Manifest) -> SplitStats:
        labels = {}
        for name in manifest.labels:
            present, absent, uncertain = (self.labels[name, value] for value in (1, 0, -1))
            labels[name] = LabelCounts(present, absent, uncertain, self.samples - present - absent - uncertain)
        together: dict[str, dict[str, int]] = {}
        for (first, second), count in sorted(self.together.items()):
            together.setdefault(first, {})[second] = count
        widths, heights = Counter[int](), Counter[int]()
        for (width, height), count in self.sizes.items():
            widths[width] += count
            heights[height] += count
        return SplitStats(
            folder=folder,
            dataset=manifest.dataset,
            manifest=manifest_hash(manifest),
            config_hash=manifest.config_hash,
            licence=manifest.licence,
            access=manifest.access,
            phi_scan=manifest.phi_scan,
            labels_by=manifest.labels_by,
            split=manifest.split,
            shards=len(manifest.shards),
            samples=self.samples,
            bytes=sum(shard.bytes for shard in manifest.shards),
            views=dict(self.views.most_common()),
            labels=labels,
            together=together,
            without_report=self.without_report,
            words=spread(self.words),
            widths=spread(widths),
            heights=spread(heights),
            ages=spread(self.ages),
            without_age=self.samples - self.ages.total(),
            report_words=dict(sorted(self.words.items())),
            ages_of=dict(sorted(self.ages.items())),
            sizes={f"{width} x {height}": count for (width, height), count in self.sizes.most_common()},
            patients=len(self.patients),
            without_patient=self.without_patient,
            images_per_patient=spread(Counter(self.patients.values())),
            unreadable=self.unreadable,
            undecodable=self.undecodable,
        )
