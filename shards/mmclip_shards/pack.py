"""Pack a raw data set: check it, prepare its images in parallel, write DEST/SPLIT/000000.tar and so on, then the manifests."""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from mmclip_shards import storage
from mmclip_shards.images import AS_PUBLISHED, Rendering
from mmclip_shards.journal import QUARANTINE, Bad, Unfinished, load_finished, read_quarantine
from mmclip_shards.manifest import Manifest
from mmclip_shards.phi import PhiScan
from mmclip_shards.preparation import Processes, SampleMaker, Workers, cannot_be_used
from mmclip_shards.rawpath import LOOKED_FOR, RemotePath, evenly
from mmclip_shards.schema import Record, canonical_json, check_record
from mmclip_shards.split import (
    check_patient,
    check_split_name,
    check_splits,
    crossing_patients,
    key_id,
    split_of,
)
from mmclip_shards.split import patient_key as stored_patient_key
from mmclip_shards.storage import Url
from mmclip_shards.writer import SAMPLES_PER_SHARD

SHORT_SIDE = 512
_NAMED_FAILURES = 5


def pack(
    records: Iterable[Record],
    dest: Url,
    *,
    dataset: str,
    splits: Mapping[str, float] | None,
    split_of_record: Mapping[str, str] | None = None,
    seed: int = 0,
    short_side: int = SHORT_SIDE,
    rendering: Rendering = AS_PUBLISHED,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    config_hash: str,
    patient_key: bytes | None = None,
    numbering: str | None = None,
    max_bad_fraction: float = 0.0,
    licence: str | None = None,
    access: str | None = None,
    allow_phi_like: bool = False,
    labels_by: str | None = None,
    workers: int | Workers = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Manifest]:
    """Write a base set below `dest`, one folder per split -> its manifests, by split.

    records: a Sequence is asked for each record when it is needed, so one that makes records on demand need not hold them (pack
    itself keeps 25 bytes of each, and the keys while it sorts them); of anything else a list is made.
    splits: split -> fraction of the patients. Or give None and split_of_record: key -> split, for every record.
    short_side, rendering: see `prepare_image`; the manifests state them. config_hash: identifies the records (see `datasets`);
    pack adds its own settings.
    patient_key: key of the stored patient hash; `split.patient_key()` by default. numbering: the collection that numbers
    the patients (`hash_patient`), if it is a published one. progress(done, total): after every image.
    max_bad_fraction: share of the records whose image may be missing or unreadable, whose key an earlier record has, or whose
    patient is in two splits of split_of_record (then in none). They are left out, and listed in DEST/SPLIT/quarantine.jsonl. If
    there are more, one error counts them once all images were tried; no manifest is written.
    licence, access: terms of the raw data set, for the manifests.
    allow_phi_like: whether reports may seem to identify people (`phi`); the manifests hold the counts. Reports of drawn images
    are not scanned: a program wrote them. labels_by: for the manifests, what made the records' labels from their reports.
    workers: processes of this machine, or a cluster's (`mmclip_dist.offline.packing.RayWorkers`); the bytes depend on neither.

    Packing again skips finished splits. After an error or a kill it goes on after the last finished shard (with several workers,
    one more was perhaps on its way), and the bytes are those of a pack in one go; from the first shard on whose images have
    changed, shards are made again. All but the content of the images is checked before anything is written. ValueError for all
    that the caller can mend.
    """
    for name, value in (("short_side", short_side), ("samples_per_shard", samples_per_shard), ("workers", workers)):
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    crew: Workers = Processes(workers) if isinstance(workers, int) else workers
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction is {max_bad_fraction}; it must be between 0 and 1")
    key = stored_patient_key() if patient_key is None else patient_key
    records = records if isinstance(records, Sequence) else list(records)
    scan = PhiScan()
    found = _survey(records, splits, split_of_record, seed, scan)
    if not allow_phi_like:
        scan.check()
    _check_repeated(found, max_bad_fraction)
    crossing = _crossing(found, records) if splits is None else {}
    _check_crossing(crossing, records, max_bad_fraction)
    plan = _assign(found, records, splits, crossing)
    never = _never_packed(found, crossing)
    full_hash = _hash_settings(
        config=config_hash,
        dataset=dataset,
        splits=dict(splits) if splits is not None else {found.keys[n]: name for name in plan for n in plan[name]},
        seed=seed if splits is not None else None,
        short_side=short_side,
        samples_per_shard=samples_per_shard,
        patient_key=key_id(key),
        **({} if numbering is None else {"numbering": numbering}),
        **({} if rendering == AS_PUBLISHED else {"rendering": asdict(rendering)}),
    )
    found.keys.clear()
    manifests = load_finished(dest, full_hash)
    todo = {split: numbers for split, numbers in plan.items() if split not in manifests}
    if todo:
        _check_images_exist(records, found.missing, max_bad_fraction)
        if found.remote == len(records):
            _look_for_remote(records)
        writers = {
            split: Unfinished(
                storage.join(dest, split), full_hash, samples_per_shard, len(numbers), left_out=never.get(split, []),
                write=crew.write, ahead=crew.ahead,
            )
            for split, numbers in todo.items()
        }
        for split, writer in writers.items():
            writer.keep_unchanged((records[n] for n in todo[split]), lambda record: cannot_be_used(record, short_side, rendering))
        start = {split: writer.start for split, writer in writers.items()}
        total = sum(len(numbers) - start[split] for split, numbers in todo.items())
        jobs = ((split, records[n]) for split in todo for n in itertools.islice(todo[split], start[split], None))
        make = SampleMaker(dataset, found.label_names, key, numbering, short_side, rendering)
        with closing(crew.prepare(jobs, make, samples_per_shard)) as prepared:
            for done, ((split, record), mark, sample) in enumerate(prepared, 1):
                writers[split].add(record.key, mark, sample)
                if progress is not None:
                    progress(done, total)
        for writer in writers.values():
            writer.wait()
        _check_left_out(dest, writers, manifests, len(records), max_bad_fraction)
        images = {"short_side": short_side, **asdict(rendering), "window": rendering.window and [*rendering.window]}
        manifests |= {
            split: writer.finish(
                dataset, split, found.label_names, licence=licence, access=access, patient_key_id=key_id(key),
                phi_scan=scan.document(split), labels_by=labels_by, images=images,
            )
            for split, writer in writers.items()
        }
    return {split: manifests[split] for split in plan}


