"""Read what a sample holds beside its image: report, labels, patient. No other module parses `KEY.json` and `KEY.txt`, of our
sets or of foreign ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmclip_shards.schema import LABEL_VALUES, OLDEST

_PATIENT = re.compile(r"[0-9a-f]{32}")
_FOREIGN_REPORTS = ("report", "text", "caption")  # fields of foreign JSON that may hold the report's text


class Document(NamedTuple):
    """The document of a sample. report: its text, or ""; labels: as in `schema.Record`, empty if unknown; age: in years, those
    above 89 as 90."""

    report: str
    labels: dict[str, int | None]
    patient: str | None
    view: str | None
    age: int | None = None


def read_document(members: Mapping[str, bytes]) -> Document:
    """The document of a sample, from its members. ValueError when `json` or `txt` cannot be read.

    The report is, in this order, the JSON's `report.text` (our form), the content of `txt`, or a text in the JSON's `report`,
    `text` or `caption`. Labels in another form than ours count as unknown.
    """
    try:
        fields = json_fields(members["json"]) if "json" in members else {}
        report = _report(members, fields)
        _check_encodable(report)
    except ValueError as error:
        raise ValueError(f"the sample's json or txt is {error}; `mmclip verify` lists such samples") from error
    patient, view = fields.get("patient"), fields.get("view")
    age: Any = fields.get("age")
    return Document(
        report=report if report.strip() else "",
        labels=legal_labels(fields.get("labels")) or {},
        patient=patient if isinstance(patient, str) and patient.strip() else None,
        view=view if isinstance(view, str) and view.strip() else None,
        age=min(age, OLDEST) if _is_number(age, whole=True) and age >= 0 else None,
    )


def named_fields(key: str, members: Mapping[str, bytes]) -> dict[str, Any]:
    """What an expression may ask of a sample (`expression.FIELDS`): field -> value, None for one that the sample lacks or that
    has another type than ours. ValueError as in `read_document`."""
    document = read_document(members)
    fields = json_fields(members["json"]) if "json" in members else {}
    texts = {name: value if isinstance(value := fields.get(name), str) else None for name in ("dataset", "source")}
    sides = {name: value if _is_number(value := fields.get(name)) else None for name in ("width", "height")}
    boxes = fields.get("boxes", [])
    return {
        "key": key, "report": document.report or None, "view": document.view, "patient": document.patient,
        "age": document.age, "labels": document.labels, "boxes": boxes if isinstance(boxes, list) else None, **texts, **sides,
    }  # fmt: skip


def json_fields(data: bytes) -> dict[str, Any]:
    """The fields of a JSON object; empty for any other JSON value. ValueError when it cannot be parsed."""
    value = parse_json(data)
    return value if isinstance(value, dict) else {}


def parse_json(data: bytes) -> Any:
    """A JSON value. ValueError when it cannot be parsed; the message does not quote the text, which may name a patient."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        place = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"not usable JSON, {type(error).__name__}{place}") from error


