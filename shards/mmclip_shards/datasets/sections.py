"""The sections of a report in plain text, and which of them become the report that a model reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

SECTIONS = ("findings", "impression", "indication", "comparison", "technique", "addendum", "last_paragraph")
"""Names that `split_report` gives. Other headers (wet read, notification, ...) end a section and are dropped."""

DEFAULT_SECTIONS = ("findings", "impression")

_HEADER = re.compile(r"(?:^|\n)[ \t]{0,3}([A-Z][A-Z ()/,&-]+):(?=\s|$)")
_ADDENDUM_LINE = re.compile(r"\n[ \t]*_{20,}[ \t]*\n")
_TITLE = re.compile(r"^\s*(FINAL REPORT|WET READ)[^\n]*\n")
_ADDENDUM_WORD = re.compile(r"^ADDENDUM[:\s]*")
_BLANK = re.compile(r"_{2,}|X{4,}")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")

# The first that is found in a header names it, so that "FINDINGS AND IMPRESSION" is an impression. Typing errors are those of
# MIMIC-CXR, which its own parser lists, too.
_NAMES = (
    ("addendum", r"addend"),
    ("impression", r"impress|imprss|conclusion"),
    ("findings", r"find|fndng"),
    ("indication", r"indication|histor|reason for|clinical info"),
    ("comparison", r"compar"),
    ("technique", r"techni"),
    ("", r"exam|wet read|notification|recommend|dictated|attending|report"),
    ("findings", r"chest|portable|lateral|frontal|\bviews?\b|radiograph|\bap\b|\bpa\b"),
)


def split_report(text: str) -> dict[str, str]:
    """The sections of a report by name: a header is capitals and a colon at the start of a line.

    A section that comes twice is the last one. What stands above a full line of underscores is an addendum. If there are no
    findings and no impression, `last_paragraph` is what follows the first empty line of the last section, or all of a text
    without headers. White space becomes single spaces; the marks of removed words (`___`, `XXXX`) become `___`.
    """
    parts = _ADDENDUM_LINE.split(text.replace("\r\n", "\n"))
    *addenda, text = list(filter(str.strip, parts)) or [""]
    sections: dict[str, str] = {}
    headers = list(_HEADER.finditer(text))
    ends = [*(header.start() for header in headers[1:]), len(text)]
    for header, end in zip(headers, ends, strict=False):
        name = _section_name(header[1])
        if name and (content := clean_text(text[header.end() : end])):
            sections[name] = content
    if addenda and (content := _ADDENDUM_WORD.sub("", clean_text(" ".join(addenda)))):
        sections["addendum"] = content
    if not sections.keys() & {"findings", "impression"}:
        # The header's own paragraph is its section: "COMPARISON: None." says nothing of the image.
        rest = "".join(_PARAGRAPH.split(text[headers[-1].end() :], maxsplit=1)[1:]) if headers else _TITLE.sub("", text)
        if content := clean_text(rest):
            sections["last_paragraph"] = content
    return sections


def join_sections(sections: Mapping[str, str], chosen: Sequence[str] | None = None) -> str:
    """The report: the chosen sections, in that order. None: findings and impression, or else the last paragraph."""
    wanted = DEFAULT_SECTIONS if chosen is None else chosen
    text = "\n".join(sections[name] for name in wanted if sections.get(name))
    return text or (sections.get("last_paragraph", "") if chosen is None else "")


def parse_choice(text: str) -> tuple[str, ...]:
    """`"impression,findings"` -> names of sections. ValueError for a name that is none."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in SECTIONS:
            raise ValueError(f"there is no section {name!r}; the sections are {', '.join(SECTIONS)}")
    return names


def clean_text(text: str) -> str:
    """Single spaces, and one mark for a removed word."""
    return " ".join(_BLANK.sub("___", text).split())


def _section_name(header: str) -> str:
    return next((name for name, pattern in _NAMES if re.search(pattern, header.lower())), "")