@dataclass(frozen=True)
class _Survey:
    """What one look at every record tells: they may be made on demand, which costs more than all that is done with them here.

    splits: of each record, a number into `names`. order: the places of the records, sorted by key; without `repeated`: those that
    have the key of an earlier record, and its place. missing: places of the records whose image file is not there; remote: how
    many images are in a store, which is not asked for each.
    """

    keys: list[str]
    label_names: tuple[str, ...]
    names: tuple[str, ...]
    splits: array[int]
    order: array[int]
    missing: array[int]
    remote: int
    repeated: list[tuple[int, int]]


def _survey(
    records: Sequence[Record], splits: Mapping[str, float] | None, split_of_record: Mapping[str, str] | None, seed: int,
    scan: PhiScan,
) -> _Survey:  # fmt: skip
    """scan: is given the reports. ValueError that names the first record that cannot be stored, or has no split."""
    if (splits is None) == (split_of_record is None):
        raise ValueError("give either split fractions (splits) or every record's split (split_of_record), not both")
    if splits is not None:
        check_splits(splits)
    keys: list[str] = []
    label_names: set[str] = set()
    names: dict[str, int] = {}
    numbers, missing, remote = array("L"), array("Q"), 0
    for number, record in enumerate(records, 1):
        try:
            check_record(record)
            check_patient(record.patient)
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
        split = split_of(record.patient, splits, seed) if splits is not None else (split_of_record or {}).get(record.key)
        if split is None:
            raise ValueError(f"record {number} has no split: give every record one, or split by fractions")
        if not callable(record.image):
            scan.add(split, number, (record.report, record.findings, record.impression))
        keys.append(record.key)
        label_names.update(record.labels)
        numbers.append(names.setdefault(split, len(names)))
        if isinstance(record.image, Path) and not record.image.is_file():
            missing.append(number - 1)
        remote += isinstance(record.image, RemotePath)
    if not keys:
        raise ValueError("there are no records to pack")
    order, repeated = array("Q"), []
    for place in sorted(range(len(keys)), key=keys.__getitem__):  # of equal keys, the first record comes first
        if order and keys[place] == keys[order[-1]]:
            repeated.append((place, order[-1]))
        else:
            order.append(place)
    return _Survey(keys, tuple(sorted(label_names)), tuple(names), numbers, order, missing, remote, sorted(repeated))


def _crossing(found: _Survey, records: Sequence[Record]) -> dict[int, str]:
    """Place -> where the patient is in another split, for all records of patients who are in two."""
    patients = crossing_patients(
        (f"record {place + 1}", record.patient, found.names[found.splits[place]]) for place, record in enumerate(records)
    )
    if not patients:
        return {}
    return {place: patients[record.patient] for place, record in enumerate(records) if record.patient in patients}


def _check_crossing(crossing: Mapping[int, str], records: Sequence[Record], max_bad_fraction: float) -> None:
    if len(crossing) / len(records) > max_bad_fraction:
        patients = len({record.patient for record in records})
        crossed = len({records[place].patient for place in crossing})
        raise ValueError(
            f"{crossed} of {patients} patients are in two splits: {next(iter(crossing.values()))}. A patient must stay in one "
            f"split: correct the splits, let the program split by patient (--splits), or leave these patients out of all splits "
            f"with --max-bad-fraction {_fraction(len(crossing), len(records))}"
        )


