"""Which patients and images a run trains on, as hashes in one file that every checkpoint carries: so that a test set is known to
be new although it was packed anew, elsewhere, or under another name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import xxhash
from mmclip_shards.document import read_document
from mmclip_shards.manifest import load_index
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import IMAGE_SUFFIXES
from mmclip_shards.storage import write_atomic

SEEN = "seen.npz"


@dataclass(frozen=True)
class Seen:
    """patients: 64-bit hashes of the keyed hashes that samples carry; sets that were packed with another key have others. images:
    those of the encoded files, from the shards' indexes; an image that was resized otherwise has another. Both sorted, each once.
    datasets: names in the manifests."""

    patients: np.ndarray
    images: np.ndarray
    datasets: tuple[str, ...]

    @classmethod
    def of(cls, readers: Sequence[ShardReader], rank: int = 0, world: int = 1) -> Seen:
        """Of some sets, or of a rank's share of their shards. Reads the sets once. A damaged document has no patient."""
        patients: set[int] = set()
        images: list[int] = []
        shards = [(reader, number) for reader in readers for number in range(len(reader.manifest.shards))]
        for reader, number in shards[rank::world]:
            index = load_index(reader.url, reader.manifest.shards[number])
            members = (member for row in range(len(index.keys)) for member in index.sample(row))
            images += [xxh3 for suffix, _, _, xxh3 in members if suffix in IMAGE_SUFFIXES]
            for _, sample in reader.samples(number):
                try:
                    patient = read_document(sample).patient
                except ValueError:
                    continue
                if patient is not None:
                    patients.add(xxhash.xxh3_64_intdigest(patient.encode()))
        names = tuple(dict.fromkeys(reader.manifest.dataset for reader in readers))
        return cls(np.unique(np.array(sorted(patients), np.uint64)), np.unique(np.array(images, np.uint64)), names)

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """The shares of all ranks."""
        return cls(
            np.unique(np.concatenate([part.patients for part in parts])),
            np.unique(np.concatenate([part.images for part in parts])),
            tuple(dict.fromkeys(name for part in parts for name in part.datasets)),
        )  # fmt: skip

    def common(self, other: Seen) -> tuple[int, int]:
        """How many patients and how many images are in both."""
        return tuple(len(np.intersect1d(mine, its, assume_unique=True))  # type: ignore[return-value]
                     for mine, its in ((self.patients, other.patients), (self.images, other.images)))  # fmt: skip

    def save(self, path: Path) -> None:
        """The same hashes are the same bytes."""
        buffer = BytesIO()
        np.savez(buffer, patients=self.patients, images=self.images, datasets=np.array(self.datasets, dtype=str))
        write_atomic(str(path), buffer.getvalue())


def load_seen(path: Path) -> Seen:
    """ValueError if the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Seen(stored["patients"], stored["images"], tuple(stored["datasets"].tolist()))
    except (ValueError, KeyError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is damaged ({error}): delete it, and the leak check says that it knows no patients") from error
