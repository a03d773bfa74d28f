"""SASRec: a causal transformer over the items watched (Kang and McAuley, ICDM 2018).

Two losses: `bce` as published, one uniformly drawn negative a positive, and `ce`, cross entropy over the whole catalogue,
with which the same network is a far stronger baseline (Klenitskiy and Vasilev, RecSys 2023).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.baselines.fitting import PADDING, RankerConfig, TransformerRanker, causal_rows
from trainer.baselines.transformer import Encoder, left_padded


class SASRecNetwork(nn.Module):
    """Items [B, T] -> hidden states [B, T, d], each to be multiplied with the item table for the item that follows."""

    def __init__(self, items: int, config: RankerConfig) -> None:
        super().__init__()
        self.scale = config.width**0.5
        self.table = nn.Parameter(torch.empty(items + 1, config.width))  # the last row: the start, before any item
        self.encoder = Encoder(
            width=config.width, layers=config.layers, heads=config.heads, dropout=config.dropout,
            length=config.length, causal=True,
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Rows int64 [B, T] with `PADDING` at the left."""
        real = rows != PADDING
        return self.encoder(F.embedding(rows.clamp(min=0), self.table) * self.scale, real)

    def scores(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., N]."""
        return F.linear(hidden, self.table[:-1])


class SASRec(TransformerRanker):
    """The published model on sequences of catalogue rows; a history of no items gets what follows the start."""

    network: SASRecNetwork

    def __init__(
        self,
        items: int,
        config: RankerConfig | None = None,
        *,
        loss: Literal["ce", "bce"] = "ce",
        negatives: int = 1,
        device: str | None = None,
    ) -> None:
        config = config or RankerConfig()
        super().__init__(items, config, lambda: SASRecNetwork(items, config), device)
        self.loss, self.negatives = loss, negatives

    def _rows(self, sequences: list[list[int]]) -> Tensor:
        return causal_rows(sequences, self.items, self.config.length)

    def _loss(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        rows = rows.to(self.device)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        # An item is predicted where one, or the start, stands before it.
        real = (inputs != PADDING) & (targets != PADDING)
        hidden, targets = self.network(inputs)[real], targets[real]
        if self.loss == "ce":
            return F.cross_entropy(self.network.scores(hidden), targets, reduction="sum"), len(targets)
        return self._bce(hidden, targets, generator), len(targets)

    def _bce(self, hidden: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Binary cross entropy of hidden [P, d] with each target and with `negatives` items that it is not."""
        drawn = torch.randint(self.items - 1, (len(targets), self.negatives), generator=generator).to(self.device)
        drawn = drawn + (drawn >= targets.unsqueeze(1))
        positive = (hidden * F.embedding(targets, self.network.table)).sum(-1)
        negative = (hidden.unsqueeze(1) * F.embedding(drawn, self.network.table)).sum(-1)
        return -F.logsigmoid(positive).sum() - F.logsigmoid(-negative).sum() / self.negatives

    def _scores(self, histories: list[list[int]]) -> Tensor:
        rows = left_padded([[self.items, *history] for history in histories], self.config.length, PADDING)
        return self.network.scores(self.network(rows.to(self.device))[:, -1])
