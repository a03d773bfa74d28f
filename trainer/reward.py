"""The reward model R(u, S): what a session of items is worth to a user (paper §3.3.1, eq. 5-7).

Shapes: B sessions of the log (or users), T history items, W windows of a session (or sessions of a user), m items of a
window, R windows, L levels of K codes, H heads, d width of content, e width of a target-aware item; the last axis of
rewards is TARGETS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
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
"""Two hashes a prefix: items that share a row of the table by one almost never share it by the other too."""

SIDE = 8
"""Width of what is learnt of each item apart from its content: how long it is, how good it is."""
SIDE_GAIN = 4.0
"""Rows of the hashed tables are seen now and then only; with a gain a step of Adam moves them as much further."""
CONTENT = 8
"""Width of an item's own content beside the history's view of it."""
SIMILARITY_GAIN = 4.0
"""Content vectors are about 1 long, and similarities between two items of one kind around 0.3: this makes them about 1."""
ITEM_LOSS = 1.0
"""Weight of the item towers' loss beside eq. 7: a window's labels are sums over its items, which hide what each was worth."""
RANDOM_CONTENT_SPREAD = 0.7
"""Without centroids a level's random content is so much shorter than the one before, as residuals are."""


class RewardBatch(NamedTuple):
    """Sessions of the log, each cut into windows of m items; all right-padded, histories oldest first."""

    history: Tensor  # int64 [B, T, L], H(start), the newest T <= history_length
    history_mask: Tensor  # bool [B, T]
    sessions: Tensor  # int64 [B, W, m, L]
    session_mask: Tensor  # bool [B, W, m]; all False = padding window
    labels: Tensor  # fp32 [B, W, 4], soft labels of the window's own items (SEMANTICS.md §6)
    item_labels: Tensor | None = None  # fp32 [B, W, m, 4], of each item as if it were a window, with swt_cap_ms / m


def prefix_rows(codes: tuple[Tensor, ...], buckets: int) -> list[Tensor]:
    """Rows of a table of `buckets` for a prefix of codes, one a hash; products stay below 2^62, so ONNX agrees."""
    rows = []
    for factor in HASH_FACTORS:
        key = torch.ones_like(codes[0])
        for code in codes:
            key = (key * factor + code + 1) % HASH_PRIME
        rows.append(key % buckets)
    return rows


class Content(nn.Module):
    """What an item is about: the sum of its codes' vectors, a comparable place for items and history alike.

    The vectors are the codebook's centroids (`start_from`), so that items that were never seen together are near each
    other from the first step; else random ones. What is learnt is added to them.
    """

    base: Tensor
    plasticity: Tensor

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        shape = (config.levels, config.codes, config.dimension)
        self.register_buffer("base", torch.empty(shape))
        self.register_buffer("plasticity", torch.ones(1))
        self.learnt = nn.Parameter(torch.zeros(shape))

    @torch.no_grad()
    def start_from(self, centroids: NDArray[np.float32]) -> None:
        """Take the codebook's `centroids` [L, K, c]; wider ones are turned onto their main axes first.

        Centroids are trusted: what is learnt on top of them moves a tenth as fast as without.
        """
        vectors = np.nan_to_num(centroids.astype(np.float64))
        levels, codes, width = self.base.shape
        if vectors.shape[:2] != (levels, codes):
            raise ValueError(f"centroids {vectors.shape[:2]} for a reward model of {levels} levels of {codes} codes")
        if vectors.shape[2] > width:
            flat = vectors.reshape(-1, vectors.shape[2])
            vectors = vectors @ np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :width]
        length = np.sqrt((vectors[0] ** 2).sum(-1).mean())
        self.base.zero_()
        self.base[:, :, : vectors.shape[2]] = torch.from_numpy(vectors / max(length, 1e-12))
        self.plasticity.fill_(0.1)

    def forward(self, codes: Tensor) -> Tensor:
        """`codes` int64 `[..., L]` -> `[..., d]`."""
        each = list(enumerate(codes.unbind(-1)))
        base = torch.stack([F.embedding(code, self.base[level]) for level, code in each]).sum(0)
        learnt = torch.stack([F.embedding(code, self.learnt[level]) for level, code in each]).sum(0)
        return base + self.plasticity * learnt


