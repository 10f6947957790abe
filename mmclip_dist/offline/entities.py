"""Offline stage `entities`: the medical entities of every report, as a sidecar."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

from mmclip_shards.document import read_document

from mmclip_dist.offline.clinical_text import LEXICON_MODEL, as_json, build_extractor, extractor_hash
from mmclip_dist.offline.stage import Maker, Sample, Stage, Unreadable

_BATCH = 64


def entities_stage(
    base: str, out: str, model: str = LEXICON_MODEL, language: str = "en", linker: str | None = None
) -> Stage:
    """Entities of the reports in `base`, found by `model` and linked by `linker` (see `build_extractor`), to `out`.

    Ray gives a node as many workers as have room there: a model or a linker is loaded once to measure it, the lexicon is small.
    """
    return Stage(
        "entities", base, out, extractor_hash(model, language, linker), partial(_build, model, language, linker),
        measured=model != LEXICON_MODEL or linker is not None,
    )  # fmt: skip


def _build(model: str, language: str, linker: str | None) -> Maker:
    extract = build_extractor(model, language, linker)

    def make(samples: Iterable[Sample]) -> Iterator[Sample]:
        remaining = iter(samples)
        while batch := list(islice(remaining, _BATCH)):
            reports, problems = [], []
            for _, members in batch:
                try:
                    reports.append(read_document(members).report)
                    problems.append("")
                except ValueError as error:  # no entities: training meets the same sample, replaces it and counts it
                    reports.append("")
                    problems.append(str(error))
            for (key, _), found, problem in zip(batch, extract(reports), problems, strict=True):
                row = {"entities.json": json.dumps([as_json(entity) for entity in found]).encode()}
                yield key, Unreadable(row, problem) if problem else row

    return make
