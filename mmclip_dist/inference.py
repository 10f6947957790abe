"""A trained model in a few lines: embed images and texts, score findings, and see where a text points in an image."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmclip_kernels import attention_scores
from mmclip_shards import decode_image
from mmclip_shards.dicom import decode_dicom, is_dicom
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from mmclip_dist.checkpoint.mirror import local_checkpoint
from mmclip_dist.checkpoint.model_files import load_model
from mmclip_dist.data.transforms import WHOLE, crop_image
from mmclip_dist.export.dual_encoder import dual_encoder
from mmclip_dist.export.hf_folder import is_export, read_hf
from mmclip_dist.export.remote_code.modeling_mmclip import MMCLIPDualEncoder

ImageInput = Any
"""A JPEG, PNG or DICOM file (a path or its bytes), a Pillow image, an array of grey values [height, width], a pydicom data set,
or a tensor [1, size, size] of normalised pixels (`crop_image`)."""

_BATCH = 32


class Findings(NamedTuple):
    """What `MMCLIPModel.zero_shot` found, one row an image and one column a class.

    scores [N, C]: mean cosine with the prompts that state the finding, minus that with those that deny it, where there are any.
    probabilities [N, C]: softmax over the two kinds of prompt at the model's temperature; None without prompts that deny. They
    are not calibrated.
    """

    classes: tuple[str, ...]
    scores: Tensor
    probabilities: Tensor | None


class MMCLIPModel:
    """A trained model with its tokenizer, for inference. All results are float32 on the CPU.

    model: both encoders in the form that is exported, so that a run and its export go the same way.
    """

    def __init__(self, model: MMCLIPDualEncoder, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.size, self.max_tokens = model.config.vision_config.image_size, model.config.max_tokens

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, average: bool = False, device: str | torch.device | None = None
    ) -> MMCLIPModel:
        """Load a run folder's newest checkpoint, one of its checkpoints, the URL of a mirror, or a folder of `mmclip export`.

        An exported folder is read offline, and code that lies in it is not run. average: the exponential average of a run's
        weights. device: by default a GPU if there is one. ValueError if there is no checkpoint, if another version of this
        package wrote it, or if the run kept no average.
        """
        place = os.fspath(path)
        if is_export(place):
            if average:
                raise ValueError(f"{place} is an export, which has one set of weights: leave average out, or name the run")
            model, tokenizer = read_hf(Path(place))
        else:
            with local_checkpoint(place) as folder:
                trained, tokenizer, _, _ = load_model(folder, average=average)
            model = dual_encoder(trained)
        model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))  # type: ignore[arg-type]  # wrapped
        return cls(model, tokenizer)

    def encode_image(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Images -> embeddings [N, E], L2-normalised. One image gives one row; a tensor may also be a batch [N, 1, size, size].

        Files, Pillow images and arrays are decoded as for training: upright, 8-bit grey, deeper pixels rescaled from their
        minimum to their maximum. ValueError that names a file which cannot be used.
        """
        rows = iter(_each(images))
        parts = []
        while batch := [self._pixels(image)[0] for image in islice(rows, _BATCH)]:  # decoded images do not pile up
            parts.append(F.normalize(self._run(self.model.get_image_features, torch.stack(batch)), dim=-1))
        return torch.cat(parts) if parts else torch.zeros(0, self.model.config.projection_dim)

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> embeddings [N, E], L2-normalised. What a text has beyond the model's window of tokens does not count."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        parts = []
        for start in range(0, len(texts), _BATCH):
            words = self.tokenizer(
                texts[start : start + _BATCH], truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt"
            )
            found = self._run(self.model.get_text_features, words["input_ids"], words["attention_mask"])
            parts.append(F.normalize(found, dim=-1))
        return torch.cat(parts) if parts else torch.zeros(0, self.model.config.projection_dim)

    def zero_shot(
        self, images: ImageInput | Sequence[ImageInput], present: Mapping[str, Sequence[str]],
        absent: Mapping[str, Sequence[str]] | None = None,
    ) -> Findings:  # fmt: skip
        """Score images for findings by prompts: `present` states each finding, `absent` denies it ("No evidence of edema.").

        With `absent`, scores are those of `mmclip evaluate zeroshot`. ValueError if a class has no prompt, if a prompt is longer
        than the model's window of tokens, or if the classes of `present` and `absent` differ.
        """
        if absent is not None and set(present) != set(absent):
            differing = sorted(set(present) ^ set(absent))
            raise ValueError(f"present and absent differ in {differing}: give both kinds of prompt for each class")
        stated = self._class_embeddings(present)
        denied = None if absent is None else self._class_embeddings({name: absent[name] for name in present})
        embedded = self.encode_image(images)
        scores = embedded @ (stated if denied is None else stated - denied).T
        scale = self.model.logit_scale.detach().exp().cpu()
        return Findings(tuple(present), scores, None if denied is None else torch.sigmoid(scale * scores))

    def attention_map(self, image: ImageInput, text: str, *, full_size: bool = False) -> Tensor:
        """How strongly each patch of an image responds to a text [grid, grid], as the scores that guide masking are made.

        full_size: interpolated to [height, width] of the image. ValueError if the text has no word.
        """
        pixels, (height, width) = self._pixels(image)
        words = self.tokenizer(
            [text], truncation=True, max_length=self.max_tokens, return_special_tokens_mask=True, return_tensors="pt"
        )
        evidence = words["special_tokens_mask"] == 0
        if not evidence.any():
            raise ValueError(f"the text {text!r} has no word to look for: name a finding")
        scores = self._run(self._score, pixels[None], words["input_ids"], evidence)
        side = self.size // self.model.config.vision_config.patch_size
        grid = scores.unflatten(1, (side, side))
        return F.interpolate(grid[None], (height, width), mode="bilinear")[0, 0] if full_size else grid[0]

    def _score(self, pixels: Tensor, tokens: Tensor, evidence: Tensor) -> Tensor:
        words = self.model.get_word_features(tokens, torch.ones_like(tokens))
        patches, temperature = self.model.get_patch_features(pixels), self.model.config.attention_temperature
        return attention_scores(patches, words, evidence, temperature=temperature)

    def _class_embeddings(self, prompts: Mapping[str, Sequence[str]]) -> Tensor:
        """Mean embedding of each class's prompts [C, E]."""
        if not prompts:
            raise ValueError("no class to score: pass prompts such as {'Edema': ['There is edema.']}")
        for name, texts in prompts.items():
            if isinstance(texts, str) or not texts:
                raise ValueError(f"the class {name!r} needs a list of at least one prompt, found {texts!r}")
            for text in texts:
                tokens = len(self.tokenizer(text)["input_ids"])
                if tokens > self.max_tokens:
                    raise ValueError(f"a prompt of {name!r} has {tokens} tokens, the model reads {self.max_tokens}: shorten it")
        embedded = self.encode_text([text for texts in prompts.values() for text in texts])
        return torch.stack([part.mean(0) for part in embedded.split([len(texts) for texts in prompts.values()])])

    def _pixels(self, image: ImageInput) -> tuple[Tensor, tuple[int, int]]:
        """Normalised pixels [1, size, size], and the height and width of the image that they show."""
        if isinstance(image, Tensor):
            if image.shape != (1, self.size, self.size):
                raise ValueError(f"an image tensor has shape {list(image.shape)}; the model takes [1, {self.size}, {self.size}]")
            return image.float(), (self.size, self.size)
        found = decoded(image)
        return torch.from_numpy(crop_image(found, WHOLE, self.size)), (found.height, found.width)

    @torch.no_grad()
    def _run(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        device = self.model.logit_scale.device
        return function(*(value.to(device) for value in inputs)).float().cpu()


def _each(images: ImageInput | Sequence[ImageInput]) -> Sequence[ImageInput]:
    if isinstance(images, Tensor) and images.ndim == 4:
        return list(images)
    return images if isinstance(images, list | tuple) else [images]


def decoded(image: ImageInput) -> Image.Image:
    """An image of any accepted kind, in mode "L". ValueError for what is none."""
    if isinstance(image, str | os.PathLike):
        image = Path(image)
    if isinstance(image, Path | bytes):
        return decode_dicom(image) if is_dicom(image) else decode_image(image)
    if isinstance(image, Image.Image | np.ndarray):
        return decode_image(image)
    if hasattr(image, "PhotometricInterpretation"):
        return decode_dicom(image)
    raise ValueError(f"{type(image).__name__} is no image: give a file, a Pillow image, an array [height, width] or DICOM data")
