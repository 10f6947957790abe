"""The entity extractor: hand-labelled sentences, negation, offsets, models, and agreement with synthetic labels."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from itertools import chain, pairwise, product
from pathlib import Path

import pytest

pytest.importorskip("scispacy", reason="needs the extra nlp")

from mmclip_shards.datasets.synthetic import FINDINGS, synthetic_records

from mmclip_dist.offline import clinical_text, lexicon
from mmclip_dist.offline.clinical_text import Entity, Extractor, as_json, build_extractor, extractor_hash
from mmclip_dist.offline.short_forms import short_forms
from tests.toy_model import NAME, write_package

LABELS = {"F": "FINDING", "A": "ANATOMY", "L": "LOCATION", "S": "SEVERITY", "D": "DEVICE"}
MARK = re.compile(r"\[([^|\]]+)\|([FALSD])([-?~]?)\]")

# Our own sentences, labelled by hand: [text|label], a minus for negated, ? for uncertain, ~ for background.
LABELLED = r"""
No [effusion|F-] but there is a [right|L] [apical|L] [pneumothorax|F].
No [focal|L-] [consolidation|F-], [pleural effusion|F-], or [pneumothorax|F-].
No [pneumothorax|F-] or [pleural effusion|F-].
[Lungs|A] are clear without [focal|L-] [consolidation|F-].
The [lungs|A] are clear of [effusion|F-].
There is no evidence of [pulmonary edema|F-].
Negative for [acute|S-] [fracture|F-] or [dislocation|F-].
The [pleural spaces|A] are free of [fluid collection|F-].
[Linear atelectasis|F] rather than [pneumonia|F-].
Cannot exclude a [small|S?] [pneumothorax|F?].
A [small|S?] [pneumothorax|F?] cannot be excluded.
Possible [left|L?] [lower lobe|A?] [pneumonia|F?].
[Pneumothorax|F-] is not seen.
The [left|L-] [effusion|F-] has resolved.
The [effusion|F-] has resolved and [pneumothorax|F] persists.
The [effusion|F] has not resolved.
[Pneumothorax|F-] has been excluded.
[Pleural effusion|F-] is absent.
No change in the [right|L] [effusion|F].
No interval change in [bibasilar|L] [opacities|F].
Not only [consolidation|F] but also [cavitation|F].
[Heart size|A] is normal.
The [mediastinal contours|A] are unremarkable.
[Heart size is mildly enlarged|F].
The [heart|A] is not [enlarged|F-].
[Moderate|S] [cardiomegaly|F] without [congestion|F-].
[Small|S] [bilateral|L] [pleural effusions|F] with adjacent [atelectasis|F].
[Blunting|F] of the [left|L] [costophrenic angle|A].
[Right|L] [upper lobe|A] [nodule|F] with spiculated margins.
[Ground-glass opacities|F] in [both lungs|L], [peripheral|L] and [basal|L].
[Diffuse|L] [ground glass opacification|F].
[Tension pneumothorax|F] with [mediastinal shift|F].
[Pneumothoraces|F-] are no longer seen.
Neither [consolidation|F-] nor [effusion|F-].
[Elevated hemidiaphragm|F] on the [right|L].
[Severe|S] [oedema|F] and [haemothorax|F].
[Endotracheal tube|D] tip above the [carina|A].
Interval removal of the [right|L-] [chest tube|D-] with new [pneumothorax|F].
No [acute|S-] [cardiopulmonary process|F-].
[Retrocardiac|L] [consolidation|F], [left|L] greater than [right|L].
[COVID-19 pneumonia|F] and [ARDS|F].
[Consolidation|F]/[effusion|F] at the [left|L] [base|L].
No [effusion|F-]; [cardiomegaly|F] is stable.
No [acute abnormality|F-] other than [scoliosis|F].
Dr. Stone was told of the [PTX|F].
No [nodules|F-]. [Mass|F] in the [lingula|A]. [Mass|F].
There is no [pneumothorax|F-], however [subcutaneous emphysema|F] is present.
[Hiatal hernia|F], [tortuous aorta|F] and [degenerative changes|F] of the [thoracic spine|A].
Resolution of the [left|L-] [infiltrate|F-].
Partial resolution of the [left|L] [infiltrate|F].
Without evidence for [tuberculosis|F-] or [lymphadenopathy|F-].
[Hyperinflated|F] [lungs|A] with [emphysematous changes|F].
[Effusion|F]: [small|S], unchanged.
[Mild|S] [interstitial prominence|F] w/o [pulmonary vascular congestion|F-].
[Calcified granuloma|F] in the [right|L] [hilum|A] and an old [rib fracture|F].
Can't exclude [pneumonia|F?].
[Edema|F] improved, [effusion|F-] resolved. [CHF|F] worse, [pneumothorax|F-] resolved.
[Raised|F] [left|L] [hemidiaphragm|A], possibly due to [phrenic nerve palsy|F?].
PA and lateral views of the [chest|A] show no [local recurrence|F-]. Recurrence of the [pneumothorax|F].
Nil [pneumothorax|F-]. Neg for [consol|F-].
[Subcutaneous emphysema|F] limits evaluation of the [lungs|A]. This limits evaluation for an [effusion|F?].
CT for further evaluation of the [nodule|F]. Repeat film to ensure resolution of the [opacity|F].
[Swan-Ganz catheter|D] has been withdrawn into the [main pulmonary artery|A].
[Right|L] [pleural eff|F], s/o [infection|F?].
Known case of [TB|F~]. [Fibrocavitary lesions|F] in [RUZ|A].
[Respiratory distress syndrome|F], [UVC|D] and [UAC|D].
No [mottling|F-] or [miliary mottling|F-]. [Lung hypoplasia|F], [coils|D].
"""


@pytest.fixture(scope="module")
def extract() -> Extractor:
    return build_extractor()


def read_markup(line: str) -> tuple[str, list[tuple[str, str, str]]]:
    """A line of LABELLED -> the sentence and its expected (text, label, mark)."""
    return MARK.sub(r"\1", line), [(text, LABELS[code], mark) for text, code, mark in MARK.findall(line)]


def summary(entities: list[Entity]) -> list[tuple[str, str, str]]:
    return [(e.text, e.label, "-" * e.negated + "?" * e.uncertain + "~" * e.background) for e in entities]


def findings(extract: Extractor, report: str) -> dict[str, bool]:
    """Canonical findings of one report -> negated."""
    return {str(entity.term): entity.negated for entity in extract([report])[0] if entity.label == "FINDING"}


@pytest.mark.parametrize("line", LABELLED.strip().splitlines())
def test_hand_labelled_sentence(extract: Extractor, line: str) -> None:
    sentence, expected = read_markup(line)
    assert summary(extract([sentence])[0]) == expected


def test_enough_sentences_are_labelled() -> None:
    labelled = [expected for _, expected in map(read_markup, LABELLED.strip().splitlines())]
    assert len(labelled) >= 40
    assert sum(mark == "-" for expected in labelled for _, _, mark in expected) >= 30


def test_negation_ends_with_its_sentence_also_as_one_report(extract: Extractor) -> None:
    lines = [read_markup(line) for line in LABELLED.strip().splitlines()]
    report = " ".join(sentence for sentence, _ in lines)
    assert summary(extract([report])[0]) == [entity for _, expected in lines for entity in expected]


@pytest.mark.parametrize(
    "report",
    [
        "FINDINGS:\n The heart is  enlarged.\n Small pleural\n effusion on the left\nIMPRESSION: No PTX\n\nNodule",
        "No nodule\r\n\r\n1. Large\tright pleural \n  effusion\n2. Naïve café – no mass ",
        "  \n\n No pneumothorax\n- Left pleural\u00a0effusion",
    ],
)
def test_offsets_point_into_the_report_as_it_came(extract: Extractor, report: str) -> None:
    entities = extract([report])[0]
    assert len(entities) >= 3
    for entity in entities:
        assert report[entity.start : entity.end] == entity.text
    assert all(left.end <= right.start for left, right in pairwise(entities))
    effusion = next(entity for entity in entities if entity.term == "pleural effusion")
    assert " ".join(effusion.text.split()).lower() == "pleural effusion"
    assert not effusion.negated


def test_wrapped_line_continues_a_negation_and_a_heading_ends_it(extract: Extractor) -> None:
    assert findings(extract, "No consolidation,\n effusion or\npneumothorax.") == {
        "consolidation": True,
        "pleural effusion": True,
        "pneumothorax": True,
    }
    assert findings(extract, "No consolidation\nIMPRESSION: effusion") == {
        "consolidation": True,
        "pleural effusion": False,
    }


@pytest.mark.parametrize(
    "report",
    [
        "INDICATION: Pneumonia, rule out effusion\nFINDINGS: Small effusion. No nodule.",
        "Clinical history: pneumonia. Comparison: none. Findings: Small effusion. No nodule.",
        "FINAL REPORT INDICATION: r/o pneumonia FINDINGS: Small effusion. No nodule.",
        "HISTORY:\n\n Pneumonia with fever\n\nSmall effusion. No nodule.",
        "TECHNIQUE: PA view for pneumonia\n\nSmall  effusion.\n No nodule.",
    ],
)
def test_sections_about_the_past_and_the_question_are_background(extract: Extractor, report: str) -> None:
    entities = extract([report])[0]
    background = {entity.term for entity in entities if entity.background}
    assert "pneumonia" in background
    body = entities[-3:]
    assert [(entity.term, entity.background, entity.uncertain, entity.negated) for entity in body] == [
        ("small", False, False, False), ("pleural effusion", False, False, False), ("nodule", False, False, True),
    ]  # fmt: skip
    assert all(report[entity.start : entity.end] == entity.text for entity in entities)


@pytest.mark.parametrize("report", ["NO EFFUSION. POSSIBLE PNEUMONIA.", "H/O CHF", "R/O PTX. R/o PTX."])
def test_capitals_change_no_mark(extract: Extractor, report: str) -> None:
    upper, lower = (extract([text])[0] for text in (report, report.lower()))
    assert [mark for _, _, mark in summary(upper)] == [mark for _, _, mark in summary(lower)]
    assert all(mark for _, _, mark in summary(upper))


def test_short_form_defined_in_the_report_is_an_entity(extract: Extractor) -> None:
    defined, undefined = extract(["Left basal consolidation (LBC). No LBC on the prior.", "LBC is stable."])
    short = [entity for entity in defined if entity.text == "LBC"]
    assert [(entity.label, entity.term, entity.negated) for entity in short] == [
        ("FINDING", "consolidation", False),
        ("FINDING", "consolidation", True),
    ]
    assert undefined == []


def test_batches_change_nothing_and_empty_reports_are_kept(extract: Extractor) -> None:
    reports = ["No effusion.", "", "Left effusion (LEF).", "   ", "LEF."] * 30
    assert extract(reports) == [extract([report])[0] for report in reports]
    assert extract([]) == []
    assert extract([""]) == [[]]


ODD = {
    "one statement": "pleural effusion and no pneumothorax ", "definitions": "right ventricular cardiomegaly (RVC) and ",
    "opened": "(", "brackets": "a (b) ", "signs": "!?.;,:-()[]{}", "quotes": "'\"",
    "tags": "<a", "emoji": "\U0001fac1\U0001f600", "nothing": "\0",
    "right to left": "\u202e\u05d0\u05d9\u05df \u05ea\u05e4\u05dc\u05d9\u05d8 ", "breaks": "\n",
    "headings": "INDICATION: cough. FINDINGS: ", "letters": "x",
    "different definitions": "",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.timeout(150)
def test_odd_reports_take_time_by_their_length_alone(extract: Extractor, name: str) -> None:
    """A time that grew with the square of the length, as that of scispaCy's own detector does, would be hours."""
    words = ("".join(letters) for letters in product("abcdefgh", repeat=5))
    unit = ODD[name] or " ".join(f"{word} {word[::-1]} ({word[0]}{word[-1]}) " for word in words)
    report = (unit * (300_000 // len(unit) + 1))[:300_000]
    (entities,) = extract([report])
    assert all(report[entity.start : entity.end] == entity.text for entity in entities)
    assert bool(entities) == (name in ("one statement", "definitions", "headings"))


@pytest.mark.parametrize(
    ("report", "found"),
    [
        ("<p>No <b>effusion</b>.</p><p>Cardiomegaly.</p>", [("effusion", True), ("Cardiomegaly", False)]),
        ("No effusion<br/>Pneumothorax", [("effusion", True), ("Pneumothorax", False)]),
        ("<div class='a b'>FINDINGS:</div>\n<td>Edema</td><td>no nodule</td>", [("Edema", False), ("nodule", True)]),
        ("No pleural&nbsp;effusion", [("pleural&nbsp;effusion", True)]),
        ("Nodule <5 mm and edema > before", [("Nodule", False), ("edema", False)]),
    ],
)
def test_markup_is_no_part_of_words_and_its_blocks_end_sentences(
    extract: Extractor, report: str, found: list[tuple[str, bool]]
) -> None:
    (entities,) = extract([report])
    assert [(entity.text, entity.negated) for entity in entities if entity.label == "FINDING"] == found
    assert all(report[entity.start : entity.end] == entity.text for entity in entities)


def test_an_endless_sentence_is_cut_at_blanks_so_that_a_model_can_read_it(extract: Extractor) -> None:
    """Models need memory by the length of a sentence, and spaCy refuses a megabyte to them."""
    report = "no effusion and edema " * 12_000
    pieces = clinical_text.sentences_of(report, set())
    assert len(pieces) == 3 and max(len(text) for _, text in pieces) <= clinical_text.LONGEST_SENTENCE
    assert all(report[start : start + len(text)] == text for start, text in pieces)
    assert " ".join(text for _, text in pieces) == report.strip()
    assert len(extract([report])[0]) == 24_000


def test_short_forms_are_those_of_scispacys_detector() -> None:
    from scispacy.abbreviation import AbbreviationDetector

    nlp = lexicon.blank_pipeline("en")
    detector = AbbreviationDetector(nlp)
    detector.global_matcher.add("no token", [[{"ORTH": ""}]])
    draw = random.Random(0)
    words = ["right", "lower", "lobe", "(", ")", "(RLL)", "( LLL )", "left", "RLL", "LLL", "(left lower", "lobe of it)", "((a)",
             ".", "retractile", "visceral", "consolidation (RVC)", "RVC", "(RVC)",
             "RVC (retractile visceral consolidation again )"]  # fmt: skip
    several = 0
    for _ in range(2000):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(1, 25)))
        wanted = {(short.start, short.end, short._.long_form.text) for short in detector(nlp.make_doc(text))._.abbreviations}
        found = [(short.start, short.end, long.text) for short, long in short_forms(nlp.make_doc(text))]
        assert set(found) == wanted and len(found) == len(wanted), text
        several += len(wanted) > 1
    assert several > 100


