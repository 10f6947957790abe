"""Short forms that a report defines, as in "retractile visceral consolidation (RVC)", and where they stand.

The rules are those of scispaCy (`scispacy.abbreviation`, after Schwartz and Hearst, 2003), and so are the results. Its own
detector looks at every pair of an opening and a closing parenthesis, and for every definition at each word: a megabyte would take
days.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spacy.tokens import Doc, Span

_MOST_WORDS = 8  # between parentheses (scispaCy's `filter_matches`)


def short_forms(doc: Doc) -> list[tuple[Span, Span]]:
    """(short form, its long form) of each place of a short form that is defined in the document. They may overlap."""
    from scispacy.abbreviation import filter_matches, find_abbreviation

    words = [token.text for token in doc]
    bracketed = [  # in the order of spaCy's matcher: the first definition of a form counts
        (0, start + 1, end)
        for end, word in enumerate(words) if word == ")"
        for start in range(end - 2, max(end - 2 - _MOST_WORDS, -1), -1) if words[start] == "("
    ]  # fmt: skip
    defined: dict[tuple[str, ...], Span] = {}
    known_short, known_long = set[str](), set[str]()
    for before, candidate in filter_matches(bracketed, doc):
        short, long = find_abbreviation(before, candidate)
        if long is not None and short.text not in known_short and long.text not in known_long:
            known_short.add(short.text)
            known_long.add(long.text)
            defined[tuple(token.text for token in short)] = long
    lengths = sorted({len(short) for short in defined})
    return [
        (doc[start : start + length], long)
        for start in range(len(words)) for length in lengths
        if (long := defined.get(tuple(words[start : start + length]))) is not None
    ]  # fmt: skip
