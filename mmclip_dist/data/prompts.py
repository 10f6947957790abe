"""Disease-kind prompts: how a label is put into words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptTexts:
    """Texts [R][2C]: for each of R template pairs, the C "present" prompts, then the C "absent" ones."""

    diseases: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]


def prompts_source(file: str | None) -> Traversable:
    """The YAML file of the prompts: the named one, else the embedded one."""
    return Path(file) if file else resources.files("mmclip_dist") / "data" / "prompts.yaml"


def load_prompts(diseases: Sequence[str], file: str | None = None) -> PromptTexts:
    """Prompts of `diseases` (label names) from a YAML file, by default the embedded one. ValueError if it is malformed."""
    try:
        document = yaml.safe_load(prompts_source(file).read_text())
        present, absent, names = document["present"], document["absent"], document.get("names") or {}
        if len(present) != len(absent) or not present:
            raise ValueError(f"{len(present)} present and {len(absent)} absent templates")
        templates = [(str(yes), str(no)) for yes, no in zip(present, absent, strict=True)]
        if any("{disease}" not in text for pair in templates for text in pair):
            raise ValueError("a template without {disease}")
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"prompts.file={file!r} must be YAML with as many `present` as `absent` templates holding {{disease}}: {error}"
        ) from error
    words = [str(names.get(disease, disease.replace("_", " ").lower())) for disease in diseases]
    return PromptTexts(
        tuple(diseases),
        tuple(tuple(_sentence(template, word) for template in pair for word in words) for pair in templates),
    )


def _sentence(template: str, words: str) -> str:
    text = template.format(disease=words)
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
