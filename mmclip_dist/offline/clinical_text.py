"""Entities of radiology reports: a lexicon (default) or an installed spaCy/scispaCy model, each with what the report
says of it (`context.py`).

    extract = build_extractor("lexicon")
    [[entity, ...], ...] = extract(["No effusion but a right apical pneumothorax.", ...])

Words come from scispaCy's tokeniser, short forms that the report defines from its rules (`short_forms.py`). Everything that a
radiologist may want to change is in the language's lexicon (`lexicon.py`). Line breaks in the middle of a phrase are ignored.

A sentence is looked at alone, and once: radiologists repeat themselves, and no rule reaches across the end of a sentence.

Needs the extra `nlp`; its packages are imported only where they are used, as spaCy alone takes about three seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from mmclip_dist.offline.context import background_spans, heading_finder, marks_of
from mmclip_dist.offline.lexicon import Term, blank_pipeline, cue_finder, lexicon_path, load_lexicon, term_finder
from mmclip_dist.offline.linker import build_linker, linker_version
from mmclip_dist.offline.short_forms import short_forms

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Span

LEXICON_MODEL = "lexicon"
RULES_VERSION = 5
"""Part of the extractor's hash. Raise it when this file changes what is extracted: old sidecars then become stale."""

NLP_PACKAGES = ("spacy", "scispacy")
STEMMER_PACKAGE = "snowballstemmer"
UNUSED_PIPES = ["tagger", "attribute_ruler", "lemmatizer", "parser", "senter"]
"""Parts of an installed model that entities do not need; where a sentence ends is in `context.py`."""
KNOWN_SENTENCES = 1 << 16
"""Sentences that an extractor keeps, about a kilobyte each; then it starts anew."""
LONGEST_SENTENCE = 100_000
"""Characters: a model needs memory by the length of a sentence."""
KNOWN_WORDS = 1 << 16
"""Words that a vocabulary keeps; further ones are freed after their batch, and no tokeniser caches them."""

NEW_BLOCK = re.compile(
    r"\n[^\S\n]*\n"  # a blank line
    r"|\n(?=[^\S\n]*(?:[-*•]|\d{1,2}[.)])\s)"  # a list item
    r"|\n(?=[^\S\n]*[A-Z][A-Za-z/]*(?:[ ][A-Za-z/()]+){0,3}:)"  # a heading, or "Heart: normal."
)
_TAG = r"</?[a-zA-Z][^<>\n]{0,200}>|&nbsp;"
TAG = re.compile(_TAG)
_TOO_LONG = r"\S{100}(?=\S)"
FOLDED_BLANKS = re.compile(rf"\s{{2,}}|[^\S ]|{_TOO_LONG}")
"""White space that becomes one character; and where words are too long for any language, as in lines of signs: the tokeniser's
time grows with the square of such a word, so a blank is put in."""
FOLDED_MARKUP = re.compile(rf"(?:\s|{_TAG}){{2,}}|[^\S ]|{_TAG}|(?:(?!{_TAG})\S){{100}}(?=\S)")
"""The same in a report with markup, which counts as white space."""
BLOCK_TAG = re.compile(r"</?(?:p|div|br|li|ul|ol|tr|td|th|table|h[1-6]|body)\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!;\n](?:(?<=\n)|(?:(?<=[^\W\d_]{3}[.!;])|(?<= [.!;])) )")
"""Only ends that the tokeniser sees as well: behind whole words, and not behind its abbreviations (`sentences_of`)."""

Extractor = Callable[[Sequence[str]], "list[list[Entity]]"]
Headings = Callable[[str], "list[re.Match[str]]"]


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


class Marked(NamedTuple):
    """An entity of a text, in its characters. mark: of `context.MARKS`, or None for stated."""

    start: int
    end: int
    label: str
    term: str
    cui: str
    mark: str | None


