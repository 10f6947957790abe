"""Find images that are nearly the same, reports that are the same, and patients in two splits, within a set and across sets.

An image's mark is its difference hash (dHash): for each of 16 x 16 cells, whether it is brighter than the next to its right. A
copy that was resized, compressed again or made lighter differs in few of the 256 bits. Two images count as nearly the same if at
most `distance` bits differ. Not all pairs are compared: the bits are dealt into `distance` + 1 bands, and only marks that agree
in a whole band are looked at, which misses none (pigeonhole). The usual 64 bits would not do: radiographs of two people differ
in 2 of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmclip_shards import storage
from mmclip_shards.document import read_document
from mmclip_shards.images import decode_image
from mmclip_shards.manifest import Manifest, load_manifest, manifest_hash
from mmclip_shards.processes import in_order
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import IMAGE_SUFFIXES, canonical_json
from mmclip_shards.sources import open_sources, unknown_keys
from mmclip_shards.storage import Url

SIDE = 16
BITS = SIDE * SIDE
DISTANCE = 8
"""Bits that may differ. Of 1,296 radiographs, other images came as near as 17; copies at quality 75 differed in 5 at most."""

KINDS = ("images", "reports", "patients")

_MARGIN = 1  # grey levels: what is flat stays 0 whatever the noise
_ONES = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)
_NOTHING = bytes(16)  # in place of the hash of a report or a patient


@dataclass(frozen=True)
class Groups:
    """Samples that are alike, in groups of two or more. samples: in all of them. across_sets, across_splits, across_patients: the
    groups with samples of several of these."""

    groups: int
    samples: int
    across_sets: int
    across_splits: int
    across_patients: int


class Spare(NamedTuple):
    """A sample that may go. kind: of `KINDS`, why; like: folder and key of the one that stays."""

    folder: str
    key: str
    kind: str
    like: tuple[str, str]


@dataclass(frozen=True)
class Duplicates:
    """What `find_duplicates` found. images: nearly the same; reports: the same but for case, space; undecodable: samples whose
    image or document cannot be read. patients: (folder, folder) -> patients that are in both, if these are of different splits.

    spare: without these samples, one of each group of images stays, one patient of each report, each patient in one split. What
    stays is of a split other than `train` if it can be, else of the set that was named first.
    """

    samples: int
    sets: int
    undecodable: int
    images: Groups
    reports: Groups
    patients: dict[tuple[str, str], int]
    spare: tuple[Spare, ...]
    notes: tuple[str, ...]


def find_duplicates(
    urls: Sequence[Url],
    *,
    distance: int = DISTANCE,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Duplicates:
    """Compare all samples of the sets at `urls`, and below them. Memory: about 150 bytes a sample.

    distance: bits of 256 in which images may differ. progress(done, total): in shards. The result is the same whatever the number
    of worker processes. ValueError for a distance that is not 0 to 64, and for a damaged shard.
    """
    if not 0 <= distance <= 64:
        raise ValueError(f"distance is {distance}; it must be 0 to 64 of {BITS} bits")
    sources = open_sources(urls)
    manifests = {source.folder: source.manifest for source in sources}
    folders = sorted(manifests, key=lambda folder: manifests[folder].split == "train")  # what comes first stays
    jobs = [(folder, number) for folder in folders for number in range(len(manifests[folder].shards))]
    scans = []
    for scan in _scan_all(jobs, workers):
        scans.append(scan)
        if progress is not None:
            progress(len(scans), len(jobs))
    found = _Samples(folders, manifests, jobs, scans)
    usable = np.flatnonzero(found.usable)
    of_images = np.arange(len(found.keys))
    of_images[usable] = usable[near_groups(found.marks[usable], distance)]
    of_reports = _equal_groups(found.reports)
    spare = {
        "images": found.spare(of_images),
        "reports": found.spare(of_reports, found.patients),
        "patients": found.spare(_equal_groups(found.patients), found.splits),
    }
    return Duplicates(
        samples=len(found.keys),
        sets=len(folders),
        undecodable=len(found.keys) - len(usable),
        images=found.count(of_images),
        reports=found.count(of_reports),
        patients=found.patients_in_two_splits(),
        spare=tuple(
            Spare(*found.name(one), kind, found.name(other)) for kind, pairs in spare.items() for one, other in pairs
        ),
        notes=tuple(_key_notes(manifests) or unknown_keys(sources)),
    )


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """These kinds. ValueError for one that is none of `KINDS`."""
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"{unknown[0]!r} is no kind of duplicates; the kinds are {', '.join(KINDS)}")
    return tuple(kinds)


def write_list(url: Url, found: Duplicates, kinds: Sequence[str] = ("images", "patients")) -> int:
    """Write the spare samples of these kinds as a list for `rewrite.select` -> how many."""
    first: dict[tuple[str, str], Spare] = {}
    for spare in found.spare:
        if spare.kind in kinds:
            first.setdefault((spare.folder, spare.key), spare)
    hashes = {folder: manifest_hash(load_manifest(folder)) for folder in {folder for folder, _ in first}}
    rows = [
        {"set": hashes[folder], "folder": folder, "key": key, "kind": spare.kind, "like": list(spare.like)}
        for (folder, key), spare in sorted(first.items())
    ]
    storage.write_atomic(url, b"".join(map(canonical_json, rows)))
    return len(rows)


def image_mark_of(image: Image.Image) -> np.ndarray:
    """The difference hash of an 8-bit image -> uint64 [4]."""
    small = np.asarray(image.resize((SIDE + 1, SIDE), Image.Resampling.BOX), np.int16)
    return np.packbits(small[:, :-1] > small[:, 1:] + _MARGIN).view(np.uint64)


def near_groups(marks: np.ndarray, distance: int) -> np.ndarray:
    """Groups of marks that hang together by steps of at most `distance` bits. marks [N, 4], uint64 -> the least index of the own
    group [N]."""
    unique, first, inverse = np.unique(marks, axis=0, return_index=True, return_inverse=True)
    root = np.arange(len(unique))
    bits = np.unpackbits(unique.view(np.uint8), axis=1) if len(unique) else np.empty((0, BITS), np.uint8)
    for band in range(distance + 1):
        # Dealt out like cards, so that no band is a part of the image that is black in all of them.
        key = _as_words(np.packbits(bits[:, band :: distance + 1], axis=1))
        order = np.argsort(key, kind="stable")
        key = key[order]
        end = np.searchsorted(key, key, side="right")  # of the run of equal keys, for each place
        place, step = np.arange(len(key)), 1
        while (place := place[place + step < end[place]]).size:
            one, other = order[place], order[place + step]
            open_ = root[one] != root[other]  # the rest are in one group already
            one, other = one[open_], other[open_]
            near = _differing(unique[one], unique[other]) <= distance
            _join(root, one[near], other[near])
            step += 1
    least = np.full(len(unique), len(marks))
    np.minimum.at(least, root, first)
    return least[root[inverse.reshape(-1)]]


def _join(root: np.ndarray, ones: np.ndarray, others: np.ndarray) -> None:
    """Make one group of each pair's groups. root [U]: the root of each mark's group, changed in place."""
    if not len(ones):
        return
    for pair in zip(ones.tolist(), others.tolist(), strict=True):
        one, other = (_top(root, mark) for mark in pair)
        root[max(one, other)] = min(one, other)
    while not np.array_equal(root, above := root[root]):
        root[:] = above


def _top(root: np.ndarray, mark: int) -> int:
    while root[mark] != mark:
        mark = root[mark]
    return mark


def _differing(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Bits in which two marks differ: [M, 4], [M, 4] -> [M]."""
    return _ONES[(ones ^ others).view(np.uint16)].sum(axis=1, dtype=np.int64)


