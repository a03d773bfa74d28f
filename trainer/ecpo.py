"""Reinforcement of the generator by ECPO, early-clipped GRPO (OneRec Technical Report, arXiv 2506.13695, RL section).

The published form, for a user u with sessions o_1 .. o_G drawn from π_old:

    J(θ) = E[ 1/G Σ_i min(ρ_i A_i, clip(ρ_i, 1 - ε, 1 + ε) A_i) ],   ρ_i = π_θ(o_i|u) / π'_old(o_i|u)
    A_i = (r_i - mean(r)) / std(r)
    π'_old(o_i|u) = max( sg(π_θ(o_i|u)) / (1 + ε + δ), π_old(o_i|u) ),   δ > 0, sg = stop gradient

so that ρ_i ≤ 1 + ε + δ: GRPO's min leaves the ratio of a bad session (A_i < 0) unbounded, and with it the gradient, which
is ρ_i A_i ∇ log π_θ. No KL term: the model learns next-token prediction (eq. 4 of the OneRec paper) in the same step.

Format reward, as published: K of the G sessions at random; the legal ones have the advantage 1 in the same objective, the
others are discarded, since pushing them down squeezes probability onto whatever else is likely, legal or not.

What is ours, where the report leaves it open: o is a whole session, and π(o|u) the product over its m·L codes; std is the
population's; π_old is the policy at the beginning of a step, or of up to `renew` - 1 steps before (the report's is older
because serving lags), and a step makes `updates` updates on the same sessions; groups whose rewards are all equal teach
nothing and are skipped and counted; illegal sessions earn no reward and are no group members; the mean over K counts the
discarded, so that the format term's gradient is that of the probability of a legal session.

Shapes: B users, G sessions of a group, K sessions of the format reward, N = G + K or G, m items, L levels.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor

from onerec.errors import UserError
from trainer.batches import window_batch
from trainer.beam import trie_tensors
from trainer.data import Example
from trainer.model import Batch, OneRec
from trainer.optim import Optimizer
from trainer.policy_rewards import Earned, PolicyRewards, legality
from trainer.rollout import Samples, sample_sessions

EQUAL = 1e-6
"""A group whose rewards deviate by less than this is all equal: what is left is rounding, which A_i would blow up."""

Positive = Annotated[int, Meta(ge=1)]


class EcpoConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Reinforcement; the report gives ε, δ and the form, the sizes are for a small model on a CPU.

    `users`, `group`: B and G of a step. `epsilon`, `delta`: ε and δ; delta None is GRPO's clipping, for comparison.
    `updates`: updates on the sessions of a step; `renew`: steps between renewals of π_old, which draws them; with both 1
    the ratio is always 1. `weight`, `ntp_weight`, `format_weight`: of
    J, of next-token prediction and of the format reward (0: off; legality is measured all the same). `format_sessions`: K.
    `source`: what the groups are drawn from: "trie", the sessions that serving could give, all of them legal; "free", as
    published, all codes, of which the K are a part. `precision` fp32: two passes in bf16 differ by as much as ε.
    """

    users: Positive = 16
    group: Annotated[int, Meta(ge=2)] = 16
    epsilon: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    delta: Annotated[float, Meta(gt=0)] | None = 0.1
    updates: Positive = 2
    renew: Positive = 1
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-4
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0
    weight: Annotated[float, Meta(ge=0)] = 1.0
    ntp_weight: Annotated[float, Meta(ge=0)] = 1.0
    format_weight: Annotated[float, Meta(ge=0)] = 1.0
    format_sessions: Positive = 8
    source: Literal["trie", "free"] = "trie"
    precision: Literal["auto", "fp32", "bf16"] = "fp32"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A step: what was drawn before it, from π_old, and its updates.

    `legal`, `legal_items`: shares of sessions and of items drawn without the trie that are legal; `entropy` [L] in nats;
    `reward`: mean of the legal sessions' R(u, S); `industrial`: of the user's function, None without. `groups` learnt,
    `equal_groups` skipped for equal rewards, `small_groups` for fewer than two rewarded sessions; `faults`: sessions that
    the user's function failed on. Of the updates: `gradient` and `largest_gradient`, mean and largest norm before
    clipping, `ratio`: largest π_θ/π_old, `clipped`: share of group sessions without gradient, `skipped`: not finite.
    """

    step: int
    legal: float
    legal_items: float
    entropy: list[float]
    reward: float | None
    industrial: float | None
    groups: int
    equal_groups: int
    small_groups: int
    faults: int
    ntp: float
    gradient: float
    largest_gradient: float
    ratio: float
    clipped: float
    skipped: int
    seconds: float


class Advantages(NamedTuple):
    """A_i, and how often which group could not have any."""

    values: NDArray[np.float64]  # [B, G]; 0 for sessions without reward and for skipped groups
    weights: NDArray[np.float64]  # [B, G]; 1 / (groups learnt · rewarded sessions), 0 where there is no advantage
    learnt: int
    equal: int
    small: int


def advantages(rewards: NDArray[np.float64]) -> Advantages:
    """A_i = (r_i - mean) / std within each group of `rewards [B, G]`, NaN = no reward: no member of its group."""
    member = np.isfinite(rewards)
    size = member.sum(1)
    known = np.where(member, rewards, 0.0)
    centred = np.where(member, known - (known.sum(1) / np.maximum(size, 1))[:, None], 0.0)
    deviation = np.sqrt((centred**2).sum(1) / np.maximum(size, 1))
    small = size < 2
    equal = ~small & (deviation <= EQUAL)
    learnt = ~small & ~equal
    values = np.where(learnt[:, None], centred / np.where(learnt, deviation, 1.0)[:, None], 0.0)
    weights = (member & learnt[:, None]) / np.maximum(size, 1)[:, None] / max(1, int(learnt.sum()))
    return Advantages(values, weights, int(learnt.sum()), int(equal.sum()), int(small.sum()))


def clipped_objective(
    log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, *, epsilon: float, delta: float | None
) -> Tensor:
    """min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) of each session, any shape, to be maximised; `delta` None: GRPO's ρ = π_θ/π_old.

    log_probs: log π_θ with its gradient; old_log_probs: log π_old without.
    """
    if delta is not None:
        old_log_probs = torch.maximum(log_probs.detach() - math.log1p(epsilon + delta), old_log_probs)
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


class _Drawn(NamedTuple):
    """The sessions of a step, their advantages and weights; `places` [B, K] are the format reward's among the N."""

    history: Tensor
    history_mask: Tensor
    codes: Tensor  # [B, N, m, L]
    log_probs: Tensor  # [B, N]
    advantage: Tensor  # [B, G]
    weight: Tensor  # [B, G]
    places: Tensor  # [B, K]
    legal: Tensor  # [B, K], 1 = legal


