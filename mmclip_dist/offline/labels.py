"""CheXpert's 14 observations from reports, by rules on the entities of the lexicon and what the report says of each.

    label = build_labeller()
    [{"Edema": 0, "Pneumothorax": None, ...}, ...] = label(["No edema.", ...])

As CheXpert's own labeller does (Irvin et al., 2019): every mention counts as present, uncertain or absent; of several, present
wins over uncertain, and uncertain over absent. `No Finding` is present, or else not mentioned: it is present where nothing but
support devices is stated or in doubt. Which words are mentions is in `observations.yaml`. Mentions of the patient's past and of
the question that was asked do not count. Agreement with the MeSH headings of Open-i: `mmclip_dist/bench/results/labeller.md`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from mmclip_shards import storage
from mmclip_shards.datasets.chexpert import FINDINGS
from mmclip_shards.document import read_document
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import ShardReader

from mmclip_dist.offline.clinical_text import Entity, build_extractor, extractor_hash
from mmclip_dist.offline.lexicon import language_of

OBSERVATIONS_PATH = Path(__file__).with_name("observations.yaml")
NO_FINDING, SUPPORT_DEVICES, _OTHER = "No Finding", "Support Devices", "another finding"
PRESENT, ABSENT, UNCERTAIN = 1, 0, -1
LABELS_VERSION = 1
"""Part of the labeller's hash. Raise it when this file changes a label."""

_SENTENCE_END = re.compile(r"[.!;]\s|\n\s*\n")
_BATCH = 256

Labels = dict[str, int | None]
Labeller = Callable[[Sequence[str]], list[Labels]]


def build_labeller() -> Labeller:
    """Reports -> their labels: 1 present, 0 absent, -1 uncertain, None not mentioned, of each of the 14 observations.

    An empty report mentions nothing, and not even No Finding is set. Build once per process; it is not thread-safe. ValueError
    when the extra `nlp` is not installed.
    """
    extract = build_extractor()

    def label(reports: Sequence[str]) -> list[Labels]:
        return [labels_of(report, entities) for report, entities in zip(reports, extract(reports), strict=True)]

    return label


def labeller_hash() -> str:
    """sha256 (hex) of everything that affects a label."""
    rules = hashlib.sha256(OBSERVATIONS_PATH.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([LABELS_VERSION, rules, extractor_hash()]).encode()).hexdigest()


def label_once(reports: Iterable[str], label: Labeller) -> Iterator[Labels]:
    """The labels of reports, in their order; one that comes again (with each image) is labelled once. Memory holds the labels of
    each different report."""
    known: dict[bytes, Labels] = {}
    waiting: list[str] = []

    def flush() -> Iterator[Labels]:
        new = {_digest(report): report for report in waiting if _digest(report) not in known}
        known.update(zip(new, label(list(new.values())), strict=True))
        yield from (known[_digest(report)] for report in waiting)
        waiting.clear()

    for report in reports:
        waiting.append(report)
        if len(waiting) == _BATCH:
            yield from flush()
    yield from flush()


def label_set(base: str, out: str, progress: Callable[[int, int], None] | None = None) -> dict[str, tuple[int, int, int]]:
    """Write the labels of the reports in a packed set as CSV: key, then 1.0, 0.0, -1.0 or nothing for each observation, as
    CheXpert does -> observation -> how often it is (present, uncertain, absent).

    progress(done, total): in samples. ValueError where there is no set, its reports are not English, or one cannot be read.
    """
    manifest = load_manifest(base)
    if manifest.kind != "base":
        raise ValueError(f"{base} holds {manifest.kind} sidecars: name the packed set itself")
    if (language := language_of(base)) != "en":
        raise ValueError(f"the reports of {base} are in another language ({language}) than these rules, which are English")
    reader, keys = ShardReader(base, manifest), list[str]()

    def reports() -> Iterator[str]:
        for number in range(len(manifest.shards)):
            for key, members in reader.samples(number):
                keys.append(key)
                yield read_document(members).report

    rows, counts = [",".join(["key", *FINDINGS])], Counter[tuple[str, int | None]]()
    for number, labels in enumerate(label_once(reports(), build_labeller())):
        counts.update(labels.items())
        rows.append(",".join([keys[number], *(_CELLS[labels[name]] for name in FINDINGS)]))
        if progress is not None:
            progress(number + 1, manifest.samples)
    storage.write_atomic(out, ("\n".join(rows) + "\n").encode())
    return {name: (counts[name, PRESENT], counts[name, UNCERTAIN], counts[name, ABSENT]) for name in FINDINGS}


