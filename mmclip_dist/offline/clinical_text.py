"""Entities of radiology reports: a lexicon (default) or an installed spaCy/scispaCy model, with negation on top.

    extract = build_extractor("lexicon")
    [[entity, ...], ...] = extract(["No effusion but a right apical pneumothorax.", ...])

Words come from scispaCy's tokeniser, short forms defined in the report from its abbreviation detector (Schwartz and
Hearst, 2003), negation from NegEx (Chapman et al., 2001) through negspacy. Everything that a radiologist may want to
change is in `lexicon.yaml`. Line breaks in the middle of a phrase are ignored.

Needs the extra `nlp`; its packages are imported only where they are used, as spaCy alone takes about three seconds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Span

LEXICON_PATH = Path(__file__).with_name("lexicon.yaml")
LEXICON_MODEL = "lexicon"
RULES_VERSION = 1
"""Part of the extractor's hash. Raise it when this file changes what is extracted: old sidecars then become stale."""

NLP_PACKAGES = ("spacy", "scispacy", "negspacy")
SENTENCE_ENDS = [".", "!", "?", ";", "\n"]
UNUSED_PIPES = ["tagger", "attribute_ruler", "lemmatizer", "parser", "senter"]
"""Parts of an installed model that entities do not need; its sentence splitter is replaced by ours."""

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

Match = tuple[int, int, int]
Extractor = Callable[[Sequence[str]], "list[list[Entity]]"]


@dataclass(frozen=True)
class Entity:
    """A span of a report: `report[start:end] == text`, in characters.

    label: FINDING, ANATOMY, LOCATION, SEVERITY or DEVICE with the lexicon; the model's own label otherwise.
    negated: within the scope of a negation, so no evidence of the disease (any label, not only findings).
    term: the lexicon's canonical name ("opacities" -> "lung opacity"); None with an installed model.
    cui: the UMLS concept, where the model gives one.
    """

    start: int
    end: int
    text: str
    label: str
    negated: bool
    cui: str | None = None
    term: str | None = None


def as_json(entity: Entity) -> dict[str, Any]:
    """One item of an entity sidecar: `cui` only if known; `term` is not part of the format."""
    item = asdict(entity)
    del item["term"]
    if entity.cui is None:
        del item["cui"]
    return item


def build_extractor(model: str = LEXICON_MODEL) -> Extractor:
    """Reports -> their entities, in order, never overlapping. Build once per process; it is not thread-safe.

    model: `lexicon`, or the name of an installed spaCy/scispaCy package that recognises entities.
    Raises ValueError when the extra `nlp` or the model is not installed.
    """
    require_installed(model)
    nlp = lexicon_pipeline() if model == LEXICON_MODEL else installed_pipeline(model)
    detect_abbreviations = abbreviations(nlp)
    # Only a model's entity may hold its negation ("no effusion").
    negate = negation(nlp, entity_prefixes=model != LEXICON_MODEL)

    def extract(reports: Sequence[str]) -> list[list[Entity]]:
        """Entities of each report, in the order of the reports."""
        flat = [flatten(report) for report in reports]
        found = []
        # The zone frees new words of the vocabulary afterwards; without it a worker's memory grows with the corpus.
        with nlp.memory_zone():
            for report, (text, positions), doc in zip(reports, flat, nlp.pipe(text for text, _ in flat), strict=True):
                if "(" in text:  # a definition needs one; skipping the detector saves a sixth of the run time
                    add_short_forms(detect_abbreviations(doc))
                found.append([entity_of(span, report, positions) for span in negate(doc).ents])
        return found

    return extract


