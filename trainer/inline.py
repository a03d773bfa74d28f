"""Preference alignment in one process, to the letter of Algorithm 2: for experiments, where a sampler beside the trainer
would make the figures depend on who was quicker. The trainer that never stops is `trainer.loop`, its sampler
`trainer.sampler`; both use the same pairs (`trainer.sampling`) and losses (`trainer.preference`).
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch

from trainer import preference
from trainer.batches import pair_batch, window_batch
from trainer.config import PreferenceConfig, RewardConfig
from trainer.data import Example
from trainer.model import OneRec
from trainer.optim import Optimizer
from trainer.pairs import Drop, Pair, is_sampled
from trainer.reward import RewardModel
from trainer.sampling import PairMaker, Request, Responses

REQUESTS_AT_ONCE = 16


class Alignment(msgspec.Struct, frozen=True, kw_only=True):
    """What an alignment did; seconds of generating and judging sessions, and of learning."""

    pairs: int
    drops: dict[str, int]
    steps: int
    preference_steps: int
    sampler_seconds: float
    trainer_seconds: float
    reward_margin: float
    lines: list[dict[str, float]]


class AlignConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How `align` runs over the examples.

    `source`: "self" takes winner and loser from M_t's own sessions (the paper's IPA); "logged" sets the session that the
    user really had against a random one of M_t's, as preference data of a log would. `snapshots`: how many M_t a pass has
    (0: the seed model makes all pairs).
    """

    source: Literal["self", "logged"] = "self"
    snapshots: int = 1
    passes: int = 1
    batch_windows: int = 64
    learning_rate: float = 2e-4
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0


class _Sampled(NamedTuple):
    """The sampled sessions of a stretch of the examples, with the place of each one's batch."""

    batch: int
    request: Request
    example: Example


def align(
    model: OneRec,
    examples: Sequence[Example],
    item_codes: np.ndarray,
    reward_model: RewardModel,
    *,
    settings: PreferenceConfig,
    reward: RewardConfig,
    config: AlignConfig,
    optimizer: Mapping[str, torch.Tensor] | None = None,
    progress: Callable[[float, dict[str, float]], None] = lambda share, line: None,
) -> Alignment:
    """Train `model` in place by L = L_NTP + λ L_DPO over `examples`, in order, a pass after the other.

    The share `settings.ratio` of the sessions of each pass (by a hash of session id and pass) become pairs, learnt in the
    batch that holds their session. `optimizer`: state to go on from. Same arguments: same weights (CPU, fixed threads).
    """
    preference.check(settings)
    rng = np.random.default_rng([config.seed, 5])
    steps = Optimizer(model, learning_rate=config.learning_rate, precision=config.precision)
    if optimizer is not None:
        steps.load_state_dict(optimizer)
    batches = _batches(examples, config.batch_windows)
    drops: Counter[str] = Counter()
    margins: list[float] = []
    lines: list[dict[str, float]] = []
    spent = {"sampler": 0.0, "trainer": 0.0}
    done, preference_steps, snapshot = 0, 0, copy.deepcopy(model)
    stretches = np.array_split(np.arange(len(batches)), max(1, config.snapshots))
    for round_ in range(config.passes):
        for stretch in stretches:
            began = time.perf_counter()
            if config.snapshots:
                snapshot = copy.deepcopy(model)
            maker = PairMaker(
                snapshot, reward_model, item_codes, settings, reward,
                snapshot_step=done, snapshot_version=0, codebook_version="",
            )
            sampled = _sample(batches, stretch.tolist(), settings.ratio, round_)
            pairs = _pairs(sampled, maker, settings, config, rng, drops)
            margins += [pair.margin for group in pairs.values() for pair in group]
            spent["sampler"] += time.perf_counter() - began
            for place in stretch.tolist():
                began = time.perf_counter()
                line = _step(steps, batches[place], pairs.get(place, []), item_codes, settings)
                spent["trainer"] += time.perf_counter() - began
                done += 1
                preference_steps += place in pairs
                lines.append(line)
                progress(done / (len(batches) * config.passes), line)
    model.eval()
    return Alignment(
        pairs=len(margins),
        drops=dict(drops),
        steps=done,
        preference_steps=preference_steps,
        sampler_seconds=spent["sampler"],
        trainer_seconds=spent["trainer"],
        reward_margin=float(np.mean(margins)) if margins else 0.0,
        lines=lines,
    )


