"""Offline stage `entities`: the medical entities of every report, as a sidecar."""

from __future__ import annotations

import json
from functools import partial

from mmclip_shards.document import read_document

from mmclip_dist.offline.clinical_text import as_json, build_extractor, extractor_hash
from mmclip_dist.offline.stage import Maker, Members, Stage


def entities_stage(base: str, out: str, model: str = "lexicon") -> Stage:
    """Entities of the reports in `base`, found by `model` (see `build_extractor`), to `out`."""
    return Stage("entities", base, out, extractor_hash(model), partial(_build, model))


def _build(model: str) -> Maker:
    extract = build_extractor(model)

    def make(samples: list[tuple[str, Members]]) -> list[tuple[str, Members]]:
        reports = [read_document(members).report for _, members in samples]
        rows = zip(samples, extract(reports), strict=True)
        return [
            (key, {"entities.json": json.dumps([as_json(entity) for entity in found]).encode()})
            for (key, _), found in rows
        ]

    return make
