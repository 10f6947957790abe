"""The model card of an export: what it was trained on, under which terms, how well it does, and what it is not for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import yaml
from mmclip_shards.manifest import load_manifest

from mmclip_dist.checkpoint.folder import Meta
from mmclip_dist.config import Config
from mmclip_dist.evaluate.zeroshot import ZeroShot


@dataclass(frozen=True)
class TrainedOn:
    """A training set. shards: sha256 of its shards; samples: None if the set could not be read at export."""

    name: str
    samples: int | None
    shards: tuple[str, ...]


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
            found.append(TrainedOn(f"{manifest.dataset}/{manifest.split}", manifest.samples, shards))
            known |= set(shards)
    rest = tuple(sha256 for sha256 in meta.trained_on if sha256 not in known)
    return [*found, TrainedOn("sets that could not be read at export", None, rest)] if rest else found


def card(
    config: Config, meta: Meta, sets: Sequence[TrainedOn], *, weights: str, license: str | None, result: ZeroShot | None,
    formats: Sequence[str], image_size: int,
) -> str:  # fmt: skip
    """The text of README.md. weights: their sha256. license: an SPDX-like id for the weights; None: that of the training data."""
    head: dict[str, object] = {
        "language": "en", "library_name": "transformers", "license": license or "other",
        "tags": ["radiology", "chest-xray", "medical", "clip", "mmclip", "arxiv:2407.19546"], "metrics": ["roc_auc"],
    }  # fmt: skip
    if license is None:
        head |= {"license_name": "terms-of-the-training-data"}
    terms = (
        f"The weights are given under `{license}`, as whoever exported them stated."
        if license else
        "No licence was stated for the weights. They fall under the terms of the data they were trained on: credentialed data "
        "(such as MIMIC-CXR) and non-commercial data bind models too. Do not pass them on before that is settled."
    )  # fmt: skip
    rows = [f"| {one.name} | {one.samples if one.samples is not None else '?'} | {_short(one.shards)} |" for one in sets]
    return "\n".join([
        "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", "# A model pretrained by MMCLIP", "",
        f"Two encoders with a shared space, for images of {image_size} x {image_size} pixels in one grey channel and English "
        f"reports of up to {config.model.text.max_tokens} tokens; {meta.step} training steps. "
        f"sha256 of the trained weights: `{weights}`.",
        "", "## Use", "", *_use(formats), "", "## Training data", "",
        "| set | samples | sha256 of its shards |", "|---|---|---|", *rows, "",
        "Manifests state no licence or access terms: look them up where each set came from.", "", "## Terms", "", terms, "",
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
        "method, and mmclip-dist for the implementation. These weights are not those of the paper's authors.", "",
    ])  # fmt: skip


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
            "Its own processor takes 8-bit images.", "",
        ],
        "open_clip": ['`open_clip/`: `open_clip.create_model_from_pretrained("local-dir:FOLDER/open_clip")`.', ""],
        "onnx": [
            "`onnx/`: `model.onnx` gives embeddings of length 1; `vision_model.onnx` and `text_model.onnx` give them before "
            "that.", "",
        ],
    }  # fmt: skip
    return [line for name in formats for line in lines[name]][:-1]


def _results(result: ZeroShot | None) -> list[str]:
    if result is None:
        return ["None were given at export."]
    low, high = result.auc_macro_ci95
    return [
        f"Zero-shot classification of {', '.join(result.datasets)}, {result.samples} images of {result.patients} patients:", "",
        "| class | AUC |", "|---|---|", *(f"| {name} | {auc:.3f} |" for name, auc in result.per_class.items()),
        f"| macro | {result.auc_macro:.3f} (95% {low:.3f} to {high:.3f}, bootstrap by patient) |",
    ]  # fmt: skip