def _batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Whole consecutive sessions, at least `size` windows a batch, as the trainer's."""
    found: list[list[Example]] = [[]]
    for place, example in enumerate(examples):
        if len(found[-1]) >= size and example.session_id != examples[place - 1].session_id:
            found.append([])
        found[-1].append(example)
    return found


def _sample(batches: Sequence[list[Example]], places: Sequence[int], ratio: float, round_: int) -> list[_Sampled]:
    """The first window of each sampled session of some batches: its history is H(start)."""
    found = []
    for place in places:
        seen: set[str] = set()
        for example in batches[place]:
            name = f"{example.session_id}#{round_}" if round_ else example.session_id
            if name not in seen and is_sampled(name, ratio):
                found.append(_Sampled(place, Request(example.session_id, 0, example.history), example))
            seen.add(name)
    return found


def _pairs(
    sampled: Sequence[_Sampled],
    maker: PairMaker,
    settings: PreferenceConfig,
    config: AlignConfig,
    rng: np.random.Generator,
    drops: Counter[str],
) -> dict[int, list[Pair]]:
    """The pairs of the sampled sessions by the batch that they belong to."""
    found: dict[int, list[Pair]] = {}
    for start in range(0, len(sampled), REQUESTS_AT_ONCE):
        group = sampled[start : start + REQUESTS_AT_ONCE]
        answers = maker.respond([one.request for one in group])
        for one, answer in zip(group, answers, strict=True):
            if config.source == "self":
                made: Pair | Drop = maker.choose(one.request, answer)
            else:
                made = _logged(one, answer, maker, settings, rng)
            if isinstance(made, Drop):
                drops[made.reason] += 1
            else:
                found.setdefault(one.batch, []).append(made)
    return found


def _logged(
    one: _Sampled, answer: Responses, maker: PairMaker, settings: PreferenceConfig, rng: np.random.Generator
) -> Pair | Drop:
    """The session that the user had, against `settings.rejected` random ones of M_t's."""
    if len(answer.rewards) < settings.rejected or len(one.example.targets) < answer.codes.shape[1]:
        return Drop(
            number=0, session_id=one.example.session_id, sequence=0, snapshot_step=maker.snapshot_step,
            reason="few_responses",
        )
    losers = rng.choice(len(answer.rewards), settings.rejected, replace=False)
    chosen, log_prob, towers = maker.judge(one.request, one.example.targets)
    return Pair(
        number=0,
        session_id=one.example.session_id,
        sequence=0,
        snapshot_step=maker.snapshot_step,
        snapshot_version=maker.snapshot_version,
        codebook_version=maker.codebook_version,
        history=maker.history_codes(one.request),
        chosen=chosen,
        rejected=answer.codes[losers].tolist(),
        chosen_log_prob=log_prob,
        rejected_log_probs=answer.log_probs[losers].tolist(),
        chosen_reward=towers,
        rejected_rewards=answer.towers[losers].tolist(),
        margin=0.0,
    )


def _step(
    optimizer: Optimizer, examples: list[Example], pairs: list[Pair], item_codes: np.ndarray, settings: PreferenceConfig
) -> dict[str, float]:
    """One update on a batch and its pairs; losses, margin and gradient norm."""
    batch = window_batch(examples, item_codes, m=optimizer.model.config.session_items)
    chosen = pair_batch(pairs) if pairs else None

    def objective(model: OneRec) -> tuple[torch.Tensor, dict[str, Any]]:
        loss, stats = model.loss(batch)
        if chosen is None:
            return loss, stats
        aligned, more = preference.loss(model, chosen, settings)
        return loss + settings.weight * aligned, {**stats, **more, "preference": aligned.detach()}

    stats = optimizer.step(objective)
    names = ("ntp", "preference", "margin", "accuracy", "chosen_logratios", "rejected_logratios", "grad_norm")
    return {name: float(stats[name]) for name in names if name in stats}