@pytest.mark.slow
def test_a_report_of_more_than_a_megabyte_is_read_to_its_end(extract: Extractor) -> None:
    report = ("x" * 200 + ". No effusion. ") * 5_000 + "Possible mass."
    entities = extract([report])[0]
    assert len(report) > 1_000_000 and len(entities) == 5_001
    assert all(entity.negated for entity in entities[:-1]) and entities[-1].uncertain


@pytest.mark.parametrize(
    "report", ["<p>Sin derrame pleural.</p>", "\x00\x01", "???", "Pulmones: sin hallazgos.", "a:b::", "No", "INDICATION:\n"]
)
def test_what_is_no_english_report_has_no_evidence_and_stops_nothing(extract: Extractor, report: str) -> None:
    assert [entity for entity in extract([report])[0] if entity.label == "FINDING"] == []


def test_as_json_leaves_unknown_concepts_out() -> None:
    entity = Entity(3, 11, "effusion", "FINDING", True, term="pleural effusion")
    assert as_json(entity) == {"start": 3, "end": 11, "text": "effusion", "label": "FINDING", "negated": True}
    known = Entity(3, 11, "effusion", "FINDING", True, cui="C0032227")
    assert as_json(known) == {**as_json(entity), "cui": "C0032227"}
    doubtful, past = Entity(0, 1, "x", "FINDING", uncertain=True), Entity(0, 1, "x", "FINDING", background=True)
    assert as_json(doubtful) == {"start": 0, "end": 1, "text": "x", "label": "FINDING", "negated": False, "uncertain": True}
    assert as_json(past) == {"start": 0, "end": 1, "text": "x", "label": "FINDING", "negated": False, "background": True}


