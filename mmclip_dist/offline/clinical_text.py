"""Entities of radiology reports: a lexicon (default) or an installed spaCy/scispaCy model, each with what the report
says of it (`context.py`).

    extract = build_extractor("lexicon")
    [[entity, ...], ...] = extract(["No effusion but a right apical pneumothorax.", ...])

Words come from scispaCy's tokeniser, short forms defined in the report from its abbreviation detector (Schwartz and
Hearst, 2003). Everything that a radiologist may want to change is in `lexicon.yaml`. Line breaks in the middle of a phrase are
ignored.

Needs the extra `nlp`; its packages are imported only where they are used, as spaCy alone takes about three seconds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mmclip_dist.offline.context import Cue, background_spans, cue_phrases, heading_pattern, longest, marks_of

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Span

LEXICON_PATH = Path(__file__).with_name("lexicon.yaml")
LEXICON_MODEL = "lexicon"
RULES_VERSION = 2
"""Part of the extractor's hash. Raise it when this file changes what is extracted: old sidecars then become stale."""

NLP_PACKAGES = ("spacy", "scispacy")
UNUSED_PIPES = ["tagger", "attribute_ruler", "lemmatizer", "parser", "senter"]
"""Parts of an installed model that entities do not need; where a sentence ends is in `context.py`."""

NEW_BLOCK = re.compile(
    r"\n[^\S\n]*\n"  # a blank line
    r"|\n(?=[^\S\n]*(?:[-*•]|\d{1,2}[.)])\s)"  # a list item
    r"|\n(?=[^\S\n]*[A-Z][A-Za-z/]*(?:[ ][A-Za-z/()]+){0,3}:)"  # a heading, or "Heart: normal."
)
FOLDED_BLANKS = re.compile(r"\s{2,}|[^\S ]")
SLASH = r"(?<=[A-Za-z])/(?=[A-Za-z])"
"""scispaCy keeps "consolidation/effusion" whole (meant for chemistry); in a report a slash separates findings."""
SLASHED_WORDS = ("w/o", "r/o", "h/o", "s/p", "c/w", "b/l")
ALTERNATIVES = re.compile(r"\(([^()]*)\)")

Extractor = Callable[[Sequence[str]], "list[list[Entity]]"]


@dataclass(frozen=True)
class Entity:
    """A span of a report: `report[start:end] == text`, in characters.

    label: FINDING, ANATOMY, LOCATION, SEVERITY or DEVICE with the lexicon; the model's own label otherwise.
    negated: the report says that it is not there, or no longer (any label, not only findings).
    uncertain: possible, or one of several.
    background: of the patient's past, or of the question that was asked, as in the section "Indication".
    At most one of the three; an entity with any of them is no evidence of the disease.
    term: the lexicon's canonical name ("opacities" -> "lung opacity"); None with an installed model.
    cui: the UMLS concept, where the model gives one.
    """

    start: int
    end: int
    text: str
    label: str
    negated: bool = False
    uncertain: bool = False
    background: bool = False
    cui: str | None = None
    term: str | None = None


def as_json(entity: Entity) -> dict[str, Any]:
    """One item of an entity sidecar: `uncertain`, `background` and `cui` only where they say something; never `term`."""
    item = asdict(entity)
    del item["term"]
    for name in ("uncertain", "background", "cui"):
        if not item[name]:
            del item[name]
    return item


def build_extractor(model: str = LEXICON_MODEL) -> Extractor:
    """Reports -> their entities, in order, never overlapping. Build once per process; it is not thread-safe.

    model: `lexicon`, or the name of an installed spaCy/scispaCy package that recognises entities.
    Raises ValueError when the extra `nlp` or the model is not installed.
    """
    require_installed(model)
    nlp = lexicon_pipeline() if model == LEXICON_MODEL else installed_pipeline(model)
    detect_abbreviations = abbreviations(nlp)
    find_cues = cue_finder(nlp)
    headings = heading_pattern(load_lexicon()["sections"])
    # Only a model's entity may hold its negation ("no effusion").
    prefixes = () if model == LEXICON_MODEL else tuple(load_lexicon()["entity_prefix"])

    def extract(reports: Sequence[str]) -> list[list[Entity]]:
        """Entities of each report, in the order of the reports."""
        flat = [flatten(report, headings) for report in reports]
        found = []
        # The zone frees new words of the vocabulary afterwards; without it a worker's memory grows with the corpus.
        with nlp.memory_zone():
            for report, (text, positions), doc in zip(reports, flat, nlp.pipe(text for text, _ in flat), strict=True):
                if "(" in text:  # a definition needs one; skipping the detector saves a sixth of the run time
                    add_short_forms(detect_abbreviations(doc))
                spans = doc.ents
                marks = marks_of([(span.start, span.end) for span in spans], find_cues(doc))
                background = background_spans(text, list(headings.finditer(text))) if ":" in text else []
                found.append([
                    entity_of(span, in_report(mark, span, background, prefixes), report, positions)
                    for span, mark in zip(spans, marks, strict=True)
                ])  # fmt: skip
        return found

    return extract