def build_extractor(model: str = LEXICON_MODEL, language: str = "en", linker: str | None = None) -> Extractor:
    """Reports -> their entities, in order, never overlapping. Build once per process; it is not thread-safe.

    model: `lexicon`, or the name of an installed spaCy/scispaCy package that recognises entities. language: of the lexicon, whose
    rules say what a report says of an entity, whatever the model. linker: scispaCy's knowledge base that gives the concepts
    (`linker.py`). Raises ValueError when the extra `nlp`, the model, or a file of the knowledge base is not here.
    """
    require_installed(model, language)
    from spacy.attrs import IDX, LENGTH
    from spacy.tokens import Span

    lexicon = load_lexicon(language)
    tokens = blank_pipeline(language)
    nlp = tokens if model == LEXICON_MODEL else installed_pipeline(model)
    link = build_linker(linker) if linker else None
    find_terms, find_cues = term_finder(tokens, language), cue_finder(tokens, language)
    headings = heading_finder(lexicon["sections"])
    rules: dict[str, Any] = getattr(nlp.tokenizer, "rules")  # noqa: B009, spaCy types a tokeniser as any callable
    abbreviated = frozenset(word[:-1] for word in rules if word.endswith("."))
    # Only a model's entity may hold its negation ("no effusion").
    prefixes = () if model == LEXICON_MODEL else tuple(lexicon["entity_prefix"])
    of_the_patient = frozenset(lexicon["background_terms"])
    known: dict[str, list[Marked]] = {}
    words: set[str] = set()

    def read(sentences: list[str]) -> Iterator[list[Marked]]:
        """The entities of each sentence."""
        if nlp is not tokens:
            for doc in nlp.pipe(sentences):
                yield marked(doc, terms_of(link(doc) if link else doc))
            return
        learn(sentences, words, tokens)
        doc = tokens.make_doc("\n".join(sentences))  # at once: a document takes as long to begin as a sentence to read
        terms = find_terms(doc)
        if link:
            doc.ents = [Span(doc, term.start, term.end, term.label, span_id=term.name) for term in terms]
            terms = terms_of(link(doc))
        yield from apart(sentences, marked(doc, terms))

    def marked(doc: Doc, terms: list[Term]) -> list[Marked]:
        cues = find_cues(doc if nlp is tokens else words_of(doc, tokens))
        marks = marks_of([term[:2] for term in terms], cues)
        starts, lengths = doc.to_array([IDX, LENGTH]).T.tolist()
        return [
            Marked(starts[start], starts[end - 1] + lengths[end - 1], label, name, cui, told(name, mark))
            for (start, end, label, name, cui), mark in zip(terms, marks, strict=True)
        ]

    def told(term: str, mark: str | None) -> str | None:
        """A symptom is told, not seen: never evidence of the image."""
        return "background" if term in of_the_patient and mark != "negated" else mark

    def extract(reports: Sequence[str]) -> list[list[Entity]]:
        """Entities of each report, in the order of the reports."""
        flat = [flatten(report, headings) for report in reports]
        sentences = [list(sentences_of(text, abbreviated)) for text, _, _ in flat]
        if len(known) > KNOWN_SENTENCES:
            known.clear()
        new = list(dict.fromkeys(sentence for pairs in sentences for _, sentence in pairs if sentence not in known))
        found = []
        with bounded(nlp), bounded(tokens) if tokens is not nlp else nullcontext():
            known.update(zip(new, read(new), strict=True))
            for report, (text, moved, background), pairs in zip(reports, flat, sentences, strict=True):
                spans = [(at, span) for at, sentence in pairs for span in known[sentence]]
                if "(" in text:  # a definition needs one
                    doc = nlp.make_doc(text)
                    if defined := short_forms(doc):
                        spans = [(0, span) for span in marked(doc, terms_of(add_short_forms(doc, spans, defined)))]
                found.append([entity_of(span, at, background, prefixes, report, moved) for at, span in spans])
        return found

    return extract


def extractor_hash(model: str = LEXICON_MODEL, language: str = "en", linker: str | None = None) -> str:
    """sha256 (hex) of everything that affects the entities: lexicon, context, rules, versions of model, linker and packages."""
    packages = require_installed(model, language)
    lexicon = load_lexicon(language)
    if model == LEXICON_MODEL:
        source = {"lexicon": hashlib.sha256(lexicon_path(language).read_bytes()).hexdigest()}
    else:
        source = {"version": metadata.version(model)}
    configuration = {
        "model": model,
        "source": source,
        "language": language,
        "linker": linker and linker_version(linker),
        "context": [lexicon[name] for name in ("context", "sections", "entity_prefix", "background_terms")],
        "rules": RULES_VERSION,
        "packages": {name: metadata.version(name) for name in packages},
    }
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def require_installed(model: str, language: str = "en") -> tuple[str, ...]:
    """The NLP packages of a language; ValueError with the command that helps, unless they and the model are installed."""
    packages = (*NLP_PACKAGES, STEMMER_PACKAGE) if "stemmer" in load_lexicon(language) else NLP_PACKAGES
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        raise ValueError(f"entities need {', '.join(missing)}, not installed here: run pip install 'mmclip-dist[nlp]'")
    if model != LEXICON_MODEL and not is_installed(model):
        raise ValueError(
            f"entity model {model!r} is not installed. The default, {LEXICON_MODEL!r}, needs no download. For a "
            "scispaCy model run pip install URL, with a release URL from https://allenai.github.io/scispacy (not by "
            "name: en-core-sci-md on PyPI is a placeholder); for a spaCy model python -m spacy download NAME"
        )
    return packages


