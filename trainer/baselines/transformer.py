"""The transformer pieces that SASRec, BERT4Rec and FDSA share.

Shapes: B sequences, T places, N items, d width, H heads. Rows are left-padded, so that the last place is the newest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 0.02
"""Of all tables and matrices (BERT's); with it the first cross entropy over N items is log N."""


class Block(nn.Module):
    """Pre-norm self-attention and a feed-forward layer of 4 d with GELU, each behind dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.mixed = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` [B, T, d]; mask bool [B, 1, T, T], True where a place (row) may look at another (column)."""
        rate = self.dropout if self.training else 0.0
        query, key, value = self.mixed(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), rate)
        return x + F.dropout(self.feed(self.feed_norm(x)), rate)


class Encoder(nn.Module):
    """Blocks over vectors with learnt places; `causal`: a place sees itself and what is older, else the whole row."""

    def __init__(self, *, width: int, layers: int, heads: int, dropout: float, length: int, causal: bool) -> None:
        super().__init__()
        self.causal, self.dropout = causal, dropout
        self.places = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """`x` [B, T, d] and real bool [B, T] (False = padding) -> [B, T, d], normed; T at most the number of places."""
        size = x.shape[1]
        x = F.dropout(x + self.places[-size:], self.dropout if self.training else 0.0)
        mask = real[:, None, None, :].expand(-1, 1, size, -1)
        if self.causal:
            mask = mask & torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
        # Padding looks at itself: a softmax over nothing would be NaN and spoil the gradient.
        mask = mask | torch.eye(size, dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


@torch.no_grad()
def reset(module: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights anew: tables and matrices normal with `INIT_STD`, biases 0, norms 1."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * INIT_STD)
        else:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)


def left_padded(sequences: list[list[int]], length: int, padding: int) -> Tensor:
    """int64 [B, length]: the newest `length` entries of each sequence at the right, `padding` before them."""
    rows = torch.full((len(sequences), length), padding, dtype=torch.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        newest = sequence[-length:]
        if newest:
            row[-len(newest) :] = torch.tensor(newest)
    return rows
