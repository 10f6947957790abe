"""Write a radiology report for a synthetic `Study`: present findings with side and severity, absent ones only in negations.

The wording is drawn from small grammars. Each finding gets one affirmative sentence. A sentence that starts with a negation
names only absent findings, so a rule-based reader can tell the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmclip_shards.datasets.synthetic.studies import FINDINGS, Finding, Severity, Study, Zone

Choose = Callable[[Sequence[str]], str]

SIZE_WORDS: dict[Severity, tuple[str, ...]] = {
    "mild": ("small", "small", "trace", "minimal"),
    "moderate": ("moderate", "moderate-sized"),
    "severe": ("large", "large", "extensive"),
}
"""For findings with a volume: fluid, air, a nodule. Each word belongs to the same severity in every table."""
DEGREE_WORDS: dict[Severity, tuple[str, ...]] = {
    "mild": ("mild", "mild", "subtle", "minimal"),
    "moderate": ("moderate",),
    "severe": ("severe", "marked", "extensive"),
}
HEART_WORDS: dict[Severity, tuple[str, ...]] = {
    "mild": ("mild", "borderline to mild"),
    "moderate": ("moderate",),
    "severe": ("severe", "marked"),
}
HEART_ADVERBS: dict[Severity, tuple[str, ...]] = {
    "mild": ("mildly", "slightly"),
    "moderate": ("moderately",),
    "severe": ("severely", "markedly"),
}
ZONE_WORDS: dict[Zone, tuple[str, ...]] = {
    "upper": ("upper zone", "upper lung zone", "upper lung"),
    "mid": ("mid zone", "mid lung zone", "mid lung"),
    "lower": ("lower zone", "lung base", "lower lung"),
}

ABSENT: dict[str, tuple[str, ...]] = {
    "Atelectasis": ("atelectasis", "volume loss"),
    "Cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "Consolidation": ("consolidation", "focal consolidation", "airspace disease", "airspace opacity"),
    "Nodule": ("pulmonary nodule", "nodule", "focal nodule"),
    "Pleural Effusion": ("pleural effusion", "effusion", "pleural fluid"),
    "Pneumothorax": ("pneumothorax",),
}
NORMAL_HEART = (
    "Heart size is normal.",
    "The cardiac silhouette is normal in size.",
    "Cardiac size is within normal limits.",
    "The heart is not enlarged.",
)
NORMAL_ANATOMY = (
    "The mediastinal contours are unremarkable.",
    "The trachea is midline.",
    "The visualized osseous structures are intact.",
    "No acute bony abnormality.",
    "The hila are unremarkable.",
    "The pulmonary vasculature is within normal limits.",
    "The upper abdomen is unremarkable.",
    "The aortic contour is normal.",
)
CLEAR_LUNGS = ("The lungs are clear.", "Both lungs are clear.", "Lungs are well expanded and clear.")
NORMAL_IMPRESSION = (
    "No acute cardiopulmonary abnormality.",
    "No acute cardiopulmonary process.",
    "Normal chest radiograph.",
    "No radiographic evidence of acute disease.",
    "Unremarkable examination of the chest.",
)
DEVICE_SENTENCES = {
    "electrodes": ("ECG leads overlie the chest.", "Monitoring leads project over the thorax."),
    "port": ("A chest port is in place with its tip over the superior vena cava.", "Port catheter is noted."),
    "tracheal tube": ("An endotracheal tube is in place.", "The endotracheal tube ends above the carina."),
    "pacemaker": ("A left chest wall pacemaker is present.", "Pacemaker with leads in expected position."),
}
TECHNIQUE = (
    "{view} view of the chest was obtained.",
    "Single {view} view of the chest.",
    "TECHNIQUE: Frontal {view} radiograph of the chest.",
    "EXAMINATION: Chest radiograph, {view}.",
)
FIRST_VISIT = ("COMPARISON: None.", "COMPARISON: None available.")
LATER_VISIT = ("COMPARISON: Prior chest radiograph.", "COMPARISON: Previous study.")
FEWEST_WORDS, MOST_WORDS = 18, 76
"""Words of the two bodies. Headings, technique and comparison add up to 14, so a report has 20 to 90 words."""


@dataclass(frozen=True)
class Report:
    """A report's full text, and the bodies of its two sections, which are substrings of it."""

    text: str
    findings: str
    impression: str