def test_synthetic_reports_agree_with_their_labels(extract: Extractor) -> None:
    """At least 0.97 agreement for each disease: present = a finding of that canonical name, not negated."""
    records = list(synthetic_records(500, seed=7, size=32))
    drawn = {name: sum(record.labels[name] == 1 for record in records) for name in FINDINGS}
    assert drawn and min(drawn.values()) > 0.03 * len(records), drawn  # enough of each that never finding one is noticed
    agreed: Counter[str] = Counter()
    for record, entities in zip(records, extract([record.report for record in records]), strict=True):
        present = {entity.term for entity in entities if entity.label == "FINDING" and not entity.negated}
        agreed.update(name for name in FINDINGS if (name.lower() in present) == bool(record.labels[name]))
    assert {name: agreed[name] for name in FINDINGS if agreed[name] < 0.97 * len(records)} == {}


def test_a_sentence_that_comes_again_is_known_and_lies_where_it_is(extract: Extractor) -> None:
    reports = ["No effusion. There is a mass. No effusion.", "There is a mass. No effusion.", "Mass, no nodule."]
    for again in (False, True):
        found = extract(reports) if not again else extract(reports[::-1])[::-1]
        for report, entities in zip(reports, found, strict=True):
            assert [report[entity.start : entity.end] for entity in entities] == [entity.text for entity in entities]
        assert [summary(entities) for entities in found] == [
            [("effusion", "FINDING", "-"), ("mass", "FINDING", ""), ("effusion", "FINDING", "-")],
            [("mass", "FINDING", ""), ("effusion", "FINDING", "-")],
            [("Mass", "FINDING", ""), ("nodule", "FINDING", "-")],
        ]
    assert summary(extract(["No mass as in Prof. Stone's nodule."])[0])[-1] == ("nodule", "FINDING", "-")