def decode_text(data: bytes) -> str:
    """UTF-8 text. ValueError when it is not UTF-8; the message does not quote it."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text, at byte {error.start}") from error


def legal_labels(value: object) -> dict[str, int | None] | None:
    """The labels, if `value` has the form `{disease: 1 | 0 | -1 | null}` (1.0 counts as 1); None for anything else."""
    if not isinstance(value, dict):
        return None
    labels: dict[str, int | None] = {}
    for name, label in value.items():
        if not name.strip() or isinstance(label, bool) or label not in LABEL_VALUES:
            return None
        labels[name] = None if label is None else int(label)
    return labels


def check_fields(fields: Any, *, dataset: str, label_names: tuple[str, ...]) -> None:
    """ValueError unless these are fields as `schema.sample_document` makes them, for a set with these labels."""
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")
    report = fields.get("report", "")
    texts = {"text", "findings", "impression"}
    if report is not None and not (
        isinstance(report, dict)
        and "text" in report
        and report.keys() <= texts
        and all(isinstance(text, str) and text.strip() for text in report.values())
    ):
        raise ValueError("`report` must be null, or hold `text` and perhaps `findings` and `impression`")
    labels = legal_labels(fields.get("labels"))
    if labels is None or set(labels) != set(label_names):
        raise ValueError("`labels` must give 1, 0, -1 or null for each label of the manifest")
    if not _PATIENT.fullmatch(str(fields.get("patient"))):
        raise ValueError("`patient` must be a keyed hash, 32 hex digits")
    if fields.get("dataset") != dataset:
        raise ValueError("`dataset` is not that of the manifest")
    if not isinstance(fields.get("view", 0), str | None):
        raise ValueError("`view` must be a text or null")
    source = fields.get("source")
    if not isinstance(source, str) or not source or source.startswith("/"):
        raise ValueError("`source` must be a name or a relative path")
    if not all(_is_number(fields.get(side), whole=True) and fields[side] > 0 for side in ("width", "height")):
        raise ValueError("`width` and `height` must be positive whole numbers")
    if not (_is_number(fields.get("age", 0), whole=True) and 0 <= fields.get("age", 0) <= OLDEST):
        raise ValueError(f"`age` must be whole years, those above {OLDEST - 1} as {OLDEST}")
    _check_boxes(fields.get("boxes", []))


def _check_boxes(boxes: Any) -> None:
    if not isinstance(boxes, list):
        raise ValueError("`boxes` must be a list")
    for box in boxes:
        if not (isinstance(box, dict) and isinstance(box.get("label"), str) and box["label"]):
            raise ValueError("a box has no `label`")
        if not all(_is_number(box.get(side)) for side in ("x", "y", "width", "height")):
            raise ValueError("a box lacks `x`, `y`, `width` or `height`")


def check_spans(spans: object) -> None:
    """ValueError unless these are spans as `KEY.entities.json` holds them: start, end, text, label, negated; where
    known, uncertain, background and cui."""
    if not isinstance(spans, list):
        raise ValueError("it is not a list of spans")
    for number, span in enumerate(spans):
        if not isinstance(span, dict):
            raise ValueError(f"span {number} is not an object")
        start: Any = span.get("start")
        end: Any = span.get("end")
        text = span.get("text")
        if not (_is_number(start, whole=True) and _is_number(end, whole=True) and 0 <= start < end):
            raise ValueError(f"span {number}: `start` and `end` must be whole numbers, 0 <= start < end")
        if not isinstance(text, str) or len(text) != end - start:
            raise ValueError(f"span {number}: `text` must have `end` - `start` characters")
        if not (isinstance(span.get("label"), str) and span["label"] and isinstance(span.get("negated"), bool)):
            raise ValueError(f"span {number}: `label` must be a text and `negated` true or false")
        if not all(isinstance(span.get(mark, False), bool) for mark in ("uncertain", "background")):
            raise ValueError(f"span {number}: `uncertain` and `background` must be true or false")
        if not isinstance(span.get("cui", ""), str):
            raise ValueError(f"span {number}: `cui` must be a text")


def is_evidence(span: Mapping[str, Any]) -> bool:
    """Whether a report states an entity as seen: not negated, in doubt, or of the past. Older sidecars know only `negated`."""
    return not (span["negated"] or span.get("uncertain") or span.get("background"))


def report_texts(fields: Mapping[str, Any]) -> list[str]:
    """Every text of a report in the fields of `KEY.json`, of our sets and of foreign ones."""
    found = (fields.get(name) for name in _FOREIGN_REPORTS)
    values = [text for value in found for text in (value.values() if isinstance(value, dict) else [value])]
    return [text for text in values if isinstance(text, str)]


def _report(members: Mapping[str, bytes], fields: Mapping[str, Any]) -> str:
    ours = fields.get("report")
    if isinstance(ours, dict) and isinstance(ours.get("text"), str):
        return str(ours["text"])
    if "txt" in members:
        return decode_text(members["txt"])
    return next((fields[name] for name in _FOREIGN_REPORTS if isinstance(fields.get(name), str)), "")


def _check_encodable(text: str) -> None:
    """ValueError for a text that UTF-8 cannot hold: JSON may name half of a character (\\ud800)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not UTF-8 text, at character {error.start}") from error


def _is_number(value: Any, whole: bool = False) -> bool:
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)
