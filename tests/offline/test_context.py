"""What each entity is marked as, from cues alone: tokens are letters, `marked` reads a line of them."""

from __future__ import annotations

import random

import pytest

from mmclip_dist.offline.context import (
    Cue,
    _statements,
    background_spans,
    cue_phrases,
    heading_finder,
    longest,
    marks_of,
)

KINDS = {
    "no": "negated preceding", "gone": "negated following", "maybe": "uncertain preceding", "possible": "uncertain adjective",
    "unclear": "uncertain following", "versus": "uncertain between",
    "resolved": "negated either", "past": "background preceding", ".": "sentence end",
    "but": "termination", "there-is": "existential", "is": "predicate", ",": "join", "or": "alternative", "fake": "pseudo",
}  # fmt: skip


def marked(line: str) -> str:
    """Marks of the words in capitals, one letter each: s stated, n negated, u uncertain, b background."""
    words = line.split()
    cues = [Cue(KINDS[word], at, at + 1) for at, word in enumerate(words) if word in KINDS]
    entities = [(at, at + 1) for at, word in enumerate(words) if word.isupper()]
    return "".join((mark or "stated")[0] for mark in marks_of(entities, cues))


@pytest.mark.parametrize(
    ("line", "marks"),
    [
        ("A B", "ss"),
        ("no A , B or C", "nnn"),
        ("A gone B", "ns"),
        ("A , B , C gone", "nnn"),
        ("no A . B", "ns"),
        ("no A but B", "ns"),
        ("no A there-is B", "ns"),
        ("no A , B is C", "nss"),  # a new clause: "no effusion, the heart is enlarged"
        ("no A or B is seen", "nn"),  # the same clause goes on
        ("A is B , C gone", "ssn"),
        ("A , B is C", "sss"),
        ("maybe A , B", "uu"),
        ("possible A , B", "us"),
        ("possible A or B", "uu"),
        ("A , B versus C , D", "suus"),
        ("A , B unclear", "uu"),
        ("A maybe B versus C", "suu"),  # no doubt of what may be one or the other
        ("A is B versus C", "suu"),
        ("possible A versus B", "uu"),
        ("resolved A , B", "nn"),
        ("A , B resolved", "nn"),
        ("A resolved , B", "ns"),
        ("A is B , C resolved", "ssn"),
        ("past A . B", "bs"),
        ("no past A", "n"),
        ("past maybe A", "b"),
        ("fake A", "s"),
        ("no A gone . maybe B", "nu"),
    ],
)
def test_marks(line: str, marks: str) -> None:
    assert marked(line) == marks


def marks_one_by_one(entities: list[tuple[int, int]], cues: list[Cue]) -> list[str | None]:
    """The rules as they are told: each cue of a statement looks at all others, and marks each entity that it reaches."""
    marks: list[str | None] = [None] * len(entities)
    for start, end, inside in _statements(cues):
        for mark in ("uncertain", "background", "negated"):
            for cue in (cue for cue in inside if cue.kind.startswith(mark)):
                scope, clauses = cue.kind.split()[-1], {"join", "predicate", "existential"}
                ends = {"adjective": clauses, "either": clauses, "between": {"join"}}.get(scope, set())
                openings = clauses | {"uncertain preceding"} if scope == "between" else set()
                right = min((other.start for other in inside if other.start >= cue.end and other.kind in ends), default=end)
                left = max((other.end for other in inside if other.end <= cue.start and other.kind in openings), default=start)
                if scope == "either":
                    scope = "preceding" if any(cue.end <= first < right for first, _ in entities) else "following"
                    right = end
                low = left if scope in ("following", "between") else cue.start
                high = cue.start if scope == "following" else right
                for row, (first, last) in enumerate(entities):
                    if max(low, start) <= first and last <= high and first < end:
                        marks[row] = mark
    return marks


def test_a_long_statement_is_marked_as_its_cues_say_one_by_one() -> None:
    draw = random.Random(0)
    for _ in range(500):
        at, cues, entities = 0, [], []
        for _ in range(draw.randint(1, 40)):
            length, word = draw.randint(1, 3), draw.choice([*KINDS.values(), "ENTITY", "ENTITY", "word"])
            if word == "ENTITY":
                entities.append((at, at + length))
            elif word != "word":
                cues.append(Cue(word, at, at + length))
            at += length - draw.choice([0, 0, 0, 1]) * (length > 1)  # entities and cues may share a token
        cues = longest(cues)
        entities = [
            entity for entity, before in zip(entities, [(0, 0), *entities], strict=False) if entity[0] >= before[1]
        ]
        assert marks_of(entities, cues) == marks_one_by_one(entities, cues), (entities, cues)


def test_the_longest_cue_wins_and_then_the_leftmost() -> None:
    short, long, right = Cue("a", 1, 2), Cue("b", 0, 3), Cue("c", 2, 4)
    assert longest([short, right, long]) == [long]
    assert longest([right, short]) == [short, right]
    assert longest([Cue("e", 0, 2), Cue("f", 1, 4)]) == [Cue("f", 1, 4)]
    assert longest([Cue("d", 1, 3), right]) == [Cue("d", 1, 3)]


def test_phrases_get_their_kind() -> None:
    context = {"negated": {"preceding": ["no"], "following": ["gone"]}, "join": [","]}
    kinds = cue_phrases(context)
    assert {name: kinds[name] for name in kinds if name != "sentence end"} == {
        "negated preceding": ["no"], "negated following": ["gone"], "join": [","],
    }  # fmt: skip


def test_a_background_section_ends_at_the_next_heading_or_block() -> None:
    headings = heading_finder({"background": ["history", "clinical history"], "findings": ["findings"]})
    for text, background in (
        ("History: A Findings: B", "History: A "),
        ("CLINICAL HISTORY:\nA\nB", "CLINICAL HISTORY:\nA"),
        ("A History: B", "History: B"),
        ("Findings: A", ""),
        ("prehistory: A", ""),
        ("history of A", ""),
        ("A: History : B: clinical history: C", "History : B: clinical history: C"),
        ("B:history: A", ""),
        ("so clinical history : A", "clinical history : A"),
    ):
        spans = background_spans(text, headings(text))
        assert "".join(text[start:end] for start, end in spans) == background
