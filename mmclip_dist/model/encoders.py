"""The two encoders, from `transformers`: a hub id, a local folder, or random weights of a configured shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, ViTConfig, ViTModel

from mmclip_dist.config import ImageEncoder, TextEncoder
from mmclip_dist.model.packing import Packing


class ImageTower(nn.Module):
    """ViT over single-channel radiographs. It does not use a [CLS] token: features are pooled over patches, so that patches and
    whole images share one space, and attention scores need no training of their own."""

    def __init__(self, config: ImageEncoder, stored: Path | None = None) -> None:
        """stored: folder with the shape that a checkpoint was trained in, whose weights are about to be loaded."""
        super().__init__()
        if stored:
            self.vit = ViTModel(ViTConfig.from_pretrained(stored), add_pooling_layer=False)
        elif config.pretrained:
            self.vit = _load_vit(config)
        else:
            self.vit = ViTModel(_vit_config(config), add_pooling_layer=False)
        self.width: int = self.vit.config.hidden_size
        self.patch = config.patch

    def embed(self, image: Tensor) -> Tensor:
        """image [B, 1, S, S] -> patch embeddings with positions [B, P, D]."""
        embeddings: Tensor = self.vit.embeddings(image)
        return embeddings[:, 1:]

    def encode(self, patches: Tensor) -> Tensor:
        """Any subset of embedded patches [B, K, D] -> features [B, K, D]. Without an image one row of padding runs through: see
        `with_a_row`."""
        if len(patches) == 0:
            return self.encode(pad_row(patches))[:0]
        for layer in self.layers:
            patches = layer(patches)
        features: Tensor = self.vit.layernorm(patches)
        return features

    @property
    def embeddings(self) -> nn.Module:
        return self.vit.embeddings

    @property
    def layers(self) -> nn.ModuleList:
        # transformers 5.17 keeps the layers in an inner encoder, 5.23 in the model itself.
        vit: Any = self.vit
        layers: nn.ModuleList = vit.layers if hasattr(vit, "layers") else vit.encoder.layer
        return layers


class TextTower(nn.Module):
    """BERT-family encoder of reports and prompts. Several share a row, so that padding is not computed."""

    def __init__(self, config: TextEncoder, vocabulary: int, stored: Path | None = None) -> None:
        """vocabulary: tokens of the tokenizer. stored: as in `ImageTower`."""
        super().__init__()
        if stored:
            self.bert = AutoModel.from_config(AutoConfig.from_pretrained(stored), add_pooling_layer=False)
        elif config.pretrained:
            found = AutoConfig.from_pretrained(_resolve(config.pretrained))
            found.hidden_dropout_prob = found.attention_probs_dropout_prob = 0.0
            self.bert = AutoModel.from_pretrained(_resolve(config.pretrained), config=found, add_pooling_layer=False)
            if self.bert.config.vocab_size < vocabulary:
                raise ValueError(
                    f"model.text.tokenizer has {vocabulary} tokens, but {config.pretrained} embeds "
                    f"{self.bert.config.vocab_size}; use the tokenizer that the weights were trained with"
                )
        else:
            self.bert = BertModel(_bert_config(config, vocabulary), add_pooling_layer=False)
        self.width: int = self.bert.config.hidden_size
        self.first_position = _first_position(self.bert)
        if config.pretrained and not stored:
            _check_packing(self, config.pretrained)

    def forward(self, tokens: Tensor, mask: Tensor, packing: Packing | None = None) -> Tensor:
        """tokens [N, T] int64, mask [N, T] bool (True: a token) -> features [N, T, D], 0 where there is no token.

        packing: that of the mask, if it is at hand. Without a single token, one row of padding runs through the encoder, with no
        gradient but 0: see `with_a_row`.
        """
        packing = packing or self.pack(mask)
        features: Tensor = self.bert(
            input_ids=packing.pack(tokens), position_ids=packing.column + self.first_position,
            attention_mask=packing.blocks(self.bert.dtype),
        ).last_hidden_state  # fmt: skip
        return packing.unpack(features)

    def embed(self, tokens: Tensor, packing: Packing) -> Tensor:
        """tokens [N, T] int64 -> what enters the encoder's first layer, in packed rows [R, L, D]."""
        embedded: Tensor = self.embeddings(input_ids=packing.pack(tokens), position_ids=packing.column + self.first_position)
        return embedded

    def pack(self, mask: Tensor) -> Packing:
        """mask [N, T] bool -> how the texts share rows. Every pass over them uses it."""
        return Packing.of(mask, self.width)

    @property
    def embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.bert.embeddings
        return embeddings

    @property
    def layers(self) -> nn.ModuleList:
        # Model families name the list of layers differently: take the one whose length is the encoder's depth.
        depth = self.bert.config.num_hidden_layers
        found = [m for m in self.bert.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if not found:
            raise ValueError(f"model.text.pretrained: no list of {depth} layers in a {type(self.bert).__name__}")
        return found[0]


def with_a_row(module: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Run a module that has no row to work on over one row of padding -> [0, L, D]. inputs [0, L, ...], masks bool.

    A rank may well hold unpaired images alone. It must still run every module, forwards and backwards, in the order of the
    other ranks: under ZeRO-3 they gather each module's weights together, and one that stays away would hang the rest. The
    row is present in every mask (attention over nothing is NaN), and no gradient but 0 comes back from it.
    """
    features: Tensor = module.forward(*(None if value is None else pad_row(value) for value in inputs))
    assert inputs[0] is not None
    return features[:0, : inputs[0].shape[1]]


def pad_row(value: Tensor) -> Tensor:
    """[0, L, ...] -> [1, max(L, 1), ...], still attached to the graph of `value`."""
    padding = (0, 0) * (value.ndim - 2) + (0, int(value.shape[1] == 0), 0, 1)
    return nn.functional.pad(value, padding, value=value.dtype == torch.bool)


def pool(features: Tensor, mask: Tensor) -> Tensor:
    """Mean of the features that count. [N, T, D], [N, T] bool -> [N, D]."""
    weight = mask[:, :, None].to(features.dtype)
    return (features * weight).sum(1) / weight.sum(1).clamp(min=1)


def _first_position(bert: nn.Module) -> int:
    """The position id of a text's first token: 0 for BERT, one past the padding's id for RoBERTa-like encoders."""
    positions = getattr(getattr(bert, "embeddings", None), "position_embeddings", None)
    if not isinstance(positions, nn.Embedding):
        raise ValueError(f"model.text.pretrained: {_CANNOT_PACK.format(type(bert).__name__)}")
    return 0 if positions.padding_idx is None else positions.padding_idx + 1


_CANNOT_PACK = (
    "in a {} a token's features depend on where in a row its report lies, or on the other reports there; use an encoder "
    "with learned absolute positions and full attention, as in BERT or RoBERTa"
)


@torch.no_grad()
def _check_packing(encoder: TextTower, name: str) -> None:
    """ValueError if the encoder gives texts that share a row other features than each alone (sliding windows, FNet, ...)."""
    tokens = encoder.bert.config.vocab_size - 1 - torch.arange(5).expand(3, -1)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    alone = [encoder.bert(input_ids=tokens[row : row + 1, : mask[row].sum()]).last_hidden_state[0] for row in range(3)]
    try:
        packed = encoder(tokens, mask)[mask]
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"model.text.pretrained={name}: {_CANNOT_PACK.format(type(encoder.bert).__name__)}") from error
    if not torch.allclose(packed, torch.cat(alone), rtol=1e-2, atol=1e-3):
        raise ValueError(f"model.text.pretrained={name}: {_CANNOT_PACK.format(type(encoder.bert).__name__)}")


def _resolve(name: str) -> str:
    if "/" in name and name.startswith((".", "/")) and not Path(name).is_dir():
        raise ValueError(f"no folder {name!r} with pretrained weights")
    return name


def _spread(width: int) -> float:
    """Standard deviation of initial weights: 0.02 at width 768, in proportion to 1 / sqrt(fan-in) elsewhere.

    At a small width, 0.02 leaves all pooled features nearly parallel, and the contrastive loss on its plateau for long.
    """
    return 0.02 * (768 / width) ** 0.5


def _vit_config(config: ImageEncoder) -> ViTConfig:
    # No dropout, as usual in pretraining. It also makes a step a function of its batch.
    return ViTConfig(
        image_size=config.size, patch_size=config.patch, num_channels=1, hidden_size=config.width,
        num_hidden_layers=config.depth, num_attention_heads=config.heads, intermediate_size=4 * config.width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=_spread(config.width),
    )  # fmt: skip


def _bert_config(config: TextEncoder, vocabulary: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary, hidden_size=config.width, num_hidden_layers=config.depth,
        num_attention_heads=config.heads, intermediate_size=4 * config.width, max_position_embeddings=max(512, config.max_tokens),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=_spread(config.width),
    )  # fmt: skip


def _load_vit(config: ImageEncoder) -> ViTModel:
    """Pretrained weights, made to take one channel and `config.size` pixels."""
    vit = ViTModel.from_pretrained(_resolve(config.pretrained or ""), add_pooling_layer=False)
    if vit.config.patch_size != config.patch:
        raise ValueError(
            f"model.image.patch={config.patch}, but {config.pretrained} has patches of {vit.config.patch_size}"
        )
    projection: Any = vit.embeddings.patch_embeddings.projection
    if projection.in_channels != 1:
        # A grey image repeated over the channels gives the same as one channel with the summed kernel.
        summed: Any = nn.Conv2d(1, projection.out_channels, projection.kernel_size, projection.stride)
        with torch.no_grad():
            summed.weight.copy_(projection.weight.sum(1, keepdim=True))
            summed.bias.copy_(projection.bias)
        vit.embeddings.patch_embeddings.projection = summed
        vit.embeddings.patch_embeddings.num_channels = vit.config.num_channels = 1
    if vit.embeddings.position_embeddings.shape[1] != 1 + config.grid**2:
        _resize_positions(vit, config)
    return vit


def _resize_positions(vit: ViTModel, config: ImageEncoder) -> None:
    """Interpolate the position embeddings to the grid of `config.size` pixels, once, at load."""
    positions = vit.embeddings.position_embeddings.detach()
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(config.grid, config.grid), mode="bicubic", align_corners=False)
    resized = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    vit.embeddings.position_embeddings = nn.Parameter(resized)
    patches = vit.embeddings.patch_embeddings
    patches.image_size = vit.embeddings.image_size = (config.size, config.size)
    patches.num_patches = config.grid**2
    vit.config.image_size = config.size
