"""BERT4Rec: a bidirectional transformer that fills in masked items (Sun et al., CIKM 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.baselines.fitting import PADDING, RankerConfig, TransformerRanker
from trainer.baselines.transformer import Encoder, left_padded

MASKED = 0.2
"""Share of the items of a row that are masked (published: 0.2 to 0.6 by data set; 0.2 on dense ones)."""
LAST_ONLY = 0.2
"""Share of the rows where the newest item alone is masked, as at inference (published so)."""
COPIES = 4
"""Times that an epoch masks each row anew: then as many items are predicted as next-item training predicts."""


class BERT4RecNetwork(nn.Module):
    """Items and masks [B, T] -> hidden states [B, T, d]; scores are products with the item table plus a bias."""

    def __init__(self, items: int, config: RankerConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(items + 1, config.width))  # the last row: the mask
        self.head = nn.Linear(config.width, config.width)
        self.head_norm = nn.LayerNorm(config.width)
        self.bias = nn.Parameter(torch.zeros(items))
        self.encoder = Encoder(
            width=config.width, layers=config.layers, heads=config.heads, dropout=config.dropout,
            length=config.length, causal=False,
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Rows int64 [B, T] with `PADDING` at the left."""
        return self.encoder(F.embedding(rows.clamp(min=0), self.table), rows != PADDING)

    def scores(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., N]."""
        return F.linear(self.head_norm(F.gelu(self.head(hidden))), self.table[:-1], self.bias)


class BERT4Rec(TransformerRanker):
    """Trained on masked items with cross entropy over the catalogue; the next item is a mask behind the history."""

    network: BERT4RecNetwork

    def __init__(self, items: int, config: RankerConfig | None = None, *, device: str | None = None) -> None:
        config = config or RankerConfig()
        super().__init__(items, config, lambda: BERT4RecNetwork(items, config), device)

    def _rows(self, sequences: list[list[int]]) -> Tensor:
        length = self.config.length
        pieces = [
            sequence[max(0, end - length) : end]
            for sequence in sequences
            for end in range(len(sequence), 0, -length)
        ]
        pieces = pieces * COPIES
        return left_padded(pieces, min(length, max((len(piece) for piece in pieces), default=0)), PADDING)

    def _loss(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        masked = masks(rows, generator)
        inputs = torch.where(masked, self.items, rows).to(self.device)
        masked, targets = masked.to(self.device), rows.to(self.device)
        targets = targets[masked]
        scores = self.network.scores(self.network(inputs)[masked])
        return F.cross_entropy(scores, targets, reduction="sum"), len(targets)

    def _scores(self, histories: list[list[int]]) -> Tensor:
        rows = left_padded([[*history, self.items] for history in histories], self.config.length, PADDING)
        return self.network.scores(self.network(rows.to(self.device))[:, -1])


def masks(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Which items of `rows` [B, T] to predict, bool: in some rows the newest only, in others each by chance, at least one."""
    real = rows != PADDING
    masked = real & (torch.rand(rows.shape, generator=generator) < MASKED)
    only = torch.rand(len(rows), generator=generator) < LAST_ONLY
    masked[only] = False
    masked[~masked.any(1), -1] = True
    return masked & real
