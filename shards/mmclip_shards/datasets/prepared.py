"""Run a recipe once and keep its records on disk, so that `pack` can ask for each when it needs it."""

from __future__ import annotations

import hashlib
import pickle
import re
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from mmclip_shards.datasets.recipe import OFFICIAL, Recipe, Skipped, check_needs
from mmclip_shards.datasets.sections import join_sections
from mmclip_shards.datasets.table import NORMAL_LABELS, Records
from mmclip_shards.datasets.upstream import read_lines
from mmclip_shards.rawpath import RawPath, matching
from mmclip_shards.schema import Record, canonical_json, check_record, check_source, make_key
from mmclip_shards.split import check_split_name, hash_patient

_IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g|dcm|dicom)$", re.IGNORECASE)
_LIST_SUFFIX = re.compile(r"[_-]?list$")

_SHORTEST_ID = 3  # a shorter one is in a path by chance

LISTS = "splits"
"""The folder of the raw tree that holds named splits: splits/NAME/train.txt and so on."""


@dataclass(frozen=True)
class Prepared:
    """What a recipe found. records: ready for `pack`; split_of: key -> split, None when patients are to be split by shares;
    skipped: reason -> upstream rows; config_hash: of all that shapes the records; without_report, same_report: records that
    have no report, and those whose report another one has, too; without_labels: those of which no label is known."""

    records: Sequence[Record]
    split_of: dict[str, str] | None
    skipped: Counter[str]
    config_hash: str
    without_report: int
    same_report: int
    without_labels: int


def prepare_records(
    name: str, recipe: Recipe, raw: RawPath, *, split: str | None, patient_key: bytes, sections: Sequence[str] | None = None
) -> Prepared:
    """Run a recipe over the tree `raw` -> its records; they lie in a temporary file, about 1 kB each, and go with it.

    split: `official`, a name of RAW/splits, or None. patient_key: for the keys of sets whose paths name patients. sections:
    which sections become the report, in this order; by default findings and impression. ValueError in one line for all that
    the user can mend.
    """
    spool = _Spool()
    label_names: set[str] = set()
    split_of: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    reports: Counter[int] = Counter()
    labelled = 0
    content = hashlib.sha256(
        canonical_json([name, recipe.licence, recipe.access, recipe.private_paths, recipe.unlisted_absent])
    )
    for number, found in enumerate(read_records(recipe, raw, split=split, sections=sections, skipped=skipped), 1):
        record = without_patient(found, name, patient_key) if recipe.private_paths else found
        try:
            check_record(record)
            if record.split is not None:
                check_split_name(record.split)
            # Not the image: the journal marks its content.
            content.update(canonical_json({**vars(record), "image": None, "boxes": [vars(box) for box in record.boxes]}))
        except UnicodeEncodeError:
            raise ValueError(f"recipe {name}, record {number}: a text holds half a surrogate pair: write it as UTF-8") from None
        except ValueError as error:
            raise ValueError(f"recipe {name}, record {number}: {error}") from error
        if record.split is not None:
            split_of.setdefault(record.key, sys.intern(record.split))  # of a key that comes twice, the first record is packed
        label_names.update(record.labels)
        reports[hash(record.report)] += bool(record.report)
        labelled += any(value is not None for value in record.labels.values())
        spool.append(record)
    if not len(spool):
        raise nothing_found(raw, skipped)
    absent: dict[str, int | None] = {}
    if recipe.unlisted_absent:
        absent = dict.fromkeys(sorted(label for label in label_names if label.casefold() not in NORMAL_LABELS), 0)

    def filled(record: Record) -> Record:
        if not recipe.unlisted_absent:
            return record
        present = {label: value for label, value in record.labels.items() if label in absent}
        return replace(record, labels={**absent, **present} if record.labels else dict.fromkeys(absent))

    with_report = sum(reports.values())
    return Prepared(
        records=Records(spool, filled),
        split_of=None if split is None else split_of,
        skipped=skipped,
        config_hash=content.hexdigest(),
        without_report=len(spool) - with_report,
        same_report=with_report - sum(count > 0 for count in reports.values()),
        without_labels=len(spool) - labelled,
    )


def read_records(
    recipe: Recipe, raw: RawPath, *, split: str | None, sections: Sequence[str] | None, skipped: Counter[str]
) -> Iterator[Record]:
    """The records of a recipe with legal keys, their split and report; `skipped` counts what is left out, by reason."""
    check_needs(recipe)
    if not raw.is_dir():
        raise ValueError(f"there is no folder {raw}")
    lists = _Lists(raw / LISTS / split) if split not in (None, OFFICIAL) else None
    number = 0
    for found in recipe.read(raw):
        if isinstance(found, Skipped):
            skipped[found.reason] += 1
            continue
        number += 1
        try:
            check_source(found.source)  # before it is hashed
        except ValueError as error:
            raise ValueError(f"record {number} of the recipe: {error}") from error
        record = replace(found, split=lists.split_of(found.source)) if lists is not None else found
        if split is None:
            record = replace(record, split=None)
        elif not record.split:
            skipped[f"not in split {split}"] += 1
            continue
        if record.sections:
            record = replace(
                record,
                report=join_sections(record.sections, sections),
                findings=record.sections.get("findings"),
                impression=record.sections.get("impression"),
            )
        yield replace(record, key=make_key(record.key)) if record.key else record
    if lists is not None and lists.unused:
        skipped[f"named in split {split}, but not among the images"] += lists.unused