class Side(nn.Module):
    """What else there is to an item, learnt from rewards alone: embeddings of its codes, of (l1, l2), of all codes."""

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.buckets = config.buckets
        self.depths = sorted({min(2, config.levels), config.levels})
        self.levels = nn.Parameter(torch.zeros(config.levels, config.codes, SIDE))
        self.prefixes = nn.Parameter(torch.zeros(len(self.depths), config.buckets, SIDE))

    def forward(self, codes: Tensor) -> Tensor:
        """`codes` int64 `[..., L]` -> `[..., SIDE]`."""
        each = codes.unbind(-1)
        parts = [F.embedding(code, self.levels[level]) for level, code in enumerate(each)]
        for place, depth in enumerate(self.depths):
            parts += [F.embedding(row, self.prefixes[place]) for row in prefix_rows(each[:depth], self.buckets)]
        return SIDE_GAIN * torch.stack(parts).sum(0)


class TargetAttention(nn.Module):
    """The target-aware representation e_i of an item, v_i ⊙ u: what it is, and how alike what the user's history holds.

    A head attends from the item over the history and gives the mean similarity of what it attends to; a learned "no
    history" key takes part, and its share of the attention says how little of the history concerns the item.
    """

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        d, width = config.dimension, config.hidden
        self.heads = config.heads
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.recency = nn.Parameter(torch.empty(config.history_length, config.heads))
        self.no_history = nn.Parameter(torch.empty(config.heads))
        self.own = nn.Linear(d, CONTENT)
        self.mix = nn.Sequential(nn.Linear(SIDE + CONTENT + 2 * config.heads, width), nn.GELU(), nn.Linear(width, width))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Heads begin as kernels: query and key agree, so that alike attracts; the first takes all of the history alike.

        Every other head prefers what is new, each more than the one before.
        """
        self.key.weight.normal_(0.0, 2 * self.key.weight.shape[1] ** -0.5, generator=generator)
        self.query.weight.copy_(self.key.weight)
        self.query.weight[: self.query.weight.shape[0] // self.heads].zero_()
        age = torch.arange(self.recency.shape[0], device=self.recency.device)
        for head in range(self.heads):
            self.recency[:, head] = age * (-0.05 * 3 ** (head // 2) if head % 2 else 0.0)
        self.no_history.zero_()

    def forward(self, items: Tensor, side: Tensor, history: Tensor, history_mask: Tensor) -> Tensor:
        """`items [B, Q, d]` and `side [B, Q, SIDE]` towards `history [B, T, d]`, `history_mask [B, T]` -> `[B, Q, e]`.

        Age is counted from the newest item, so that padding does not move it.
        """
        lengths = history_mask.sum(1, keepdim=True)
        age = (lengths - 1 - torch.arange(history_mask.shape[1], device=history.device)).clamp(0, self.recency.shape[0] - 1)
        query, key = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(items), self.key(history)))
        scores = query @ key.transpose(2, 3) + F.embedding(age, self.recency).permute(0, 2, 1).unsqueeze(2)
        scores = torch.where(history_mask[:, None, None, :], scores, NOTHING)
        nothing = self.no_history[:, None, None].expand(items.shape[0], -1, items.shape[1], 1)
        weights = torch.cat((nothing, scores), dim=-1).softmax(-1)
        alike = (items @ history.transpose(1, 2)).unsqueeze(1)
        similarity = SIMILARITY_GAIN * (weights[..., 1:] * alike).sum(-1)
        features = (side, self.own(items), similarity.transpose(1, 2), weights[..., 0].transpose(1, 2))
        return self.mix(torch.cat(features, dim=-1))


class SessionAttention(nn.Module):
    """Self-attention over the items of a window (eq. 5), added to what it read."""

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """`h [R, m, e]`, `mask [R, m]` -> `[R, m, e]`."""
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.query_key_value(h).chunk(3, dim=-1)
        )
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        weights = torch.where(mask[:, None, None, :], scores, NOTHING).softmax(-1)
        return h + self.out((weights @ value).transpose(1, 2).flatten(2))


class RewardModel(nn.Module):
    """Four towers over the sum of a window's items, each seen through the user's history (eq. 5-7).

    `forward` holds no control flow that depends on data; `torch.onnx.export(dynamo=True)` traces it. Make the content
    known with `start_from` before the first step.
    """

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        for name in ("dimension", "hidden"):
            if getattr(config, name) % config.heads:
                raise ValueError(f"{name} {getattr(config, name)} is not a multiple of heads {config.heads}")
        self.config = config
        width = config.hidden
        self.content = Content(config)
        self.side = Side(config)
        self.target_attention = TargetAttention(config)
        self.position = nn.Parameter(torch.empty(config.session_items, width))
        self.earlier = nn.Linear(config.session_items - 1, width, bias=False) if config.session_items > 1 else None
        self.session = nn.ModuleList(SessionAttention(config) for _ in range(config.layers))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)) for _ in TARGETS
        )
        self.item_towers = nn.Linear(width, len(TARGETS))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, content too; small last layers make the first prediction the towers' biases."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1 or name.startswith(("side", "content", "position")):
                parameter.zero_()
            else:
                scale = 0.1 if name.startswith("towers") and name.endswith("2.weight") else 0.6
                parameter.normal_(0.0, scale * parameter.shape[1] ** -0.5, generator=generator)
        for layer in self.session:
            layer.out.weight.mul_(0.2)  # type: ignore[operator, union-attr]
        self.target_attention.reset_parameters(generator)
        content = self.content
        content.base.normal_(0.0, content.base.shape[2] ** -0.5, generator=generator)
        for level in range(content.base.shape[0]):
            content.base[level] *= RANDOM_CONTENT_SPREAD**level
        content.plasticity.fill_(1.0)

    def start_from(self, centroids: NDArray[np.float32]) -> None:
        """Begin with the content that the codebook's `centroids` [L, K, c] know. Raises ValueError for another shape."""
        self.content.start_from(centroids)

    @torch.no_grad()
    def start_at(self, labels: Tensor, item_labels: Tensor | None = None) -> None:
        """Put the biases of towers that have learnt nothing yet to the base rates of `labels` [n, 4].

        As if half a label more of each kind were seen. Without it a rare target (follow: one window in twenty-five)
        spends its first thousand steps on finding its rate. item_labels [k, 4]: likewise, for the item towers.
        """
        biases = torch.cat([tower[-1].bias for tower in self.towers])  # type: ignore[index]
        if not bool(biases.any()):
            for tower, rate in zip(self.towers, _base_rates(labels), strict=True):
                tower[-1].bias.fill_(rate)  # type: ignore[index]
        if item_labels is not None and not bool(self.item_towers.bias.any()):
            self.item_towers.bias.copy_(_base_rates(item_labels))

    def forward(self, history: Tensor, history_mask: Tensor, sessions: Tensor, session_mask: Tensor) -> Tensor:
        """Logits `[B, W, 4]` of windows `sessions` int64 `[B, W, m, L]`, `session_mask` bool `[B, W, m]`.

        history int64 [B, T, L] and history_mask bool [B, T]: right-padded, oldest first; m at most `session_items`, fewer
        are as if padded. A window without a real item gets a finite logit that means nothing.
        """
        return self._towers(*self._aware(self.content(history), history_mask, sessions), session_mask)

    def rewards(self, history: Tensor, history_mask: Tensor, sessions: Tensor, session_mask: Tensor) -> Tensor:
        """The rewards r̂ `[B, W, 4]` of `forward`'s logits, within (0, 1) (eq. 6)."""
        return torch.sigmoid(self(history, history_mask, sessions, session_mask))

    def _aware(self, history: Tensor, history_mask: Tensor, sessions: Tensor) -> tuple[Tensor, Tensor]:
        """The target-aware items h = {e_1 .. e_m} `[B, W, m, e]` and their content `[B, W, m, d]`."""
        items = self.content(sessions)
        flat, side = items.flatten(1, 2), self.side(sessions).flatten(1, 2)
        return self.target_attention(flat, side, history, history_mask).unflatten(1, sessions.shape[1:3]), items

    def _towers(self, aware: Tensor, items: Tensor, session_mask: Tensor) -> Tensor:
        """Logits `[B, W, 4]`: eq. 5 over `aware [B, W, m, e]`, the sum over items, the towers of eq. 6.

        How alike the items before are goes in as it is: of more of the same people tire, and a softmax, whose weights
        sum to 1, cannot count.
        """
        count, most = aware.shape[2], self.config.session_items
        h, items, mask = aware.flatten(0, 1), items.flatten(0, 1), session_mask.flatten(0, 1)
        h = h + self.position[:count]
        if self.earlier is not None and count > 1:
            alike = items @ items.transpose(1, 2) * mask.unsqueeze(1)
            before = torch.stack([F.pad(alike.diagonal(-back, 1, 2), (back, 0)) for back in range(1, count)], dim=-1)
            h = h + self.earlier(SIMILARITY_GAIN * F.pad(before, (0, most - count)))
        for layer in self.session:
            h = layer(h, mask)
        total = (F.gelu(h) * mask.unsqueeze(-1)).sum(1) * most**-0.5
        return torch.cat([tower(total) for tower in self.towers], dim=-1).unflatten(0, session_mask.shape[:2])

    def loss(self, batch: RewardBatch) -> tuple[Tensor, dict[str, Any]]:
        """Eq. 7: binary cross-entropy on soft labels, the sum over towers, the mean over the real windows.

        In training mode and with `item_labels`, plus ITEM_LOSS times the same of the item towers, which read e_i, over
        the real items. Stats, all detached: `bce` fp32 [4] a tower, `predictions` and `labels` fp32 [n, 4] of the n real
        windows in order, as they were before the step.
        """
        real = batch.session_mask.any(-1)
        owner = real.nonzero()[:, 0]
        mask = batch.session_mask[real]
        # Only real windows are computed, each as a row of its own: W is that of the longest session.
        history = self.content(batch.history).index_select(0, owner)
        aware, items = self._aware(history, batch.history_mask.index_select(0, owner), batch.sessions[real].unsqueeze(1))
        logits = self._towers(aware, items, mask.unsqueeze(1)).squeeze(1)
        labels = batch.labels[real]
        towers = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(0) / max(1, len(labels))
        stats = {"bce": towers.detach(), "predictions": torch.sigmoid(logits.detach()), "labels": labels}
        loss = towers.sum()
        if self.training and batch.item_labels is not None:
            each = self.item_towers(F.gelu(aware.squeeze(1)[mask]))
            of_items = F.binary_cross_entropy_with_logits(each, batch.item_labels[real][mask], reduction="sum")
            loss = loss + ITEM_LOSS * of_items / max(1, len(each))
        return loss, stats


