"""Synthetic radiographs: the same from any slice, text true to the image, findings where their boxes and words say."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import astuple, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards.datasets import synthetic
from mmclip_shards.datasets.synthetic import FINDINGS, synthetic_records
from mmclip_shards.datasets.synthetic.drawing import draw
from mmclip_shards.datasets.synthetic.reports import write_report
from mmclip_shards.datasets.synthetic.set import _PATIENT_KEY, pack_synthetic
from mmclip_shards.datasets.synthetic.studies import Finding, Pose, Study, sample_study
from mmclip_shards.pack import pack
from mmclip_shards.schema import KEY_PATTERN, Box, Record

SIZE = 128
UPRIGHT = Pose(0.0, 1.0, 0.0, 0.0, 0.0, inspiration=0.0, gamma=1.0, gain=0.9, offset=0.0, noise=0.0)
"""The midline is the middle of the image, and nothing but the study is drawn."""

# A reader of its own: what a radiologist's words name, written down without a look at the grammar's tables.
MENTIONS = {
    "Atelectasis": r"atelectasis|volume loss",
    "Cardiomegaly": r"cardiomegaly|cardiac enlargement|(heart|silhouette) is .*enlarged|enlargement of the heart"
    r"|enlarged cardiac silhouette",
    "Consolidation": r"consolidation|airspace|patchy opacity",
    "Nodule": r"nodule|nodular",
    "Pleural Effusion": r"effusion|pleural fluid|costophrenic angle blunting|blunting of",
    "Pneumothorax": r"pneumothorax|visceral pleural line",
}
NEGATION = re.compile(r"^(no|there is no|negative for)\b|\bnot\b", re.IGNORECASE)
SEVERITY_WORDS = {
    "mild": r"mild|mildly|slightly|small|trace|minimal|subtle",
    "moderate": r"moderate|moderately|moderate-sized",
    "severe": r"severe|severely|marked|markedly|large|extensive",
}


def sentences(text: str) -> list[str]:
    bodies = re.sub(r"\b(FINDINGS|IMPRESSION|COMPARISON|TECHNIQUE|EXAMINATION):|\b\d\. ", " ", text)
    return [part.strip() for part in bodies.split(".") if part.strip()]


def mentions(text: str) -> tuple[dict[str, list[str]], set[str]]:
    """Sentences that affirm each finding, and the findings that are denied."""
    affirmed: dict[str, list[str]] = defaultdict(list)
    denied: set[str] = set()
    for sentence in sentences(text):
        for name, pattern in MENTIONS.items():
            if re.search(pattern, sentence, re.IGNORECASE):
                if NEGATION.search(sentence):
                    denied.add(name)
                else:
                    affirmed[name].append(sentence)
    return affirmed, denied


def words_of(table: dict[str, str], sentence: str) -> set[str]:
    return {key for key, words in table.items() if re.search(rf"\b({words})\b", sentence, re.IGNORECASE)}


def same(a: Record, b: Record) -> bool:
    assert isinstance(a.image, np.ndarray)
    assert isinstance(b.image, np.ndarray)
    rest = replace(a, image=b"") == replace(b, image=b"")
    return rest and a.image.dtype == b.image.dtype and np.array_equal(a.image, b.image)


def pixels(record: Record) -> np.ndarray:
    assert isinstance(record.image, np.ndarray)
    return record.image


def studies(count: int, seed: int = 0, start: int = 0) -> list[Study]:
    return [sample_study(index, seed=seed, unpaired=False) for index in range(start, start + count)]


@cache
def reports(count: int) -> list[tuple[Study, str]]:
    return [(s, write_report(s, np.random.default_rng((7, i))).text) for i, s in enumerate(studies(count))]


# ------------------------------------------------------------------------------------------------------------ records


def test_any_slice_holds_the_same_records() -> None:
    whole = list(synthetic_records(24, seed=3))
    for start, count in ((17, 7), (0, 5), (5, 12), (23, 1)):
        part = list(synthetic_records(count, seed=3, start=start))
        assert [same(a, b) for a, b in zip(part, whole[start : start + count], strict=True)] == [True] * count


def test_seed_and_pairing_change_every_image() -> None:
    first = list(synthetic_records(8, seed=3))
    for other in (synthetic_records(8, seed=4), synthetic_records(8, seed=3, unpaired=True)):
        assert not any(np.array_equal(pixels(a), pixels(b)) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("size", [64, 96, 128])
def test_record_is_well_formed(size: int) -> None:
    records = list(synthetic_records(30, seed=1, size=size))
    assert [record.key for record in records] == [f"synthetic-{i:06d}" for i in range(30)]
    for record in records:
        assert KEY_PATTERN.fullmatch(record.key)
        assert isinstance(record.image, np.ndarray)
        assert record.image.shape == (size, size)
        assert record.image.dtype == np.uint8
        assert 15 < record.image.std() < 100
        assert tuple(record.labels) == FINDINGS
        assert set(record.labels.values()) <= {0, 1}
        assert record.view in ("PA", "AP")
        assert record.findings
        assert record.impression
        assert f"FINDINGS: {record.findings}" in record.report
        assert f"IMPRESSION: {record.impression}" in record.report
        assert {box.label for box in record.boxes} == {name for name, label in record.labels.items() if label}


def test_unpaired_records_have_labels_and_no_text() -> None:
    records = list(synthetic_records(20, seed=1, unpaired=True))
    assert records[7].key == "synthetic-unpaired-000007"
    assert all(r.report == "" and r.findings is None and r.impression is None for r in records)
    assert any(any(r.labels.values()) for r in records)
    paired = {r.patient for r in synthetic_records(20, seed=1)}
    assert paired.isdisjoint(r.patient for r in records)


def test_size_changes_pixels_only() -> None:
    small, large = next(synthetic_records(1, seed=2, size=64)), next(synthetic_records(1, seed=2, size=128))
    assert (small.report, small.labels, small.patient) == (large.report, large.labels, large.patient)
    assert isinstance(small.image, np.ndarray)
    assert isinstance(large.image, np.ndarray)
    halved = large.image.reshape(64, 2, 64, 2).mean(axis=(1, 3))
    assert np.corrcoef(small.image.ravel(), halved.ravel())[0, 1] > 0.95


def test_patients_have_one_to_three_consecutive_studies_of_one_anatomy() -> None:
    all_studies = studies(600)
    names = [study.patient for study in all_studies]
    per_patient = Counter(names)
    assert set(per_patient.values()) == {1, 2, 3}
    changes = sum(a != b for a, b in pairwise(names))
    assert changes == len(per_patient) - 1
    bodies: dict[str, set[tuple[float, ...]]] = defaultdict(set)
    for study in all_studies:
        bodies[study.patient].add(astuple(study.anatomy))
    assert all(len(body) == 1 for body in bodies.values())
    assert len(set.union(*bodies.values())) == len(per_patient)


def test_prevalence() -> None:
    counts, numbers = Counter[str](), Counter[int]()
    for study in studies(4000):
        counts.update(finding.name for finding in study.findings)
        numbers[len(study.findings)] += 1
    assert set(numbers) == {0, 1, 2, 3}
    assert 0.22 < numbers[0] / 4000 < 0.28
    for name in FINDINGS[:5]:
        assert 0.24 < counts[name] / 4000 < 0.36
    assert 0.12 < counts["Pneumothorax"] / 4000 < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1, "seed": 0}, "choose a range"),
        ({"count": 2, "seed": 0, "start": 999_999}, "choose a range"),
        ({"count": 1, "seed": -1}, "seed is -1"),
        ({"count": 1, "seed": 0, "size": 8}, "size is 8"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(synthetic_records(**arguments))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ reports


def test_reader_is_not_fooled() -> None:
    affirmed, denied = mentions("FINDINGS: There is no effusion or nodule. Small pneumothorax. Heart is not enlarged.")
    assert set(affirmed) == {"Pneumothorax"}
    assert denied == {"Pleural Effusion", "Nodule", "Cardiomegaly"}


def test_text_affirms_exactly_the_findings_that_are_present() -> None:
    denials = 0
    for study, text in reports(1500):
        present = {finding.name for finding in study.findings}
        affirmed, denied = mentions(text)
        assert set(affirmed) == present, text
        assert denied.isdisjoint(present), text
        denials += len(denied)
    # Some, but not all, of the absent findings are denied.
    assert 1.0 < denials / 1500 < 4.0


def test_text_gives_side_severity_and_zone_of_each_finding() -> None:
    sides = {"left": "left", "right": "right", "bilateral": "bilateral|both"}
    zones = {"upper": "upper", "mid": "mid", "lower": "lower|base|basilar", "retrocardiac": "retrocardiac"}
    for study, text in reports(1500):
        affirmed, _ = mentions(text)
        for finding in study.findings:
            for sentence in affirmed[finding.name]:
                assert words_of(SEVERITY_WORDS, sentence) == {finding.severity}, sentence
                expected = set() if finding.side == "none" else {finding.side}
                assert words_of(sides, sentence) == expected, sentence
                if finding.name in ("Atelectasis", "Consolidation", "Nodule"):
                    assert words_of(zones, sentence) == {finding.zone}, sentence


def test_text_mentions_only_devices_that_are_there() -> None:
    patterns = {"electrodes": "leads overlie|Monitoring leads", "port": r"\bport\b", "pacemaker": "pacemaker"}
    patterns["tracheal tube"] = "endotracheal"
    for study, text in reports(1500):
        mentioned = {device for device, words in patterns.items() if re.search(words, text, re.IGNORECASE)}
        assert mentioned <= set(study.devices), text


def test_clear_lungs_are_said_only_of_clear_lungs() -> None:
    for study, text in reports(1500):
        if re.search(r"lungs are (well expanded and )?clear", text, re.IGNORECASE):
            assert {finding.name for finding in study.findings} <= {"Cardiomegaly"}


def test_reports_are_of_readable_length_and_varied() -> None:
    texts = [text for _, text in reports(1500)]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 20
    assert max(lengths) <= 90
    assert len(set(texts)) > 1450
    assert not any("  " in text or ".." in text or "{" in text for text in texts)


# ------------------------------------------------------------------------------------------------------------- images


def without(study: Study, finding: Finding) -> Study:
    return replace(study, findings=tuple(other for other in study.findings if other is not finding))


def inside(image: np.ndarray, box: Box, margin: int = 0) -> np.ndarray:
    top, left = max(int(box.y) - margin, 0), max(int(box.x) - margin, 0)
    return image[top : int(box.y + box.height) + margin, left : int(box.x + box.width) + margin]


def cases(count: int) -> list[tuple[Study, Finding]]:
    return [(study, finding) for study in studies(count, seed=11) for finding in study.findings]


def test_boxes_lie_in_the_image_and_hold_what_the_finding_changed() -> None:
    changes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for study, finding in cases(250):
        image, boxes = draw(study, SIZE)
        plain, others = draw(without(study, finding), SIZE)
        own = [box for box in boxes if box.label == finding.name]
        assert len(own) == (2 if finding.side == "bilateral" else 1)
        assert finding.name not in {box.label for box in others}
        change = np.abs(image.astype(float) - plain)
        # Seen, not guessed: all that changed lies in the boxes, but for soft rims.
        covered = np.zeros_like(change)
        for box in own:
            assert box.x >= 0
            assert box.y >= 0
            assert box.x + box.width <= SIZE
            assert box.y + box.height <= SIZE
            inside(covered, box, margin=4)[:] = 1
            changes[finding.name, finding.severity].append(float(inside(change, box).mean()))
        # A raised diaphragm also moves the abdomen below it.
        if finding.kind != "volume loss":
            assert (change * covered).sum() > 0.8 * change.sum(), (finding, own)
    assert len(changes) == 18
    for (name, severity), values in changes.items():
        assert min(values) > 1.5, (name, severity, values)
        assert np.mean(values) > 4, (name, severity)


def test_right_is_at_image_left() -> None:
    for study, finding in cases(120):
        if finding.side not in ("right", "left"):
            continue
        upright = replace(study, pose=UPRIGHT, devices=())
        image, boxes = draw(upright, SIZE)
        plain, _ = draw(without(upright, finding), SIZE)
        change = np.abs(image.astype(float) - plain)
        at_image_left = change[:, : SIZE // 2].sum()
        at_image_right = change[:, SIZE // 2 :].sum()
        assert (at_image_left > 5 * at_image_right) if finding.side == "right" else (at_image_right > 5 * at_image_left)
        (box,) = [box for box in boxes if box.label == finding.name]
        assert (box.x + box.width / 2 < SIZE / 2) == (finding.side == "right")


def test_heart_points_to_image_right() -> None:
    for study in studies(30, seed=5):
        image, _ = draw(replace(study, pose=UPRIGHT, findings=(), devices=()), SIZE)
        # A band across the heart, lung on both its sides: columns at 0.30 of half the width from the midline.
        band = image[int(0.58 * SIZE) : int(0.64 * SIZE)].astype(float).mean(axis=0)
        middle, reach = SIZE // 2, int(0.30 * SIZE / 2)
        right_of_image, left_of_image = band[middle + reach], band[middle - reach]
        assert right_of_image > left_of_image + 15


def test_heart_width_follows_severity() -> None:
    widths = defaultdict(list)
    for study, finding in cases(400):
        if finding.name == "Cardiomegaly":
            _, boxes = draw(replace(study, pose=UPRIGHT), SIZE)
            (box,) = [box for box in boxes if box.label == "Cardiomegaly"]
            lungs = 2 * (2 * study.anatomy.lung_width) * SIZE / 2
            widths[finding.severity].append(box.width / lungs)
    assert 0.52 < np.mean(widths["mild"]) < np.mean(widths["moderate"]) < np.mean(widths["severe"]) < 0.75


def test_nodule_is_visible_at_64_pixels() -> None:
    seen = 0
    for study, finding in cases(300):
        if finding.name == "Nodule" and finding.severity == "moderate":
            _, boxes = draw(replace(study, pose=UPRIGHT), 64)
            (box,) = [box for box in boxes if box.label == "Nodule"]
            assert box.width >= 5
            assert box.height >= 5
            seen += 1
    assert seen > 10


def test_pneumothorax_takes_lung_markings_away() -> None:
    """Beyond the visceral line the lung is darker."""
    seen = 0
    for study, finding in cases(200):
        if finding.name == "Pneumothorax" and finding.severity != "mild":
            image, boxes = draw(replace(study, pose=UPRIGHT, devices=(), findings=(finding,)), SIZE)
            plain, _ = draw(replace(study, pose=UPRIGHT, devices=(), findings=()), SIZE)
            (box,) = boxes
            change = inside(image.astype(float) - plain, box)
            assert (change < -4).mean() > 0.10
            # The pleural line itself is bright.
            assert (change > 4).any()
            seen += 1
    assert seen > 10


def test_a_change_of_the_drawing_code_is_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else packing again would keep the images of an older version."""

    def packed() -> str:
        return pack_synthetic(tmp_path, 3, seed=1, size=32, splits={"train": 1.0})["train"].config_hash

    assert packed() == packed()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "lesions.py"))
    with pytest.raises(ValueError, match="holds another set"):
        packed()


