"""Offline stage `entities`: the medical entities of every report, as a sidecar."""

from __future__ import annotations

import json
from functools import partial

from mmclip_shards.document import read_document

from mmclip_dist.offline.clinical_text import as_json, build_extractor, extractor_hash
from mmclip_dist.offline.stage import Maker, Members, Stage, Unreadable


def entities_stage(base: str, out: str, model: str = "lexicon") -> Stage:
    """Entities of the reports in `base`, found by `model` (see `build_extractor`), to `out`."""
    return Stage("entities", base, out, extractor_hash(model), partial(_build, model))


def _build(model: str) -> Maker:
    extract = build_extractor(model)

    def make(samples: list[tuple[str, Members]]) -> list[tuple[str, Members]]:
        reports, problems = [], []
        for _, members in samples:
            try:
                reports.append(read_document(members).report)
                problems.append("")
            except ValueError as error:  # no entities: training meets the same sample, replaces it and counts it
                reports.append("")
                problems.append(str(error))
        rows = []
        for (key, _), found, problem in zip(samples, extract(reports), problems, strict=True):
            row = {"entities.json": json.dumps([as_json(entity) for entity in found]).encode()}
            rows.append((key, Unreadable(row, problem) if problem else row))
        return rows

    return make
