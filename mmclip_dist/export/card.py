"""The model card of an export: what it was trained on, under which terms, how well it does, and what it is not for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mmclip_shards.manifest import load_manifest

import mmclip_dist
from mmclip_dist.checkpoint.folder import Meta
from mmclip_dist.config import Config
from mmclip_dist.evaluate.zeroshot import ZeroShot


@dataclass(frozen=True)
class TrainedOn:
    """A training set. shards: sha256 of its shards; samples: None if the set could not be read at export; licence, access: the
    terms of the raw data, None if its manifest states none."""

    name: str
    samples: int | None
    shards: tuple[str, ...]
    licence: str | None = None
    access: str | None = None


def trained_on(config: Config, meta: Meta) -> list[TrainedOn]:
    """The training sets of a run, by their manifests; what the manifests no longer hold is listed by its hashes alone."""
    found, known = [], set()
    for source in config.data.sources:
        try:
            manifest = load_manifest(source.url)
        except (OSError, ValueError):  # moved or deleted since training: the hashes below still tell what it was
            continue
        shards = tuple(shard.sha256 for shard in manifest.shards if shard.sha256 in meta.trained_on)
        if shards:
            name = f"{manifest.dataset}/{manifest.split}"
            found.append(TrainedOn(name, manifest.samples, shards, manifest.licence, manifest.access))
            known |= set(shards)
    rest = tuple(sha256 for sha256 in meta.trained_on if sha256 not in known)
    return [*found, TrainedOn("sets that could not be read at export", None, rest)] if rest else found


def card(
    config: Config, meta: Meta, sets: Sequence[TrainedOn], *, weights: str, license: str | None, result: ZeroShot | None,
    formats: Sequence[str], image_size: int,
) -> str:  # fmt: skip
    """The text of README.md. weights: their sha256. license: an SPDX-like id for the weights; None: that of the training data."""
    terms = (
        f"The weights are given under `{license}`, as whoever exported them stated. The terms of the training sets, above, stay."
        if license else
        "No licence was stated for the weights. They fall under the terms of the data they were trained on, above: credentialed "
        "data (such as MIMIC-CXR) and non-commercial data bind models too. Do not pass them on before that is settled."
    )  # fmt: skip
    rows = [
        f"| {_cell(one.name)} | {one.samples if one.samples is not None else '?'} | {_cell(one.licence)} | {_cell(one.access)} | "
        f"{_short(one.shards)} |"
        for one in sets
    ]
    head = yaml.safe_dump(_head(config, license, result, formats), sort_keys=False, allow_unicode=True, width=1000)
    return "\n".join([
        "---", head.strip(), "---", "", "# A model pretrained by MMCLIP", "",
        f"Two encoders with a shared space, for images of {image_size} x {image_size} pixels in one grey channel and "
        f"reports of up to {config.model.text.max_tokens} tokens; {meta.step} training steps. "
        f"sha256 of the trained weights: `{weights}`.",
        "", "## Use", "", *_use(formats), "", "## Training data", "",
        "| set | samples | licence | access | sha256 of its shards |", "|---|---|---|---|---|", *rows, "",
        "Licence and access are those of the raw data, as the sets' manifests state them; where they state none, look them up "
        "where the set came from. Patients do not cross the splits of a set. This folder holds no image, report or patient's id; "
        "whether the weights can give any of them away was not examined.", "", "## Terms", "", terms, "",
        "## Results", "", *_results(result), "", "## Intended use", "",
        "Research on medical vision-language models. **Not a medical device**: not for diagnosis, triage or any decision about a "
        "patient.",
        "", "## Limits", "",
        "- Scores are not calibrated; choose thresholds on data of your own site.",
        "- Performance on other sites, scanners, views, ages and sexes than those of the training data is unknown.",
        "- Laterality, devices and \"no finding\" are known weak points of contrastive models.",
        "- Images are squashed to a square and scaled to 8 bits; what a text has beyond the token limit is cut off.", "",
        "## How to cite", "",
        "*MMCLIP: Cross-modal Attention Masked Modelling for Medical Language-Image Pre-Training* (arXiv 2407.19546) for the "
        f"method, and mmclip-dist {mmclip_dist.__version__} for the implementation. These weights are not those of the paper's "
        "authors.", "",
    ])  # fmt: skip


_LIBRARIES = {"hf": "transformers", "siglip-tower": "transformers", "open_clip": "open_clip", "onnx": "onnxruntime"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def _head(config: Config, license: str | None, result: ZeroShot | None, formats: Sequence[str]) -> dict[str, Any]:
    """What model hubs read of a card. Without a licence the weights are of none that a hub knows."""
    terms = {"license": license} if license else {"license": "other", "license_name": "terms-of-the-training-data"}
    named = [name for name in (config.model.image.pretrained, config.model.text.pretrained) if name]
    began_from = [name for name in named if _HUB_ID.fullmatch(name) and not Path(name).exists()]
    head: dict[str, Any] = {
        "library_name": _LIBRARIES[formats[0]], **terms,
        "tags": ["radiology", "chest-xray", "medical", "clip", "mmclip", "arxiv:2407.19546"], "metrics": ["roc_auc"],
    }  # fmt: skip
    if began_from:
        head["base_model"] = began_from
    if result is not None and math.isfinite(result.auc_macro):
        head["model-index"] = [{"name": "mmclip", "results": [_indexed(result)]}]
    return head


def _indexed(result: ZeroShot) -> dict[str, Any]:
    name = f"macro AUROC{_interval(result.auc_macro_ci95)}"
    return {
        "task": {"type": "zero-shot-image-classification"},
        "dataset": {"name": ", ".join(result.datasets), "type": result.datasets[0].partition("/")[0]},
        "metrics": [{"type": "roc_auc", "name": name, "value": round(result.auc_macro, 4)}],
    }


def _cell(text: str | None) -> str:
    """Text as a cell of a table."""
    return "not stated" if text is None else " ".join(text.split()).replace("|", "\\|")


def _interval(around: tuple[float, float] | None) -> str:
    return "" if around is None or math.isnan(around[0]) else f" (95% {around[0]:.3f} to {around[1]:.3f})"


def _short(shards: Sequence[str]) -> str:
    return f"{len(shards)} in `training.json`, the first `{shards[0][:16]}`" if shards else "none"


def _use(formats: Sequence[str]) -> list[str]:
    lines = {
        "hf": [
            "```python", "from transformers import AutoModel, AutoProcessor", "",
            'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)',
            'processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)',
            'inputs = processor(images=["chest.png"], text=["There is effusion.", "No evidence of effusion."])',
            "print(model(**inputs).logits_per_image)", "```", "",
        ],
        "siglip-tower": [
            "`siglip-tower/`: the image encoder as `transformers.SiglipVisionModel`; `pooler_output` is the mean over patches. "
            "Its processor refuses images that are not RGB, since it would misread 16-bit and transparent ones: give it "
            '`grey_image(Image.open(path)).convert("RGB")`, by `siglip-tower/grey.py`.', "",
        ],
        "open_clip": [
            "```python", "import open_clip", "from grey import grey_image  # FOLDER/open_clip/grey.py",
            "from PIL import Image", "",
            'model, transform = open_clip.create_model_from_pretrained("local-dir:FOLDER/open_clip")',
            'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER/open_clip")',
            'image = model.encode_image(transform(grey_image(Image.open("chest.png")))[None], normalize=True)',
            'texts = model.encode_text(tokenizer(["There is effusion."]), normalize=True)', "```", "",
            "Without `grey_image` open_clip's transform clips 16-bit files to white. It reads the text encoder's shape from "
            "`hf_model_name` in `open_clip_config.json`, an absolute path: correct it when the folder moves.", "",
        ],
        "onnx": [
            "`onnx/`: `model.onnx` gives embeddings of length 1; `vision_model.onnx` and `text_model.onnx` give them before "
            "that.", "",
        ],
    }  # fmt: skip
    return [line for name in formats for line in lines[name]][:-1]


def _results(result: ZeroShot | None) -> list[str]:
    if result is None:
        return ["None were given at export."]
    rows = {**result.per_class, "macro": result.auc_macro}
    around = {**result.per_class_ci95, "macro": result.auc_macro_ci95}
    left_out = ["", f"Left out, for want of positives or negatives: {', '.join(result.left_out)}."] if result.left_out else []
    return [
        f"Zero-shot classification of {', '.join(result.datasets)} by the protocol `{result.protocol}`, {result.samples} images "
        f"of {result.patients} patients; 95% intervals by bootstrap over patients:", "",
        "| class | AUROC |", "|---|---|",
        *(f"| {_cell(name)} | {auc:.3f}{_interval(around.get(name))} |" for name, auc in rows.items()), *left_out,
    ]  # fmt: skip
