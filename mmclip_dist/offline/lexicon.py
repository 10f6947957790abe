"""The words of a language: radiographic terms, and the phrases that negate or doubt them.

`lexicon.yaml` holds English, `lexicon_es.yaml` Spanish; the code is the same. A lexicon that names a Snowball `stemmer` is
matched by stems without accents, so that it says each word once and also reads text that was published as stems (PadChest's); the
others by lower-case words. Needs the extra `nlp`; its packages are imported only where they are used.
"""

from __future__ import annotations

import itertools
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from mmclip_shards.datasets.recipe import find_recipe, recipe_names
from mmclip_shards.manifest import load_manifest

from mmclip_dist.offline.context import Cue, cue_phrases, longest

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc

LEXICONS = {"en": Path(__file__).with_name("lexicon.yaml"), "es": Path(__file__).with_name("lexicon_es.yaml")}
"""Language -> its lexicon."""

SLASH = r"(?<=[^\W\d_])/(?=[^\W\d_])"
"""scispaCy keeps "consolidation/effusion" whole (meant for chemistry); in a report a slash separates findings."""
GLUED = r"(?<=[^\W\d_]{3})[.;](?=[^\W\d_]{2})"
"""The end of a sentence without a blank behind it, which spaCy sees only between a small letter and a capital: "EFFUSION.NO"."""
SLASHED_WORDS = ("w/o", "r/o", "h/o", "s/p", "c/w", "b/l")
ALTERNATIVES = re.compile(r"\(([^()]*)\)")
_STEMMED_FROM = 5  # letters: in shorter words the ending is most of the word
_SHORT = re.compile("...[aeou]")  # a word in "i" is a stem already: "hili" of "hilio"
NO_ENTITY = "NONE"
"""Label of the phrases in which a word is no entity: "in the right clinical setting"."""


class Term(NamedTuple):
    """A term at tokens [start, end)."""

    start: int
    end: int
    label: str
    name: str
    cui: str = ""


def language_of(base: str) -> str:
    """The language of a packed set's reports: what the recipes of its data sets say; English where there is no recipe.
    ValueError for several."""
    names = recipe_names()
    found = {find_recipe(name).language if name in names else "en" for name in load_manifest(base).datasets}
    if len(found) > 1:
        raise ValueError(f"{base} has reports in several languages ({', '.join(sorted(found))}): choose one with --language")
    return found.pop()


@cache
def load_lexicon(language: str = "en") -> dict[str, Any]:
    """The parsed lexicon: `spellings`, `entities`, `background_terms`, `context`, `sections`, `entity_prefix`; `stemmer` and
    `stems` where words are matched by stem. ValueError for a language without one."""
    return yaml.safe_load(lexicon_path(language).read_text(encoding="utf-8"))


def lexicon_path(language: str) -> Path:
    """ValueError for a language without a lexicon."""
    if language not in LEXICONS:
        raise ValueError(f"there is no lexicon for the language {language!r}: choose one of {', '.join(LEXICONS)}")
    return LEXICONS[language]


def surface_forms(form: str, spellings: dict[str, str]) -> set[str]:
    """All spellings of one line of the lexicon, in lower case: endings, hyphens, British forms."""
    pieces = ALTERNATIVES.split(form.lower())
    choices = [
        [piece] if index % 2 == 0 else (piece.split("/") if "/" in piece else ["", piece])
        for index, piece in enumerate(pieces)
    ]
    forms = {" ".join("".join(choice).split()) for choice in itertools.product(*choices)}
    forms |= {" ".join(spellings.get(word, word) for word in text.split()) for text in forms}
    return forms | {text.replace("-", " ") for text in forms}


def term_forms(language: str) -> dict[tuple[str, str], list[str]]:
    """(label, term) -> its surface forms. Raises ValueError for a form that two terms claim."""
    lexicon, normal = load_lexicon(language), word_norm(language)
    owners: dict[str, tuple[str, str, str]] = {}
    for label, terms in lexicon["entities"].items():
        for term, forms in terms.items():
            names = forms if "stemmer" in lexicon else [term, *forms]  # terms are English: their own lexicon holds them as forms
            for form in sorted(set().union(*(surface_forms(form, lexicon["spellings"]) for form in names))):
                key = " ".join(map(normal, form.split()))
                other = owners.setdefault(key, (label, term, form))
                if other[:2] != (label, term):
                    raise ValueError(
                        f"{lexicon_path(language).name}: {form!r} is a form of both {' / '.join(other[:2])} "
                        f"and {label} / {term}; keep one"
                    )
    found: dict[tuple[str, str], list[str]] = {}
    for label, term, form in owners.values():
        found.setdefault((label, term), []).append(form)
    return found


