"""OneRec: a T5-style encoder over the history and a sparse decoder that writes a session (paper §3.2, eq. 1-4).

Shapes: B users, T history items, L levels, K codes a level, m target items, S memory positions (1 + T or 1 + T·L),
P cached and Q new decoder positions, H heads, dh width of a head, d width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.attention import CrossAttention, KeyValue, PositionBias, Scores, SelfAttention, score_bias
from trainer.config import ModelConfig
from trainer.moe import MoE, Routing, assignments, balance_loss, of_tokens
from trainer.norm import RMSNorm
from trainer.packing import pack

__all__ = ["BALANCE_WEIGHT", "Batch", "KeyValue", "OneRec"]

BALANCE_WEIGHT = 0.01


class Batch(NamedTuple):
    """One training batch; histories are right-padded and oldest first, sessions right-padded."""

    history: Tensor  # int64 [B, T, L]
    history_mask: Tensor  # bool [B, T], True = real
    targets: Tensor  # int64 [B, m, L]
    target_mask: Tensor  # bool [B, m], True = real


def wide(x: Tensor) -> Tensor:
    """`x` in fp32 or better, for what must not be rounded to bf16: log-probabilities."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def newest_first(history_mask: Tensor, levels: int) -> Tensor:
    """Index `[B, T, L]` for `gather` that turns right-padded rows of length n around: n - 1 .. 0, then 0."""
    lengths = history_mask.sum(1, keepdim=True)
    index = (lengths - 1 - torch.arange(history_mask.shape[1], device=history_mask.device)).clamp(min=0)
    return index.unsqueeze(-1).expand(-1, -1, levels)


