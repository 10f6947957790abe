"""How far the Spanish lexicon can be trusted: against sentences labelled by hand, and PadChest's own labels.

    python -m mmclip_dist.bench.entities_padchest --gold tests/offline/gold_entities_es.yaml --table PADCHEST.csv.gz

--table: PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz, as it comes with PadChest and inside the wheel `torchxrayvision`
1.5.7. Only the 26,412 reports that physicians labelled count, not those that PadChest's network did. Words were changed
after a look at one half of them; of the other, `held out`, only counts were looked at.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import hashlib
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from mmclip_shards.datasets.padchest import read_list

from mmclip_dist.bench.entities import Agreement, gold_table, mark_of
from mmclip_dist.offline.clinical_text import Extractor, build_extractor

MAIN_FINDINGS: dict[str, tuple[set[str], set[str]]] = {
    "COPD": ({"COPD signs"}, {"COPD"}),
    "cardiomegaly": ({"cardiomegaly"}, {"cardiomegaly"}),
    "aortic elongation": ({"aortic elongation", "descendent aortic elongation", "supra aortic elongation"},
                          {"aortic tortuosity"}),
    "aortic atheromatosis": ({"aortic atheromatosis"}, {"atherosclerosis"}),
    "scoliosis": ({"scoliosis"}, {"scoliosis"}),
    "kyphosis": ({"kyphosis"}, {"kyphosis"}),
    "degenerative change": ({"vertebral degenerative changes", "axial hyperostosis", "non axial articular degenerative changes"},
                            {"degenerative change"}),
    "interstitial pattern": ({"interstitial pattern", "reticular interstitial pattern", "reticulonodular interstitial pattern",
                              "bronchovascular markings"}, {"interstitial opacity", "bronchitis"}),
    "alveolar pattern, infiltrate or consolidation": ({"alveolar pattern", "infiltrates", "consolidation"},
                                                      {"alveolar pattern", "infiltration", "consolidation"}),
    "pneumonia": ({"pneumonia", "atypical pneumonia"}, {"pneumonia", "infection"}),
    "pleural effusion": ({"pleural effusion", "loculated pleural effusion"}, {"pleural effusion"}),
    "costophrenic blunting": ({"costophrenic angle blunting"}, {"costophrenic blunting"}),
    "pleural thickening": ({"apical pleural thickening", "pleural thickening", "calcified pleural thickening",
                            "minor fissure thickening", "fissure thickening"}, {"pleural thickening"}),
    "air trapping": ({"air trapping"}, {"air trapping"}),
    "atelectasis or volume loss": ({"laminar atelectasis", "atelectasis", "lobar atelectasis", "total atelectasis",
                                    "round atelectasis", "volume loss"}, {"atelectasis"}),
    "hilar congestion": ({"hilar congestion"}, {"congestion"}),
    "heart failure": ({"heart insufficiency"}, {"heart failure"}),
    "diaphragm elevation": ({"hemidiaphragm elevation", "diaphragmatic eventration"}, {"diaphragm elevation"}),
    "hiatal hernia": ({"hiatal hernia"}, {"hernia"}),
    "bronchiectasis": ({"bronchiectasis"}, {"bronchiectasis"}),
    "emphysema": ({"emphysema"}, {"emphysema"}),
    "granuloma": ({"granuloma", "calcified granuloma"}, {"granuloma"}),
    "nodule": ({"nodule", "multiple nodules"}, {"nodule"}),
    "mass": ({"pulmonary mass", "mediastinal mass"}, {"mass"}),
    "fracture": ({"callus rib fracture", "rib fracture", "vertebral fracture", "humeral fracture", "clavicle fracture",
                  "vertebral compression", "vertebral anterior compression", "fracture"}, {"fracture"}),
    "pneumothorax": ({"pneumothorax", "hydropneumothorax"}, {"pneumothorax"}),
    "pulmonary edema": ({"pulmonary edema"}, {"edema"}),
    "pacemaker": ({"pacemaker", "dual chamber device", "single chamber device", "dai"}, {"pacemaker"}),
    "enteric tube": ({"NSG tube"}, {"enteric tube"}),
    "endotracheal tube": ({"endotracheal tube"}, {"endotracheal tube"}),
}  # fmt: skip
"""Name -> labels of PadChest, terms of the lexicon that say the same."""


class Report(NamedTuple):
    """A labelled report. held_out: not looked at when the words were chosen."""

    text: str
    labels: set[str]
    held_out: bool


def read_reports(table: Path) -> Iterator[Report]:
    """The reports that physicians labelled, each once; `exclude` and `suboptimal study` are left out."""
    csv.field_size_limit(1 << 24)
    seen = set()
    with gzip.open(table, "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            labels = read_list(row["Labels"])
            if row["MethodLabel"] != "Physician" or row["ReportID"] in seen or labels & {"exclude", "suboptimal study"}:
                continue
            seen.add(row["ReportID"])
            # By text: equal reports are in one half. Sentences may be in both.
            half = hashlib.sha256(row["Report"].encode()).digest()[0] % 2 == 0
            yield Report(row["Report"], labels, half)


def agreement_table(extract: Extractor, reports: list[Report]) -> list[str]:
    """Rows of a Markdown table: every main finding, and all of them together by what counts as found."""
    each = {name: Agreement() for name in MAIN_FINDINGS}
    totals = {"**all, stated**": Agreement(), "all, stated or uncertain": Agreement()}
    for report, entities in zip(reports, extract([report.text for report in reports]), strict=True):
        by_mark = {mark: {e.term for e in entities if mark_of(e) == mark} for mark in ("stated", "uncertain")}
        for name, (labels, terms) in MAIN_FINDINGS.items():
            named, stated = bool(labels & report.labels), bool(terms & by_mark["stated"])
            each[name].add(named, stated)
            totals["**all, stated**"].add(named, stated)
            totals["all, stated or uncertain"].add(named, stated or bool(terms & by_mark["uncertain"]))
    head = ["| finding | labelled | found | recall | precision |", "|---|---|---|---|---|"]
    return head + [agreement.row(name) for name, agreement in (totals | each).items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--gold", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    arguments = parser.parse_args()
    extract = build_extractor(language="es")
    rows, failures = gold_table(extract, arguments.gold)
    reports = list(read_reports(arguments.table))
    halves = {"held out": [report for report in reports if report.held_out]}
    halves["tuned"] = [report for report in reports if not report.held_out]
    extract([reports[0].text])
    started = time.process_time()
    tables = {name: agreement_table(extract, half) for name, half in halves.items()}
    rate = len(reports) / (time.process_time() - started)
    versions = ", ".join(f"{name} {version(name)}" for name in ("spacy", "snowballstemmer"))
    lines = [
        "# Spanish entities", "",
        f"`python -m mmclip_dist.bench.entities_padchest --gold {arguments.gold} --table {arguments.table.name}`, "
        f"{datetime.datetime.now(datetime.UTC).date()}, one process, Python {platform.python_version()}, {versions}.", "",
        "## Sentences labelled by hand", "",
        "F1 by exact span and label; negation (negated or not) and all four marks over the entities found.", "", *rows, "",
        "What `tuned` still has wrong:", "", *([f"- {failure}" for failure in failures] or ["- nothing"]), "",
    ]  # fmt: skip
    for name, table in tables.items():
        lines += [f"## {len(halves[name]):,} PadChest reports against their physicians' labels, {name}", "", *table, ""]
    print("\n".join([*lines, f"Speed: {rate:,.0f} reports/s of processor time, the tables included."]))


if __name__ == "__main__":
    main()
