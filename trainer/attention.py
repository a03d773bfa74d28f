"""Attention with T5's relative position bias, in a form that trains fast on a CPU and one that exports.

Shapes: R rows (users, packed rows or beams), Q queries, S keys, P cached positions, H heads, dh width of a head,
d width of the model.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig

KeyValue = tuple[Tensor, Tensor]  # k, v: [R, H, positions, dh]

FORBIDDEN = -3e4
"""Added to scores that must not count: no score outweighs it, and fp16 can hold it."""
NARROW = 32
"""Rows of a softmax below this are computed in fp32, whatever their type."""


def relative_bucket(distance: int, *, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """T5's bucket of a key `distance` positions after the query: exact when near, logarithmic when far."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    far = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact))
    return offset + min(far, buckets - 1)


class PositionBias(nn.Module):
    """T5's relative position bias, one table for all layers of a stack."""

    bucket_of: Tensor

    def __init__(self, config: ModelConfig, *, bidirectional: bool) -> None:
        super().__init__()
        if config.relative_max_distance <= config.relative_buckets // 2:
            raise ValueError(
                f"relative_max_distance {config.relative_max_distance} must exceed half of the "
                f"{config.relative_buckets} relative_buckets, which are one position wide"
            )
        self.reach = config.relative_max_distance
        self.table = nn.Parameter(torch.zeros(config.relative_buckets, config.heads))
        # Looked up, not computed: a logarithm may round differently in another runtime and move a bucket's border.
        buckets = [
            relative_bucket(distance, bidirectional=bidirectional, buckets=config.relative_buckets, max_distance=self.reach)
            for distance in range(-self.reach, self.reach + 1)
        ]
        self.register_buffer("bucket_of", torch.tensor(buckets), persistent=False)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bias `[H, Q, S]` between positions `queries [Q]` and `keys [S]`."""
        distance = (keys.unsqueeze(0) - queries.unsqueeze(1)).clamp(-self.reach, self.reach)
        return self.table[self.bucket_of[distance + self.reach]].permute(2, 0, 1)


class Scores(NamedTuple):
    """What is added to the scores: `learnt` is what gradients flow to, `total` also holds the mask."""

    learnt: Tensor | None  # [H, Q, S]
    total: Tensor  # broadcasts to [R, H, Q, S]


def score_bias(learnt: Tensor | None, mask: Tensor, dtype: torch.dtype) -> Scores:
    """Bias and `mask` (True = may attend, broadcasts to `[R, H, Q, S]`) together, once for all layers of a stack."""
    forbidden = mask.logical_not().to(dtype) * FORBIDDEN
    return Scores(learnt, forbidden if learnt is None else learnt + forbidden)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Scores) -> Tensor:
    """softmax(q kᵀ / √dh + bias) v: `[R, H, Q, dh]` from `[R, H, Q, dh]` and twice `[R, H, S, dh]`."""
    if torch.compiler.is_exporting():
        scores = torch.matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5 + bias.total
        return torch.matmul(torch.softmax(scores, dim=-1), value)
    return _BiasedAttention.apply(query, key, value, bias.learnt, bias.total.detach())


def _softmax(scores: Tensor) -> Tensor:
    """Over the last axis; rows shorter than two vector registers take PyTorch's slow path unless they are fp32."""
    if scores.shape[-1] < NARROW:
        return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return torch.softmax(scores, dim=-1)


