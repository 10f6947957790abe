"""What each step of the entity extractor gives in speed, with a statistical spaCy model.

    python -m mmclip_dist.bench.entities_speed --reports NLMCXR_reports.tgz [--model NAME]

--reports: as in `mmclip_dist.bench.entities`. --model: an installed spaCy or scispaCy model. Without it, one of the architecture
of scispaCy's small model and spaCy's is trained here for a minute: a tagger, a parser and entity recognition by transitions,
on vectors of words by convolution. It learns entities from the lexicon's own on an eighth of the reports; tagger and parser
learn nothing, which makes no difference to their speed.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmclip_dist.bench.entities import read_reports
from mmclip_dist.offline.clinical_text import LEXICON_MODEL, UNUSED_PIPES, build_extractor, installed_pipeline

if TYPE_CHECKING:
    from spacy.language import Language

NAME = "en_lexicon_ner"
ROUNDS = 3
BATCH = 64
"""Samples at a time, as in the stage."""


def train(texts: Sequence[str], folder: Path, rounds: int = 4) -> None:
    """Train a pipeline on the lexicon's entities, and lay it into `folder` as an installed package of the name `NAME`."""
    import spacy
    from spacy.training import Example

    nlp = spacy.blank("en", meta={"name": NAME.removeprefix("en_"), "version": "1.0"})
    for part in ("tok2vec", "tagger", "parser"):
        config = {"model": {"tok2vec": {"@architectures": "spacy.Tok2VecListener.v1", "width": 96}}} if part != "tok2vec" else {}
        nlp.add_pipe(part, config=config)
    nlp.add_pipe("ner")  # with word vectors of its own, as in spaCy's small English model
    examples = []
    for text, entities in zip(texts, build_extractor()(texts), strict=True):
        doc = nlp.make_doc(text)
        spans = [span for e in entities if (span := doc.char_span(e.start, e.end, e.label)) is not None]
        marks: dict[str, Any] = {"entities": [(span.start_char, span.end_char, span.label_) for span in spans]}
        heads = [max(0, at - 1) for at in range(len(doc))]  # each word hangs on the one before it
        tags = ["TERM" if any(span.start <= at < span.end for span in spans) else "WORD" for at in range(len(doc))]
        deps = ["ROOT" if at == 0 else "dep" for at in range(len(doc))]
        examples.append(Example.from_dict(doc, marks | {"heads": heads, "tags": tags, "deps": deps}))
    nlp.initialize(lambda: examples)
    draw = random.Random(0)
    with nlp.select_pipes(enable=["ner"]):
        for _ in range(rounds):
            draw.shuffle(examples)
            for batch in spacy.util.minibatch(examples, 32):
                nlp.update(batch)
    package = folder / NAME
    package.mkdir()
    nlp.to_disk(package / f"{NAME}-1.0")
    (package / "meta.json").write_bytes((package / f"{NAME}-1.0" / "meta.json").read_bytes())
    loader = "from spacy.util import load_model_from_init_py\ndef load(**overrides):\n"
    (package / "__init__.py").write_text(f"{loader}    return load_model_from_init_py(__file__, **overrides)\n")
    installed = folder / f"{NAME}-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")


def steps(model: str) -> dict[str, Callable[[Sequence[str]], object]]:
    """Name of a way -> the entities of reports found that way; each has no part of a report known before."""
    import spacy

    whole, fewer = spacy.load(model), spacy.load(model, exclude=UNUSED_PIPES)
    numpy_blas = installed_pipeline(model)
    alone = spacy.load(model, exclude=[*UNUSED_PIPES, "tok2vec"]) if "tok2vec" in unheard(fewer) else fewer
    return {
        "naive: one call a report, all parts": lambda texts: [whole(text).ents for text in texts],
        "`nlp.pipe`, all parts": lambda texts: [doc.ents for doc in whole.pipe(texts)],
        "without tagger, parser, lemmatizer": lambda texts: [doc.ents for doc in fewer.pipe(texts)],
        "without word vectors that nobody reads": lambda texts: [doc.ents for doc in alone.pipe(texts)],
        "numpy's BLAS for thinc's": lambda texts: [doc.ents for doc in numpy_blas.pipe(texts)],
    }


def unheard(nlp: Language) -> list[str]:
    """Parts that make word vectors for others, of which there are none."""
    return [name for name, pipe in nlp.pipeline if not getattr(pipe, "listening_components", True)]


def agreement(model: str, texts: Sequence[str]) -> float:
    """F1 of the entities that the model finds sentence by sentence, by exact span and label, to those in whole reports."""
    pairs = zip(installed_pipeline(model).pipe(texts), build_extractor(model)(texts), strict=True)
    common = total = 0
    for doc, entities in pairs:
        whole = {(span.start_char, span.end_char, span.label_) for span in doc.ents}
        single = {(entity.start, entity.end, entity.label) for entity in entities}
        common, total = common + len(whole & single), total + len(whole) + len(single)
    return 2 * common / max(1, total)


def rate(texts: Sequence[str], find: Callable[[Sequence[str]], object]) -> float:
    """Reports/s of processor time."""
    started = time.process_time()
    for start in range(0, len(texts), BATCH):
        find(texts[start : start + BATCH])
    return len(texts) / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--reports", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    texts = [report.text for report in read_reports(arguments.reports)]
    model = arguments.model or NAME
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            train(texts[::8], Path(folder))
            sys.path.insert(0, folder)
        ways = steps(model)
        for find in ways.values():
            find(texts[:2])
        few = texts[: len(texts) // 10]
        rates: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):  # the ways in turn, so that a change of the machine's speed meets all
            for name, find in ways.items():
                rates.setdefault(name, []).append(rate(few, find))
            ours = {"each sentence once, and what is said of it": model, "the lexicon": LEXICON_MODEL}
            for name, of in ours.items():
                rates.setdefault(name, []).append(rate(texts, build_extractor(of)))
        same = agreement(model, few)
    slowest = statistics.median(rates["naive: one call a report, all parts"])
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print("\n".join([
        f"`python -m mmclip_dist.bench.entities_speed {' '.join(sys.argv[1:])}`, "
        f"{datetime.datetime.now(datetime.UTC).date()}, one process, Python {platform.python_version()}, "
        f"spacy {version('spacy')}; model `{model}`; medians of {arguments.rounds} rounds, reports/s of processor time; the "
        f"first five ways on {len(few):,} reports, the others on all {len(texts):,}.", "",
        "| step | reports/s | of the naive loop |", "|---|---|---|",
        *(f"| {name} | {found:,.0f} | {found / slowest:.1f} |" for name, found in medians.items()), "",
        f"Entities of the model sentence by sentence and in whole reports agree to an F1 of {same:.3f}.",
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
