"""Draw and pack a set of synthetic radiographs, in several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from mmclip_shards.datasets.synthetic import Drawing, check_range, study_record
from mmclip_shards.datasets.table import Records
from mmclip_shards.manifest import Manifest
from mmclip_shards.pack import pack
from mmclip_shards.schema import canonical_json
from mmclip_shards.storage import Url

_PATIENT_KEY = b"synthetic patients have nothing to hide"
"""A fixed key, so that a synthetic set is the same on every machine and no user's key is used for it."""


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

    unpaired: labels without reports. workers: processes that draw. See `synthetic_records` and `pack`: an image is drawn when it
    is packed, and none is drawn again after a kill.
    """
    check_range(count, seed=seed, size=size)
    return pack(
        Records(range(count), lambda index: study_record(Drawing(index, seed, size, unpaired))),
        dest,
        dataset="synthetic-unpaired" if unpaired else "synthetic",
        splits=splits,
        seed=seed,
        short_side=size,
        samples_per_shard=samples_per_shard,
        config_hash=_identity(count=count, seed=seed, size=size, unpaired=unpaired),
        patient_key=_PATIENT_KEY,
        workers=workers,
        progress=progress,
    )


def _identity(**settings: object) -> str:
    """Hash of the settings and of this package's code: another version of the code may draw other images."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(canonical_json(settings) + code).hexdigest()
