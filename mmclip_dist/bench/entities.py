"""How far the lexicon's entities can be trusted, and how fast they come.

    python -m mmclip_dist.bench.entities --gold tests/offline/gold_entities.yaml
        sentences labelled by hand: F1 of the entities, accuracy of their marks; the failures of the part `tuned` are listed
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from mmclip_dist.offline.clinical_text import Entity, Extractor, build_extractor

LABELS = {"F": "FINDING", "A": "ANATOMY", "L": "LOCATION", "S": "SEVERITY", "D": "DEVICE"}
MARKS = {"": "stated", "-": "negated", "?": "uncertain", "~": "background"}
MARKED = re.compile(r"\[([^|\]]+)\|([FALSD])([-?~]?)\]")
Span = tuple[int, int, str]


# -- Sentences labelled by hand ----------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts over sentences. `marks`: of the entities found, (right mark, mark found)."""

    expected: int = 0
    found: int = 0
    right: int = 0
    marks: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def f1(self) -> float:
        return 2 * self.right / max(1, self.expected + self.found)

    @property
    def marked(self) -> float:
        """Share of the entities found that have the right one of the four marks."""
        return sum(count for (right, got), count in self.marks.items() if right == got) / max(1, self.right)

    @property
    def negation(self) -> float:
        """Share of the entities found that are rightly negated or rightly not."""
        agree = sum(n for (right, got), n in self.marks.items() if (right == "negated") == (got == "negated"))
        return agree / max(1, self.right)


def read_gold(path: Path) -> dict[str, dict[str, list[str]]]:
    """Part -> category -> marked sentences."""
    return {
        part: {category: lines.strip().splitlines() for category, lines in categories.items()}
        for part, categories in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    }


def read_marked(line: str) -> tuple[str, dict[Span, str]]:
    """A marked sentence -> its text, and the mark of each (start, end, label)."""
    text, spans, last = "", {}, 0
    for match in MARKED.finditer(line):
        text += line[last : match.start()]
        spans[len(text), len(text) + len(match[1]), LABELS[match[2]]] = MARKS[match[3]]
        text, last = text + match[1], match.end()
    return text + line[last:], spans


def mark_of(entity: Entity) -> str:
    for mark in ("negated", "background", "uncertain"):
        if getattr(entity, mark, False):
            return mark
    return "stated"


def tally(extract: Extractor, lines: Iterable[str], label: str | None = None) -> Tally:
    """Compare the extractor with marked sentences, by exact span and label. label: count this one only."""
    result = Tally()
    read = [read_marked(line) for line in lines]
    for (text, wanted), entities in zip(read, extract([text for text, _ in read]), strict=True):
        expected = {span: mark for span, mark in wanted.items() if label in (None, span[2])}
        found = {(e.start, e.end, e.label): mark_of(e) for e in entities if label in (None, e.label)}
        both = expected.keys() & found.keys()
        result.expected += len(expected)
        result.found += len(found)
        result.right += len(both)
        result.marks.update((expected[span], found[span]) for span in both)
        problems = [f"missed {text[s[0] : s[1]]!r} {s[2]}" for s in sorted(expected.keys() - both)]
        problems += [f"too many {text[s[0] : s[1]]!r} {s[2]}" for s in sorted(found.keys() - both)]
        problems += [
            f"{text[s[0] : s[1]]!r} is {expected[s]}, got {found[s]}" for s in sorted(both) if expected[s] != found[s]
        ]
        if problems:
            result.failures.append(f"{text}  <- {'; '.join(problems)}")
    return result


def gold_table(extract: Extractor, path: Path) -> tuple[list[str], list[str]]:
    """Rows of a Markdown table, and the failures of the part `tuned`."""
    rows = ["| part | sentences | entities | F1 | negation | all marks |", "|---|---|---|---|---|---|"]
    failures = []
    for part, categories in read_gold(path).items():
        everything = [line for lines in categories.values() for line in lines]
        groups = {f"**{part}**": (everything, None), f"{part}, findings": (everything, "FINDING")}
        groups |= {f"{part}, {category}": (lines, None) for category, lines in categories.items()}
        for name, (lines, label) in groups.items():
            t = tally(extract, lines, label)
            rows.append(f"| {name} | {len(lines)} | {t.expected} | {t.f1:.3f} | {t.negation:.3f} | {t.marked:.3f} |")
        if part == "tuned":
            failures = tally(extract, everything).failures
    return rows, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gold", type=Path, required=True)
    arguments = parser.parse_args()
    rows, failures = gold_table(build_extractor(), arguments.gold)
    print("\n".join(rows + ["", *failures]))


if __name__ == "__main__":
    main()