class FeedForward(nn.Module):
    """Dense FFN of the encoder: ReLU, no biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, d_ff, bias=False)
        self.w2 = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`w2 relu(w1 x)`."""
        return self.w2(F.relu(self.w1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and dense FFN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = SelfAttention(config)
        self.ffn_norm = RMSNorm(config.d_model)
        self.ffn = FeedForward(config.d_model, config.d_ff)

    def forward(self, x: Tensor, bias: Scores) -> Tensor:
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
        bias: Scores,
        past: KeyValue | None,
        cross: KeyValue,
        cross_bias: Scores,
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
        users, _, levels = history.shape
        tokens = self._history_tokens(torch.gather(history, 1, newest_first(history_mask, levels)))
        each = 1 if self.config.history_tokens == "item" else levels
        mask = history_mask.unsqueeze(2).expand(-1, -1, each).flatten(1, 2)  # repeat_interleave exports a fixed size
        x = torch.cat((self.no_history.expand(users, 1, -1), tokens), dim=1)
        memory_mask = torch.cat((torch.ones_like(mask[:, :1]), mask), dim=1)
        return self._encoder_stack(x, memory_mask[:, None, None, :]), memory_mask

    def _history_tokens(self, history: Tensor) -> Tensor:
        """Input vectors `[..., T, d]` of items `[..., T, L]`, or of their codes, `[..., T · L, d]`."""
        codes = torch.stack([self.embed_code(level, codes) for level, codes in enumerate(history.unbind(-1))], dim=-2)
        return codes.sum(-2) if self.config.history_tokens == "item" else codes.flatten(-3, -2)

    def _encoder_stack(self, x: Tensor, mask: Tensor) -> Tensor:
        """All layers over `x [R, S, d]`; `mask` (True = may attend) broadcasts to `[R, H, S, S]`."""
        positions = torch.arange(x.shape[1], device=x.device)
        bias = score_bias(self.encoder_bias(positions, positions), mask, x.dtype)
        for layer in self.encoder:
            x = layer(x, bias)
        return self.encoder_norm(x)

    def _encode_packed(self, history: Tensor, history_mask: Tensor) -> tuple[list[KeyValue], Tensor]:
        """What `cross_kv(encode(...))` gives, computed without the padding; not for export (the shapes are data)."""
        lengths = history_mask.sum(1).cpu().numpy()
        ordered = torch.gather(history, 1, newest_first(history_mask, history.shape[2]))
        tokens = self._history_tokens(ordered[history_mask])
        lengths = 1 + lengths * (1 if self.config.history_tokens == "item" else self.config.levels)
        packing = pack(lengths, int(lengths.max()))
        # Sequence-major numbers of the tokens -> rows of [no history, tokens...].
        first = np.zeros(lengths.sum(), bool)
        first[np.cumsum(lengths) - lengths] = True
        row_of = np.where(first, 0, np.cumsum(~first))
        source, owner, place = (
            torch.from_numpy(array).to(history.device) for array in (row_of[packing.source], packing.owner, packing.place)
        )
        x = F.embedding(source, torch.cat((self.no_history.unsqueeze(0), tokens)))
        together = owner.unsqueeze(2) == owner.unsqueeze(1)
        memory = self._encoder_stack(x, together.unsqueeze(1))
        cross = [layer.cross_attention.project(memory, place) for layer in self._decoder_layers()]
        inside = torch.arange(place.shape[1]) < torch.from_numpy(lengths).unsqueeze(1)
        return cross, inside.to(history.device)

    def _decoder_layers(self) -> list[DecoderLayer]:
        return cast("list[DecoderLayer]", list(self.decoder))

    def cross_kv(self, memory: Tensor) -> list[KeyValue]:
        """Keys and values `[B, H, S, dh]` of `memory [B, S, d]` for each decoder layer; once a request."""
        return [layer.cross_attention.project(memory) for layer in self._decoder_layers()]

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
        bias = score_bias(self.decoder_bias(positions, keys), causal, x.dtype)
        cross_bias = score_bias(None, memory_mask[:, None, None, :], x.dtype)
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
        """Hidden states `[B·W, m, L, d]` before each code of `targets [B·W, m, L]`, W ≥ 1 sessions a user."""
        rows, items, levels = targets.shape
        cross, memory_mask = self._encode_packed(history, history_mask)
        x = self.session_embedded(targets)
        positions = torch.arange(x.shape[1], device=x.device)
        hidden, _ = self.decode(x, positions, None, cross, memory_mask, routings)
        return F.pad(hidden, (0, 0, 0, 1)).view(rows, items, levels + 1, -1)[:, :, :levels]

    def token_logits(self, history: Tensor, history_mask: Tensor, targets: Tensor, target_mask: Tensor) -> Tensor:
        """Teacher-forced logits `[B, m, L, K]` (eq. 3-4); those of masked items mean nothing."""
        hidden = self._target_hidden(history, history_mask, targets)
        return torch.stack([self.head(level, hidden[:, :, level]) for level in range(targets.shape[2])], dim=2)

    def loss(self, batch: Batch, total: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """NTP of eq. 4 as the mean over real target codes, plus the experts' balance loss.

        Stats (detached): `ntp`; `level_ntp [L]`; `tokens`; `balance`; `expert_load [decoder layers, E]`, shares.

        `total`: this batch is one of the parts of a larger one, and `total` turns its `census` into the sum over all
        parts. Loss and stats are then this part's addends: their sums over the parts are those of the whole.
        """
        routings: list[Routing] = []
        hidden = self._target_hidden(batch.history, batch.history_mask, batch.targets, routings)
        keep = batch.target_mask
        real, codes = hidden[keep], batch.targets[keep]
        routings = self._of_real_tokens(routings, keep)
        own = _census(len(real), routings)
        whole = own if total is None else total(own.clone())
        counts, own_counts = whole[1:].view(len(routings), -1), own[1:].view(len(routings), -1)
        level_ntp = torch.stack(
            [F.cross_entropy(wide(self.head(level, real[:, level])), codes[:, level]) for level in range(self.config.levels)]
        )
        if total is not None:
            level_ntp = level_ntp * (len(real) / whole[0])
        ntp = level_ntp.mean()
        balance = torch.stack(
            [balance_loss(routing, count) for routing, count in zip(routings, counts, strict=True)]
        ).mean()
        stats = {
            "ntp": ntp.detach(),
            "level_ntp": level_ntp.detach(),
            "tokens": codes.numel(),
            "balance": balance.detach(),
            "expert_load": own_counts / counts.sum(1, keepdim=True).clamp(min=1),
        }
        return ntp + BALANCE_WEIGHT * balance, stats

    def census(self, batch: Batch) -> Tensor:
        """What a mean over several batches needs of each: int64 `[1 + decoder layers · E]`, which add up.

        The real target items, then how many tokens chose each expert, layer by layer.
        """
        routings: list[Routing] = []
        self._target_hidden(batch.history, batch.history_mask, batch.targets, routings)
        return _census(int(batch.target_mask.sum()), self._of_real_tokens(routings, batch.target_mask))

    def _of_real_tokens(self, routings: list[Routing], target_mask: Tensor) -> list[Routing]:
        """Routings without the positions of padding."""
        if target_mask.all():
            return routings
        positions = target_mask.repeat_interleave(self.config.levels + 1, dim=1)[:, :-1].flatten()
        return [of_tokens(routing, positions) for routing in routings]

    def session_log_prob(self, history: Tensor, history_mask: Tensor, targets: Tensor, target_mask: Tensor) -> Tensor:
        """log P of each session `[B]`: the sum over the codes of its real items."""
        logits = wide(self.token_logits(history, history_mask, targets, target_mask))
        chosen = torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return (chosen.sum(-1) * target_mask).sum(-1)

    def code_log_probs(self, history: Tensor, history_mask: Tensor, sessions: Tensor) -> Tensor:
        """log P of each code `[B, W, m, L]` of W sessions a user `[B, W, m, L]`, all items real (eq. 3-4).

        The encoder runs once a user, whatever W is.
        """
        flat = sessions.flatten(0, 1)
        hidden = self._target_hidden(history, history_mask, flat)
        levels = [
            -F.cross_entropy(
                wide(self.head(level, hidden[:, :, level])).flatten(0, 1), flat[:, :, level].flatten(), reduction="none"
            )
            for level in range(flat.shape[2])
        ]
        return torch.stack(levels, dim=-1).view(sessions.shape)


def _census(items: int, routings: list[Routing]) -> Tensor:
    counts = [assignments(routing) for routing in routings]
    return torch.cat((counts[0].new_tensor([items]), *counts))