@pytest.mark.parametrize(
    ("language", "report", "found"),
    [
        ("en", "NO EFFUSION.CARDIOMEGALY.", [("EFFUSION", "-"), ("CARDIOMEGALY", "")]),
        ("en", "no effusion.cardiomegaly;no edema", [("effusion", "-"), ("cardiomegaly", ""), ("edema", "-")]),
        ("es", "Sin derrame.cardiomegalia.", [("derrame", "-"), ("cardiomegalia", "")]),
        ("es", "Cardiomegalia.no derrame", [("Cardiomegalia", ""), ("derrame", "-")]),
    ],
)
def test_a_sentence_ends_also_without_a_blank(language: str, report: str, found: list[tuple[str, str]]) -> None:
    (entities,) = build_extractor(language=language)([report])
    assert [(text, mark) for text, _, mark in summary(entities)] == found


def test_sentences_read_at_once_say_nothing_of_each_other() -> None:
    """All new sentences of a batch are one document to spaCy."""
    reports = ["There is no", " effusion", "\n\n No nodule <br>Edema", "c/w", "possible", "\tmass", "history of", "Scar"]
    together = build_extractor()(reports)
    assert [summary(entities) for entities in together if entities] == [
        [("effusion", "FINDING", "")],
        [("nodule", "FINDING", "-"), ("Edema", "FINDING", "")],
        [("mass", "FINDING", "")],
        [("Scar", "FINDING", "")],
    ]
    extract = build_extractor()
    assert together == [extract([report])[0] for report in reports]
    assert all(report[e.start : e.end] == e.text for report, entities in zip(reports, together, strict=True) for e in entities)


