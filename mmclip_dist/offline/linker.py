"""scispaCy's entity linker by name: the concept (UMLS CUI, MeSH id, ...) of each entity, from files that are here.

scispaCy itself downloads a missing file at run time, a gigabyte for UMLS; here it is refused, and named with where it comes from.
Files are taken from scispaCy's own cache, `datasets` in the folder that SCISPACY_CACHE names (by default ~/.scispacy), so that a
cache filled once on a machine with a network, and copied to where all nodes see it, does. Needs the extra `nlp`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spacy.tokens import Doc


def build_linker(name: str) -> Callable[[Doc], Doc]:
    """Gives each entity of a document the concept that is most like it, as its `kb_id_`; none is like enough: "".

    Raises ValueError for an unknown name, and where a file is missing.
    """
    from scispacy.candidate_generation import CandidateGenerator, LinkerPaths
    from scispacy.linking import EntityLinker
    from scispacy.linking_utils import KnowledgeBase
    from spacy.tokens import Span

    *index, concepts = map(str, linker_files(name))
    aliases, vectorizer, neighbours = LinkerPaths(*index).load()
    generator = CandidateGenerator(neighbours, vectorizer, aliases, KnowledgeBase(concepts))
    find = EntityLinker(candidate_generator=generator, resolve_abbreviations=False)  # that is done in `clinical_text.py`

    def link(doc: Doc) -> Doc:
        doc.ents = [
            Span(doc, span.start, span.end, span.label, kb_id=span._.kb_ents[0][0] if span._.kb_ents else "", span_id=span.id)
            for span in find(doc).ents
        ]
        return doc

    return link


def linker_files(name: str) -> list[Path]:
    """The files of a linker: index, vectorizer, vectors, aliases, concepts. ValueError for an unknown name or a missing file."""
    from scispacy.candidate_generation import DEFAULT_KNOWLEDGE_BASES, DEFAULT_PATHS
    from scispacy.file_cache import DATASET_CACHE, url_to_filename

    if name not in DEFAULT_PATHS:
        raise ValueError(f"scispaCy has no linker {name!r}: choose one of {', '.join(DEFAULT_PATHS)}")
    concepts = inspect.signature(DEFAULT_KNOWLEDGE_BASES[name]).parameters["file_path"].default
    files = []
    for url in (*DEFAULT_PATHS[name], concepts):
        # scispaCy puts the version that its server told between the two: HASH.VERSION.NAME
        address, _, file = url_to_filename(url).partition(".")
        found = [path for pattern in (f"{address}.{file}", f"{address}.*.{file}") for path in Path(DATASET_CACHE).glob(pattern)]
        if len(found) != 1:
            state = "is not here" if not found else f"is here {len(found)} times; keep one"
            path = f"{DATASET_CACHE}/{address}.{file}"
            raise ValueError(f"linker {name}: {path} {state}. It is not downloaded at run time; get {url}")
        files += found
    return files


def linker_version(name: str) -> str:
    """What the linker's files are, for a hash: their names, each with the version that scispaCy's server told, and sizes."""
    return " ".join(f"{path.name}:{path.stat().st_size}" for path in linker_files(name))
