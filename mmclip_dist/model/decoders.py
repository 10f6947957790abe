"""The two decoders. Each rebuilds what was masked in one modality with the help of the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mmclip_dist.config import Decoder
from mmclip_dist.model.encoders import pad_row, with_a_row
from mmclip_dist.model.packing import Packing


class CrossDecoder(nn.Module):
    """Transformer decoder whose queries attend to each other and to a memory of the other modality."""

    def __init__(
        self, config: Decoder, *, query_width: int, memory_width: int, output_width: int, max_length: int
    ) -> None:
        super().__init__()
        self.query = nn.Linear(query_width, config.width)
        self.memory = nn.Linear(memory_width, config.width)
        self.position = nn.Parameter(torch.randn(1, max_length, config.width) * 0.02)
        # One memory slot is always visible: a sample without any text (or image) still has something to attend to.
        self.nothing = nn.Parameter(torch.zeros(1, 1, config.width))
        self.layers = nn.ModuleList(DecoderLayer(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, output_width)

    def forward(
        self, query: Tensor, memory: Tensor, memory_mask: Tensor | None, packing: Packing | None = None
    ) -> Tensor:
        """query [B, L, Dq], memory [B, K, Dm], memory_mask [B, K] bool (True: present) -> features [B, L, width].

        packing: the queries are of texts that share rows [R, L, Dq], each with a memory of its own -> features [R, L, width].
        """
        if packing is None and len(query) == 0:
            return with_a_row(self, query, memory, memory_mask)
        position = self.position[:, : query.shape[1]] if packing is None else self.position[0, packing.column]
        if packing is not None and packing.texts == 0:  # packing then leaves one row of padding
            packing, memory = None, pad_row(memory)
        hidden = self.query(query) + position
        seen = torch.cat([self.nothing.expand(len(memory), -1, -1).to(memory.dtype), self.memory(memory)], dim=1)
        visible = None
        if memory_mask is not None:
            visible = torch.cat([memory_mask.new_ones(len(memory), 1), memory_mask], dim=1)[:, None, None]
        blocks = None if packing is None else packing.blocks(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, seen, visible, blocks, packing)
        features: Tensor = self.norm(hidden)
        return features


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to the memory, MLP. Each normalises its input and adds its output (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        # No biases before attention: softmax cancels a key's bias, and the output's bias covers a value's.
        self.self_in, self.self_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.cross_query, self.cross_memory = (nn.Linear(width, times * width, bias=False) for times in (1, 2))
        self.cross_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        # As in nn.MultiheadAttention: Glorot's bound for all three projections together. With a bound per matrix AttMIM
        # learned more slowly (RESULTS.md).
        for module in (self.self_in, self.cross_query, self.cross_memory):
            nn.init.uniform_(module.weight, -((1.5 / width) ** 0.5), (1.5 / width) ** 0.5)
        for module in (self.self_out, self.cross_out):
            nn.init.zeros_(module.bias)

    def forward(
        self, hidden: Tensor, memory: Tensor, visible: Tensor | None, blocks: Tensor | None, packing: Packing | None
    ) -> Tensor:
        """hidden [R, L, W], memory [n, K, W], visible [n, 1, 1, K] bool, blocks [R, 1, L, L] -> [R, L, W].

        packing: how n texts share the R rows. Only the product of queries and memory is computed text by text; without it, R = n.
        """
        query, key, value = self.self_in(self.self_norm(hidden)).chunk(3, dim=-1)
        hidden = hidden + self.self_out(_attention(query, key, value, self.heads, blocks))
        query = self.cross_query(self.cross_norm(hidden))
        key, value = self.cross_memory(memory).chunk(2, dim=-1)
        if packing is None:
            crossed = _attention(query, key, value, self.heads, visible)
        else:
            crossed = packing.pack(_attention(packing.unpack(query), key, value, self.heads, visible))
        hidden = hidden + self.cross_out(crossed)
        added: Tensor = self.mlp(self.mlp_norm(hidden))
        return hidden + added


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """query [n, L, W], key and value [n, K, W], mask broadcast to [n, heads, L, K] -> [n, L, W]."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