def _softmax_backward(gradient: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the scores from that of the `weights`."""
    backward = torch.ops.aten._softmax_backward_data  # noqa: SLF001
    if weights.shape[-1] < NARROW:
        wide = torch.promote_types(weights.dtype, torch.float32)
        return backward(gradient.to(wide), weights.to(wide), -1, wide).to(weights.dtype)
    return backward(gradient, weights, -1, weights.dtype)


class _BiasedAttention(torch.autograd.Function):
    """A bias that requires grad sends `scaled_dot_product_attention` to its unfused path; this is 3-4 times faster.

    It keeps the softmax and nothing else of size `[R, H, Q, S]`, and sums the bias's gradient over rows at once.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, learnt: Tensor | None, total: Tensor) -> Tensor:
        rows, heads, queries, width = query.shape
        q, k, v = query.reshape(-1, queries, width), key.flatten(0, 1), value.flatten(0, 1)
        weights = _weights(q, k, total, rows)
        ctx.save_for_backward(q, k, v, weights)
        ctx.shape = (rows, heads)
        return torch.bmm(weights, v).view(rows, heads, queries, width)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        shape, scale = ctx.shape, q.shape[-1] ** -0.5
        d_out = gradients[0].reshape(q.shape)
        d_value = torch.bmm(weights.transpose(1, 2), d_out)
        d_scores = _softmax_backward(torch.bmm(d_out, v.transpose(1, 2)), weights)
        d_learnt = d_scores.unflatten(0, shape).sum(0) if ctx.needs_input_grad[3] else None
        d_query = torch.bmm(d_scores, k).mul_(scale)
        d_key = torch.bmm(d_scores.transpose(1, 2), q).mul_(scale)
        back = [part.unflatten(0, shape) for part in (d_query, d_key, d_value)]
        return back[0], back[1], back[2], d_learnt, None


class _BiasedSelfAttention(torch.autograd.Function):
    """`_BiasedAttention` from the projection `[R, S, 3 d]` to the mixed values `[R, S, d]`, keys and values.

    One copy brings queries, keys and values into the layout of the products, and one brings their gradients back.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, learnt: Tensor | None, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3 // heads
        parts = qkv.view(rows, length, 3, heads, width).permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = parts.flatten(1, 2).unbind(0)
        weights = _weights(q, k, total, rows)
        ctx.save_for_backward(parts, weights)
        ctx.set_materialize_grads(False)
        mixed = torch.bmm(weights, v).view(rows, heads, length, width)
        return mixed.transpose(1, 2).reshape(rows, length, -1), parts[1], parts[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        parts, weights = ctx.saved_tensors
        _, rows, heads, length, width = parts.shape
        d_out, *d_cache = gradients
        d_parts, d_learnt = torch.empty_like(parts), None
        if d_out is not None:
            q, k, v = parts.flatten(1, 2).unbind(0)
            d_q, d_k, d_v = d_parts.flatten(1, 2).unbind(0)
            d_mixed = d_out.view(rows, length, heads, width).transpose(1, 2).reshape(q.shape)
            torch.bmm(weights.transpose(1, 2), d_mixed, out=d_v)
            d_scores = _softmax_backward(torch.bmm(d_mixed, v.transpose(1, 2)), weights)
            d_learnt = d_scores.unflatten(0, (rows, heads)).sum(0) if ctx.needs_input_grad[2] else None
            torch.bmm(d_scores, k, out=d_q)
            torch.bmm(d_scores.transpose(1, 2), q, out=d_k)
            d_parts[:2].mul_(width**-0.5)
        else:
            d_parts.zero_()
        for part, of_cache in zip(d_parts[1:], d_cache, strict=True):
            if of_cache is not None:
                part.add_(of_cache)
        return d_parts.permute(1, 3, 0, 2, 4).reshape(rows, length, -1), None, d_learnt, None


def _weights(q: Tensor, k: Tensor, total: Tensor, rows: int) -> Tensor:
    """softmax(q kᵀ / √dh + total) of `q [R·H, Q, dh]` and `k [R·H, S, dh]`."""
    shape = (rows, len(q) // rows, q.shape[1], k.shape[1])
    offset = total.expand(shape).reshape(-1, *shape[2:])
    return _softmax(torch.baddbmm(offset, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5))


class SelfAttention(nn.Module):
    """Multi-head self-attention with an optional cache of earlier keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, bias: Scores, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Output `[R, Q, d]` and keys and values `[R, H, P + Q, dh]` of cache and `x [R, Q, d]`."""
        rows, length, width = x.shape
        if past is None and not torch.compiler.is_exporting():
            mixed, k, v = _BiasedSelfAttention.apply(self.qkv(x), self.heads, bias.learnt, bias.total.detach())
            return self.out(mixed), (k, v)
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        mixed = attend(q, k, v, bias)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width)), (k, v)


class CrossAttention(nn.Module):
    """Attention to the encoder's output; no position bias. Keys and values are made once and shared by all beams."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key_value = nn.Linear(config.d_model, 2 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def project(self, memory: Tensor, rows: Tensor | None = None) -> KeyValue:
        """Keys and values `[B, H, S, dh]` of `memory [B, S, d]`, or of its positions `rows [B, S]` when it is packed."""
        pair = self.key_value(memory)
        if rows is not None:
            pair = pair.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)
        users, length, width = pair.shape
        k, v = pair.view(users, length, 2, self.heads, width // 2 // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    def forward(self, x: Tensor, cross: KeyValue, bias: Scores) -> Tensor:
        """`x [B·W, Q, d]` against the keys of B users: W beams of a user are more queries to the same memory."""
        users, width = cross[0].shape[0], x.shape[-1]
        q = self.query(x).reshape(users, -1, self.heads, width // self.heads).transpose(1, 2)
        mixed = attend(q, cross[0], cross[1], bias)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))
