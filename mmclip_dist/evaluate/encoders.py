"""What evaluation needs of a dual encoder, and three kinds of it: our own checkpoints, transformers' models, open_clip's.

Shape letters: N images or texts, P patches, S pixels a side, D width of the image encoder, E shared width.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmclip_shards.textfiles import read_json
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from mmclip_dist.checkpoint.folder import weights_hash
from mmclip_dist.checkpoint.mirror import local_checkpoint
from mmclip_dist.checkpoint.model_files import load_model
from mmclip_dist.data.seen import SEEN, Seen, load_seen
from mmclip_dist.data.transforms import WHOLE, crop_image
from mmclip_dist.model.mmclip import MMCLIP

HF, OPEN_CLIP = "hf:", "open_clip:"
_TEXTS = 128  # at once


class Encoder(ABC):
    """A dual encoder. model: whose mode is changed for the time of an evaluation; name: what the user called it; sha256: of its
    weights; window: tokens of a text at most; prompts: the file of the prompts that it was trained with, None for the embedded
    ones; trained_on: sha256 of the training shards, seen: their patients and images, each None if the model does not tell.
    features_are: what `features` gives, in words for a result."""

    model: Any
    name: str
    sha256: str
    window: int
    prompts: str | None = None
    trained_on: tuple[str, ...] | None = None
    seen: Seen | None = None
    features_are: ClassVar[str] = "pooled, before the projection"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def blank(self) -> Tensor:
        """An image without content [1, channels, S, S]."""
        return self.pixels(Image.new("L", (32, 32)))[None]

    @abstractmethod
    def pixels(self, image: Image.Image) -> Tensor:
        """A decoded image in mode "L" -> [channels, S, S], on the CPU."""

    @abstractmethod
    def tokens(self, text: str) -> int:
        """How many tokens a text has, uncut."""

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """[N, channels, S, S] -> [N, E], L2-normalised."""

    @abstractmethod
    def _embed_texts(self, texts: list[str]) -> Tensor: ...

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """[N, channels, S, S] -> [N, D], what a probe sees."""

    def patches(self, pixels: Tensor) -> Tensor:
        """[N, channels, S, S] -> patches of a square grid in the space of the texts [N, P, E], L2-normalised. ValueError if the
        model has none."""
        raise ValueError(f"{self.name} has no patches in the space of its texts, so it cannot point: evaluate another task")

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """-> [N, E], L2-normalised. What is beyond the window is cut off."""
        parts = [self._embed_texts(list(texts[first : first + _TEXTS])) for first in range(0, len(texts), _TEXTS)]
        return torch.cat(parts)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without gradients and in evaluation mode, then in the mode of before."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)


class Trained(Encoder):
    """A model of this package."""

    features_are = "mean of the patches, before the projection"

    def __init__(
        self, model: MMCLIP, tokenizer: PreTrainedTokenizerBase, *, name: str = "", sha256: str = "", prompts: str | None = None,
        trained_on: tuple[str, ...] | None = None, seen: Seen | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.name, self.sha256, self.prompts = model, tokenizer, name, sha256, prompts
        self.trained_on, self.seen = trained_on, seen
        self.window, self.size = model.config.model.text.max_tokens, model.config.model.image.size

    @property
    def device(self) -> torch.device:
        return self.model.log_scale.device

    @property
    def blank(self) -> Tensor:
        return torch.zeros(1, 1, self.size, self.size)

    def pixels(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(crop_image(image, WHOLE, self.size))

    def tokens(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self.model.embed_images(pixels)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        words = self.tokenizer(texts, padding=True, truncation=True, max_length=self.window, return_tensors="pt").to(self.device)
        return self.model.embed_texts(words["input_ids"], words["attention_mask"].bool())

    def features(self, pixels: Tensor) -> Tensor:
        return self._seen(pixels).mean(1)

    def patches(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.model.image_head(self._seen(pixels)), dim=-1)

    def _seen(self, pixels: Tensor) -> Tensor:
        return self.model.image.encode(self.model.image.embed(pixels.to(self.model.mask_token.dtype)))


class Transformers(Encoder):
    """A dual encoder of transformers: `get_image_features` and `get_text_features`, with its own processor and tokenizer."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, name: str) -> None:
        self.model, self.processor, self.tokenizer, self.name = model, processor, tokenizer, name
        self.sha256 = state_hash(model)
        text = model.config.text_config
        self.window = int(getattr(model.config, "max_tokens", None) or text.max_position_embeddings)
        # SigLIP's text embedding is its last position: it was trained on texts padded to the window, without a mask.
        self.whole_window = model.config.model_type.startswith("siglip")
        self.grey = getattr(model.config.vision_config, "num_channels", 3) == 1

    def pixels(self, image: Image.Image) -> Tensor:
        made = self.processor(images=[image if self.grey else image.convert("RGB")], return_tensors="pt")
        return torch.as_tensor(made["pixel_values"][0])

    def tokens(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def embed_images(self, pixels: Tensor) -> Tensor:
        return F.normalize(_pooled(self.model.get_image_features(pixel_values=pixels)), dim=-1)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        padding = "max_length" if self.whole_window else True
        words = self.tokenizer(texts, padding=padding, truncation=True, max_length=self.window, return_tensors="pt")
        words = words.to(self.device)
        mask = {} if self.whole_window else {"attention_mask": words["attention_mask"]}
        return F.normalize(_pooled(self.model.get_text_features(input_ids=words["input_ids"], **mask)), dim=-1)

    def features(self, pixels: Tensor) -> Tensor:
        seen = self.model.vision_model(pixel_values=pixels)
        pooled = getattr(seen, "pooler_output", None)
        return seen.last_hidden_state.mean(1) if pooled is None else pooled

    def patches(self, pixels: Tensor) -> Tensor:
        if hasattr(self.model, "get_patch_features"):  # our own export
            return F.normalize(self.model.get_patch_features(pixels), dim=-1)
        if self.model.config.model_type == "clip":
            seen = self.model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
            return F.normalize(self.model.visual_projection(self.model.vision_model.post_layernorm(seen)), dim=-1)
        return super().patches(pixels)


class OpenClip(Encoder):
    """A model of open_clip."""

    features_are = "embedding, before normalisation"

    def __init__(self, model: Any, transform: Any, tokenizer: Any, name: str) -> None:
        self.model, self.transform, self.tokenizer, self.name = model, transform, tokenizer, name
        self.sha256, self.window = state_hash(model), int(tokenizer.context_length)

    def pixels(self, image: Image.Image) -> Tensor:
        return self.transform(image.convert("RGB"))

    def tokens(self, text: str) -> int:
        inner = getattr(self.tokenizer, "tokenizer", None)  # of open_clip.tokenizer.HFTokenizer
        return len(inner(text)["input_ids"]) if inner is not None else len(self.tokenizer.encode(text)) + 2

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels, normalize=True)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)

    def features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)


