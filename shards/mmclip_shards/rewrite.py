"""Make new sets of packed ones: other shards, several sets in one, other splits by patient, a choice of samples.

First a plan: which samples go where, by the indexes, and by the documents where these decide. It is checked before anything
is written, and takes 18 bytes a sample. Then each split is written as `pack` writes it, by key and with its journal:
members keep their bytes, memory holds one shard, and the same call goes on after a kill. Sidecars come before the manifest,
and what has none is no set.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmclip_shards import storage
from mmclip_shards.expression import parse_expression
from mmclip_shards.foreign import FOREIGN, is_foreign
from mmclip_shards.journal import Unfinished, image_mark, load_finished
from mmclip_shards.manifest import Kind, Manifest, Shard, manifest_hash, save_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import Record, canonical_json
from mmclip_shards.sidecars import REBUILD
from mmclip_shards.sources import (
    SIDECARS,
    Sample,
    Source,
    check_joinable,
    fetched,
    in_order,
    open_sources,
    unknown_keys,
)
from mmclip_shards.split import check_split_name, check_splits, split_of
from mmclip_shards.storage import Url
from mmclip_shards.textfiles import read_rows
from mmclip_shards.writer import SAMPLES_PER_SHARD, write_shard

Progress = Callable[[int, int], None]

_OF_ITS_OWN = {"kind", "split", "shards", "config_hash", "base", "checkpoint", "guide", "version"}
"""Fields of a manifest that a new set does not take from its sources."""

_COPIED = "the entities that are copied with it"

_UNCHANGED = image_mark(b"")  # a journal marks raw images, and here are none: the hash of the sources' manifests stands for them


@dataclass(frozen=True)
class Rewritten:
    """The new sets. manifests: by split; notes: lines that the caller should show, such as which sidecars did not follow."""

    manifests: dict[str, Manifest]
    notes: tuple[str, ...]


def reshard(
    url: Url, dest: Url, *, samples_per_shard: int, progress: Progress | None = None
) -> Rewritten:
    """The set at `url`, or every split below it, with another number of samples in a shard, as DEST/SPLIT.

    progress(done, total): in samples. ValueError if `dest` holds another set, or the source is damaged.
    """
    sources = open_sources([url])
    plans = _plan(sources, lambda sample: sample.source.manifest.split, reads=False)
    return _write(dest, plans, _identity("reshard", sources, samples_per_shard), samples_per_shard, progress=progress)


def merge(
    urls: Sequence[Url],
    dest: Url,
    *,
    dataset: str | None = None,
    prefix_keys: bool = False,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    progress: Progress | None = None,
) -> Rewritten:
    """All sets at `urls`, splits of the same name together, as DEST/SPLIT. The manifests tell labels and terms of each data set.

    dataset: the name of the whole, by default the names joined by +. prefix_keys: put the data set's name before every key,
    where sets share keys. ValueError if a patient would be in two splits, if the patients cannot be compared since their
    hashes have different keys, if sets share a key or are of another program, and as in `reshard`.
    """
    sources = open_sources(urls, prefix_keys=prefix_keys)
    check_joinable(sources)
    splits = {source.manifest.split for source in sources}
    patients = _Patients()

    def choose(sample: Sample) -> str:
        if len(splits) > 1:
            patients.add(sample)
        return sample.source.manifest.split

    plans = _plan(sources, choose, progress, reads=len(splits) > 1)
    patients.check()
    identity = _identity("merge", sources, samples_per_shard, dataset=dataset, prefix_keys=prefix_keys)
    return _write(dest, plans, identity, samples_per_shard, dataset=dataset, notes=unknown_keys(sources), progress=progress)


def split_again(
    url: Url,
    dest: Url,
    *,
    splits: Mapping[str, float],
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    progress: Progress | None = None,
) -> Rewritten:
    """All samples at `url`, whatever their split was, in new splits by patient (`split.split_of` of the stored hash).

    splits: name -> fraction of the patients. ValueError for a sample without a patient, a split that would be empty, and as in
    `merge`.
    """
    check_splits(splits)
    sources = open_sources([url])
    check_joinable(sources)
    nobody: Counter[str] = Counter()

    def choose(sample: Sample) -> str | None:
        patient = sample.document().patient
        if patient is None:
            nobody[sample.source.folder] += 1
            return None
        return split_of(patient, splits, seed)

    plans = _plan(sources, choose, progress, pooled=True)
    for folder, count in nobody.items():
        raise ValueError(f"{folder}: {count} samples have no patient, so they cannot be split by patient")
    for name, fraction in splits.items():
        if fraction > 0 and name not in plans:
            raise ValueError(f"no patient fell in split {name!r} (fraction {fraction:g}): give it a larger one, or another seed")
    identity = _identity("split", sources, samples_per_shard, splits=dict(splits), seed=seed)
    return _write(
        dest, {name: plans[name] for name in splits if name in plans}, identity, samples_per_shard,
        notes=unknown_keys(sources), progress=progress,
    )  # fmt: skip


def select(
    url: Url,
    dest: Url,
    expression: str | None,
    *,
    leave_out: Url | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    progress: Progress | None = None,
) -> Rewritten:
    """The samples at `url` that match an expression (`expression.parse_expression`), as DEST/SPLIT.

    leave_out: a list as `duplicates.write_list` makes it; its samples are left out. ValueError for a wrong expression, a list
    of other sets, if nothing matches, and as in `reshard`.
    """
    sources, plans, listed = _selected(url, expression, leave_out, progress)
    empty = [source.folder for source in sources if source.manifest.split not in plans]
    if not plans:
        raise ValueError(f"no sample of {url} matches: nothing was written")
    identity = _identity("filter", sources, samples_per_shard, expression=expression, leave_out=listed)
    notes = [f"{folder}: no sample matches, so there is no such split in {dest}" for folder in empty]
    return _write(dest, plans, identity, samples_per_shard, notes=notes, progress=progress)


def count_matches(
    url: Url, expression: str | None, *, leave_out: Url | None = None, progress: Progress | None = None
) -> dict[str, tuple[int, int]]:
    """Split -> how many samples `select` would keep, and how many there are. Errors are those of `select`; no match is none."""
    sources, plans, _ = _selected(url, expression, leave_out, progress)
    total: Counter[str] = Counter()
    for source in sources:
        total[source.manifest.split] += source.manifest.samples
    return {split: (len(plans[split]) if split in plans else 0, count) for split, count in total.items()}


# -- The plan ---------------------------------------------------------------------------------------------------------


class _Plan:
    """The samples of one new split, in their order."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._numbers = {id(source): number for number, source in enumerate(sources)}
        self._source, self._shard, self._row = array("H"), array("L"), array("L")

    def __len__(self) -> int:
        return len(self._row)

    @property
    def sources(self) -> list[Source]:
        """Those that give samples."""
        used = set(self._source)
        return [source for number, source in enumerate(self._sources) if number in used]

    def add(self, sample: Sample) -> None:
        self._source.append(self._numbers[id(sample.source)])
        self._shard.append(sample.shard)
        self._row.append(sample.row)

    def samples(self, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
        for place in range(start, len(self) if stop is None else stop):
            source, shard, row = self._sources[self._source[place]], self._shard[place], self._row[place]
            yield Sample(source, shard, row, source.prefix + source.reader.keys(shard)[row])


class _Patients:
    """In which split each patient is."""

    def __init__(self) -> None:
        self._first: dict[bytes, Source] = {}
        self._crossing: dict[bytes, tuple[str, str]] = {}

    def add(self, sample: Sample) -> None:
        if (patient := sample.document().patient) is None:
            return
        # 16 bytes: hashed again, as another program's set may hold raw ids, and none may stay in memory.
        short = hashlib.blake2b(patient.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first = self._first.setdefault(short, sample.source)
        if first.manifest.split != sample.source.manifest.split:
            self._crossing.setdefault(short, (first.folder, sample.source.folder))

    def check(self) -> None:
        """ValueError if one is in two splits. It names counts and sets, no patients."""
        if self._crossing:
            ((one, other), most), *_ = Counter(self._crossing.values()).most_common(1)
            raise ValueError(
                f"{len(self._crossing)} patients would be in two splits, {most} of them are in {one} and {other}: list their "
                "samples with `mmclip duplicates ... --list FILE`, and leave them out with `mmclip filter ... --leave-out FILE`"
            )


def _plan(
    sources: Sequence[Source],
    choose: Callable[[Sample], str | None],
    progress: Progress | None = None,
    *,
    pooled: bool = False,
    reads: bool = True,
) -> dict[str, _Plan]:
    """New split -> its samples, by `choose`. pooled: sources of all splits are joined; else those of one split. reads: whether
    `choose` reads samples."""
    groups = [list(sources)] if pooled else [
        [source for source in sources if source.manifest.split == split]
        for split in dict.fromkeys(source.manifest.split for source in sources)
    ]  # fmt: skip
    total = sum(source.manifest.samples for source in sources)
    plans: dict[str, _Plan] = {}
    done = 0
    for group in groups:
        samples = in_order(group)
        for sample in fetched(samples, lambda sample: sample.source.reader) if reads else samples:
            split = choose(sample)
            if split is not None:
                plans.setdefault(split, _Plan(sources)).add(sample)
            done += 1
            if progress is not None and reads:
                progress(done, total)
    return plans


def _selected(
    url: Url, expression: str | None, leave_out: Url | None, progress: Progress | None
) -> tuple[list[Source], dict[str, _Plan], str | None]:
    """The sources, what of them is kept, and a hash of the list of what is left out."""
    if expression is None and leave_out is None:
        raise ValueError("give an expression, or a list of samples to leave out (--leave-out)")
    sources = open_sources([url])
    labels = {name for source in sources for name in source.manifest.labels}
    wanted = parse_expression(expression, labels) if expression is not None else None
    listed = _read_list(leave_out, sources) if leave_out is not None else {}

    def choose(sample: Sample) -> str | None:
        if sample.key in listed.get(sample.source.folder, ()):
            return None
        kept = wanted is None or wanted.matches(sample.fields())
        return sample.source.manifest.split if kept else None

    plans = _plan(sources, choose, progress, reads=wanted is not None)
    of_list = [sorted(listed.get(source.folder, ())) for source in sources]
    return sources, plans, hashlib.sha256(canonical_json(of_list)).hexdigest() if leave_out is not None else None


def _read_list(url: Url, sources: Sequence[Source]) -> dict[str, set[str]]:
    """Folder -> the keys that a list names. ValueError if it names no sample of these sets."""
    folders = {manifest_hash(source.manifest): source.folder for source in sources}
    found: dict[str, set[str]] = {}
    if not storage.exists(url):
        raise ValueError(f"there is no list {url}: make it with `mmclip duplicates ... --list`")
    for row in read_rows(url, "make it again with `mmclip duplicates ... --list`"):
        if (folder := folders.get(str(row.get("set")))) is not None:
            found.setdefault(folder, set()).add(str(row.get("key")))
    if not found:
        raise ValueError(
            f"{url} lists no sample of {', '.join(source.folder for source in sources)}: make it with "
            "`mmclip duplicates ... --list` for these very sets"
        )
    return found


# -- Writing ----------------------------------------------------------------------------------------------------------


def _identity(operation: str, sources: Sequence[Source], samples_per_shard: int, **settings: object) -> str:
    """The config_hash of the new sets: of all that shapes them. A set of another program stays one."""
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    hashes = [manifest_hash(source.manifest) for source in sources]
    content = canonical_json([operation, hashes, samples_per_shard, settings])
    return (FOREIGN if is_foreign(sources[0].manifest) else "") + hashlib.sha256(content).hexdigest()


def _write(
    dest: Url,
    plans: Mapping[str, _Plan],
    config_hash: str,
    samples_per_shard: int,
    *,
    dataset: str | None = None,
    notes: Iterable[str] = (),
    progress: Progress | None = None,
) -> Rewritten:
    """Write what is missing of the planned splits below `dest`. Their manifests come last, when all else is there."""
    for split in plans:
        check_split_name(split)  # it becomes a folder, and a manifest may come from anywhere
    manifests = load_finished(dest, config_hash)
    told = list(notes)
    todo = {split: plan for split, plan in plans.items() if split not in manifests}
    writers = {
        split: Unfinished(storage.join(dest, split), config_hash, samples_per_shard, len(plan)) for split, plan in todo.items()
    }
    for split, writer in writers.items():
        writer.keep_unchanged(map(_raw, todo[split].samples()), lambda record: False)
    total = sum(len(plan) - writers[split].start for split, plan in todo.items())
    done = 0
    described = {split: _described(plan, dataset) for split, plan in todo.items()}
    for split, plan in plans.items():
        folder = storage.join(dest, split)
        sidecars, why_not = _sidecars_of(plan, folder)
        told += why_not
        if split in manifests:
            continue
        writer = writers[split]
        for sample in fetched(plan.samples(writer.start), lambda sample: sample.source.reader):
            writer.add(sample.key, _UNCHANGED, sample.read(sample.source.reader))
            done += 1
            if progress is not None:
                progress(done, total)
        written: dict[Kind, Manifest] = {}
        for kind, identity in sidecars.items():
            made = {"kind": kind, "dataset": described[split]["dataset"], "split": split, **identity}
            if made.get("guide") == _COPIED:
                made["guide"] = manifest_hash(written["entities"])
            written[kind] = _write_sidecar(storage.join(folder, kind), plan, writer.shards, made)
    manifests |= {split: writer.finish(split=split, **described[split]) for split, writer in writers.items()}
    return Rewritten({split: manifests[split] for split in plans}, tuple(told))


def _raw(sample: Sample) -> Record:
    """A sample as the journal knows it."""
    return Record(sample.key, b"", "", "")


def _described(plan: _Plan, dataset: str | None) -> dict[str, Any]:
    """The fields of a new manifest that tell what is in it, and under which terms."""
    manifests = [source.manifest for source in plan.sources]
    parts = tuple(dict.fromkeys(part for manifest in manifests for part in manifest.origins))
    name = dataset or "+".join(dict.fromkeys(manifest.dataset for manifest in manifests))
    keys = {manifest.patient_key_id for manifest in manifests}

    def terms(of: Literal["licence", "access"]) -> str | None:
        stated = dict.fromkeys((part.dataset, getattr(part, of)) for part in parts)
        if len({text for _, text in stated}) == 1:
            return next(text for _, text in stated)
        return "; ".join(f"{of_dataset}: {text or 'not stated'}" for of_dataset, text in stated)

    # What else a manifest states of how its samples were made holds for the new set if all sources state it.
    same = {field: value for field, value in vars(manifests[0]).items() if all(vars(m)[field] == value for m in manifests)}
    return {
        **{field: value for field, value in same.items() if field not in _OF_ITS_OWN},
        "dataset": name,
        "labels": parts[0].labels if len(parts) == 1 else tuple(sorted({label for part in parts for label in part.labels})),
        "licence": terms("licence"),
        "access": terms("access"),
        "patient_key_id": keys.pop() if len(keys) == 1 else None,
        "phi_scan": _scanned([manifest.phi_scan for manifest in manifests]),
        "parts": () if len(parts) == 1 and parts[0].dataset == name else parts,
    }


def _scanned(scans: list[dict[str, int] | None]) -> dict[str, int] | None:
    """What the scans of the sources found together: of a part of them, the most that it may hold. None unless all were scanned
    by the same version."""
    found = [scan for scan in scans if scan is not None]
    versions = {scan["version"] for scan in found}
    if len(found) < len(scans) or len(versions) != 1:
        return None
    counts: Counter[str] = Counter()
    for scan in found:
        counts.update(scan)
    return {**counts, "version": versions.pop()}


def _sidecars_of(plan: _Plan, folder: str) -> tuple[dict[Kind, dict[str, Any]], list[str]]:
    """The sidecars that can follow: kind -> config_hash, checkpoint and guide; and a line for each kind that cannot."""
    follow: dict[Kind, dict[str, Any]] = {}
    notes = []
    for kind in SIDECARS:
        found = [source.sidecars.get(kind) for source in plan.sources]
        if not any(found):
            continue
        why_not = next((each for each in found if isinstance(each, str)), None)
        if why_not is None and None in found:
            why_not = f"{plan.sources[found.index(None)].folder} has none"
        made = [each.manifest for each in found if isinstance(each, ShardReader)]
        guides = {_guide(source) for source in plan.sources} if kind == "attention" else {None}
        if why_not is None and len({manifest.checkpoint for manifest in made}) > 1:
            why_not = "the sets' were made by different checkpoints"
        elif why_not is None and (len(guides) > 1 or (_COPIED in guides and "entities" not in follow)):
            why_not = "it was made from entities that did not follow"
        elif why_not is None and len({manifest.config_hash for manifest in made}) > 1:
            why_not = "the sets' were made in different ways"
        if why_not is not None:
            again = REBUILD[kind].format(base=folder, sidecar=storage.join(folder, kind))
            notes.append(f"{kind} sidecars did not follow to {folder} ({why_not}); make them with `{again}`")
            continue
        follow[kind] = {"config_hash": made[0].config_hash, "checkpoint": made[0].checkpoint, "guide": guides.pop()}
    return follow, notes


def _guide(source: Source) -> str | None:
    """What guided the attention of a set: _COPIED for the entities beside it, else their hash, or None."""
    attention, entities = (source.sidecars.get(kind) for kind in ("attention", "entities"))
    if not isinstance(attention, ShardReader):
        return None
    of_set = manifest_hash(entities.manifest) if isinstance(entities, ShardReader) else None
    return _COPIED if of_set is not None and attention.manifest.guide == of_set else attention.manifest.guide


def _write_sidecar(folder: str, plan: _Plan, base: Sequence[Shard], made: dict[str, Any]) -> Manifest:
    """The rows of these samples, in shards as those of `base`. Shards of a killed call are written again: they are small."""
    kind = made["kind"]
    stops = list(itertools.accumulate(shard.samples for shard in base))

    def rows(start: int, stop: int) -> Iterator[tuple[str, dict[str, bytes]]]:
        for sample in fetched(plan.samples(start, stop), lambda sample: _reader(sample, kind)):
            yield sample.key, sample.read(_reader(sample, kind))

    shards = tuple(
        write_shard(folder, number, rows(stop - shard.samples, stop))
        for number, (shard, stop) in enumerate(zip(base, stops, strict=True))
    )
    manifest = Manifest(shards=shards, base={shard.path: shard.sha256 for shard in base}, **made)
    save_manifest(folder, manifest)
    return manifest


def _reader(sample: Sample, kind: Kind) -> ShardReader:
    reader = sample.source.sidecars[kind]
    assert isinstance(reader, ShardReader)
    return reader
