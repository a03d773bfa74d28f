"""OneRec: a T5-style encoder over the history and a sparse decoder that writes a session (paper §3.2, eq. 1-4).

Shapes: B users, T history items, L levels, K codes a level, m target items, S memory positions (1 + T or 1 + T·L),
P cached and Q new decoder positions, H heads, dh width of a head, d width of the model.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import ModelConfig
from trainer.moe import MoE, Routing, balance_loss, load

KeyValue = tuple[Tensor, Tensor]  # k, v: [rows, H, positions, dh]

BALANCE_WEIGHT = 0.01


class Batch(NamedTuple):
    """One training batch; histories are right-padded and oldest first, sessions right-padded."""

    history: Tensor  # int64 [B, T, L]
    history_mask: Tensor  # bool [B, T], True = real
    targets: Tensor  # int64 [B, m, L]
    target_mask: Tensor  # bool [B, m], True = real


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias; computed in fp32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`x / rms(x) · weight` over the last axis."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


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
        self.reach = config.relative_max_distance
        self.table = nn.Parameter(torch.zeros(config.relative_buckets, config.heads))
        # Looked up, not computed: a logarithm may round differently in another runtime and move a bucket's border.
        buckets = [
            relative_bucket(
                distance, bidirectional=bidirectional, buckets=config.relative_buckets, max_distance=self.reach
            )
            for distance in range(-self.reach, self.reach + 1)
        ]
        self.register_buffer("bucket_of", torch.tensor(buckets), persistent=False)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bias `[H, Q, S]` between positions `queries [Q]` and `keys [S]`."""
        distance = (keys.unsqueeze(0) - queries.unsqueeze(1)).clamp(-self.reach, self.reach)
        return self.table[self.bucket_of[distance + self.reach]].permute(2, 0, 1)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / √dh + bias) v; `bias` broadcasts to `[rows, H, Q, S]` and is hugely negative where forbidden."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5 + bias
    return torch.matmul(torch.softmax(scores.float(), dim=-1).to(value.dtype), value)


def forbidden(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is True, a value that no score outweighs (and fp16 can hold) where it is False."""
    return mask.logical_not().to(dtype) * -3e4


class FeedForward(nn.Module):
    """Dense FFN of the encoder: ReLU, no biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, d_ff, bias=False)
        self.w2 = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`w2 relu(w1 x)`."""
        return self.w2(F.relu(self.w1(x)))


class SelfAttention(nn.Module):
    """Multi-head self-attention with an optional cache of earlier keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, bias: Tensor, past: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Output `[B, Q, d]` and keys and values `[B, H, P + Q, dh]` of cache and `x [B, Q, d]`."""
        rows, length, width = x.shape
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

    def project(self, memory: Tensor) -> KeyValue:
        """Keys and values `[B, H, S, dh]` of `memory [B, S, d]`."""
        rows, length, width = memory.shape
        pair = self.key_value(memory).view(rows, length, 2, self.heads, width // self.heads)
        k, v = pair.permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    def forward(self, x: Tensor, cross: KeyValue, bias: Tensor) -> Tensor:
        """`x [B·W, Q, d]` against the keys of B users: W beams of a user are more queries to the same memory."""
        users, width = cross[0].shape[0], x.shape[-1]
        q = self.query(x).reshape(users, -1, self.heads, width // self.heads).transpose(1, 2)
        mixed = attend(q, cross[0], cross[1], bias)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and dense FFN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = SelfAttention(config)
        self.ffn_norm = RMSNorm(config.d_model)
        self.ffn = FeedForward(config.d_model, config.d_ff)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`x [B, S, d]` -> `[B, S, d]`."""
        x = x + self.attention(self.attention_norm(x), bias)[0]
        return x + self.ffn(self.ffn_norm(x))


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, cross-attention and MoE (eq. 2 with its residual)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = SelfAttention(config)
        self.cross_norm = RMSNorm(config.d_model)
        self.cross_attention = CrossAttention(config)
        self.ffn_norm = RMSNorm(config.d_model)
        self.moe = MoE(config.d_model, config.d_ff, config.experts, config.top_k)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        past: KeyValue | None,
        cross: KeyValue,
        cross_bias: Tensor,
        routings: list[Routing] | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """`x [rows, Q, d]` -> `[rows, Q, d]` and the longer cache."""
        mixed, present = self.attention(self.attention_norm(x), bias, past)
        x = x + mixed
        x = x + self.cross_attention(self.cross_norm(x), cross, cross_bias)
        return x + self.moe(self.ffn_norm(x), routings), present