def _pooled(found: Any) -> Tensor:
    """transformers before and since version 5 give a tensor, or an output whose pooler_output it is."""
    return found if isinstance(found, Tensor) else found.pooler_output


def state_hash(model: nn.Module) -> str:
    """sha256 of the names and values of a model's state."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().reshape(-1).view(torch.uint8).numpy()).tobytes())
    return digest.hexdigest()


# -- Opening ----------------------------------------------------------------------------------------------------------


@contextmanager
def open_encoder(name: str, *, average: bool = False, trust_remote_code: bool = False) -> Iterator[Encoder]:
    """A model by its name, on a GPU if there is one: a run, a checkpoint or a mirror's URL; `hf:` and a folder or hub id;
    `open_clip:` and MODEL[:PRETRAINED].

    average: of the weights, for a run that keeps one. ValueError in one line for what cannot be opened.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if average and name.startswith((HF, OPEN_CLIP)):
        raise ValueError(f"--average is of a run's own weights; {name} has one set of them: leave it out")
    if name.startswith(HF):
        encoder: Encoder = _transformers(name.removeprefix(HF), name, trust_remote_code)
    elif name.startswith(OPEN_CLIP):
        encoder = _open_clip(name.removeprefix(OPEN_CLIP), name)
    else:
        with local_checkpoint(name) as folder:
            model, tokenizer, config, meta = load_model(folder, average=average)
            encoder = Trained(
                model, tokenizer, name=name, sha256=weights_hash(folder, average=average), prompts=config.prompts.file,
                trained_on=meta.trained_on, seen=load_seen(folder / SEEN) if (folder / SEEN).is_file() else None,
            )  # fmt: skip
            encoder.model.to(device)
            yield encoder
        return
    encoder.model.eval().to(device)
    yield encoder


def _transformers(place: str, name: str, trust_remote_code: bool) -> Transformers:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    config = Path(place) / "config.json"
    if Path(place).is_dir() and not config.is_file():
        raise ValueError(f"{name}: {place} has no config.json: name a folder of `mmclip export --format hf` or of transformers")
    if config.is_file() and "auto_map" in read_json(config, "export the model again") and not trust_remote_code:
        raise ValueError(f"{name} brings code of its own ({place}/*.py): read it, then pass --trust-remote-code")
    try:
        model = AutoModel.from_pretrained(place, trust_remote_code=trust_remote_code)
        processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{name} cannot be opened: {' '.join(str(error).split())[:300]}") from error
    lacking = [method for method in ("get_image_features", "get_text_features") if not hasattr(model, method)]
    if lacking:
        raise ValueError(f"{name} is a {type(model).__name__}, which lacks {' and '.join(lacking)}: name a dual encoder")
    encoder = Transformers(model.float(), processor, tokenizer, name)
    about = Path(place) / "training.json"  # of our own exports
    if about.is_file():
        sets = read_json(about, "export the model again").get("sets", [])
        encoder.trained_on = tuple(sha256 for one in sets for sha256 in one["shards"])
    return encoder


def _open_clip(words: str, name: str) -> OpenClip:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(f'{name} needs open_clip, which is not installed: pip install "mmclip-dist[bench]"') from error
    except RuntimeError as error:  # torchvision, for another build of PyTorch
        raise ValueError(
            f"open_clip, which {name} needs, cannot be imported ({error}): install the torchvision of this PyTorch's own build"
        ) from error
    model_name, pretrained = words, None
    if not words.startswith(("hf-hub:", "local-dir:")):
        model_name, _, tag = words.partition(":")
        pretrained = tag or None
    try:
        model, _, transform = open_clip.create_model_and_transforms(model_name, pretrained=pretrained)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{name} cannot be opened: {' '.join(str(error).split())[:300]}") from error
    return OpenClip(model.float(), transform, open_clip.get_tokenizer(model_name), name)
