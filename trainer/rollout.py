"""Sessions drawn from the policy itself, code by code at temperature 1, for reinforcement (`trainer.ecpo`).

Shapes: B users, G sessions a user, m items, L levels, K codes a level, C candidates (see `trainer.beam`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.beam import SENTINEL, TrieTensors, legal
from trainer.model import KeyValue, OneRec


class Samples(NamedTuple):
    """Drawn sessions; `log_probs` is log π over the full vocabulary, as the score of a beam, also where a trie chose."""

    codes: Tensor  # int64 [B, G, m, L]
    log_probs: Tensor  # fp32 [B, G]
    entropy: Tensor  # fp32 [L], mean entropy of the policy at each level in nats, over the full vocabulary


@torch.no_grad()
def sample_sessions(
    model: OneRec,
    history: Tensor,
    history_mask: Tensor,
    *,
    count: int,
    generator: torch.Generator,
    trie: TrieTensors | None = None,
    items: int | None = None,
) -> Samples:
    """`count` sessions a user by ancestral sampling, the same for the same state of `generator`, which is on their device.

    history int64 [B, T, L], right-padded, and history_mask bool [B, T]; items: m, the model's own by default. Without
    `trie` every code may be drawn, so that a session may name no item. With it, each code is drawn from the policy's
    distribution over those that go on to an item not yet used up; the catalogue must have at least m items.
    """
    levels, m = model.config.levels, items or model.config.session_items
    encoded, mask = model.encode(history, history_mask)
    cross = model.cross_kv(encoded)
    users, device = history.shape[0], history.device
    bos = model.embed_bos().expand(users * count, 1, -1)
    log_probs = torch.zeros(users, count, device=device)
    entropy = torch.zeros(levels, device=device)
    cache: list[KeyValue] | None = None
    taken: Tensor | None = None
    sessions: list[Tensor] = []
    fed, past = bos, 0
    for _ in range(m):
        node = log_probs  # a placeholder: nothing reads it before level 0 sets it
        codes: list[Tensor] = []
        for level in range(levels):
            positions = torch.arange(past, past + fed.shape[1], device=device)
            hidden, cache = model.decode(fed, positions, cache, cross, mask)
            past += fed.shape[1]
            full = torch.log_softmax(model.head(level, hidden[:, -1]).float(), dim=-1).view(users, count, -1)
            entropy[level] -= (full.exp() * full).sum(-1).mean() / m
            totals, children = legal(trie, level, levels, full, node, taken)
            slot = _draw(totals, generator)
            code, node = slot, slot
            if children is not None:
                code, node = (part.gather(2, slot.unsqueeze(-1)).squeeze(-1) for part in (children.codes, children.nodes))
            log_probs = log_probs + full.gather(2, code.unsqueeze(-1)).squeeze(-1)
            codes.append(code)
            fed = model.embed_code(level, code).flatten(0, 1).unsqueeze(1)
        fed = torch.cat((fed, bos), dim=1)
        sessions.append(torch.stack(codes, dim=-1))
        if trie is not None:
            leaf = trie["leaf0"].long()[node] if levels == 1 else node
            taken = leaf.unsqueeze(-1) if taken is None else torch.cat((taken, leaf.unsqueeze(-1)), dim=2)
    return Samples(torch.stack(sessions, dim=2), log_probs, entropy)


def _draw(totals: Tensor, generator: torch.Generator) -> Tensor:
    """One candidate `[B, G]` for each row of `totals [B, G, C]`, unnormalised log-probabilities, SENTINEL = never."""
    weights = torch.where(totals > SENTINEL, totals, -torch.inf).softmax(-1)
    return torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(totals.shape[:2])