def nothing_found(raw: RawPath, skipped: Counter[str]) -> ValueError:
    """The error of a recipe that found no record."""
    left_out = "; ".join(f"{reason}: {count}" for reason, count in skipped.most_common(3))
    hint = " (a split needs its list in the raw folder; or split patients by --splits)" if "not in split" in left_out else ""
    return ValueError(f"the recipe found no images in {raw}" + (f" ({left_out})" if left_out else "") + hint)


def names_patient(record: Record) -> bool:
    """Whether the path of an image seems to hold the id of its patient, and not of the image alone."""
    return len(record.patient) >= _SHORTEST_ID and record.patient in record.source and record.patient != record.source


def without_patient(record: Record, name: str, patient_key: bytes) -> Record:
    """A record whose key and source are keyed hashes: a plain hash of a path that can be guessed would hide nothing."""
    key = hash_patient(record.source, patient_key)
    return replace(record, key=key, source=f"{name}/{key}")


class _Spool:
    """Records in a file without a name, in 8 bytes of memory each."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="mmclip-pack-")  # noqa: SIM115 - it goes with this object
        self._starts = array("Q", [0])

    def append(self, record: Record) -> None:
        """Add a record at the end. All must be added before the first is read."""
        self._starts.append(self._starts[-1] + self._file.write(pickle.dumps(record, pickle.HIGHEST_PROTOCOL)))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[Record]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, place: int) -> Record:
        self._file.seek(self._starts[place])
        # Nobody else can have written these bytes: the file has no name.
        record: Record = pickle.loads(self._file.read(self._starts[place + 1] - self._starts[place]))  # noqa: S301
        return record


class _Lists:
    """The lists of a split, folder/SPLIT.txt or SPLIT_list.txt: the first word of each line names an image, by its path, any end
    of it, or a path that ends in it, with or without suffix."""

    def __init__(self, folder: RawPath) -> None:
        files = matching(folder, "*.txt") if folder.is_dir() else []
        if not files:
            raise ValueError(
                f"there is no split {folder.name!r}: put its lists into {folder}/train.txt, val.txt, test.txt, one image a line"
            )
        self._split_of: dict[str, str] = {}
        self._by_name: dict[str, list[str]] = {}
        self._used: set[str] = set()
        for file in files:
            split = split_name(_LIST_SUFFIX.sub("", file.stem))
            check_split_name(split)
            for number, line in enumerate(read_lines(file), 1):
                if image := re.split(r"[\s,]", line.strip(), maxsplit=1)[0]:
                    image = _IMAGE_SUFFIX.sub("", image)
                    if image not in self._split_of:
                        self._by_name.setdefault(PurePosixPath(image).name, []).append(image)
                    if (other := self._split_of.setdefault(image, split)) != split:
                        raise ValueError(f"{file}, line {number}, names an image of split {other!r}, too: take one away")

    def split_of(self, source: str) -> str | None:
        """The split of the image; where several lines name it, that of the longest."""
        path = f"/{_IMAGE_SUFFIX.sub('', source)}"
        near = self._by_name.get(PurePosixPath(path).name, ())
        named = [image for image in near if path.endswith(f"/{image}") or f"/{image}".endswith(path)]
        self._used.update(named)
        return self._split_of[max(named, key=len)] if named else None

    @property
    def unused(self) -> int:
        """How many of the listed names no image had."""
        return len(self._split_of) - len(self._used)


def split_name(text: str) -> str:
    """The name of a split as all sets have it: upstream's `valid`, `validate` and `validation` are `val`."""
    return "val" if text in ("valid", "validate", "validation") else text


def key_of(source: str | PurePosixPath) -> str:
    """The key of an image with this path below the raw tree: its file name without suffix."""
    return _IMAGE_SUFFIX.sub("", PurePosixPath(source).name)


def describe(prepared: Prepared) -> Iterable[str]:
    """Lines that say what a recipe found. They hold counts, no ids and no text of a report."""
    total = len(prepared.records)
    yield (
        f"{total:,} images; {prepared.without_report:,} without a report, {prepared.same_report:,} with that of another image; "
        f"{prepared.without_labels:,} without labels"
    )
    for reason, count in prepared.skipped.most_common():
        yield f"left out: {count:,} ({reason})"