def extractor_hash(model: str = LEXICON_MODEL) -> str:
    """sha256 (hex) of everything that affects the entities: lexicon, context, rules, versions of model and packages."""
    require_installed(model)
    if model == LEXICON_MODEL:
        source = {"lexicon": hashlib.sha256(LEXICON_PATH.read_bytes()).hexdigest()}
    else:
        source = {"version": metadata.version(model)}
    configuration = {
        "model": model,
        "source": source,
        "context": [load_lexicon()[name] for name in ("context", "sections", "entity_prefix")],
        "rules": RULES_VERSION,
        "packages": {name: metadata.version(name) for name in NLP_PACKAGES},
    }
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def require_installed(model: str) -> None:
    """ValueError with the command that helps, unless the NLP packages and the model are installed."""
    missing = [name for name in NLP_PACKAGES if not is_installed(name)]
    if missing:
        raise ValueError(f"entities need {', '.join(missing)}, not installed here: run pip install 'mmclip-dist[nlp]'")
    if model != LEXICON_MODEL and not is_installed(model):
        raise ValueError(
            f"entity model {model!r} is not installed. The default, {LEXICON_MODEL!r}, needs no download. For a "
            "scispaCy model run pip install URL, with a release URL from https://allenai.github.io/scispacy (not by "
            "name: en-core-sci-md on PyPI is a placeholder); for a spaCy model python -m spacy download NAME"
        )


def is_installed(package: str) -> bool:
    """Whether a distribution of that name is installed in this environment."""
    try:
        metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: the empty name
        return False
    return True


# --- lexicon --------------------------------------------------------------------------------------------------------


@cache
def load_lexicon() -> dict[str, Any]:
    """The parsed lexicon file: `spellings`, `entities`, `context`, `sections` and `entity_prefix`."""
    return yaml.safe_load(LEXICON_PATH.read_text(encoding="utf-8"))


def surface_forms(form: str, spellings: dict[str, str]) -> set[str]:
    """All spellings of one line of the lexicon, in lower case: endings, hyphens, British forms."""
    pieces = ALTERNATIVES.split(form.lower())
    choices = [
        [piece] if index % 2 == 0 else (piece.split("/") if "/" in piece else ["", piece])
        for index, piece in enumerate(pieces)
    ]
    forms = {"".join(choice).strip() for choice in itertools.product(*choices)}
    forms |= {" ".join(spellings.get(word, word) for word in text.split()) for text in forms}
    return forms | {text.replace("-", " ") for text in forms}


def lexicon_patterns(lexicon: dict[str, Any]) -> list[dict[str, str]]:
    """Patterns of spaCy's entity ruler: one per surface form. Raises ValueError for a form that two terms claim."""
    owners: dict[str, tuple[str, str]] = {}
    for label, terms in lexicon["entities"].items():
        for term, forms in terms.items():
            for form in sorted(set().union(*(surface_forms(form, lexicon["spellings"]) for form in [term, *forms]))):
                if owners.setdefault(form, (label, term)) != (label, term):
                    raise ValueError(
                        f"{LEXICON_PATH.name}: {form!r} is a form of both {' / '.join(owners[form])} "
                        f"and {label} / {term}; keep one"
                    )
    return [{"label": label, "pattern": form, "id": term} for form, (label, term) in owners.items()]


# --- pipelines ------------------------------------------------------------------------------------------------------


def lexicon_pipeline() -> Language:
    """Blank English with scispaCy's tokeniser and the lexicon as entity ruler."""
    import spacy
    from scispacy.custom_tokenizer import combined_rule_tokenizer
    from spacy.symbols import ORTH

    nlp = spacy.blank("en")
    tokenizer = combined_rule_tokenizer(nlp)
    # spaCy's English keeps "Mass." as one token, for Massachusetts: a mass at the end of a sentence would be missed.
    tokenizer.rules = {word: rule for word, rule in tokenizer.rules.items() if word != "Mass."}
    infixes = tokenizer.infix_finditer.__self__.pattern
    tokenizer.infix_finditer = re.compile(f"{infixes}|{SLASH}").finditer
    for word in SLASHED_WORDS:
        for written in (word, word.capitalize(), word.upper()):
            tokenizer.add_special_case(written, [{ORTH: written}])
    nlp.tokenizer = tokenizer
    nlp.max_length = sys.maxsize  # spaCy's limit of a megabyte is for models that need memory by the length
    ruler: Any = nlp.add_pipe("entity_ruler", config={"phrase_matcher_attr": "LOWER"})
    ruler.add_patterns(lexicon_patterns(load_lexicon()))
    return nlp