def _base_rates(labels: Tensor) -> Tensor:
    """Logits of the means of `labels` [n, 4], half a label of each kind added."""
    return torch.logit((labels.sum(0) + 0.5) / (len(labels) + 1))


class RewardOptimizer:
    """fp32 Adam with clipped gradients for a `RewardModel`; the first step starts its towers at the batch's base rates.

    A step that is not finite is skipped and counted. With fixed threads on the CPU the same steps give the same bytes.
    """

    def __init__(self, model: RewardModel, learning_rate: float = 1e-3) -> None:
        self.model = model
        self._adam = Optimizer(model, learning_rate=learning_rate, clip_norm=1.0, precision="fp32")  # type: ignore[arg-type]

    def step(self, batch: RewardBatch) -> dict[str, Any]:
        """Learn `batch`; `RewardModel.loss`' stats with `loss`, `grad_norm` and `skipped`."""
        labels = batch.labels[batch.session_mask.any(-1)]
        if bool(labels.isfinite().all()):
            self.model.start_at(labels, None if batch.item_labels is None else batch.item_labels[batch.session_mask])
        return self._adam.step(lambda model: model.loss(batch))  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and counters as plain tensors."""
        return self._adam.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`; the model's own weights are loaded before. Raises UserError for another architecture."""
        self._adam.load_state_dict(state)


def combine(rewards: Tensor, config: RewardConfig) -> Tensor:
    """R(u, S), the weighted mean of the towers: `rewards [..., 4]` -> `[...]`. Raises UserError where all weights are 0."""
    weights = torch.from_numpy(tower_weights(config)).to(rewards)
    return (rewards * weights).sum(-1)
