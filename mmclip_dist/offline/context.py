"""What a report says of each entity: stated, negated, uncertain or background. Pure; the phrases are in `lexicon.yaml`.

ConText (Harkema et al., 2009), the successor of NegEx: a cue ("no", "may represent", "history of") marks the entities on one side
of it, as far as its statement reaches. A sentence is one statement, until a termination ("but"), or until a new clause begins
behind a comma or "and": there, a statement that is complete ends if what follows has a verb of its own.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from operator import itemgetter
from typing import Any, NamedTuple

MARKS = ("negated", "background", "uncertain")
"""Strongest first: what is negated is not also uncertain."""
SCOPES = ("preceding", "adjective", "following", "either", "between")
SENTENCE_END = "sentence end"
SENTENCE_ENDS = [".", "!", ";", "\n"]
_ENDS_ADJECTIVE = {"join", "predicate", "existential"}
_ENDS_BETWEEN = {"join", "predicate", "existential", "uncertain preceding"}
"""On the left of "versus": "an opacity that may be atelectasis versus pneumonia" leaves no doubt of the opacity."""


class Cue(NamedTuple):
    """A phrase at tokens [start, end). kind: `MARK SCOPE`, or how it bounds a statement (a list of the lexicon)."""

    kind: str
    start: int
    end: int


def cue_phrases(context: Mapping[str, Any]) -> dict[str, list[str]]:
    """Kind of cue -> its phrases, from the lexicon's `context`."""
    phrases = {SENTENCE_END: SENTENCE_ENDS}
    for name, value in context.items():
        if name in MARKS:
            phrases |= {f"{name} {scope}": value[scope] for scope in SCOPES if scope in value}
        else:
            phrases[name] = value
    return phrases


def longest(cues: Iterable[Cue]) -> list[Cue]:
    """Cues that share no token, longest first, then leftmost; in the order of the text."""
    kept: list[Cue] = []
    group: list[Cue] = []  # that overlap, each with one before it
    reach = 0
    for cue in sorted(cues, key=itemgetter(1)):
        if cue[1] >= reach:
            kept += group if len(group) < 2 else _longest_of(group)
            group = []
        group.append(cue)
        reach = max(reach, cue[2])
    return kept + _longest_of(group)


def _longest_of(cues: list[Cue]) -> list[Cue]:
    kept: list[Cue] = []
    taken: set[int] = set()
    for cue in sorted(cues, key=lambda cue: (cue.start - cue.end, cue.start)):
        tokens = range(cue.start, cue.end)
        if taken.isdisjoint(tokens):
            taken.update(tokens)
            kept.append(cue)
    return sorted(kept, key=itemgetter(1))


def marks_of(entities: Sequence[tuple[int, int]], cues: Sequence[Cue]) -> list[str | None]:
    """The mark of each entity, None for stated. entities: token ranges; cues: as `longest` gives them. Both in order."""
    marks: list[str | None] = [None] * len(entities)
    for start, end, inside in _statements(cues):
        marking = [cue for cue in inside if cue.kind.startswith(MARKS)]
        # All by bisection: a statement of a megabyte takes seconds, not hours.
        rows = range(bisect_left(entities, (start,)), bisect_left(entities, (end,))) if marking else ()
        if not rows:
            continue
        bounds = _Bounds(start, end, inside, [entities[row][0] for row in rows])
        for mark in reversed(MARKS):  # the strongest last
            reaches = sorted(bounds.reach(cue) for cue in marking if cue.kind.startswith(mark))
            lows, highs = [low for low, _ in reaches], list(accumulate((high for _, high in reaches), max))
            for row in rows if reaches else ():
                first, last = entities[row]
                before = bisect_right(lows, first)  # the reaches that begin there, or earlier
                if before and last <= highs[before - 1]:
                    marks[row] = mark
    return marks