def installed_pipeline(model: str) -> Language:
    """An installed model, without the parts that entities do not need. ValueError if it recognises no entities."""
    import spacy

    if find_spec(model) is None or not hasattr(import_module(model), "load"):
        raise ValueError(f"{model!r} is installed, but is no spaCy model; name one as spacy.load does: en_core_sci_sm")
    nlp = spacy.load(model, exclude=UNUSED_PIPES)
    if not any("doc.ents" in nlp.get_pipe_meta(pipe).assigns for pipe in nlp.pipe_names):
        raise ValueError(f"model {model!r} recognises no entities (its parts: {', '.join(nlp.pipe_names) or 'none'})")
    return nlp


def cue_finder(nlp: Language) -> Callable[[Doc], list[Cue]]:
    """Finds the lexicon's cues in a document; they share no token and come in order."""
    from spacy.matcher import PhraseMatcher

    matcher = PhraseMatcher(nlp.vocab, attr="LOWER")
    for kind, phrases in cue_phrases(load_lexicon()["context"]).items():
        matcher.add(kind, [nlp.make_doc(phrase) for phrase in phrases])
    strings = nlp.vocab.strings

    def find(doc: Doc) -> list[Cue]:
        return longest(Cue(strings[kind], start, end) for kind, start, end in matcher(doc))

    return find


def abbreviations(nlp: Language) -> Callable[[Doc], Doc]:
    """scispaCy's abbreviation detector; sets `doc._.abbreviations`."""
    from scispacy.abbreviation import AbbreviationDetector

    detector = AbbreviationDetector(nlp)
    # spaCy warns at every call of a matcher without patterns; this one has none until a definition is found.
    detector.global_matcher.add("no token", [[{"ORTH": ""}]])
    return detector


# --- one document ---------------------------------------------------------------------------------------------------


def flatten(report: str, headings: re.Pattern[str]) -> tuple[str, list[int] | None]:
    """The report with each run of white space as one character: "\\n" before a new block or a heading, else " ".

    Wrapped lines and double spaces would otherwise split "pleural\\n effusion".
    Returns the text and, per character, its offset in the report (None: nothing moved).
    """
    if not FOLDED_BLANKS.search(report):
        return break_before(headings, report), None
    block_starts = {match.start() for match in NEW_BLOCK.finditer(report)}
    pieces: list[str] = []
    positions: list[int] = []
    last = 0
    for run in FOLDED_BLANKS.finditer(report):
        start, end = run.span()
        pieces += [report[last:start], " " if block_starts.isdisjoint(range(start, end)) else "\n"]
        positions.extend(range(last, start + 1))
        last = end
    pieces.append(report[last:])
    positions.extend(range(last, len(report)))
    return break_before(headings, "".join(pieces)), positions


def break_before(headings: re.Pattern[str], text: str) -> str:
    """The text with "\n" for the space before a heading: no statement reaches from one section into the next."""
    if ":" not in text:
        return text
    for heading in headings.finditer(text):
        at = heading.start()
        text = text if at == 0 else f"{text[: at - 1]}\n{text[at:]}"
    return text


def add_short_forms(doc: Doc) -> Doc:
    """Make "RVC" an entity everywhere in a report that says "retractile visceral consolidation (RVC)".

    The short form gets label and term of the last entity in its long form, the head of an English noun phrase.
    """
    from spacy.tokens import Span

    heads = {entity.end: entity for entity in doc.ents}
    taken = {token.i for entity in doc.ents for token in entity}
    for short in sorted(doc._.abbreviations, key=lambda short: short.start):
        head = heads.get(short._.long_form.end)
        if head is not None and taken.isdisjoint(range(short.start, short.end)):
            span = Span(doc, short.start, short.end, label=head.label, kb_id=head.kb_id, span_id=head.id)
            doc.ents = [*doc.ents, span]
            taken.update(range(short.start, short.end))
    return doc


def in_report(mark: str | None, span: Span, background: list[tuple[int, int]], prefixes: tuple[str, ...]) -> str | None:
    """The mark of an entity, from that of its statement. background: sections that say nothing of the image, in characters."""
    if prefixes and span.text.lower().startswith(prefixes):
        return "negated"
    if mark != "negated" and any(start <= span.start_char < end for start, end in background):
        return "background"
    return mark


def entity_of(span: Span, mark: str | None, report: str, positions: list[int] | None) -> Entity:
    """A spaCy entity as `Entity`, with offsets of the original report."""
    start, end = span.start_char, span.end_char
    if positions is not None:
        start, end = positions[start], positions[end - 1] + 1
    return Entity(
        start=start,
        end=end,
        text=report[start:end],
        label=span.label_,
        negated=mark == "negated",
        uncertain=mark == "uncertain",
        background=mark == "background",
        cui=span.kb_id_ or None,
        term=span.ent_id_ or None,
    )