def _as_words(packed: np.ndarray) -> np.ndarray:
    """Rows of bytes [U, n] -> one sortable value each [U]."""
    width = max(8, packed.shape[1])
    rows = np.zeros((len(packed), width), np.uint8)
    rows[:, : packed.shape[1]] = packed
    return rows.view(np.uint64 if width == 8 else f"V{width}").reshape(-1)


def _equal_groups(hashes: np.ndarray) -> np.ndarray:
    """Equal hashes [N] -> the least index of the own group [N]; what has none stays alone."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return np.where(hashes == np.void(_NOTHING), np.arange(len(hashes)), first[inverse.reshape(-1)])


# -- Reading ----------------------------------------------------------------------------------------------------------


class _Scan(NamedTuple):
    """What is kept of a shard's samples. marks [n, 4]; usable [n]; reports, patients [n]: 16 bytes each, a hash or nothing."""

    keys: list[str]
    marks: np.ndarray
    usable: np.ndarray
    reports: np.ndarray
    patients: np.ndarray


def _scan_all(jobs: Sequence[tuple[str, int]], workers: int) -> Iterator[_Scan]:
    """The scans of shards, in their order."""
    if workers == 1:
        yield from map(_scan, jobs)
        return
    with closing(in_order(_scan, jobs, workers)) as scans:
        for _, scan in scans:
            yield scan