_CELLS = {PRESENT: "1.0", ABSENT: "0.0", UNCERTAIN: "-1.0", None: ""}


def _digest(report: str) -> bytes:
    return hashlib.blake2b(report.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def labels_of(report: str, entities: Sequence[Entity]) -> Labels:
    """The labels of one report. entities: of the lexicon, in order."""
    if not report.strip():
        return dict.fromkeys(FINDINGS)
    found: dict[str, set[int]] = {}
    for observation, value in _mentions(report, entities):
        found.setdefault(observation, set()).add(value)
    labels: Labels = {name: _strongest(found.get(name, set())) for name in FINDINGS}
    seen = any(values & {PRESENT, UNCERTAIN} for name, values in found.items() if name != SUPPORT_DEVICES)
    labels[NO_FINDING] = None if seen else PRESENT
    return labels


def _strongest(values: set[int]) -> int | None:
    return next((value for value in (PRESENT, UNCERTAIN, ABSENT) if value in values), None)


def _mentions(report: str, entities: Sequence[Entity]) -> Iterator[tuple[str, int]]:
    """(observation, value) of every mention; what is no observation, but a finding, is `another finding`."""
    rules = _rules()
    for start, end in _sentences(report):
        inside = [entity for entity in entities if start <= entity.start < end and not entity.background]
        anatomy = [entity for entity in inside if entity.label == "ANATOMY"]
        for entity in inside:
            observation = rules.observation(entity, anatomy)
            if observation is not None:
                yield observation, ABSENT if entity.negated else UNCERTAIN if entity.uncertain else PRESENT
        if anatomy:
            yield from rules.normal(report[start:end])


def _sentences(report: str) -> Iterator[tuple[int, int]]:
    start = 0
    for end in (match.end() for match in _SENTENCE_END.finditer(report)):
        yield start, end
        start = end
    yield start, len(report)


class _Rules:
    """The content of `observations.yaml`, compiled."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._of_term = {term: observation for observation, terms in content["terms"].items() for term in terms}
        self._except = {term: re.compile(pattern, re.IGNORECASE) for term, pattern in content["except"].items()}
        self._words = {term: (re.compile(words, re.IGNORECASE), of) for term, (words, of) in content["words"].items()}
        self._near = {(finding, place): observation for finding, place, observation in content["near"]}
        self._normal = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in content["normal"].items()}
        self._normal_words, self._borderline_words = (
            re.compile(content[f"{kind}_words"], re.IGNORECASE) for kind in ("normal", "borderline")
        )
        self._neutral = frozenset(content["neutral"])

    def observation(self, entity: Entity, anatomy: Sequence[Entity]) -> str | None:
        """What an entity is a mention of, or None for none. anatomy: of its sentence."""
        term = entity.term or ""
        if entity.label not in ("FINDING", "DEVICE") or term in self._neutral:
            return None
        if term in self._of_term and not (term in self._except and self._except[term].search(entity.text)):
            return self._of_term[term]
        if term in self._words and self._words[term][0].search(entity.text):
            return self._words[term][1]
        nearest = min(anatomy, key=lambda other: max(other.start - entity.end, entity.start - other.end), default=None)
        if nearest is not None and (term, nearest.term) in self._near:
            return self._near[term, nearest.term]
        return _OTHER if entity.label == "FINDING" else None

    def normal(self, sentence: str) -> Iterator[tuple[str, int]]:
        """Observations that a sentence calls normal or borderline."""
        borderline = self._borderline_words.search(sentence)
        if borderline or self._normal_words.search(sentence):
            for name, pattern in self._normal.items():
                if pattern.search(sentence):
                    yield name, UNCERTAIN if borderline else ABSENT


@cache
def _rules() -> _Rules:
    return _Rules(yaml.safe_load(OBSERVATIONS_PATH.read_text(encoding="utf-8")))