def cue_forms(language: str) -> dict[str, list[str]]:
    """Kind of cue -> its phrases. Raises ValueError for a phrase that two kinds claim."""
    lexicon, normal = load_lexicon(language), word_norm(language)
    owners: dict[str, tuple[str, str]] = {}
    for kind, phrases in cue_phrases(lexicon["context"]).items():
        spelled = set().union(*(surface_forms(phrase, lexicon["spellings"]) for phrase in phrases))
        for form in sorted(text for text in {*map(str.lower, phrases), *spelled} if "(" not in text and text not in ("", " ")):
            key = " ".join(map(normal, form.split())) or form
            other, _ = owners.setdefault(key, (kind, form))
            if other != kind:
                raise ValueError(f"{lexicon_path(language).name}: {form!r} is a phrase of both {other} and {kind}; keep one")
    found: dict[str, list[str]] = {}
    for kind, form in owners.values():
        found.setdefault(kind, []).append(form)
    return found


def word_norm(language: str) -> Callable[[str], str]:
    """What a word is compared by: its lower case; with a stemmer, the stem of that without accents, stemmed until it stays.

    A word of four letters that ends in a vowel ("seno") has the stem of its plural, which is long enough for the stemmer.
    """
    lexicon = load_lexicon(language)
    if "stemmer" not in lexicon:
        return str.lower
    import snowballstemmer

    stem, stems = snowballstemmer.stemmer(lexicon["stemmer"]).stemWord, lexicon["stems"]

    @lru_cache(maxsize=1 << 16)
    def norm(word: str) -> str:
        plain = "".join(char for char in unicodedata.normalize("NFKD", word.lower()) if not unicodedata.combining(char))
        if plain not in stems and _SHORT.fullmatch(plain):
            plain += "s"
        while plain not in stems and len(plain) >= _STEMMED_FROM and (short := stem(plain)) != plain:
            plain = short
        return stems.get(plain, plain)

    return norm


def match_attribute(language: str) -> str:
    """spaCy's attribute that holds `word_norm`."""
    return "NORM" if "stemmer" in load_lexicon(language) else "LOWER"


def blank_pipeline(language: str) -> Language:
    """The tokeniser alone: scispaCy's for English, spaCy's own for others."""
    import spacy
    from scispacy.custom_tokenizer import combined_rule_tokenizer
    from spacy.attrs import NORM
    from spacy.symbols import ORTH

    nlp = spacy.blank(language)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a doubtful set in one of scispaCy's expressions
        tokenizer: Any = combined_rule_tokenizer(nlp) if language == "en" else nlp.tokenizer
    # spaCy's English keeps "Mass." as one token, for Massachusetts: a mass at the end of a sentence would be missed.
    tokenizer.rules = {word: rule for word, rule in tokenizer.rules.items() if word != "Mass."}
    infixes = tokenizer.infix_finditer.__self__.pattern
    tokenizer.infix_finditer = re.compile(f"{infixes}|{SLASH}|{GLUED}").finditer
    tokenizer.url_match = None  # "derrame.no" is no address
    for word in SLASHED_WORDS:
        for written in (word, word.capitalize(), word.upper()):
            tokenizer.add_special_case(written, [{ORTH: written}])
    nlp.tokenizer = tokenizer
    nlp.max_length = sys.maxsize  # spaCy's limit of a megabyte is for models that need memory by the length
    if match_attribute(language) == "NORM":
        vocab: Any = nlp.vocab  # spaCy's types lack the getters
        vocab.lex_attr_getters[NORM] = word_norm(language)
    return nlp


def phrase_finder(nlp: Language, language: str, phrases: Mapping[str, Iterable[str]]) -> Callable[[Doc], list[Cue]]:
    """Finds phrases in a document, by kind; what it finds shares no token and comes in order. nlp: of `blank_pipeline`."""
    from spacy.matcher import PhraseMatcher

    matcher = PhraseMatcher(nlp.vocab, attr=match_attribute(language))
    for kind, forms in phrases.items():
        matcher.add(kind, [nlp.make_doc(form) for form in forms])
    kinds = {nlp.vocab.strings[kind]: kind for kind in phrases}

    def find(doc: Doc) -> list[Cue]:
        return longest([Cue(kinds[kind], start, end) for kind, start, end in matcher(doc)])

    return find


def cue_finder(nlp: Language, language: str) -> Callable[[Doc], list[Cue]]:
    """Finds the lexicon's cues. nlp: of `blank_pipeline`."""
    return phrase_finder(nlp, language, cue_forms(language))


def term_finder(nlp: Language, language: str) -> Callable[[Doc], list[Term]]:
    """Finds the lexicon's terms. nlp: of `blank_pipeline`."""
    forms = term_forms(language)
    names = {f"{label}\t{term}": (label, term) for label, term in forms}
    find = phrase_finder(nlp, language, {name: forms[names[name]] for name in names})

    def find_terms(doc: Doc) -> list[Term]:
        return [Term(start, end, *names[kind]) for kind, start, end in find(doc) if not kind.startswith(NO_ENTITY)]

    return find_terms
