"""Models of other programs under the same protocols: small random ones, and our own export."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmclip_shards.datasets.synthetic.set import pack_synthetic
from mmclip_shards.manifest import load_manifest
from PIL import Image
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
)

from mmclip_dist.checkpoint.folder import Meta, checkpoint_path
from mmclip_dist.checkpoint.model_files import write_model
from mmclip_dist.evaluate import tasks
from mmclip_dist.evaluate.encoders import Encoder, Trained, Transformers, open_encoder, state_hash
from mmclip_dist.evaluate.protocol import load_protocol
from mmclip_dist.export.export import export
from mmclip_dist.model.build import build_model

TEXTS = ["There is effusion.", "No evidence of a pneumothorax in the left lung, which is clear."]
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
          "patch_size": 8}  # fmt: skip


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 44), dtype=np.uint8))


def text_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": len(tokenizer), "max_position_embeddings": 40, "projection_dim": 32,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id,
            "eos_token_id": tokenizer.sep_token_id}  # fmt: skip


def write_processor(folder: Path, kind: str) -> None:
    (folder / "preprocessor_config.json").write_text(
        f'{{"image_processor_type": "{kind}", "do_resize": true, "size": {{"height": 32, "width": 32}}, "do_center_crop": false, '
        '"do_rescale": true, "do_normalize": true, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "resample": 3}'
    )


@pytest.fixture(scope="module")
def clip(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPConfig(text_config=text_config(tokenizer), vision_config=VISION | {"projection_dim": 32}, projection_dim=32)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    write_processor(folder, "CLIPImageProcessor")
    return folder


@pytest.fixture(scope="module")
def siglip(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("siglip")
    SiglipModel(SiglipConfig(text_config=text_config(tokenizer), vision_config=VISION)).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    write_processor(folder, "SiglipImageProcessor")
    return folder


@pytest.fixture(scope="module")
def run(sets, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder, manifest = tmp_path_factory.mktemp("run"), load_manifest(sets.paired)
    checkpoint_path(folder, 3).mkdir(parents=True)
    shards = tuple(shard.sha256 for shard in manifest.shards)
    model = build_model(sets.config(), tokenizer, manifest.labels)
    write_model(checkpoint_path(folder, 3), model, tokenizer, sets.config(), Meta(3, 1, 1, manifest.labels, shards))
    return str(folder)


def embedded(encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    with encoder.evaluating():
        pixels = torch.stack([encoder.pixels(picture(seed)) for seed in range(3)])
        return encoder.embed_images(pixels), encoder.embed_texts(TEXTS)


def test_clip_is_that_of_its_own_forward(clip: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with open_encoder(f"hf:{clip}") as encoder:
        images, texts = embedded(encoder)
        assert isinstance(encoder, Transformers) and encoder.window == 40 and encoder.trained_on is None and encoder.seen is None
        pixels = torch.stack([encoder.pixels(picture(seed)) for seed in range(3)])
        assert pixels.shape == (3, 3, 32, 32)
        grey = torch.tensor(np.asarray(picture().resize((32, 32), Image.Resampling.BICUBIC)) / 255)
        for channel, mean in enumerate((0.5, 0.4, 0.3)):  # the same grey value in all channels, by the folder's own processor
            torch.testing.assert_close(pixels[0, channel].double(), (grey - mean) / 0.2, atol=0.05, rtol=0)
        words = tokenizer(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            wanted = CLIPModel.from_pretrained(clip).eval()(
                input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels
            )
        torch.testing.assert_close(images, wanted.image_embeds, atol=1e-6, rtol=0)
        torch.testing.assert_close(texts, wanted.text_embeds, atol=1e-6, rtol=0)
        with torch.no_grad():
            assert encoder.features(pixels).shape == (3, 32) and encoder.patches(pixels).shape == (3, 16, 32)


def test_siglip_texts_fill_the_window(siglip: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Its text embedding is its last position: padded to the longest text it would be another one."""
    with open_encoder(f"hf:{siglip}") as encoder:
        images, texts = embedded(encoder)
        pixels = torch.stack([encoder.pixels(picture(seed)) for seed in range(3)])
        words = tokenizer(TEXTS, padding="max_length", max_length=40, return_tensors="pt")
        with torch.no_grad():
            wanted = SiglipModel.from_pretrained(siglip).eval()(input_ids=words["input_ids"], pixel_values=pixels)
        torch.testing.assert_close(images, wanted.image_embeds, atol=1e-6, rtol=0)
        torch.testing.assert_close(texts, wanted.text_embeds, atol=1e-6, rtol=0)
        alone = encoder.embed_texts(TEXTS[:1])
        torch.testing.assert_close(alone, texts[:1], atol=1e-6, rtol=0)  # whatever stands beside it
        with pytest.raises(ValueError, match="has no patches in the space of its texts, so it cannot point"):
            encoder.patches(pixels)


