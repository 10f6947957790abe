"""The worker of the `entities` stage, without Ray: one row a sample, in order, each with its own report's entities."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("scispacy", reason="needs the extra nlp")

from mmclip_shards.document import check_spans

from mmclip_dist.offline.clinical_text import extractor_hash
from mmclip_dist.offline.entities import entities_stage
from mmclip_dist.offline.stage import Unreadable


def sample(report: str | None) -> dict[str, bytes]:
    return {"json": json.dumps({"report": report and {"text": report}, "labels": {}}).encode()}


def test_every_report_gets_its_own_entities(tmp_path) -> None:
    stage = entities_stage("unused", str(tmp_path))
    assert stage.kind == "entities" and stage.config_hash == extractor_hash()
    reports = ["No effusion.", None, "Large heart and a nodule.", "Nothing to say."]
    rows = list(stage.build()((f"key-{number}", sample(report)) for number, report in enumerate(reports)))
    assert [key for key, _ in rows] == ["key-0", "key-1", "key-2", "key-3"]
    found = [json.loads(row["entities.json"]) for _, row in rows]
    assert [[(span["text"], span["negated"]) for span in spans] for spans in found] == [
        [("effusion", True)], [], [("Large heart", False), ("nodule", False)], [],
    ]  # fmt: skip
    for report, spans in zip(reports, found, strict=True):
        check_spans(spans)
        assert all(str(report)[span["start"] : span["end"]] == span["text"] for span in spans)


@pytest.mark.parametrize(
    "bad", [{"json": b"\xff"}, {"json": b'{"report": {"text": "no \\ud800 edema"}}'}, {"txt": b"\xe9panchement"}, {"json": b"{"}]
)
def test_a_report_that_is_no_text_gets_an_empty_row_and_the_others_theirs(tmp_path, bad: dict[str, bytes]) -> None:
    maker = entities_stage("unused", str(tmp_path)).build()
    rows = [row for _, row in maker([("a", sample("Edema.")), ("b", bad), ("c", sample("Nodule."))])]
    assert [len(json.loads(row["entities.json"])) for row in rows] == [1, 0, 1]
    assert [isinstance(row, Unreadable) for row in rows] == [False, True, False]