def is_installed(package: str) -> bool:
    """Whether a distribution of that name is installed in this environment."""
    try:
        metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: the empty name
        return False
    return True


# --- pipelines ------------------------------------------------------------------------------------------------------


def installed_pipeline(model: str) -> Language:
    """An installed model, without the parts that entities do not need. ValueError if it recognises no entities."""
    import spacy
    from thinc.api import Model, NumpyOps

    if find_spec(model) is None or not hasattr(import_module(model), "load"):
        raise ValueError(f"{model!r} is installed, but is no spaCy model; name one as spacy.load does: en_core_sci_sm")
    nlp = spacy.load(model, exclude=UNUSED_PIPES)
    for name, pipe in nlp.pipeline:  # word vectors that only the unused parts asked for
        if not getattr(pipe, "listening_components", True):
            nlp.remove_pipe(name)
    if not any("doc.ents" in nlp.get_pipe_meta(pipe).assigns for pipe in nlp.pipe_names):
        raise ValueError(f"model {model!r} recognises no entities (its parts: {', '.join(nlp.pipe_names) or 'none'})")
    numpy_ops = NumpyOps(use_blis=False)  # thinc's own BLIS multiplies at a third of the speed of numpy's BLAS
    for _, pipe in nlp.pipeline:
        network = getattr(pipe, "model", None)
        for node in network.walk() if isinstance(network, Model) else ():
            node.ops = numpy_ops
    return nlp


# --- one document ---------------------------------------------------------------------------------------------------


def flatten(report: str, headings: Headings) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
    """The report with each run of white space and markup as one character, "\\n" before a new block or a heading, else " ", and a
    blank after each 100 characters without one.

    Wrapped lines and double spaces would otherwise split "pleural\\n effusion".
    Returns the text; where it moved, as (first character, how far from there on the report's characters are ahead); and its
    background sections, in characters.
    """
    markup = bool(TAG.search(report))
    block_starts = {match.start() for match in NEW_BLOCK.finditer(report)} if "\n" in report else set()
    pieces: list[str] = []
    moved: list[tuple[int, int]] = []
    last = ahead = 0
    for run in (FOLDED_MARKUP if markup else FOLDED_BLANKS).finditer(report):
        start, end = run.span()
        if run[0][0].isspace() or TAG.match(run[0]):
            block = not block_starts.isdisjoint(range(start, end)) or (markup and bool(BLOCK_TAG.search(run[0])))
            kept = start
        else:
            block, kept = False, end
        pieces += [report[last:kept], "\n" if block else " "]
        if end - kept != 1:
            ahead += end - kept - 1
            moved.append((end - ahead, ahead))
        last = end
    text, background = break_before(headings, "".join([*pieces, report[last:]]) if pieces else report)
    return text, moved, background


