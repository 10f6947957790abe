"""Find in reports what may identify a patient, and count it. Contents are never told: not in errors, logs or manifests.

It is a net for what de-identification left behind, and no de-identification: a name without a title before it passes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

SCAN_VERSION = 2
"""Raise it when a rule changes: counts of different versions are not comparable."""

KINDS = ("date of birth", "record number", "phone number", "e-mail", "name after a title")


class _Rule(NamedTuple):
    """Text of this kind matches `pattern`. hint: is found wherever the pattern is, ten times as fast."""

    kind: str
    hint: re.Pattern[str]
    pattern: re.Pattern[str]


_REMOVED = re.compile(
    r"\[\*\*.*?\*\*\]"  # [**Last Name (NI) 12**] of MIMIC
    r"|\[[^\[\]\n]{1,60}\]|<[A-Z][A-Z _-]{1,40}>"  # [REDACTED], <NAME>
    r"|__+|[Xx][Xx]+",
    re.DOTALL,
)
_BLANK = "\N{REPLACEMENT CHARACTER}"  # in place of what was removed; part of no pattern

_DIGITS = re.compile(r"\d(?:[\s()./-]{0,2}\d){3}")
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DAY = (
    r"(?:\d{1,4}[./-]\d{1,2}[./-]\d{2,4}|(?:19|20)\d{6}"
    rf"|(?:\d{{1,2}}(?:st|nd|rd|th)?[\s-]+)?{_MONTH}[\s-]+(?:\d{{1,2}}(?:st|nd|rd|th)?,?\s+)?\d{{4}}|(?:19|20)\d\d)"
)

_NO_NAME = (  # what follows "Dr." or "Patient:" and is no name
    "the|this|these|there|that|at|on|in|by|of|for|from|and|or|no|not|to|with|was|is|has|please|patient|findings?|impression|comparison"
    "|indication|technique|history|chest|lungs?|heart|radiology|team|office|clinic|service|department|unknown|none|male|female|who"
    "|when|upright|supine|rotated|portable|present|practitioner|resident|radiologist|physician|nurse|manager|notified|informed|aware|called|paged|visit"
)
_LETTER, _CAPITAL, _SMALL = r"[^\W\d_]", "[A-ZÀ-ÖØ-Þ]", "[a-zß-öø-ÿ]"
_NAME = rf"(?!(?i:{_NO_NAME})\b){_CAPITAL}{_SMALL}*(?:['’-]?{_CAPITAL})?{_SMALL}+"
_ANY_NAME = rf"(?!(?i:{_NO_NAME})\b){_CAPITAL}(?:{_LETTER}|['’-])+"  # in capitals, too
_INITIALS = rf"(?:{_CAPITAL}\.\s*|{_CAPITAL}\s+){{0,2}}"
_BEFORE = rf"{_INITIALS}(?:(?:van|von|der?|la|del|dos|da|di|el|al)\s+){{0,2}}"
_DEGREES = r"(?:,\s*(?:M\.?D|D\.?O|R\.?N|P\.?A\.?-?C|N\.?P|MBBS|FRCR)|\s+M\.D)\b"
_PLACES = r"(?!(?:ED|ER|ICU|[A-Z]ICU|OR|PICC|IR|CT|MR|AP|PA|LAT|View|Views|Team|Radiology|Surgery|Medicine|Emergency)\b)"
_SIGNED_BY = r"(?:dictated|signed|reviewed|interpreted|requested|transcribed|read|approved|verified|reported)\s+by"
_SIGNED = (
    r"(?:referring|ordering|attending|requesting|reporting)(?:\s+(?:physician|doctor|radiologist|m\.?d\.?))?|radiologist"
    rf"|{_SIGNED_BY}|patient(?:'s)?\s+name"
)

_RULES = (
    _Rule(
        "date of birth",
        _DIGITS,
        re.compile(
            r"\b(?:date\s+of\s+birth|birth\s?-?date|d\.?o\.?b\b\.?|born(?:\s+on)?)[\s:#=]*"
            rf"(?:is\s+|was\s+|in\s+)?{_DAY}\b",
            re.IGNORECASE,
        ),
    ),
    _Rule(
        "record number",
        _DIGITS,
        re.compile(
            r"\b(?:mrn|mr\s?(?=\#)|med(?:ical|\.)?\s+rec(?:ord|\.)?|record\s+(?:no\.|number|id)|(?:patient(?:'s)?|pt)\.?\s+(?:id|number"
            r"|identifier)|(?:hospital|nhs|insurance|account|admission|case|chart|id)\s*(?:no\b\.?|number|id|\#)|accession"
            r"|acc(?=\s*(?:no|\#))|ssn|social\s+security|dni)"
            r"(?:\s*(?:no|number|id|\#))?[.\s:#=]*(?:is\s+)?[a-z]{0,3}-?(?:\d[\s-]?){4,}(?!\w)"
            r"|(?<![\d.-])\d{3}-\d{2}-\d{4}(?![\d-])|(?<![\d.-])\d{3}\.\d{3}\.\d{3}-\d{2}(?![\d-])",  # of social security, CPF
            re.IGNORECASE,
        ),
    ),
    _Rule(
        "phone number",
        _DIGITS,
        re.compile(
            r"(?<![\w.+/-])(?:\+?1[-. ])?(?:\(\d{3}\)\s?|\d{3}[-. ])\d{3}[-. ]\d{4}(?![\w/-])"
            r"|(?<!\w)\+\d{1,3}[ -]?(?:\(0\)[ -]?)?(?:\d[ -]?){7,12}(?!\w)"
            r"|\b(?:phone|telephone|tel|fax|pager|beeper|(?:mobile|cell)\s?(?:phone|no\.|number)|extension|ext)\b[.:#\s]*(?:no\.?|number|is|at(?!\s*[0-2]\d[0-5]\d(?!\d))|\#)?[.:\s]*"
            r"[(+]?\d(?:[\s().-]{0,2}\d){3,}(?!\w|\s*(?:[mc]m|m[lg])\b)",
            re.IGNORECASE,
        ),
    ),
    _Rule("e-mail", re.compile("@"), re.compile(r"[\w+-]@[\w-]+(?:\.[\w-]+)+")),
    _Rule(
        "name after a title",
        re.compile(r"[DMPSN](?:rs?a?|s|iss|rof|octor|rofessor|urse|RS?|ROF)\b"),
        re.compile(
            rf"\b(?:Drs?|Mrs?|Ms|Miss|Prof|Doctor|Professor|Nurse|Dra|Sra?)\b(?:\.\s*|\s+){_BEFORE}{_NAME}\b"
            # MR. and MS. also end sentences: magnetic resonance, mitral stenosis
            rf"|\b(?:Drs?|DRS?|MRS|Mrs|PROF|Prof)\.\s*{_INITIALS}{_PLACES}{_ANY_NAME}\b"
        ),
    ),
    _Rule(
        "name after a title",
        re.compile(":"),
        re.compile(
            rf"\b(?i:{_SIGNED}|signed)\s*:\s*{_BEFORE}{_PLACES}{_ANY_NAME}"
            rf"|^\s*(?i:name)\s*:\s*{_ANY_NAME}"
            rf"|\b(?i:patient)\s*:\s*{_ANY_NAME}(?:,\s*|\s+){_ANY_NAME}",
            re.MULTILINE,
        ),
    ),
    _Rule(
        "name after a title",
        re.compile(r"(?:ed|ead)\s+by\s"),
        re.compile(rf"\b(?i:{_SIGNED_BY})\s+{_PLACES}(?:{_CAPITAL}\.|{_NAME})\s+{_INITIALS}{_NAME}\b"),
    ),
    _Rule("name after a title", re.compile(_DEGREES), re.compile(rf"\b{_PLACES}{_ANY_NAME}{_DEGREES}")),
)


def phi_like(text: str) -> tuple[str, ...]:
    """The kinds of identifying content that a text seems to hold, in the order of `KINDS`. Plain dates, ages and measures are
    none, nor are the marks of removed words (`___`, `XXXX`, `[**...**]`)."""
    clean = _REMOVED.sub(_BLANK, text)
    return tuple(dict.fromkeys(rule.kind for rule in _RULES if rule.hint.search(clean) and rule.pattern.search(clean)))


class PhiScan:
    """Counts the records of each split whose texts hold something of each kind."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._first: dict[str, int] = {}

    def add(self, split: str, number: int, texts: Iterable[str | None]) -> None:
        """The texts of record `number`. They count once together."""
        counts = self._counts.setdefault(split, Counter())
        for kind in phi_like("\n".join(filter(None, texts))):
            counts[kind] += 1
            self._first.setdefault(kind, number)

    def document(self, split: str) -> dict[str, int] | None:
        """What the manifest of a split says: the version of the scan, and records by kind; None if no record was scanned."""
        return {"version": SCAN_VERSION, **self._counts[split]} if split in self._counts else None

    def check(self) -> None:
        """ValueError with the counts if there are any. It names the first record of each kind, and no content."""
        total = sum(self._counts.values(), Counter[str]())
        if total:
            found = [f"{total[kind]:,} x {kind} (first in record {self._first[kind]})" for kind in KINDS if total[kind]]
            raise ValueError(
                f"reports seem to identify people: {', '.join(found)}. Remove that from the reports, or, if you may keep "
                "it, pack with --allow-phi-like"
            )