def write_report(study: Study, rng: np.random.Generator) -> Report:
    """A report of 20 to 90 words. The study decides its content, `rng` only its wording."""

    def choose(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    body = [_describe(finding, choose) for finding in study.findings]
    impression = _impression(study, choose, rng)
    anatomy = [NORMAL_ANATOMY[i] for i in rng.permutation(len(NORMAL_ANATOMY))]
    wanted = int(rng.integers(1, 4))
    extra = [choose(DEVICE_SENTENCES[device]) for device in study.devices]
    extra += _absent_sentences(study, choose, rng) + anatomy[:wanted]
    words = _count_words([*body, impression])
    for sentence in extra:
        if words + _count_words([sentence]) <= MOST_WORDS:
            body.append(sentence)
            words += _count_words([sentence])
    for sentence in anatomy[wanted:]:
        if words < FEWEST_WORDS:
            body.append(sentence)
            words += _count_words([sentence])
    # The order of sentences differs from report to report, as it does between radiologists.
    findings = " ".join(body[i] for i in rng.permutation(len(body)))
    opening = []
    if rng.random() < 0.35:
        opening.append(choose(TECHNIQUE).format(view=study.view))
    if rng.random() < 0.35:
        opening.append(choose(LATER_VISIT if study.visit else FIRST_VISIT))
    sections = [f"FINDINGS: {findings}", f"IMPRESSION: {impression}"]
    if rng.random() < 0.08:
        sections.reverse()
    return Report(" ".join(opening + sections), findings, impression)


def _count_words(sentences: Sequence[str]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)


# -------------------------------------------------------------------------------------------------- what is present


def _describe(finding: Finding, choose: Choose) -> str:
    """One affirmative sentence for the findings section."""
    return _sentence(DESCRIBERS[finding.name](finding, choose))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _noun_phrase(finding: Finding, phrase: str, choose: Choose) -> str:
    """A sentence around the finding, such as "there is a small right effusion"."""
    plural = finding.side == "bilateral"
    article = "" if plural else "an " if phrase[0] in "aeiou" else "a "
    verb = "are" if plural else "is"
    frames = (f"there {verb} {article}{phrase}", f"{article}{phrase} {verb} present", f"{article}{phrase} {verb} seen")
    return choose((*frames, phrase))


def _atelectasis(finding: Finding, choose: Choose) -> str:
    degree, place = choose(DEGREE_WORDS[finding.severity]), _place(finding, choose)
    if finding.kind == "volume loss":
        return choose(
            (
                f"{degree} atelectasis at the {finding.side} base with elevation of the {finding.side} hemidiaphragm",
                f"{degree} volume loss at the {finding.side} base, the {finding.side} hemidiaphragm is elevated",
                f"elevated {finding.side} hemidiaphragm with {degree} basilar atelectasis",
            )
        )
    return choose(
        (
            f"{degree} linear atelectasis in the {place}",
            f"{degree} plate-like atelectasis in the {place}",
            f"there is {degree} discoid atelectasis in the {place}",
            f"{degree} band-like opacity in the {place}, consistent with atelectasis",
            f"{degree} subsegmental atelectasis is seen in the {place}",
        )
    )


def _cardiomegaly(finding: Finding, choose: Choose) -> str:
    degree, adverb = choose(HEART_WORDS[finding.severity]), choose(HEART_ADVERBS[finding.severity])
    return choose(
        (
            f"the heart is {adverb} enlarged",
            f"the cardiac silhouette is {adverb} enlarged",
            f"{adverb} enlarged cardiac silhouette",
            f"there is {degree} cardiomegaly",
            f"{degree} enlargement of the heart",
            f"{degree} cardiomegaly is present",
        )
    )


def _consolidation(finding: Finding, choose: Choose) -> str:
    degree = choose(DEGREE_WORDS[finding.severity])
    place = _place(finding, choose)
    noun = choose(("consolidation", "airspace disease", "airspace opacity", "patchy opacity", "patchy consolidation"))
    if finding.zone == "retrocardiac":
        place = "left retrocardiac region"
        return choose((f"{degree} left retrocardiac {noun}", f"there is {degree} {noun} in the {place}"))
    return choose(
        (
            f"there is {degree} {noun} in the {place}",
            f"{degree} {noun} in the {place}",
            f"{degree} {noun} is seen in the {place}",
            f"the {place} shows {degree} {noun}",
        )
    )


def _nodule(finding: Finding, choose: Choose) -> str:
    size = choose(SIZE_WORDS[finding.severity][:2])
    noun = choose(("nodule", "nodule", "pulmonary nodule", "round nodular opacity", "lung nodule"))
    place = _place(finding, choose)
    return choose(
        (
            f"a {size} {noun} is seen in the {place}",
            f"a {size} {noun} projects over the {place}",
            f"there is a {size} {noun} in the {place}",
            f"{size} {noun} in the {place}",
        )
    )


def _effusion(finding: Finding, choose: Choose) -> str:
    plural = finding.side == "bilateral"
    size = choose(SIZE_WORDS[finding.severity])
    noun = choose(("pleural effusion", "effusion", "pleural effusion")) + ("s" if plural else "")
    options = [_noun_phrase(finding, f"{size} {finding.side} {noun}", choose)] * 2
    if not plural:
        options.append(_noun_phrase(finding, f"{size} {finding.side}-sided {noun}", choose))
    if finding.severity == "mild":
        angles = "both costophrenic angles" if plural else f"the {finding.side} costophrenic angle"
        which = "bilateral" if plural else finding.side
        options.append(f"blunting of {angles}, consistent with {size} {which} {noun}")
        options.append(f"{size} {which} {noun} with costophrenic angle blunting")
    else:
        base = "bilateral basilar" if plural else f"{finding.side} basilar"
        options.append(f"{size} {finding.side} {noun} layering at the {'bases' if plural else 'base'}")
        options.append(f"{base} opacity with a meniscus, compatible with {size} {noun}")
    return choose(options)


def _pneumothorax(finding: Finding, choose: Choose) -> str:
    size, side = choose(SIZE_WORDS[finding.severity]), finding.side
    return choose(
        (
            _noun_phrase(finding, f"{size} {side} pneumothorax", choose),
            _noun_phrase(finding, f"{size} {side} apical pneumothorax", choose),
            f"{size} {side}-sided pneumothorax with a visible visceral pleural line",
            f"visceral pleural line at the {side} apex, compatible with a {size} {side} pneumothorax",
        )
    )


DESCRIBERS: dict[str, Callable[[Finding, Choose], str]] = {
    "Atelectasis": _atelectasis,
    "Cardiomegaly": _cardiomegaly,
    "Consolidation": _consolidation,
    "Nodule": _nodule,
    "Pleural Effusion": _effusion,
    "Pneumothorax": _pneumothorax,
}


def _place(finding: Finding, choose: Choose) -> str:
    """Side and zone, such as "right upper zone"."""
    return f"{finding.side} {choose(ZONE_WORDS.get(finding.zone, ('lung',)))}"


# --------------------------------------------------------------------------------------------------- what is absent


def _absent_sentences(study: Study, choose: Choose, rng: np.random.Generator) -> list[str]:
    """Negations of some absent findings, one to three per sentence, and sentences on normal heart and lungs where true."""
    present = {finding.name for finding in study.findings}
    sentences = []
    absent = [name for name in FINDINGS if name not in present and rng.random() < 0.6]
    if "Cardiomegaly" in absent and rng.random() < 0.75:
        absent.remove("Cardiomegaly")
        sentences.append(choose(NORMAL_HEART))
    if not present - {"Cardiomegaly"} and rng.random() < 0.6:
        sentences.append(choose(CLEAR_LUNGS))
    names = [choose(ABSENT[absent[i]]) for i in rng.permutation(len(absent))]
    while names:
        count = int(rng.integers(1, 4))
        sentences.append(_negate(names[:count], choose))
        names = names[count:]
    return sentences


def _negate(names: Sequence[str], choose: Choose) -> str:
    """One negation for all names, such as "No pneumothorax or pleural effusion."."""
    *head, last = names
    listed = f"{', '.join(head)} or {last}" if head else last
    frames = (
        f"No {listed}.",
        f"There is no {listed}.",
        f"No evidence of {listed}.",
        f"No {listed} is seen.",
        f"No {listed} identified.",
        f"Negative for {listed}.",
    )
    return choose(frames)


# ------------------------------------------------------------------------------------------------------- impression


def _impression(study: Study, choose: Choose, rng: np.random.Generator) -> str:
    """A short line for each finding, sometimes numbered, or one that says all is normal."""
    if not study.findings:
        return choose(NORMAL_IMPRESSION)
    lines = [_summary(study.findings[i], choose) for i in rng.permutation(len(study.findings))]
    if len(lines) > 1 and rng.random() < 0.4:
        return " ".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
    return " ".join(lines)


def _summary(finding: Finding, choose: Choose) -> str:
    """The finding under its plainest name, such as "Small left pleural effusion."."""
    name = finding.name.lower()
    if name == "cardiomegaly":
        return _sentence(f"{choose(HEART_WORDS[finding.severity])} cardiomegaly")
    if name == "nodule":
        return _sentence(f"{choose(SIZE_WORDS[finding.severity][:2])} nodule in the {_place(finding, choose)}")
    if name in ("pleural effusion", "pneumothorax"):
        plural = "s" if finding.side == "bilateral" else ""
        return _sentence(f"{choose(SIZE_WORDS[finding.severity])} {finding.side} {name}{plural}")
    degree = choose(DEGREE_WORDS[finding.severity])
    if finding.zone == "retrocardiac":
        return _sentence(f"{degree} left retrocardiac {name}")
    basilar = (f"{degree} {finding.side} basilar {name}",) if finding.zone == "lower" else ()
    return _sentence(choose((f"{degree} {finding.side} {finding.zone} lung {name}", *basilar)))
