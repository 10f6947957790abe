"""How the rules for CheXpert's observations agree with the MeSH headings of Open-i, which people gave to the same reports.

    python -m mmclip_dist.bench.labeller NLMCXR_reports.tgz --out mmclip_dist/bench/results/labeller.md

Headings name what is there, never what is absent or in doubt: "present" of the rules is held against "has the heading". The rules
were written with the reports of even number in view; those of odd number were not read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mmclip_shards.datasets.chexpert import FINDINGS
from mmclip_shards.datasets.sections import clean_text

from mmclip_dist.bench.entities import Report, read_reports
from mmclip_dist.offline.labels import Labels, build_labeller

HEADINGS: dict[str, tuple[str, ...]] = {
    "No Finding": ("normal",),
    "Enlarged Cardiomediastinum": ("Mediastinum/prominent", "Mediastinum/enlarged", "Mediastinum/right/enlarged"),
    "Cardiomegaly": ("Cardiomegaly", "Cardiac Shadow/enlarged"),
    "Lung Opacity": ("Opacity", "Infiltrate", "Airspace Disease", "Markings/lung", "Lung Diseases, Interstitial"),
    "Lung Lesion": ("Nodule", "Mass", "Lung Neoplasms", "Opacity/lung*/round*", "Density/lung*/round*"),  # round: nodular
    "Edema": ("Pulmonary Edema", "Pulmonary Congestion", "Heart Failure"),
    "Consolidation": ("Consolidation",),
    "Pneumonia": ("Pneumonia",),
    "Atelectasis": ("Pulmonary Atelectasis",),
    "Pneumothorax": ("Pneumothorax", "Hydropneumothorax", "Hemopneumothorax"),
    "Pleural Effusion": ("Pleural Effusion", "Hydropneumothorax", "Hemothorax", "Hemopneumothorax"),
    "Pleural Other": ("Thickening/pleura", "Cicatrix/pleura", "Calcinosis/pleura", "Opacity/pleura", "Pleura"),
    "Fracture": ("Fractures, Bone",),
    "Support Devices": ("Catheters, Indwelling", "Implanted Medical Device", "Medical Device", "Tube, Inserted", "Stents"),
}  # fmt: skip
"""Observation -> the headings that mean it, up to any slash."""


@dataclass(frozen=True)
class Agreement:
    """Reports by what the rules (present or not) and the headings say. uncertain: not present by the rules, but in doubt."""

    both: int
    rules_alone: int
    headings_alone: int
    uncertain: int

    @property
    def precision(self) -> float:
        return self.both / max(self.both + self.rules_alone, 1)

    @property
    def recall(self) -> float:
        return self.both / max(self.both + self.headings_alone, 1)

    @property
    def f1(self) -> float:
        return 2 * self.both / max(2 * self.both + self.rules_alone + self.headings_alone, 1)


def packed_text(report: Report) -> str:
    """Findings and impression, as `mmclip pack openi` has them."""
    return "\n".join(clean_text(report.sections[name]) for name in ("FINDINGS", "IMPRESSION") if name in report.sections)


def has_heading(headings: Iterable[str], wanted: Sequence[str]) -> bool:
    """Whether one of the headings is one of those that are wanted, or a narrower one."""
    return any(fnmatchcase(heading, name) or heading.startswith(f"{name}/") for heading in headings for name in wanted)


def agreement(reports: Sequence[Report], labels: Sequence[Labels], observation: str) -> Agreement:
    """Rules against headings for one observation."""
    pairs = [
        (of[observation], has_heading(report.mesh, HEADINGS[observation]))
        for report, of in zip(reports, labels, strict=True)
    ]  # fmt: skip
    return Agreement(
        sum(value == 1 and heading for value, heading in pairs),
        sum(value == 1 and not heading for value, heading in pairs),
        sum(value != 1 and heading for value, heading in pairs),
        sum(value == -1 for value, _ in pairs),
    )


def table(reports: Sequence[Report], labels: Sequence[Labels]) -> Iterator[str]:
    """Markdown lines: one observation each, and the mean."""
    yield "| observation | n (headings) | n (rules) | uncertain | precision | recall | F1 |"
    yield "|---|---|---|---|---|---|---|"
    found = {name: agreement(reports, labels, name) for name in FINDINGS}
    for name, a in found.items():
        n = a.both + a.headings_alone
        yield f"| {name} | {n} | {a.both + a.rules_alone} | {a.uncertain} | {a.precision:.2f} | {a.recall:.2f} | {a.f1:.2f} |"
    mean = [sum(getattr(a, kind) for a in found.values()) / len(found) for kind in ("precision", "recall", "f1")]
    yield "| mean | | | | " + " | ".join(f"{value:.2f}" for value in mean) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("archive", type=Path, help="NLMCXR_reports.tgz of Open-i")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "labeller.md")
    options = parser.parse_args()
    reports = [report for report in read_reports(options.archive) if packed_text(report)]
    label = build_labeller()
    label([packed_text(report) for report in reports[:200]])  # the first reports fill spaCy's vocabulary
    started = time.process_time()
    labels = label([packed_text(report) for report in reports])
    rate = len(reports) / (time.process_time() - started)
    lines = [
        "# Labels from reports: agreement with the MeSH headings of Open-i",
        "",
        f"Made by `python -m mmclip_dist.bench.labeller NLMCXR_reports.tgz`: {len(reports):,} indexed reports with findings or "
        f"an impression, {rate:,.0f} reports/s of processor time. Headings name what is there, so `present` is held "
        "against `has the heading`; in doubt counts as not present. Rules were written with the reports of even number in view.",
        "",
    ]
    for title, odd in (("Reports of odd number: not read while the rules were written", 1), ("Reports of even number", 0)):
        chosen = [place for place, report in enumerate(reports) if report.number % 2 == odd]
        lines += [f"## {title} ({len(chosen):,})", "", *table([reports[p] for p in chosen], [labels[p] for p in chosen]), ""]
    options.out.write_text("\n".join([*lines, _READING]), encoding="utf-8")
    print("\n".join(lines))


_READING = """## How to read it

- The lexicon beneath was written with Open-i at hand, so only the rules on top of it are new to the reports of odd number.
- MeSH and CheXpert do not name the same things: the coders did not index `Pneumonia` where the report calls it a likely cause,
  and gave `Deformity` to a wedged vertebra, which the rules call a fracture. A round opacity or density counts as a lesion.
- De-identification took the devices' names: "a left chest XXXX with tip in the mid SVC" is an indexed catheter.
- `Enlarged Cardiomediastinum`, `Consolidation`, `Pneumothorax`, `Pneumonia`, `Pleural Other` are rare: a report is many points.
- Absent and uncertain are not measured: headings do not say them. `tests/offline/test_labels.py` has sentences for both.
"""


if __name__ == "__main__":
    main()
