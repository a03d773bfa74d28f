"""The reward model R(u, S): what a session of items is worth to a user (paper §3.3.1, eq. 5-7).

Shapes: B sessions of the log (or users), T history items, W windows of a session (or sessions of a user), m items of a
window, L levels of codes, H heads, d width of the model; the last axis of rewards is TARGETS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import RewardConfig, RewardModelConfig
from trainer.optim import Optimizer
from trainer.reward_weights import TARGETS, tower_weights

__all__ = ["TARGETS", "RewardBatch", "RewardModel", "RewardOptimizer", "combine"]

NOTHING = -1e9
"""Attention score of what may not be attended to: its weight is exactly 0 in fp32, and nothing becomes NaN."""

HASH_PRIME = 2_147_483_647
HASH_FACTORS = (1_640_531_527, 362_437_069)
"""Two hashes a prefix: two items that share a row of one table almost never share it in both."""


class RewardBatch(NamedTuple):
    """Sessions of the log, each cut into windows of m items; all right-padded, histories oldest first."""

    history: Tensor  # int64 [B, T, L], H(start), the newest T <= history_length
    history_mask: Tensor  # bool [B, T]
    sessions: Tensor  # int64 [B, W, m, L]
    session_mask: Tensor  # bool [B, W, m]; all False = padding window
    labels: Tensor  # fp32 [B, W, 4], soft labels of the window's own items (SEMANTICS.md §6)


class ItemEmbedding(nn.Module):
    """What an item is, from nothing but its codes: the sum of its codes' and its hashed prefixes' embeddings."""

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = nn.ParameterList(
            nn.Parameter(torch.empty(config.codes, config.dimension)) for _ in range(config.levels)
        )
        self.prefixes = nn.ParameterList(
            nn.Parameter(torch.empty(config.buckets, config.dimension)) for _ in range(config.levels - 1)
        )

    def forward(self, codes: Tensor) -> Tensor:
        """`codes` int64 `[..., L]` -> `[..., d]`."""
        each = codes.unbind(-1)
        x = F.embedding(each[0], self.levels[0])
        for level in range(1, self.config.levels):
            x = x + F.embedding(each[level], self.levels[level])
            for row in prefix_rows(each[: level + 1], self.config.buckets):
                x = x + F.embedding(row, self.prefixes[level - 1])
        return x


def prefix_rows(codes: tuple[Tensor, ...], buckets: int) -> list[Tensor]:
    """Rows of a table of `buckets` for a prefix of codes, one a hash; products stay below 2^62, so ONNX agrees."""
    rows = []
    for factor in HASH_FACTORS:
        key = torch.ones_like(codes[0])
        for code in codes:
            key = (key * factor + code + 1) % HASH_PRIME
        rows.append(key % buckets)
    return rows


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Attention over `key`, `value` `[R, S, d]` from `query` `[R, Q, d]`; `mask` bool `[R, S]` -> `[R, Q, d]`."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    weights = torch.where(mask[:, None, None, :], scores, NOTHING).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class TargetAttention(nn.Module):
    """The target-aware representation e_i of an item: what in the user's history speaks for it."""

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        d = config.dimension
        self.heads = config.heads
        self.recency = nn.Parameter(torch.empty(config.history_length, d))
        self.no_history = nn.Parameter(torch.empty(d))
        self.query = nn.Linear(d, d, bias=False)
        self.key_value = nn.Linear(d, 2 * d, bias=False)
        self.mix = nn.Sequential(nn.Linear(3 * d, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, items: Tensor, history: Tensor, history_mask: Tensor) -> Tensor:
        """`items [B, Q, d]` towards `history [B, T, d]`, `history_mask [B, T]` -> `[B, Q, d]`.

        Age is counted from the newest item, so that padding does not move it. The learned "no history" key takes part
        always: its share of the attention says how little of the history concerns the item.
        """
        lengths = history_mask.sum(1, keepdim=True)
        age = lengths - 1 - torch.arange(history_mask.shape[1], device=history.device)
        history = history + F.embedding(age.clamp(0, self.recency.shape[0] - 1), self.recency)
        history = torch.cat((self.no_history.expand(items.shape[0], 1, -1), history), dim=1)
        mask = torch.cat((torch.ones_like(history_mask.sum(1, keepdim=True), dtype=torch.bool), history_mask), dim=1)
        key, value = self.key_value(history).chunk(2, dim=-1)
        user = attend(self.query(items), key, value, mask, self.heads)
        return items + self.mix(torch.cat((items, user, items * user), dim=-1))


class SessionLayer(nn.Module):
    """Self-attention over the items of a window (eq. 5), and a feed-forward layer."""

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        d = config.dimension
        self.heads = config.heads
        self.norm = nn.LayerNorm(d)
        self.query_key_value = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.feed_forward = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x [R, m, d]`, `mask [R, m]` -> `[R, m, d]`."""
        query, key, value = self.query_key_value(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(attend(query, key, value, mask, self.heads))
        return x + self.feed_forward(x)


class RewardModel(nn.Module):
    """Four towers over the sum of a window's items, each seen through the user's history (eq. 5-7).

    `forward` holds no control flow that depends on data; `torch.onnx.export(dynamo=True)` traces it.
    """

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        if config.dimension % config.heads:
            raise ValueError(f"dimension {config.dimension} is not a multiple of heads {config.heads}")
        self.config = config
        self.items = ItemEmbedding(config)
        self.target_attention = TargetAttention(config)
        self.position = nn.Parameter(torch.empty(config.session_items, config.dimension))
        self.session = nn.ModuleList(SessionLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dimension)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(config.dimension, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1))
            for _ in TARGETS
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew; small last layers make the first prediction the towers' biases."""
        for name, parameter in self.named_parameters():
            if name.startswith(("items.", "position")) or name.endswith(("recency", "no_history")):
                parameter.normal_(0.0, 0.1, generator=generator)
            elif parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name or name.endswith("feed_forward.0.weight") else 0.0)
                if name.endswith("bias"):
                    parameter.zero_()
            else:
                small = 0.1 if name.startswith("towers") and name.endswith("2.weight") else 1.0
                parameter.normal_(0.0, small * parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, history: Tensor, history_mask: Tensor, sessions: Tensor, session_mask: Tensor) -> Tensor:
        """Logits `[B, W, 4]` of windows `sessions` int64 `[B, W, m, L]`, `session_mask` bool `[B, W, m]`.

        history int64 [B, T, L] and history_mask bool [B, T]: right-padded, oldest first. A window without a real item
        gets a finite logit that means nothing.
        """
        items = self.items(sessions)
        aware = self.target_attention(items.flatten(1, 2), self.items(history), history_mask)
        h = aware.unflatten(1, items.shape[1:3]) + self.position[: items.shape[2]]
        h, mask = h.flatten(0, 1), session_mask.flatten(0, 1)
        for layer in self.session:
            h = layer(h, mask)
        total = (h * mask.unsqueeze(-1)).sum(1)
        total = self.norm(total).unflatten(0, items.shape[:2])
        return torch.cat([tower(total) for tower in self.towers], dim=-1)

    def rewards(self, history: Tensor, history_mask: Tensor, sessions: Tensor, session_mask: Tensor) -> Tensor:
        """The rewards r̂ `[B, W, 4]` of `forward`'s logits, within (0, 1) (eq. 6)."""
        return torch.sigmoid(self(history, history_mask, sessions, session_mask))

    def loss(self, batch: RewardBatch) -> tuple[Tensor, dict[str, Any]]:
        """Eq. 7: binary cross-entropy on soft labels, the sum over towers, the mean over the real windows.

        Stats, all detached: `bce` fp32 [4] a tower, `predictions` and `labels` fp32 [n, 4] of the n real windows in
        order, as they were before the step.
        """
        real = batch.session_mask.any(-1)
        logits = self(batch.history, batch.history_mask, batch.sessions, batch.session_mask)[real]
        labels = batch.labels[real]
        towers = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(0) / max(1, len(labels))
        stats = {"bce": towers.detach(), "predictions": torch.sigmoid(logits.detach()), "labels": labels}
        return towers.sum(), stats

    @torch.no_grad()
    def start_at(self, labels: Tensor) -> None:
        """Set the towers' last biases to the base rates of `labels` [n, 4], as if half a label more of each kind were seen.

        Without it a rare target (follow: one window in fifty) spends its first thousand steps on finding its rate.
        """
        rates = (labels.sum(0) + 0.5) / (len(labels) + 1)
        for tower, bias in zip(self.towers, torch.logit(rates), strict=True):
            tower[-1].bias.fill_(bias)  # type: ignore[index]


class RewardOptimizer:
    """fp32 Adam with clipped gradients for a `RewardModel`; the first step starts its towers at the batch's base rates.

    A step that is not finite is skipped and counted. With fixed threads on the CPU the same steps give the same bytes.
    """

    def __init__(self, model: RewardModel, learning_rate: float = 1e-3) -> None:
        self.model = model
        self._adam = Optimizer(model, learning_rate=learning_rate, clip_norm=1.0, precision="fp32")  # type: ignore[arg-type]
        self._started = False

    def step(self, batch: RewardBatch) -> dict[str, Any]:
        """Learn `batch`; `RewardModel.loss`' stats with `loss`, `grad_norm` and `skipped`."""
        labels = batch.labels[batch.session_mask.any(-1)]
        if not self._started and bool(labels.isfinite().all()):
            self.model.start_at(labels)
        stats = self._adam.step(lambda model: model.loss(batch))  # type: ignore[arg-type]
        self._started = self._started or not stats["skipped"]
        return stats

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and counters as plain tensors."""
        return self._adam.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`; the model's own weights are loaded before. Raises UserError for another architecture."""
        self._adam.load_state_dict(state)
        self._started = bool(state["step"] > 0)


def combine(rewards: Tensor, config: RewardConfig) -> Tensor:
    """R(u, S), the weighted mean of the towers: `rewards [..., 4]` -> `[...]`. Raises UserError where all weights are 0."""
    weights = torch.from_numpy(tower_weights(config)).to(rewards)
    return (rewards * weights).sum(-1)
