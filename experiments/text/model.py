"""A transformer over bytes, which sees pairs of bytes from its first step.

Shapes: bytes (b, l) int64, logits (b, l, 256): of the byte after each.
"""

import torch
from torch import Tensor, nn

from experiments.modular_arithmetic.model import Block


class ByteGPT(nn.Module):
    """Decoder with learned positions and tables of bytes, of those before, and of both together.

    A plain one of this size stays near the frequency of single bytes in the few hundred steps that
    a training takes here; the pairs let it begin where it can learn about words.
    """

    def __init__(
        self, length: int, *, width: int, num_layers: int, num_heads: int, num_pairs: int
    ) -> None:
        super().__init__()
        self.bytes, self.previous = nn.Embedding(256, width), nn.Embedding(256, width)
        self.pairs = nn.Embedding(num_pairs, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, "gelu") for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for table in (self.bytes, self.previous, self.pairs):
            nn.init.normal_(table.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        before = nn.functional.pad(text[:, :-1], (1, 0))
        pairs = (text * 31 + before * 7919) % self.pairs.num_embeddings
        tables = self.bytes(text) + self.previous(before) + self.pairs(pairs)
        return self.head(self.norm(self.blocks(tables + self.places)))
