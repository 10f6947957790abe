"""Which patients and images a run trains on, as hashes in one file that every checkpoint carries: so that a test set is known to
be new although it was packed anew, elsewhere, or under another name."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import xxhash
from mmclip_shards.document import read_document
from mmclip_shards.manifest import load_index
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import IMAGE_SUFFIXES
from mmclip_shards.storage import local_path, write_atomic

SEEN = "seen.npz"
_DOCUMENT = ("json", "txt")


@dataclass(frozen=True)
class Seen:
    """patients: 64-bit hashes of the keyed hashes that samples carry; sets that were packed with another key have others. images:
    those of the encoded files, from the shards' indexes; an image that was resized otherwise has another. Both sorted, each once.
    datasets: names in the manifests. unknown: sets (data set/split) of which not all patients are known."""

    patients: np.ndarray
    images: np.ndarray
    datasets: tuple[str, ...]
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, readers: Sequence[ShardReader], rank: int = 0, world: int = 1, *, fetch: bool = True) -> Seen:
        """Of some sets, or of a rank's share of their shards: images by the indexes, patients by reading each document. A damaged
        one is of an unknown patient.

        fetch: read documents on object storage, too; they lie between the images, so all of the set comes over.
        """
        patients: set[int] = set()
        unknown: set[str] = set()
        images: list[int] = []
        shards = [(reader, number) for reader in readers for number in range(len(reader.manifest.shards))]
        for reader, number in shards[rank::world]:
            index = load_index(reader.url, reader.manifest.shards[number])
            members = (member for row in range(len(index.keys)) for member in index.sample(row))
            images += [xxh3 for suffix, _, _, xxh3 in members if suffix in IMAGE_SUFFIXES]
            if not fetch and local_path(reader.url) is None:
                unknown.add(name_of(reader))
                continue
            for key in index.keys:
                try:
                    patient = read_document(reader.read(number, key, _DOCUMENT)).patient
                except ValueError:
                    patient = None  # training lists it in its quarantine
                if patient is None:
                    unknown.add(name_of(reader))
                else:
                    patients.add(xxhash.xxh3_64_intdigest(patient.encode()))
        names = tuple(dict.fromkeys(name for reader in readers for name in reader.manifest.datasets))
        return cls(_sorted(patients), _sorted(images), names, tuple(sorted(unknown)))

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """All of what was seen: the shares of all ranks, or of this run and of the one that it started from."""
        return cls(
            np.unique(np.concatenate([part.patients for part in parts])),
            np.unique(np.concatenate([part.images for part in parts])),
            tuple(dict.fromkeys(name for part in parts for name in part.datasets)),
            tuple(dict.fromkeys(name for part in parts for name in part.unknown)),
        )  # fmt: skip

    def after(self, earlier: Path) -> Seen:
        """With what the checkpoint saw that a run starts from. earlier: its file; without it, that is unknown."""
        if earlier.is_file():
            return Seen.joined([load_seen(earlier), self])
        return replace(self, unknown=(*self.unknown, "the run that it started from"))

    def common(self, other: Seen) -> tuple[int, int]:
        """How many patients and how many images are in both."""
        return tuple(len(np.intersect1d(mine, its, assume_unique=True))  # type: ignore[return-value]
                     for mine, its in ((self.patients, other.patients), (self.images, other.images)))  # fmt: skip

    def save(self, path: Path) -> None:
        """The same hashes are the same bytes."""
        buffer = BytesIO()
        texts = {name: np.array(getattr(self, name), dtype=str) for name in ("datasets", "unknown")}
        np.savez(buffer, patients=self.patients, images=self.images, **texts)
        write_atomic(str(path), buffer.getvalue())


def name_of(reader: ShardReader) -> str:
    return f"{reader.manifest.dataset}/{reader.manifest.split}"


def _sorted(hashes: Iterable[int]) -> np.ndarray:
    return np.unique(np.fromiter(hashes, np.uint64))


def load_seen(path: Path) -> Seen:
    """ValueError if the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            texts = (tuple(stored[name].tolist()) for name in ("datasets", "unknown"))
            return Seen(stored["patients"], stored["images"], *texts)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the leak check says that it knows no patients") from error
