"""Disease-kind prompts: how a label is put into words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import torch
import yaml
from mmclip_shards.textfiles import read_text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_FIELD = "{disease}"
"""What a template stands for: the label in words, or its entry under `names`."""


@dataclass(frozen=True)
class PromptTexts:
    """Texts [R][2C]: for each of R template pairs, the C "present" prompts, then the C "absent" ones."""

    diseases: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]


def prompts_text(file: str | None) -> str:
    """The YAML text of the prompts: of the named file, else of the embedded one. ValueError if it is missing or not UTF-8."""
    if not file:
        return (resources.files("mmclip_dist") / "data" / "prompts.yaml").read_text(encoding="utf-8")
    try:
        return read_text(file, "save it as UTF-8")
    except FileNotFoundError as error:
        raise ValueError(f"prompts.file={file}: no such file") from error


def load_prompts(diseases: Sequence[str], file: str | None = None) -> PromptTexts:
    """Prompts of `diseases` (label names) from a YAML file, by default the embedded one. ValueError if it is malformed."""
    text = prompts_text(file)
    try:
        pairs, names = _parse(text)
    except yaml.YAMLError as error:
        raise ValueError(f"prompts.file={file} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"prompts.file={file}: {error}") from error
    words = [names.get(disease, disease.replace("_", " ").lower()) for disease in diseases]
    return PromptTexts(
        tuple(diseases), tuple(tuple(_sentence(template, word) for template in pair for word in words) for pair in pairs)
    )


def _parse(text: str) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Pairs of a "present" and an "absent" template, and the names of labels in words. ValueError if they cannot be used."""
    document = yaml.safe_load(text)
    if not isinstance(document, dict):
        raise ValueError("it must hold `present` and `absent`, two lists of templates")
    present, absent = (_templates(kind, document.get(kind)) for kind in ("present", "absent"))
    if len(present) != len(absent) or not present:
        raise ValueError(f"`present` has {len(present)} templates and `absent` {len(absent)}: give as many of each, at least one")
    names = document.get("names") or {}
    if not isinstance(names, dict) or not all(isinstance(words, str) and words for words in names.values()):
        raise ValueError("`names` must map labels to their names in words")
    return list(zip(present, absent, strict=True)), {str(label): words for label, words in names.items()}


def _templates(kind: str, found: object) -> list[str]:
    if not isinstance(found, list):
        raise ValueError(f"`{kind}` must be a list of templates such as 'There is {_FIELD}.'")
    for template in found:
        if not isinstance(template, str):
            raise ValueError(f"`{kind}` holds {template!r}, which is no text: put it in quotes")
        other = re.search(r"\{[^{}]*\}|[{}]", template.replace(_FIELD, ""))
        if other or _FIELD not in template:
            fault = f"lacks {_FIELD}" if not other else f"holds {other[0] if len(other[0]) > 1 else 'a single brace'}"
            raise ValueError(f"the template {template!r} {fault}; the only field is {_FIELD}")
    return found


def _sentence(template: str, words: str) -> str:
    text = template.replace(_FIELD, words)
    return text[0].upper() + text[1:]


def tokenize_prompts(
    prompts: PromptTexts, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Token ids [R, 2C, T], int64, and their mask [R, 2C, T], bool, of all prompts."""
    rows, per_template = len(prompts.texts), len(prompts.texts[0])
    if per_template == 0:
        return torch.zeros(rows, 0, 1, dtype=torch.int64), torch.zeros(rows, 0, 1, dtype=torch.bool)
    flat = [text for texts in prompts.texts for text in texts]
    encoded = tokenizer(flat, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    shape = (rows, per_template, -1)
    return encoded["input_ids"].reshape(shape), encoded["attention_mask"].bool().reshape(shape)