def extractor_hash(model: str = LEXICON_MODEL) -> str:
    """sha256 (hex) of everything that affects the entities: lexicon, negation, rules, versions of model and packages."""
    require_installed(model)
    if model == LEXICON_MODEL:
        source = {"lexicon": hashlib.sha256(LEXICON_PATH.read_bytes()).hexdigest()}
    else:
        source = {"version": metadata.version(model)}
    configuration = {
        "model": model,
        "source": source,
        "negation": load_lexicon()["negation"],
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
    """The parsed lexicon file: `spellings`, `entities` and `negation`."""
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
    """Blank English with scispaCy's tokeniser, sentences, and the lexicon as entity ruler."""
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
        tokenizer.add_special_case(word, [{ORTH: word}])
    nlp.tokenizer = tokenizer
    ruler: Any = nlp.add_pipe("entity_ruler", config={"phrase_matcher_attr": "LOWER"})
    ruler.add_patterns(lexicon_patterns(load_lexicon()))
    return add_sentences(nlp)


def installed_pipeline(model: str) -> Language:
    """An installed model, without the parts that entities do not need. ValueError if it recognises no entities."""
    import spacy

    if find_spec(model) is None or not hasattr(import_module(model), "load"):
        raise ValueError(f"{model!r} is installed, but is no spaCy model; name one as spacy.load does: en_core_sci_sm")
    nlp = spacy.load(model, exclude=UNUSED_PIPES)
    if not any("doc.ents" in nlp.get_pipe_meta(pipe).assigns for pipe in nlp.pipe_names):
        raise ValueError(f"model {model!r} recognises no entities (its parts: {', '.join(nlp.pipe_names) or 'none'})")
    return add_sentences(nlp)


def add_sentences(nlp: Language) -> Language:
    """Put a sentence splitter first: a negation ends with its sentence."""
    nlp.add_pipe("sentencizer", name="report_sentences", first=True, config={"punct_chars": SENTENCE_ENDS})
    return nlp


def negation(nlp: Language, *, entity_prefixes: bool) -> Callable[[Doc], Doc]:
    """NegEx with the lexicon's phrases; sets `span._.negated` on the entities of a document.

    entity_prefixes: whether an entity that starts with a negation word is negated by it.
    """
    from negspacy.negation import Negex

    class LongestPhraseNegex(Negex):
        """In negspacy "resolved" acts inside "has resolved", and a pseudo-negation cancels its right neighbour; here phrases
        never overlap and the longest wins. It also lists a document's entities once per statement, which is more than half
        of its run time; here once per document."""

        def process_negations(self, doc: Doc) -> tuple[list[Match], list[Match], list[Match]]:
            """The phrases of a document: (preceding, following, termination) as (kind, first token, end token)."""
            kept: dict[str, list[Match]] = {"pseudo": [], "Preceding": [], "Following": [], "Termination": []}
            for match in without_overlap(self.matcher(doc)):
                kept[doc.vocab.strings[match[0]]].append(match)
            return kept["Preceding"], kept["Following"], kept["Termination"]

        def negex(self, doc: Doc) -> Doc:
            """Set `span._.negated`, one statement (a sentence, or a part of it up to a termination) after another."""
            preceding, following, terminating = self.process_negations(doc)
            entities = doc.ents
            for start, end in self.termination_boundaries(doc, terminating):
                before = [match for match in preceding if start <= match[1] < end]
                after = [match for match in following if start <= match[1] < end]
                for entity in entities if before or after or self.chunk_prefix else ():
                    if start <= entity.start < end:
                        self._apply_negation(entity, before, after)
            return doc

    phrases = load_lexicon()["negation"]
    termset = {
        "pseudo_negations": phrases["pseudo"],
        "preceding_negations": phrases["preceding"],
        "following_negations": phrases["following"],
        "termination": phrases["termination"],
    }
    prefixes = phrases["entity_prefix"] if entity_prefixes else None
    return LongestPhraseNegex(nlp, "negation", neg_termset=termset, extension_name="negated", chunk_prefix=prefixes)


def abbreviations(nlp: Language) -> Callable[[Doc], Doc]:
    """scispaCy's abbreviation detector; sets `doc._.abbreviations`."""
    from scispacy.abbreviation import AbbreviationDetector

    detector = AbbreviationDetector(nlp)
    # spaCy warns at every call of a matcher without patterns; this one has none until a definition is found.
    detector.global_matcher.add("no token", [[{"ORTH": ""}]])
    return detector


def without_overlap(matches: Sequence[Match]) -> list[Match]:
    """Matches that share no token, longest first, then leftmost; returned in the order of the text."""
    kept: list[Match] = []
    for match in sorted(matches, key=lambda match: (match[1] - match[2], match[1])):
        if all(match[2] <= other[1] or other[2] <= match[1] for other in kept):
            kept.append(match)
    return sorted(kept, key=lambda match: match[1])


# --- one document ---------------------------------------------------------------------------------------------------


def flatten(report: str) -> tuple[str, list[int] | None]:
    """The report with each run of white space as one character: "\\n" before a new block, else " ".

    Wrapped lines and double spaces would otherwise split "pleural\\n effusion".
    Returns the text and, per character, its offset in the report (None: nothing moved).
    """
    if not FOLDED_BLANKS.search(report):
        return report, None
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
    return "".join(pieces), positions


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


def entity_of(span: Span, report: str, positions: list[int] | None) -> Entity:
    """A spaCy entity as `Entity`, with offsets of the original report."""
    start, end = span.start_char, span.end_char
    if positions is not None:
        start, end = positions[start], positions[end - 1] + 1
    return Entity(
        start=start,
        end=end,
        text=report[start:end],
        label=span.label_,
        negated=span._.negated,
        cui=span.kb_id_ or None,
        term=span.ent_id_ or None,
    )