def test_images_are_drawn_as_they_are_packed_and_not_again_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(synthetic, "draw", lambda study, size: drawn.append(size) or draw(study, size))
    ahead = []

    def pack_to(folder: Path, stop: int = -1) -> None:
        def progress(done: int, total: int) -> None:
            ahead.append(len(drawn) - done)
            if done == stop:
                raise KeyboardInterrupt

        pack_synthetic(folder, 8, seed=1, size=32, splits={"train": 1.0}, samples_per_shard=2, progress=progress)

    pack_to(tmp_path / "whole")
    assert len(drawn) == 8 and set(ahead) == {0}
    with pytest.raises(KeyboardInterrupt):
        pack_to(tmp_path / "set", stop=5)
    drawn.clear()
    pack_to(tmp_path / "set")
    assert len(drawn) == 4
    for path in (tmp_path / "whole" / "train").iterdir():
        assert path.read_bytes() == (tmp_path / "set" / "train" / path.name).read_bytes()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_packed_are_the_records_with_their_boxes(tmp_path: Path, workers: int) -> None:
    whole = {"train": 1.0}
    pack_synthetic(tmp_path / "set", 6, seed=1, size=32, splits=whole, samples_per_shard=4, workers=workers)
    pack(
        list(synthetic_records(6, seed=1, size=32)), tmp_path / "records", dataset="synthetic", splits=whole, seed=1,
        short_side=32, samples_per_shard=4, config_hash="x", patient_key=_PATIENT_KEY,
    )  # fmt: skip
    for number in range(2):
        tars = [tmp_path / name / "train" / f"{number:06d}.tar" for name in ("set", "records")]
        assert tars[0].read_bytes() == tars[1].read_bytes()
