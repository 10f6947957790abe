"""How far the lexicon's entities can be trusted, and how fast they come.

    python -m mmclip_dist.bench.entities --gold tests/offline/gold_entities.yaml --reports NLMCXR_reports.tgz

--gold: sentences labelled by hand. F1 of the entities (exact span and label), accuracy of their marks, and the failures of the
part `tuned`; those of `held_out` are counted only.
--reports: the Open-i reports of Indiana University, as they come inside the wheel `torchxrayvision` 1.5.7. Recall and precision
of the main findings against the MeSH terms that people gave each report, and reports/s of one process.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

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


# -- Open-i reports ----------------------------------------------------------------------------------------------------

MAIN_FINDINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "airspace opacity": (
        r"Opacity|Airspace Disease|Infiltrate|Consolidation|Density|Pneumonia",
        ("lung opacity", "airspace disease", "infiltration", "consolidation", "ground-glass opacity", "interstitial opacity",
         "pneumonia"),
    ),
    "atelectasis": (r"Pulmonary Atelectasis|Volume Loss", ("atelectasis",)),
    "cardiomegaly": (r"Cardiomegaly|Cardiac Shadow/.*enlarged", ("cardiomegaly",)),
    "low lung volumes": (r"Lung/.*hypoinflation", ("low lung volumes",)),
    "hyperinflation": (r"Lung/.*hyperdistention|Lung, Hyperlucent", ("hyperinflation",)),
    "degenerative change": (r".*degenerative|Spondylosis|Osteophyte", ("degenerative change",)),
    "granuloma": (r"(Calcified )?Granuloma|Granulomatous Disease", ("granuloma",)),
    "scarring": (r"Cicatrix", ("scarring",)),
    "pleural effusion": (r"Pleural Effusion|Hemothorax", ("pleural effusion",)),
    "tortuous aorta": (r"Aorta.*/tortuous", ("aortic tortuosity",)),
    "atherosclerosis": (r"Atherosclerosis", ("atherosclerosis",)),
    "scoliosis": (r"Scoliosis", ("scoliosis",)),
    "nodule": (r"Nodule", ("nodule",)),
    "fracture": (r"Fractures, Bone", ("fracture",)),
    "congestion": (r"Pulmonary Congestion", ("congestion",)),
    "edema": (r"Pulmonary Edema", ("edema",)),
    "emphysema or COPD": (r".*Emphysema$|.*Emphysema/|Pulmonary Disease, Chronic Obstructive", ("emphysema", "COPD")),
    "hernia": (r"Hernia", ("hernia",)),
    "pneumothorax": (r".*pneumothorax", ("pneumothorax",)),
    "fibrosis": (r"(Pulmonary )?Fibrosis", ("fibrosis",)),
    "mass": (r"Mass\b", ("mass",)),
}  # fmt: skip
"""Name -> MeSH heading (matched at its start, case ignored), terms of the lexicon that say the same."""


class Report(NamedTuple):
    """A report of Open-i. sections: "FINDINGS" -> text, in the report's order; mesh: headings that people gave it."""

    number: int
    sections: dict[str, str]
    mesh: list[str]

    @property
    def text(self) -> str:
        """All sections, each with its heading."""
        return "\n".join(f"{name}: {text}" for name, text in self.sections.items())


def read_reports(archive: Path) -> list[Report]:
    """The reports that people indexed; those without text are left out."""
    reports = []
    with tarfile.open(archive) as members:
        for member in members:
            if not member.name.endswith(".xml"):
                continue
            root = ElementTree.parse(members.extractfile(member)).getroot()  # type: ignore[arg-type]
            sections = {str(part.get("Label")): part.text for part in root.iter("AbstractText") if part.text}
            headings = [heading.text or "" for heading in root.iter("major")]
            if sections and headings != ["No Indexing"]:
                reports.append(Report(int(Path(member.name).stem), sections, headings))
    return reports


@dataclass
class Agreement:
    """Counts of reports: `named` by MeSH, `found` by the lexicon, `both`."""

    named: int = 0
    found: int = 0
    both: int = 0

    def add(self, named: bool, found: bool) -> None:
        self.named += named
        self.found += found
        self.both += named and found

    def row(self, name: str) -> str:
        recall, precision = self.both / max(1, self.named), self.both / max(1, self.found)
        return f"| {name} | {self.named:,} | {self.found:,} | {recall:.3f} | {precision:.3f} |"


def mesh_table(reports: list[Report], found: list[list[Entity]]) -> list[str]:
    """Rows of a Markdown table: every main finding, and all of them together by what counts as found."""
    each = {name: Agreement() for name in MAIN_FINDINGS}
    totals = {"**all, stated**": Agreement(), "all, stated or uncertain": Agreement(), "all, whatever the mark": Agreement()}
    counted = [{"stated"}, {"stated", "uncertain"}, set(MARKS.values())]
    for report, entities in zip(reports, found, strict=True):
        marks = [(entity.term, mark_of(entity)) for entity in entities]
        for name, (mesh, terms) in MAIN_FINDINGS.items():
            named = any(re.match(mesh, heading, re.IGNORECASE) for heading in report.mesh)
            each[name].add(named, (stated := any(term in terms and mark == "stated" for term, mark in marks)))
            for total, allowed in zip(totals.values(), counted, strict=True):
                total.add(named, stated or any(term in terms and mark in allowed for term, mark in marks))
    head = ["| finding | named by MeSH | found | recall | precision |", "|---|---|---|---|---|"]
    return head + [agreement.row(name) for name, agreement in (totals | each).items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--gold", type=Path, required=True)
    parser.add_argument("--reports", type=Path, required=True)
    arguments = parser.parse_args()
    extract = build_extractor()
    rows, failures = gold_table(extract, arguments.gold)
    reports = read_reports(arguments.reports)
    texts = [report.text for report in reports]
    extract(texts[:200])  # the first reports fill spaCy's vocabulary
    # Processor time of this one process: what a core does, whoever else uses the machine.
    started = time.process_time()
    found = extract(texts)
    rate = len(texts) / (time.process_time() - started)
    versions = ", ".join(f"{name} {version(name)}" for name in ("spacy", "scispacy"))
    characters = sum(map(len, texts)) / len(texts)
    print("\n".join([
        "# Entities", "",
        f"`python -m mmclip_dist.bench.entities --gold {arguments.gold} --reports {arguments.reports.name}`, "
        f"{datetime.datetime.now(datetime.UTC).date()}, one process, Python {platform.python_version()}, {versions}.", "",
        "## Sentences labelled by hand", "",
        "F1 by exact span and label; negation (negated or not) and all four marks over the entities found.", "", *rows, "",
        "What `tuned` still has wrong:", "", *(f"- {failure}" for failure in failures), "",
        f"## {len(reports):,} Open-i reports against their MeSH", "", *mesh_table(reports, found), "",
        f"Speed: {rate:,.0f} reports/s of processor time, {characters:.0f} characters each, "
        f"{sum(map(len, found)) / len(found):.1f} entities each.",
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