def reinforce(
    model: OneRec,
    examples: Sequence[Example],
    item_codes: NDArray[np.integer],
    rewards: PolicyRewards,
    config: EcpoConfig,
    *,
    generator: torch.Generator,
    steps: int,
    optimizer: Optimizer | None = None,
) -> Iterator[Step]:
    """Train `model` in place, a step of `config.users` users drawn from `examples` at a time; yields each step's figures.

    item_codes [N, L]: the catalogue, of which `rewards.trie` must be made. `optimizer`: to go on with, of `model`; a new
    one by default. Same arguments and state of `generator`: same weights (CPU, fixed threads). Raises UserError where
    there is no example, or the catalogue has fewer items than a session.
    """
    if not examples:
        raise UserError("no session to reinforce on: the log holds none with known items; train on a longer log")
    if len(item_codes) < model.config.session_items:
        raise UserError(
            f"the catalogue has {len(item_codes)} items, a session {model.config.session_items}: none can be drawn"
        )
    optimizer = optimizer or Optimizer(
        model, learning_rate=config.learning_rate, clip_norm=config.clip_norm, precision=config.precision
    )
    old = model
    for number in range(1, steps + 1):
        began = time.perf_counter()
        model.eval()
        if config.renew > 1 and (number - 1) % config.renew == 0:
            old = copy.deepcopy(model)
        drawn, figures = _draw(old, _some(examples, config.users, generator), item_codes, rewards, config, generator)
        updates = [
            _update(optimizer, drawn, _some(examples, config.users, generator), item_codes, config)
            for _ in range(config.updates)
        ]
        yield Step(
            step=number,
            **figures,
            ntp=float(updates[0]["ntp"]),
            gradient=float(np.mean([update["grad_norm"] for update in updates])),
            largest_gradient=max(update["grad_norm"] for update in updates),
            ratio=max(float(update["ratio"]) for update in updates),
            clipped=float(np.mean([float(update["clipped"]) for update in updates])),
            skipped=sum(update["skipped"] for update in updates),
            seconds=time.perf_counter() - began,
        )
    model.eval()