def break_before(headings: Headings, text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text with "\n" for the space before a heading, as no statement reaches from one section into the next; and its
    background sections, in characters."""
    found = headings(text)
    if not found:
        return text, []
    starts = [heading.start() for heading in found]
    pieces = [text[low:high] for low, high in pairwise([0, *(max(start - 1, 0) for start in starts), len(text)])]
    text = "".join([pieces[0], *("\n" + piece[1:] if start else piece for start, piece in zip(starts, pieces[1:], strict=True))])
    return text, background_spans(text, found)


def sentences_of(text: str, abbreviated: Set[str]) -> list[tuple[int, str]]:
    """(offset, sentence) of each sentence, without blanks around it; one that is too long is cut at blanks. abbreviated: words
    without the full stop that belongs to them."""
    ends = [
        end
        for match in SENTENCE_END.finditer(text)
        if text[end := match.end() - 1] == "\n" or text[text.rfind(" ", 0, end) + 1 : end - 1] not in abbreviated
    ]
    pieces = []
    start = 0
    for end in [*ends, len(text)]:
        while end - start > LONGEST_SENTENCE and (cut := text.rfind(" ", start + 1, start + LONGEST_SENTENCE)) > 0:
            pieces.append((start, text[start:cut]))
            start = cut + 1
        pieces.append((start, text[start:end]))
        start = end + 1
    return [(start + len(piece) - len(piece.lstrip()), piece.strip()) for start, piece in pieces if piece and not piece.isspace()]


def apart(sentences: Iterable[str], spans: Sequence[Marked]) -> Iterator[list[Marked]]:
    """The spans of each sentence, in its characters. spans: of the sentences with a character between two, in order."""
    at = row = 0
    for sentence in sentences:
        end, inside = at + len(sentence), []
        while row < len(spans) and spans[row].start < end:
            start, stop, label, term, cui, mark = spans[row]
            inside.append(Marked(start - at, stop - at, label, term, cui, mark))
            row += 1
        yield inside
        at = end + 1


def terms_of(doc: Doc) -> list[Term]:
    """The entities of a document."""
    return [Term(span.start, span.end, span.label_, span.id_, span.kb_id_) for span in doc.ents]


@contextmanager
def bounded(nlp: Language) -> Iterator[None]:
    """A vocabulary that is large already does not grow by what is done inside; a worker's memory would grow with the corpus."""
    with nlp.memory_zone() if len(nlp.vocab) > KNOWN_WORDS else nullcontext():
        yield


def learn(sentences: Sequence[str], words: set[str], tokens: Language) -> None:
    """Show each word that is not among `words` to the tokeniser alone, which remembers none that it meets behind a special case
    ("Dr.") of the same document."""
    if len(words) > KNOWN_WORDS:
        words.clear()
    new = {word for sentence in sentences for word in sentence.split()} - words
    for word in new:
        tokens.make_doc(word)
    words.update(new)


def words_of(doc: Doc, tokens: Language) -> Doc:
    """The same words in the vocabulary of `tokens`."""
    from spacy.tokens import Doc

    return Doc(tokens.vocab, words=[token.text for token in doc], spaces=[bool(token.whitespace_) for token in doc])


def add_short_forms(doc: Doc, spans: Sequence[tuple[int, Marked]], defined: Sequence[tuple[Span, Span]]) -> Doc:
    """The document with `spans`, each behind its offset, as entities, and "RVC" everywhere if it says "retractile visceral
    consolidation (RVC)": `defined` holds such short forms, each with its long form.

    The short form gets label, term and concept of the last entity in its long form, the head of an English noun phrase.
    """
    from spacy.tokens import Span

    entities = []
    for at, span in spans:
        entity = doc.char_span(at + span.start, at + span.end, span.label, span.cui, span_id=span.term)
        assert entity is not None, "a sentence is tokenised as it is in its report"
        entities.append(entity)
    heads = {entity.end: entity for entity in entities}
    taken = {token.i for entity in entities for token in entity}
    for short, long in sorted(defined, key=lambda pair: pair[0].start):
        head = heads.get(long.end)
        if head is not None and taken.isdisjoint(range(short.start, short.end)):
            entities.append(Span(doc, short.start, short.end, label=head.label, kb_id=head.kb_id, span_id=head.id))
            taken.update(range(short.start, short.end))
    doc.ents = entities
    return doc


def entity_of(
    span: Marked, at: int, background: list[tuple[int, int]], prefixes: tuple[str, ...], report: str, moved: list[tuple[int, int]]
) -> Entity:
    """The entity of a sentence that begins at `at`, with offsets of the original report. background: sections that say nothing of
    the image, in characters; moved: of `flatten`."""
    start, end, mark = at + span.start, at + span.end, span.mark
    if background and mark != "negated" and start < _last(background, start):
        mark = "background"
    if moved:
        start, end = start + _last(moved, start), end + _last(moved, end - 1)
    text = report[start:end]
    if prefixes and text.lower().startswith(prefixes):
        mark = "negated"
    return Entity(
        start=start,
        end=end,
        text=text,
        label=span.label,
        negated=mark == "negated",
        uncertain=mark == "uncertain",
        background=mark == "background",
        cui=span.cui or None,
        term=span.term or None,
    )


def _last(pairs: list[tuple[int, int]], at: int) -> int:
    """The second of the last pair whose first is `at` or less; 0 if there is none."""
    row = bisect_left(pairs, (at + 1,))
    return pairs[row - 1][1] if row else 0