def _scan(job: tuple[str, int]) -> _Scan:
    folder, number = job
    keys, marks, usable, reports, patients = [], [], [], [], []
    for key, members in _reader(folder).samples(number):
        keys.append(key)
        mark, report, patient = np.zeros(BITS // 64, np.uint64), _NOTHING, _NOTHING
        try:
            mark = image_mark_of(decode_image(next(members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members)))
            document = read_document(members)
        except (ValueError, StopIteration):
            usable.append(False)
        else:
            usable.append(True)
            report, patient = _hash(" ".join(document.report.casefold().split())), _hash(document.patient or "")
        marks.append(mark)
        reports.append(report)
        patients.append(patient)
    hashes = (np.frombuffer(b"".join(each), "V16") for each in (reports, patients))
    return _Scan(keys, np.array(marks), np.array(usable), *hashes)


@lru_cache(maxsize=8)
def _reader(folder: str) -> ShardReader:
    return ShardReader(folder, load_manifest(folder))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() if text else _NOTHING


# -- Counting ---------------------------------------------------------------------------------------------------------


class _Samples:
    """All samples, in the order in which they should stay."""

    def __init__(
        self, folders: Sequence[str], manifests: Mapping[str, Manifest], jobs: Sequence[tuple[str, int]], scans: Sequence[_Scan]
    ) -> None:
        self.folders = folders
        self.keys = [key for scan in scans for key in scan.keys]
        self.marks, self.usable, self.reports, self.patients = (
            np.concatenate([getattr(scan, name) for scan in scans]) for name in ("marks", "usable", "reports", "patients")
        )
        numbers = {folder: number for number, folder in enumerate(folders)}
        self.sets = np.repeat([numbers[folder] for folder, _ in jobs], [len(scan.keys) for scan in scans])
        names = sorted({manifest.split for manifest in manifests.values()})
        self.splits = np.array([names.index(manifests[folder].split) for folder in folders])[self.sets]

    def name(self, sample: int) -> tuple[str, str]:
        """Folder and key."""
        return self.folders[self.sets[sample]], self.keys[sample]

    def count(self, group: np.ndarray) -> Groups:
        """group [N]: of each sample, the first one of its group."""
        sizes = np.bincount(group, minlength=len(group))
        several = [np.unique(group[column != column[group]]).size for column in (self.sets, self.splits, self.patients)]
        return Groups(int((sizes > 1).sum()), int(sizes[sizes > 1].sum()), *map(int, several))

    def spare(self, group: np.ndarray, but: np.ndarray | None = None) -> list[tuple[int, int]]:
        """(sample, the one that stays) of all but the first of a group. but [N]: those that share it with the first stay, too."""
        away = group != np.arange(len(group))
        if but is not None:
            away &= but != but[group]
        return [(int(sample), int(group[sample])) for sample in np.flatnonzero(away)]

    def patients_in_two_splits(self) -> dict[tuple[str, str], int]:
        known = self.patients != np.void(_NOTHING)
        _, numbers = np.unique(self.patients[known], return_inverse=True)
        places = np.unique(np.stack([numbers.reshape(-1), self.sets[known]], axis=1), axis=0)
        found: Counter[tuple[str, str]] = Counter()
        split_of = dict(zip(self.sets.tolist(), self.splits.tolist(), strict=True))
        starts = np.flatnonzero(np.diff(places[:, 0], prepend=-1))
        for of_patient in np.split(places[:, 1], starts[1:]):
            for one, other in combinations(of_patient.tolist(), 2):
                if split_of[one] != split_of[other]:
                    found[self.folders[one], self.folders[other]] += 1
        return dict(found)


def _key_notes(manifests: Mapping[str, Manifest]) -> list[str]:
    first: dict[str, str] = {}
    for folder, manifest in manifests.items():
        if manifest.patient_key_id is not None:
            first.setdefault(manifest.patient_key_id, folder)
    if len(first) < 2:
        return []
    return [f"patients of {' and '.join(first.values())} cannot be compared: their hashes have different keys"]
