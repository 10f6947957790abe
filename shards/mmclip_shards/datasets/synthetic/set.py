"""Draw and pack a set of synthetic radiographs, in several processes."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from mmclip_shards.datasets.synthetic import synthetic_records
from mmclip_shards.manifest import Manifest
from mmclip_shards.pack import pack
from mmclip_shards.schema import Record, canonical_json
from mmclip_shards.storage import Url

_PATIENT_KEY = b"synthetic patients have nothing to hide"
"""A fixed key, so that a synthetic set is the same on every machine and no user's key is used for it."""

_CHUNK = 64


def pack_synthetic(
    dest: Url,
    count: int,
    *,
    seed: int,
    size: int,
    splits: Mapping[str, float],
    unpaired: bool = False,
    samples_per_shard: int = 256,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Manifest]:
    """Write `count` synthetic radiographs of size x size pixels below `dest` -> their manifests, by split.

    unpaired: labels without reports. workers: processes that draw. progress(done, total): images drawn. See
    `synthetic_records` and `pack`.
    """
    records = []
    for record in _draw_all(count, seed, size, unpaired, workers):
        records.append(record)
        if progress:
            progress(len(records), count)
    return pack(
        records,
        dest,
        dataset="synthetic-unpaired" if unpaired else "synthetic",
        splits=splits,
        seed=seed,
        short_side=size,
        samples_per_shard=samples_per_shard,
        config_hash=_identity(count=count, seed=seed, size=size, unpaired=unpaired),
        patient_key=_PATIENT_KEY,
    )


def _identity(**settings: object) -> str:
    """Hash of the settings and of this package's code: another version of the code may draw other images."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(canonical_json(settings) + code).hexdigest()


def _draw_all(count: int, seed: int, size: int, unpaired: bool, workers: int) -> Iterator[Record]:
    if workers == 1:
        yield from synthetic_records(count, seed=seed, size=size, unpaired=unpaired)
        return
    starts = range(0, count, _CHUNK)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for records in pool.map(_draw, [(start, min(_CHUNK, count - start), seed, size, unpaired) for start in starts]):
            yield from records


def _draw(part: tuple[int, int, int, int, bool]) -> list[Record]:
    start, count, seed, size, unpaired = part
    return list(synthetic_records(count, seed=seed, size=size, unpaired=unpaired, start=start))
