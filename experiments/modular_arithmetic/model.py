"""A causal transformer that says the result after the equals sign.

Shapes: tokens (b, l) int64, logits (b, vocabulary).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Block(nn.Module):
    """Attention and a perceptron, each after a normalisation and beside a short cut."""

    def __init__(self, width: int, num_heads: int, activation: str, *, causal: bool = True) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), ACTIVATIONS[activation](), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, self.num_heads, -1)
        query, key, value = self.qkv(self.norm_attention(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    """Decoder with learned positions; the logits are those of the last token."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        activation: str,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(
            *(Block(width, num_heads, activation) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.tokens(tokens) + self.places)
        return self.head(self.norm(hidden[:, -1]))
