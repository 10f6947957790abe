"""Pack a raw data set: check it, prepare its images in parallel, write DEST/SPLIT/000000.tar and so on, then the manifests."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from pathlib import Path

from mmclip_shards import storage
from mmclip_shards.images import PreparedImage, prepare_image
from mmclip_shards.manifest import MANIFEST_NAME, Manifest, load_manifest
from mmclip_shards.schema import Record, canonical_json, check_record, sample_document
from mmclip_shards.split import (
    check_patient,
    check_patients_stay,
    check_split_name,
    check_splits,
    hash_patient,
    split_of,
)
from mmclip_shards.split import patient_key as stored_patient_key
from mmclip_shards.storage import Url
from mmclip_shards.writer import SAMPLES_PER_SHARD, ShardWriter

SHORT_SIDE = 512
_WINDOW_PER_WORKER = 8
_NAMED_FAILURES = 5

Numbered = tuple[int, Record]
"""A record and its place in the caller's sequence, from 1. Errors name the place, never the patient."""


def pack(
    records: Sequence[Record] | Iterable[Record],
    dest: Url,
    *,
    dataset: str,
    splits: Mapping[str, float] | None,
    split_of_record: Mapping[str, str] | None = None,
    seed: int = 0,
    short_side: int = SHORT_SIDE,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    config_hash: str,
    patient_key: bytes | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Manifest]:
    """Write a base set below `dest`, one folder per split -> its manifests, by split.

    splits: split -> fraction of the patients. Or give None and split_of_record: key -> split, for every record.
    short_side: pixels (see `prepare_image`). config_hash: identifies the records (see `datasets`); pack adds its own settings.
    patient_key: key of the stored patient hash; `split.patient_key()` by default. progress(done, total): after every image.

    Packing again skips finished splits. All is checked before anything is written, except the content of the images: if some
    are unreadable, one error lists them and nothing is left behind. ValueError for all that the caller can mend.
    """
    for name, value in (("short_side", short_side), ("samples_per_shard", samples_per_shard), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    key = stored_patient_key() if patient_key is None else patient_key
    numbered = _check_records(records)
    plan = _assign(numbered, splits, split_of_record, seed)
    assignment = dict(splits) if splits is not None else {record.key: name for name in plan for _, record in plan[name]}
    full_hash = _hash_settings(
        config=config_hash,
        dataset=dataset,
        splits=assignment,
        seed=seed if splits is not None else None,
        short_side=short_side,
        samples_per_shard=samples_per_shard,
        patient_key=hash_patient("fingerprint of the key", key),
    )
    manifests = _load_finished(dest, full_hash)
    todo = {split: rows for split, rows in plan.items() if split not in manifests}
    if todo:
        _check_images_exist(numbered)
        label_names = tuple(sorted({name for _, record in numbered for name in record.labels}))
        samples = _encode_samples(
            todo,
            dataset=dataset,
            label_names=label_names,
            key=key,
            short_side=short_side,
            workers=workers,
            progress=progress,
        )
        existed = storage.exists(dest)
        try:
            with ExitStack() as stack, closing(samples):
                writers = {
                    split: stack.enter_context(
                        ShardWriter(
                            storage.join(dest, split),
                            kind="base",
                            dataset=dataset,
                            split=split,
                            config_hash=full_hash,
                            labels=label_names,
                            samples_per_shard=samples_per_shard,
                        )
                    )
                    for split in todo
                }
                for split, sample_key, files in samples:
                    writers[split].add(sample_key, files)
        except BaseException:
            if not existed:
                storage.remove_empty_folder(dest)
            raise
    return {split: manifests.get(split) or load_manifest(storage.join(dest, split)) for split in plan}


def _check_records(records: Iterable[Record]) -> list[Numbered]:
    """The records with their numbers, sorted by key. ValueError that names the first record that cannot be stored."""
    numbered = list(enumerate(records, 1))
    if not numbered:
        raise ValueError("there are no records to pack")
    for number, record in numbered:
        try:
            check_record(record)
            check_patient(record.patient)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
    numbered.sort(key=lambda row: row[1].key)
    for (first, one), (second, other) in itertools.pairwise(numbered):
        if one.key == other.key:
            raise ValueError(
                f"records {first} and {second} share the key {one.key!r}: every image needs a key of its own"
            )
    return numbered


def _assign(
    numbered: list[Numbered], splits: Mapping[str, float] | None, split_of_record: Mapping[str, str] | None, seed: int
) -> dict[str, list[Numbered]]:
    """Split -> its records, sorted by key. ValueError for a split that would be empty, or a patient in two splits."""
    if (splits is None) == (split_of_record is None):
        raise ValueError("give either split fractions (splits) or every record's split (split_of_record), not both")
    plan: dict[str, list[Numbered]] = {}
    if splits is not None:
        check_splits(splits)
        plan = {name: [] for name, fraction in splits.items() if fraction > 0}
        for row in numbered:
            plan[split_of(row[1].patient, splits, seed)].append(row)
        for name, rows in plan.items():
            if not rows:
                patients = len({record.patient for _, record in numbered})
                raise ValueError(
                    f"no patient fell in split {name!r} (fraction {splits[name]:g} of {patients} patients): "
                    "give it a larger fraction, try another seed, or leave the split out"
                )
        return plan
    assert split_of_record is not None
    for number, record in numbered:
        if record.key not in split_of_record:
            raise ValueError(f"record {number} has no split: give every record one, or split by fractions")
    for name in sorted({split_of_record[record.key] for _, record in numbered}):
        check_split_name(name)
        plan[name] = [row for row in numbered if split_of_record[row[1].key] == name]
    by_number = sorted(numbered, key=lambda row: row[0])
    check_patients_stay(
        (f"record {number}", record.patient, split_of_record[record.key]) for number, record in by_number
    )
    return plan


def _hash_settings(**settings: object) -> str:
    """Hash of everything that shapes a packed set. Packing with an equal hash is skipped."""
    return hashlib.sha256(canonical_json(settings)).hexdigest()


def _load_finished(dest: Url, config_hash: str) -> dict[str, Manifest]:
    """Manifests in `dest` of an earlier run with the same settings, by split. ValueError when `dest` holds another set."""
    if storage.exists(storage.join(dest, MANIFEST_NAME)):
        raise ValueError(f"{dest} is itself a split of a packed set: name a new folder, or the folder above it")
    finished: dict[str, Manifest] = {}
    for name in storage.list_folder(dest):
        folder = storage.join(dest, name)
        if not storage.exists(storage.join(folder, MANIFEST_NAME)):
            continue
        manifest = load_manifest(folder)
        if manifest.kind != "base":
            continue  # sidecars may lie beside the splits
        if manifest.config_hash != config_hash:
            raise ValueError(
                f"{dest} holds another set (split {name!r} of {manifest.dataset!r}, packed from other data or with "
                "other settings): pack into a new folder, or remove this one first"
            )
        finished[name] = manifest
    return finished


def _check_images_exist(numbered: list[Numbered]) -> None:
    missing = sorted(
        number for number, record in numbered if isinstance(record.image, Path) and not record.image.is_file()
    )
    if missing:
        raise ValueError(f"{len(missing)} of {len(numbered)} images are missing, the first one of record {missing[0]}")


def _encode_samples(
    todo: Mapping[str, list[Numbered]],
    *,
    dataset: str,
    label_names: tuple[str, ...],
    key: bytes,
    short_side: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Generator[tuple[str, str, dict[str, bytes]], None, None]:
    """(split, key, members) of every record. After the first unreadable image it yields no more, but finds all others too.

    ValueError at the end that lists the unreadable images.
    """
    jobs = [(split, number, record) for split, rows in todo.items() for number, record in rows]
    failures: list[str] = []
    with closing(_prepare_all([record for _, _, record in jobs], short_side, workers)) as images:
        for done, ((split, number, record), image) in enumerate(zip(jobs, images, strict=True), 1):
            if isinstance(image, str):
                failures.append(f"record {number}: {image}")
            elif not failures:
                document = sample_document(
                    record,
                    label_names=label_names,
                    patient_hash=hash_patient(record.patient, key),
                    dataset=dataset,
                    width=image.width,
                    height=image.height,
                    boxes=image.boxes,
                )
                yield split, record.key, {image.suffix: image.data, "json": canonical_json(document)}
            if progress is not None:
                progress(done, len(jobs))
    if failures:
        named = "; ".join(failures[:_NAMED_FAILURES]) + ("; ..." if len(failures) > _NAMED_FAILURES else "")
        raise ValueError(
            f"{len(failures)} of {len(jobs)} images cannot be read, so nothing was written. "
            f"Mend them or take them out: {named}"
        )


def _prepare_all(records: list[Record], short_side: int, workers: int) -> Generator[PreparedImage | str, None, None]:
    """The prepared image of every record, in order, or a text that says why there is none. Holds a bounded number in memory."""
    if workers == 1:
        yield from (_prepare(record, short_side) for record in records)
        return
    # Spawn, do not fork: a child of a process with threads (torch, fsspec) may inherit a lock that nobody releases.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    window: deque[Future[PreparedImage | str]] = deque()
    try:
        for record in records:
            window.append(pool.submit(_prepare, record, short_side))
            if len(window) >= workers * _WINDOW_PER_WORKER:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError("a packing worker died, most likely for lack of memory: pack with fewer workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(record: Record, short_side: int) -> PreparedImage | str:
    try:
        return prepare_image(record.image, short_side, record.boxes)
    except ValueError as error:
        return str(error) if isinstance(record.image, Path) else f"{record.source}: {error}"