def _assign(
    found: _Survey, records: Sequence[Record], splits: Mapping[str, float] | None, crossing: Mapping[int, str]
) -> dict[str, array[int]]:
    """Split -> the places of its records, sorted by key, without those that cross. ValueError for a split that would be empty."""
    for name in found.names:
        check_split_name(name)
    wanted = sorted(found.names) if splits is None else [name for name, fraction in splits.items() if fraction > 0]
    plan = {name: array("Q") for name in wanted}
    for n in found.order:
        if n not in crossing:
            plan[found.names[found.splits[n]]].append(n)
    for name, numbers in plan.items():
        if not numbers and splits is not None:
            patients = len({record.patient for record in records})
            raise ValueError(
                f"no patient fell in split {name!r} (fraction {splits[name]:g} of {patients} patients): "
                "give it a larger fraction, try another seed, or leave the split out"
            )
        if not numbers:
            raise ValueError(f"every patient of split {name!r} is in another split, too: correct the splits")
    return plan


def _hash_settings(**settings: object) -> str:
    """Hash of everything that shapes a packed set. Packing with an equal hash is skipped."""
    return hashlib.sha256(canonical_json(settings)).hexdigest()


def _check_repeated(found: _Survey, max_bad_fraction: float) -> None:
    total = len(found.keys)
    if len(found.repeated) / total > max_bad_fraction:
        place, first = found.repeated[0]
        raise ValueError(
            f"{len(found.repeated)} of {total} records have the key of an earlier one (records {first + 1} and {place + 1} share "
            f"the key): every image needs a key of its own; {_mend(len(found.repeated), total)}"
        )


def _never_packed(found: _Survey, crossing: Mapping[int, str]) -> dict[str, list[Bad]]:
    """Split -> its records that are left out: an earlier one has their key, or their patient is in another split, too."""
    why = {place: f"record {place + 1} has the key of record {first + 1}" for place, first in found.repeated}
    why |= {place: f"the patient is in two splits: {text}" for place, text in crossing.items()}
    left_out: dict[str, list[Bad]] = {}
    for place, reason in sorted(why.items()):
        left_out.setdefault(found.names[found.splits[place]], []).append((found.keys[place], reason))
    return left_out


def _check_images_exist(records: Sequence[Record], missing: Sequence[int], max_bad_fraction: float) -> None:
    if len(missing) == len(records):
        raise ValueError(
            f"none of {len(records)} images is there, the first one {records[missing[0]].source}: check the folder of the images"
        )
    if len(missing) / len(records) > max_bad_fraction:
        raise ValueError(
            f"{len(missing)} of {len(records)} images are missing, the first one of record {missing[0] + 1} "
            f"({records[missing[0]].source}): {_mend(len(missing), len(records))}"
        )


def _look_for_remote(records: Sequence[Record]) -> None:
    """ValueError if none of a few remote images is there. All are looked for when they are read: each look is a request."""
    some = [records[place] for place in evenly(len(records), LOOKED_FOR)]
    if not any(record.image.is_file() for record in some if isinstance(record.image, RemotePath)):
        raise ValueError(
            f"none of {len(some)} images that were looked for is there, the first one {some[0].source}: check the folder"
        )


def _check_left_out(
    dest: Url, writers: Mapping[str, Unfinished], finished: Iterable[str], total: int, max_bad_fraction: float
) -> None:
    """ValueError if too many images, or all of a split, cannot be used; DEST/SPLIT/quarantine.jsonl lists them then.

    writers: the splits to finish; finished: those of an earlier pack, which count; total: records of both.
    """
    bad = [row for split in finished for row in read_quarantine(storage.join(dest, split))]
    bad += [row for writer in writers.values() for row in writer.bad]
    empty = [split for split, writer in writers.items() if not writer.samples]
    if len(bad) / total <= max_bad_fraction and not empty:
        return
    for writer in writers.values():
        writer.write_quarantine()
    if empty:
        raise ValueError(
            f"no image of split {empty[0]!r} can be used: mend those in {storage.join(dest, empty[0], QUARANTINE)}"
        )
    named = "; ".join(f"{key} ({reason})" for key, reason in bad[:_NAMED_FAILURES])
    named += "; ..." if len(bad) > _NAMED_FAILURES else ""
    raise ValueError(
        f"{len(bad)} of {total} images cannot be used: {named} (all: {storage.join(dest, '*', QUARANTINE)}). "
        f"Finished shards are kept: {_mend(len(bad), total)}"
    )


def _mend(bad: int, total: int) -> str:
    return f"mend them, or leave them out with --max-bad-fraction {_fraction(bad, total)}"


def _fraction(bad: int, total: int) -> str:
    return f"{math.ceil(1000 * bad / total) / 1000:g}"