def _some(examples: Sequence[Example], count: int, generator: torch.Generator) -> list[Example]:
    drawn = torch.randint(len(examples), (count,), generator=generator, device=generator.device)
    return [examples[place] for place in drawn.tolist()]


def _batch(model: OneRec, examples: list[Example], item_codes: NDArray[np.integer]) -> Batch:
    return window_batch(examples, item_codes, m=model.config.session_items, device=model.bos.device)


def _draw(
    model: OneRec,
    users: list[Example],
    item_codes: NDArray[np.integer],
    rewards: PolicyRewards,
    config: EcpoConfig,
    generator: torch.Generator,
) -> tuple[_Drawn, dict[str, Any]]:
    """Sessions from `model`, which is π_old, and what they earn."""
    batch = _batch(model, users, item_codes)
    history, mask, device = batch.history, batch.history_mask, batch.history.device
    if config.source == "free":
        group = sample_sessions(model, history, mask, count=config.group, generator=generator)
        order = torch.rand(len(users), config.group, generator=generator, device=generator.device).argsort(1)
        places = order[:, : config.format_sessions].to(device)
        samples, free = group, group
    else:
        tries = trie_tensors(rewards.trie, device)
        group = sample_sessions(model, history, mask, count=config.group, generator=generator, trie=tries)
        free = sample_sessions(model, history, mask, count=config.format_sessions, generator=generator)
        places = torch.arange(config.group, config.group + config.format_sessions, device=device).expand(len(users), -1)
        samples = group
        if config.format_weight:
            samples = Samples(
                torch.cat((group.codes, free.codes), 1), torch.cat((group.log_probs, free.log_probs), 1), free.entropy
            )
    faults = rewards.faults
    earned: Earned = rewards(history, mask, group.codes)
    legal = earned.legality if config.source == "free" else legality(rewards.trie, free.codes.cpu().numpy())
    found = advantages(earned.rewards)
    is_legal = torch.from_numpy(legal.sessions.astype(np.float32)).to(device)
    drawn = _Drawn(
        history,
        mask,
        samples.codes,
        samples.log_probs,
        torch.from_numpy(found.values).float().to(device),
        torch.from_numpy(found.weights).float().to(device),
        places,
        is_legal.gather(1, places) if config.source == "free" else is_legal,
    )
    return drawn, {
        "legal": float(legal.sessions.mean()),
        "legal_items": float(legal.items.mean()),
        "entropy": [float(value) for value in free.entropy],
        "reward": _mean(earned.preference),
        "industrial": _mean(earned.industrial),
        "groups": found.learnt,
        "equal_groups": found.equal,
        "small_groups": found.small,
        "faults": rewards.faults - faults,
    }


def _mean(values: NDArray[np.float64]) -> float | None:
    """The mean of what is not NaN; None where all is."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _update(
    optimizer: Optimizer,
    drawn: _Drawn,
    learnt: list[Example],
    item_codes: NDArray[np.integer],
    config: EcpoConfig,
) -> Mapping[str, Any]:
    """One update by -weight · (J + format_weight · J_format) + ntp_weight · NTP."""
    batch = _batch(optimizer.model, learnt, item_codes)

    def gain(log_probs: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        return clipped_objective(log_probs, old, advantage, epsilon=config.epsilon, delta=config.delta)

    def objective(model: OneRec) -> tuple[Tensor, dict[str, Any]]:
        loss, stats = model.loss(batch)
        log_probs = model.code_log_probs(drawn.history, drawn.history_mask, drawn.codes).sum((-1, -2))
        group, old = log_probs[:, : config.group], drawn.log_probs[:, : config.group]
        gained = (gain(group, old, drawn.advantage) * drawn.weight).sum()
        if config.format_weight:
            ruled = gain(log_probs.gather(1, drawn.places), drawn.log_probs.gather(1, drawn.places), drawn.legal).mean()
            gained = gained + config.format_weight * ruled
        total = config.ntp_weight * loss - config.weight * gained
        ratio = torch.exp(group.detach() - old)
        high, low = ratio > 1 + config.epsilon, ratio < 1 - config.epsilon
        still = ((drawn.advantage > 0) & high) | ((drawn.advantage < 0) & low)
        return total, {**stats, "ratio": ratio.max(), "clipped": still.float().mean()}

    return optimizer.step(objective)
