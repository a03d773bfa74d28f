"""FDSA: self-attention over items and, beside it, over their features (Zhang et al., IJCAI 2019)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.baselines.fitting import PADDING, RankerConfig, TransformerRanker, causal_rows
from trainer.baselines.transformer import Encoder, left_padded


class FDSANetwork(nn.Module):
    """Items [B, T] -> hidden states [B, T, d] of both paths together.

    An item's features are pooled by vanilla attention; the features' path has a transformer of its own; both last states
    meet in one linear layer (eq. 3, 4, 11 and 12 of FDSA).
    """

    def __init__(self, features: NDArray[np.integer], config: RankerConfig) -> None:
        super().__init__()
        items, fields = features.shape
        self.scale = config.width**0.5
        # Every field's values have rows of their own; 0 is "has none".
        rows, first = np.zeros((items + 1, fields), np.int64), 1
        for field in range(fields):
            values, place = np.unique(features[:, field], return_inverse=True)
            known = features[:, field] >= 0
            rows[:-1, field] = np.where(known, first + place, 0)
            first += len(values)
        self.feature_rows: Tensor
        self.register_buffer("feature_rows", torch.from_numpy(rows), persistent=False)
        self.table = nn.Parameter(torch.empty(items + 1, config.width))  # the last row: the start, before any item
        self.feature_table = nn.Parameter(torch.empty(first, config.width))
        self.attention = nn.Linear(config.width, 1)
        paths = [
            Encoder(
                width=config.width, layers=config.layers, heads=config.heads, dropout=config.dropout,
                length=config.length, causal=True,
            )
            for _ in range(2)
        ]
        self.item_path, self.feature_path = paths
        self.join = nn.Linear(2 * config.width, config.width)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows int64 [B, T] with `PADDING` at the left."""
        real, rows = rows != PADDING, torch.where(rows == PADDING, len(self.table) - 1, rows)
        items = self.item_path(F.embedding(rows, self.table) * self.scale, real)
        features = self.feature_path(self._features(rows) * self.scale, real)
        return self.join(torch.cat((items, features), -1))

    def scores(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., N]."""
        return F.linear(hidden, self.table[:-1])

    def _features(self, rows: Tensor) -> Tensor:
        """The features of the items `rows` [B, T] as one vector each, [B, T, d]."""
        found = self.feature_rows[rows]
        vectors = F.embedding(found, self.feature_table)
        weights = self.attention(vectors).squeeze(-1).masked_fill(found == 0, -1e4).softmax(-1)
        return (weights.unsqueeze(-1) * vectors).sum(-2)


class FDSA(TransformerRanker):
    """Trained like SASRec with cross entropy over the catalogue.

    features: int [N, F], categories of each item (tags, author, the code of level 1); negative where it has none.
    """

    network: FDSANetwork

    def __init__(
        self, features: NDArray[np.integer], config: RankerConfig | None = None, *, device: str | None = None
    ) -> None:
        config = config or RankerConfig()
        super().__init__(len(features), config, lambda: FDSANetwork(features, config), device)

    def _rows(self, sequences: list[list[int]]) -> Tensor:
        return causal_rows(sequences, self.items, self.config.length)

    def _loss(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        rows = rows.to(self.device)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        real = (inputs != PADDING) & (targets != PADDING)
        scores = self.network.scores(self.network(inputs)[real])
        return F.cross_entropy(scores, targets[real], reduction="sum"), int(real.sum())

    def _scores(self, histories: list[list[int]]) -> Tensor:
        rows = left_padded([[self.items, *history] for history in histories], self.config.length, PADDING)
        return self.network.scores(self.network(rows.to(self.device))[:, -1])