def test_known_sentences_and_words_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(clinical_text, "KNOWN_SENTENCES", 50)
    monkeypatch.setattr(clinical_text, "KNOWN_WORDS", 0)
    extract = build_extractor()

    def held(first: int) -> int:
        """Bytes after 2,000 sentences of new words."""
        for start in range(first, first + 2000, 200):
            extract([f"Effusion of patient word{number}." for number in range(start, start + 200)])
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    before = held(0)
    after = max(map(held, (2000, 4000, 6000)))
    tracemalloc.stop()
    assert after - before < 1_000_000, "6,000 kept sentences take about 3 MB; a table that doubles, half of one"


# --- lexicon ----------------------------------------------------------------------------------------------------


def test_surface_forms_of_a_lexicon_line() -> None:
    spell = {"edema": "oedema"}
    assert lexicon.surface_forms("opacit(y/ies)", {}) == {"opacity", "opacities"}
    assert lexicon.surface_forms("(lung )nodule(s)", {}) == {"nodule", "nodules", "lung nodule", "lung nodules"}
    assert lexicon.surface_forms("Ground-glass edema", spell) == {
        "ground-glass edema",
        "ground glass edema",
        "ground-glass oedema",
        "ground glass oedema",
    }


def test_form_of_two_terms_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"spellings": {}, "entities": {"FINDING": {"nodule": ["mass"], "mass": []}}}
    monkeypatch.setattr(lexicon, "load_lexicon", lambda language: words)
    with pytest.raises(ValueError, match=r"lexicon.yaml: 'mass' is a form of both FINDING / nodule and FINDING / mass"):
        lexicon.term_forms("en")