class _Bounds:
    """How far the cues of the statement [start, end) reach. entities: where those of the statement begin, in order."""

    def __init__(self, start: int, end: float, cues: Sequence[Cue], entities: Sequence[int]) -> None:
        self.start, self.end, self.entities = start, end, entities
        self.joins = [cue.start for cue in cues if cue.kind == "join"]
        self.clauses = [cue.start for cue in cues if cue.kind in _ENDS_ADJECTIVE]
        self.openings = [cue.end for cue in cues if cue.kind in _ENDS_BETWEEN]

    def reach(self, cue: Cue) -> tuple[float, float]:
        """Tokens that a cue acts on."""
        scope = cue.kind.split()[-1]
        if scope == "either":  # "effusion resolved", with nothing behind it
            scope = "preceding" if _next(self.entities, cue, self.end) < _next(self.clauses, cue, self.end) else "following"
        if scope == "preceding":
            return cue.start, self.end
        if scope == "following":
            return self.start, cue.start
        if scope == "adjective":
            return cue.start, _next(self.clauses, cue, self.end)
        before = bisect_right(self.openings, cue.start)
        return self.openings[before - 1] if before else self.start, _next(self.joins, cue, self.end)


def _next(starts: Sequence[int], cue: Cue, end: float) -> float:
    """The first of the starts behind a cue, else the end."""
    after = bisect_left(starts, cue.end)
    return starts[after] if after < len(starts) else end


def _statements(cues: Sequence[Cue]) -> Iterator[tuple[int, float, list[Cue]]]:
    """(start, end, cues) of each statement that has a cue."""
    start, complete, inside = 0, False, list[Cue]()
    for row, cue in enumerate(cues):
        clause = cue.kind == "join" and complete and _clause_follows(cues, row + 1)
        if clause or cue.kind in (SENTENCE_END, "termination", "existential"):
            if inside:
                yield start, cue.start, inside
            start, complete, inside = cue.start, False, []
        inside.append(cue)
        complete |= cue.kind in ("existential", "predicate") or cue.kind.startswith(MARKS)
    if inside:
        yield start, float("inf"), inside


def _clause_follows(cues: Sequence[Cue], row: int) -> bool:
    """Whether from cue `row` on a verb comes before the next comma, conjunction or end."""
    for at in range(row, len(cues)):
        cue = cues[at]
        if cue.kind == "predicate" or cue.kind.endswith(("following", "either")):
            return True
        if cue.kind in ("join", "alternative", "termination", "existential", SENTENCE_END):
            return False
    return False


# --- sections -------------------------------------------------------------------------------------------------------


def heading_finder(sections: Mapping[str, Sequence[str]]) -> Callable[[str], list[re.Match[str]]]:
    """Finds headings ("INDICATION:") in a text; group 1 holds those whose section is background."""
    background, findings = (
        "|".join(map(re.escape, sorted(sections[name], key=len, reverse=True))) for name in ("background", "findings")
    )
    pattern = re.compile(rf"(?:(?<=\s)|^)(?:({background})|(?:{findings}))\s?:", re.IGNORECASE)
    most = max(map(len, chain(sections["background"], sections["findings"]))) + 1  # characters before the colon

    def find(text: str) -> list[re.Match[str]]:
        found, end = [], 0
        # From the colons: a text has few of them, and many words at which a name could begin.
        while (colon := text.find(":", end)) >= 0:
            heading = pattern.search(text, max(end, colon - most), colon + 1)
            end = colon + 1
            if heading:
                found.append(heading)
        return found

    return find


def background_spans(text: str, headings: Sequence[re.Match[str]]) -> list[tuple[int, int]]:
    """Characters of the sections that say nothing of the image. A section ends at the next heading or block of text."""
    starts = [heading.start() for heading in headings] + [len(text)]
    spans = []
    for heading, limit in zip(headings, starts[1:], strict=True):
        if heading[1]:
            body = len(text) - len(text[heading.end() :].lstrip())
            block = text.find("\n", body)
            spans.append((heading.start(), limit if block < 0 else min(limit, block)))
    return spans