@pytest.mark.slow
def test_our_export_is_the_model_that_was_exported(run: str, tmp_path: Path) -> None:
    export(run, tmp_path / "model", "hf")
    name = f"hf:{tmp_path / 'model'}"
    with pytest.raises(ValueError, match=r"brings code of its own .* read it, then pass --trust-remote-code"), open_encoder(name):
        pass
    with open_encoder(run) as ours, open_encoder(name, trust_remote_code=True) as exported:
        for mine, its in zip(embedded(ours), embedded(exported), strict=True):
            torch.testing.assert_close(its, mine, atol=1e-5, rtol=0)
        pixels = torch.stack([ours.pixels(picture(seed)) for seed in range(2)])
        torch.testing.assert_close(torch.stack([exported.pixels(picture(seed)) for seed in range(2)]), pixels)
        assert exported.window == ours.window == 48 and exported.trained_on == ours.trained_on
        with torch.no_grad():
            torch.testing.assert_close(exported.features(pixels), ours.features(pixels), atol=1e-5, rtol=0)
            torch.testing.assert_close(exported.patches(pixels), ours.patches(pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_they_stand_in_the_same_table(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    folder = request.getfixturevalue(kind)
    pack_synthetic(str(tmp_path / "set"), 40, seed=21, size=40, splits={"test": 1.0})
    with open_encoder(f"hf:{folder}") as encoder:
        found = tasks.zeroshot(tasks.Request(encoder, [str(tmp_path / "set")], load_protocol("siim@cxrclip")))
        retrieved = tasks.retrieval(tasks.Request(encoder, [str(tmp_path / "set")], load_protocol("own")))
    assert found.document["model"] == f"hf:{folder}" and 0 <= found.document["auroc"]["Pneumothorax"] <= 1
    assert found.document["leak"]["checked"] == [] and len(found.document["checkpoint_sha256"]) == 64
    assert any("does not tell which patients it was trained on" in line for line in found.notes)
    assert retrieved.document["results"]["image_to_text_each"]["queries"] == 40


def test_the_hash_is_of_all_weights() -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    assert state_hash(one) == state_hash(other)
    with torch.no_grad():
        other.bias[1] += 1e-7
    assert state_hash(one) != state_hash(other)


def test_what_is_no_dual_encoder_is_one_line(clip: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**shape, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(str(tmp_path / "bert"))
    write_processor(tmp_path / "bert", "CLIPImageProcessor")
    (tmp_path / "empty").mkdir()
    for name, told in (
        (f"hf:{tmp_path / 'bert'}", "is a BertModel, which lacks get_image_features and get_text_features: name a dual encoder"),
        (f"hf:{tmp_path / 'empty'}", "has no config.json"),
        ("open_clip:ViT-B-32", "needs open_clip, which is not installed: pip install"),
        (str(tmp_path / "empty"), "no checkpoint at"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=told) as error:
            patch.setitem(sys.modules, "open_clip", None)
            with open_encoder(name):
                pass
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--average is of a run's own weights"), open_encoder(f"hf:{clip}", average=True):
        pass


class OpenClipModel(nn.Module):
    """As much of an open_clip model as evaluation calls, with its signatures."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(12, 4), nn.Embedding(50, 4)

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        features = self.visual(image.flatten(1))
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        features = self.text(text).mean(1)
        return nn.functional.normalize(features, dim=-1) if normalize else features


def test_open_clip_is_called_by_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its documented interface: open_clip itself, which needs torchvision, is not installed here."""
    asked: list[object] = []

    class Tokenizer:
        context_length = 8

        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[len(word) % 50 for word in text.split()][:8] + [0] * (8 - len(text.split())) for text in texts])

        def encode(self, text: str) -> list[int]:
            return [1] * len(text.split())

    def create(name: str, pretrained: str | None) -> tuple[nn.Module, None, Any]:
        asked.append((name, pretrained))
        return OpenClipModel(), None, lambda image: torch.tensor(np.asarray(image.resize((2, 2)))).permute(2, 0, 1) / 255

    module = SimpleNamespace(create_model_and_transforms=create, get_tokenizer=lambda name: asked.append(name) or Tokenizer())
    monkeypatch.setitem(sys.modules, "open_clip", module)
    for name in ("open_clip:ViT-B-32", "open_clip:ViT-B-32:laion2b", "open_clip:hf-hub:org/name"):
        with open_encoder(name) as encoder:
            images, texts = embedded(encoder)
            assert images.shape == (3, 4) and texts.shape == (2, 4) and encoder.tokens("a b") == 4 and encoder.window == 8
            torch.testing.assert_close(images.norm(dim=-1), torch.ones(3))
    assert asked[::2] == [("ViT-B-32", None), ("ViT-B-32", "laion2b"), ("hf-hub:org/name", None)]


def test_a_model_of_ours_is_opened_with_what_it_says_of_itself(run: str, sets) -> None:
    with open_encoder(run) as encoder:
        assert isinstance(encoder, Trained) and encoder.trained_on == tuple(s.sha256 for s in load_manifest(sets.paired).shards)
        assert encoder.tokens(TEXTS[0]) > 4 and encoder.blank.shape == (1, 1, 32, 32)
