"""The tokenizer: any of `transformers`, or a WordPiece vocabulary trained on packed reports. Nothing is downloaded
unless a hub id is named."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from mmclip_shards.document import read_document
from mmclip_shards.manifest import load_manifest
from mmclip_shards.reader import iterate
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmclip_dist.data.prompts import load_prompts

_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by hub id or folder. ValueError if it lacks what EntMLM needs: offsets, a mask and a padding token."""
    # Reports are tokenised one at a time, so a pool of threads would only add overhead.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at model.text.tokenizer={name!r}: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast or tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer {name!r} must be a fast one with a mask and a padding token")
    return tokenizer


def reports_of(urls: Sequence[str]) -> Iterator[str]:
    """The report texts of packed sets, in the order of their shards."""
    for url in urls:
        for _, members in iterate(url):
            if report := read_document(members).report:
                yield report


def train_tokenizer(texts: Iterable[str], vocabulary: int = 8192) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer of at most `vocabulary` tokens. Errors: ValueError without any text.

    Its pieces are all characters and the most frequent words (two occurrences at least), so that a rare word is spelled
    and a term of the field stays whole. The trainers of `tokenizers` break ties at random: the same reports would give
    another vocabulary each time, and a run that is made again other numbers.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    if not counts:
        raise ValueError("no report to train a tokenizer on: name at least one set with reports")
    characters = sorted(set("".join(counts)))
    frequent = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    pieces = [*_SPECIAL.values(), *characters, *(f"##{character}" for character in characters), *frequent]
    tokens = {piece: number for number, piece in enumerate(list(dict.fromkeys(pieces))[:vocabulary])}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokens[name]) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


def tokenizer_of_sets(urls: Sequence[str], vocabulary: int = 8192) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the reports of packed sets and on the prompts of their diseases."""
    diseases = sorted({name for url in urls for name in load_manifest(url).labels})
    prompts = [text for texts in load_prompts(diseases).texts for text in texts]
    return train_tokenizer(chain(reports_of(urls), prompts, prompts), vocabulary)  # twice: a word met once is left out


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(str(folder))