class OneRec(nn.Module):
    """The paper's generative recommender: history codes in, log-probabilities of sessions out.

    One implementation for training, beam search and export: `encode`, `cross_kv` and `decode` hold no control flow that
    depends on data, and `torch.onnx.export(dynamo=True)` traces them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.d_model % config.heads:
            raise ValueError(f"d_model {config.d_model} is not a multiple of heads {config.heads}")
        self.config = config
        self.level_embedding = nn.ParameterList(
            nn.Parameter(torch.empty(config.codes, config.d_model)) for _ in range(config.levels)
        )
        self.level_head = nn.ParameterList(
            nn.Parameter(torch.empty(config.codes, config.d_model)) for _ in range(config.levels)
        )
        self.bos = nn.Parameter(torch.empty(config.d_model))
        self.no_history = nn.Parameter(torch.empty(config.d_model))
        self.encoder_bias = PositionBias(config, bidirectional=True)
        self.decoder_bias = PositionBias(config, bidirectional=False)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.encoder_norm = RMSNorm(config.d_model)
        self.decoder_norm = RMSNorm(config.d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew; small heads make the first loss log K a level."""
        config = self.config
        depth = 2 * config.encoder_layers + 3 * config.decoder_layers
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            if name.endswith("bias.table"):
                parameter.zero_()
                continue
            if name.startswith("level_head"):
                std = 0.1 * config.d_model**-0.5
            elif name.startswith("level_embedding") or parameter.dim() == 1:
                std = 1.0 if parameter.dim() == 1 else config.levels**-0.5
            else:
                std = parameter.shape[-1] ** -0.5
                if name.endswith((".out.weight", ".w2", ".w2.weight")):
                    std *= depth**-0.5
            parameter.normal_(0.0, std, generator=generator)

    def encode(self, history: Tensor, history_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The encoded history H = Encoder(H_u): memory `[B, S, d]` and its mask `[B, S]`.

        The encoder reads newest first, behind the "no history" token: its distance to that token then says how old an
        item is, at any length, and attention is never over nothing.
        """
        users, items, levels = history.shape
        lengths = history_mask.sum(1, keepdim=True)
        newest_first = (lengths - 1 - torch.arange(items, device=history.device)).clamp(min=0)
        history = torch.gather(history, 1, newest_first.unsqueeze(-1).expand(-1, -1, levels))
        codes = torch.stack([self.embed_code(level, history[:, :, level]) for level in range(levels)], dim=2)
        if self.config.history_tokens == "item":
            tokens, mask = codes.sum(2), history_mask
        else:
            tokens, mask = codes.flatten(1, 2), history_mask.repeat_interleave(levels, dim=1)
        x = torch.cat((self.no_history.expand(users, 1, -1), tokens), dim=1)
        memory_mask = torch.cat((torch.ones_like(mask[:, :1]), mask), dim=1)
        positions = torch.arange(x.shape[1], device=x.device)
        bias = self.encoder_bias(positions, positions) + forbidden(memory_mask, x.dtype)[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, bias)
        return self.encoder_norm(x), memory_mask

    def cross_kv(self, memory: Tensor) -> list[KeyValue]:
        """Keys and values `[B, H, S, dh]` of `memory [B, S, d]` for each decoder layer; once a request."""
        return [layer.cross_attention.project(memory) for layer in self.decoder]

    def decode(
        self,
        tokens_embedded: Tensor,
        positions: Tensor,
        self_kv: list[KeyValue] | None,
        cross_kv: list[KeyValue],
        memory_mask: Tensor,
        routings: list[Routing] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """A block of decoder positions: hidden states `[B·W, Q, d]` (normed, ready for `head`) and the longer cache.

        tokens_embedded `[B·W, Q, d]`, W ≥ 1 rows a user, the rows of a user together; positions int64 `[Q]`, which must
        go on from the cache: P .. P + Q - 1; self_kv a layer's `[B·W, H, P, dh]`, None for an empty cache; cross_kv and
        memory_mask of the B users.
        """
        x = tokens_embedded
        total = positions.shape[0] + (0 if self_kv is None else self_kv[0][0].shape[2])
        keys = torch.arange(total, device=x.device)
        causal = keys.unsqueeze(0) <= positions.unsqueeze(1)
        bias = self.decoder_bias(positions, keys) + forbidden(causal, x.dtype)
        cross_bias = forbidden(memory_mask, x.dtype)[:, None, None, :]
        present = []
        for number, layer in enumerate(self.decoder):
            past = None if self_kv is None else self_kv[number]
            x, cache = layer(x, bias, past, cross_kv[number], cross_bias, routings)
            present.append(cache)
        return self.decoder_norm(x), present

    def embed_bos(self) -> Tensor:
        """Input vector `[d]` of s_[BOS] (eq. 3)."""
        return self.bos

    def embed_code(self, level: int, codes: Tensor) -> Tensor:
        """Input vectors `[..., d]` of `codes [...]` of a level (0-based)."""
        return F.embedding(codes, self.level_embedding[level])

    def head(self, level: int, hidden: Tensor) -> Tensor:
        """Logits `[..., K]` of the code of `level` (0-based) that follows."""
        return F.linear(hidden, self.level_head[level])

    def session_embedded(self, targets: Tensor) -> Tensor:
        """Decoder inputs of eq. 3 without the very last code, which predicts nothing: `[B, m (L + 1) - 1, d]`."""
        users, items, levels = targets.shape
        bos = self.bos.expand(users, items, -1)
        codes = [self.embed_code(level, targets[:, :, level]) for level in range(levels)]
        return torch.stack([bos, *codes], dim=2).flatten(1, 2)[:, :-1]

    def _target_hidden(
        self, history: Tensor, history_mask: Tensor, targets: Tensor, routings: list[Routing] | None = None
    ) -> Tensor:
        """Hidden states `[B, m, L, d]` before each target code."""
        users, items, levels = targets.shape
        memory, memory_mask = self.encode(history, history_mask)
        x = self.session_embedded(targets)
        positions = torch.arange(x.shape[1], device=x.device)
        hidden, _ = self.decode(x, positions, None, self.cross_kv(memory), memory_mask, routings)
        return F.pad(hidden, (0, 0, 0, 1)).view(users, items, levels + 1, -1)[:, :, :levels]

    def token_logits(self, history: Tensor, history_mask: Tensor, targets: Tensor, target_mask: Tensor) -> Tensor:
        """Teacher-forced logits `[B, m, L, K]` (eq. 3-4); those of masked items mean nothing."""
        hidden = self._target_hidden(history, history_mask, targets)
        return torch.stack([self.head(level, hidden[:, :, level]) for level in range(targets.shape[2])], dim=2)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """NTP of eq. 4 as the mean over real target codes, plus the experts' balance loss.

        Stats (detached): `ntp`; `level_ntp [L]`; `tokens`; `balance`; `expert_load [decoder layers, E]`, shares.
        """
        routings: list[Routing] = []
        hidden = self._target_hidden(batch.history, batch.history_mask, batch.targets, routings)
        keep = batch.target_mask
        level_ntp = torch.stack(
            [
                F.cross_entropy(self.head(level, hidden[:, :, level][keep]).float(), batch.targets[:, :, level][keep])
                for level in range(self.config.levels)
            ]
        )
        ntp = level_ntp.mean()
        balance = torch.stack([balance_loss(routing) for routing in routings]).mean()
        stats = {
            "ntp": ntp.detach(),
            "level_ntp": level_ntp.detach(),
            "tokens": int(keep.sum()) * self.config.levels,
            "balance": balance.detach(),
            "expert_load": torch.stack([load(routing) for routing in routings]),
        }
        return ntp + BALANCE_WEIGHT * balance, stats

    def session_log_prob(self, history: Tensor, history_mask: Tensor, targets: Tensor, target_mask: Tensor) -> Tensor:
        """log P of each session `[B]`: the sum over the codes of its real items."""
        logits = self.token_logits(history, history_mask, targets, target_mask).float()
        chosen = torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return (chosen.sum(-1) * target_mask).sum(-1)
