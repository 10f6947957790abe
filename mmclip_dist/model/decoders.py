"""The two decoders: each rebuilds what was masked in one modality while looking at the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmclip_dist.config import Decoder
from mmclip_dist.model.encoders import with_a_row


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
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                config.width,
                config.heads,
                4 * config.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, output_width)

    def forward(self, query: Tensor, query_mask: Tensor | None, memory: Tensor, memory_mask: Tensor | None) -> Tensor:
        """query [B, L, Dq], memory [B, K, Dm], masks [B, L] and [B, K] bool (True: present) -> features [B, L, width]."""
        if len(query) == 0:
            return with_a_row(self, query, query_mask, memory, memory_mask)
        hidden = self.query(query) + self.position[:, : query.shape[1]]
        seen = torch.cat([self.nothing.expand(len(memory), -1, -1).to(memory.dtype), self.memory(memory)], dim=1)
        ignored = (
            None if memory_mask is None else torch.cat([memory_mask.new_zeros(len(memory), 1), ~memory_mask], dim=1)
        )
        padding = None if query_mask is None else ~query_mask
        for layer in self.layers:
            hidden = layer(hidden, seen, tgt_key_padding_mask=padding, memory_key_padding_mask=ignored)
        features: Tensor = self.norm(hidden)
        return features