def test_phrase_of_two_kinds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"spellings": {}, "context": {"negated": {"preceding": ["no( sign of)"]}, "pseudo": ["No sign of"]}}
    monkeypatch.setattr(lexicon, "load_lexicon", lambda language: words)
    with pytest.raises(ValueError, match=r"lexicon.yaml: 'no sign of' is a phrase of both negated preceding and pseudo"):
        lexicon.cue_forms("en")


def test_what_the_patient_tells_is_background_unless_denied(extract: Extractor) -> None:
    found = summary(extract(["Dyspnea and a nodule. Possible fever. Denies cough."])[0])
    assert found == [("Dyspnea", "FINDING", "~"), ("nodule", "FINDING", ""), ("fever", "FINDING", "~"), ("cough", "FINDING", "-")]


def test_phrases_of_the_context_have_one_meaning() -> None:
    forms = lexicon.cue_forms("en")  # a phrase of two kinds is refused there
    assert len(set(chain(*forms.values()))) == sum(map(len, forms.values())) > 1000
    assert "has now resolved" in forms["negated following"] and "." in forms["sentence end"]


def test_every_form_is_found_alone_and_before_punctuation(extract: Extractor) -> None:
    """Exceptions of the tokeniser ("Mass." is Massachusetts) would hide a form."""
    known = lexicon.term_forms("en")
    assert not any(extract(known.pop((lexicon.NO_ENTITY, "no entity"))))
    forms = [(form, term) for (_, term), forms in known.items() for form in forms]
    for ending in (".", ")"):
        found = extract([form.capitalize() + ending for form, _ in forms])
        lost = [
            form
            for (form, term), entities in zip(forms, found, strict=True)
            if [(entity.text.lower(), entity.term) for entity in entities] != [(form, term)]
        ]
        assert lost == [], f"before {ending!r}"


# --- models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def toy_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package of a model whose entities hold their negation, as noun phrases do."""
    write_package(tmp_path, ("no effusion", "nodule", "mass"))
    monkeypatch.syspath_prepend(str(tmp_path))
    return NAME


def test_installed_model_gets_the_same_negation(toy_model: str) -> None:
    extract = build_extractor(toy_model)
    entities = extract(["No effusion but a nodule. Mass is not seen."])[0]
    assert summary(entities) == [("No effusion", "ENTITY", "-"), ("nodule", "ENTITY", ""), ("Mass", "ENTITY", "-")]
    assert [entity.term for entity in entities] == [None, None, None]
    assert extractor_hash(toy_model) != extractor_hash()


@pytest.mark.parametrize("name", ["en_core_sci_nonexistent", ""])
def test_unknown_model_says_what_to_do(name: str) -> None:
    for function in (build_extractor, extractor_hash):
        with pytest.raises(ValueError, match=r"not installed.*'lexicon'.*pip install"):
            function(name)


def test_installed_package_that_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="'pytest' is installed, but is no spaCy model"):
        build_extractor("pytest")


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clinical_text, "is_installed", lambda package: package != "scispacy")
    with pytest.raises(ValueError, match=r"scispacy.*pip install 'mmclip-dist\[nlp\]'"):
        build_extractor()


def test_hash_is_the_same_in_another_process_and_follows_the_lexicon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = "from mmclip_dist.offline.clinical_text import extractor_hash; print(extractor_hash())"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    before = extractor_hash()
    assert other.stdout.strip() == before
    assert re.fullmatch(r"[0-9a-f]{64}", before)

    edited = tmp_path / "lexicon.yaml"
    edited.write_bytes(lexicon.LEXICONS["en"].read_bytes() + b"# one word more\n")
    monkeypatch.setitem(lexicon.LEXICONS, "en", edited)
    assert extractor_hash() != before


def test_import_needs_no_nlp_package() -> None:
    command = "import sys, mmclip_dist.offline.clinical_text; print('spacy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_change_of_the_rules_makes_old_entities_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    before = clinical_text.extractor_hash()
    monkeypatch.setattr(clinical_text, "RULES_VERSION", clinical_text.RULES_VERSION + 1)
    assert clinical_text.extractor_hash() != before
