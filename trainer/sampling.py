"""Preference pairs by the model's own sessions: N of M_t by beam search, best and worst by the reward model (eq. 8-9).

Algorithm 2, lines 3-11. Shapes: P requests, T history items, N beams, m items, L levels, 4 towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from exporter.trie import build_trie
from trainer.beam import beam_search, trie_tensors
from trainer.config import PreferenceConfig, RewardConfig
from trainer.data import pad_histories
from trainer.pairs import Drop, Pair
from trainer.reward import combine

if TYPE_CHECKING:
    from trainer.model import OneRec
    from trainer.reward import RewardModel

REASONS = ("few_responses", "not_finite", "tie", "same_items", "margin", "behind")
"""Why a sampled session gives no pair. `few_responses`: too few live beams; `not_finite`: a reward or log-probability
that is no number; `tie`: best and worst have the same reward; `same_items`: they are the same items in another order;
`margin`: their rewards differ by less than `preference.min_margin`; `behind`: the sampler passed it over to catch up.
"""


class Request(NamedTuple):
    """A sampled session: its id, its place in the log, and the catalogue rows of H(start), oldest first."""

    session_id: str
    sequence: int
    history: np.ndarray  # int32 [h]


class Responses(NamedTuple):
    """What M_t answers to one request: its live beams, best first."""

    codes: np.ndarray  # int64 [n, m, L]
    log_probs: np.ndarray  # fp32 [n]
    towers: np.ndarray  # fp32 [n, 4]
    rewards: np.ndarray  # fp32 [n], R(u, S)


class PairMaker:
    """Makes pairs with one snapshot M_t and the reward model of the same checkpoint; `item_codes` int32 [items, L].

    Same requests, same weights: same pairs, however they are batched (to rounding).
    """

    def __init__(
        self,
        model: OneRec,
        reward_model: RewardModel,
        item_codes: np.ndarray,
        preference: PreferenceConfig,
        reward: RewardConfig,
        *,
        snapshot_step: int,
        snapshot_version: int,
        codebook_version: str,
        device: str = "cpu",
    ) -> None:
        self._model, self._reward_model = model.eval(), reward_model.eval()
        self._item_codes, self._preference, self._reward, self._device = item_codes, preference, reward, device
        self.snapshot_step, self.snapshot_version = snapshot_step, snapshot_version
        self.codebook_version = codebook_version
        trie = build_trie(item_codes, model.config.codes)
        self._leaf_codes = torch.from_numpy(trie.tuples.astype(np.int64)).to(device)
        self._trie = trie_tensors(trie, device)

    def make(self, requests: Sequence[Request]) -> list[Pair | Drop]:
        """One record a request, in order; their numbers are 0 until the log gives them theirs."""
        return self.make_counted(requests)[0]

    def make_counted(self, requests: Sequence[Request]) -> tuple[list[Pair | Drop], int]:
        """What `make` gives, and how many sessions were generated for it."""
        answers = self.respond(requests) if requests else []
        records = [self.choose(request, answer) for request, answer in zip(requests, answers, strict=True)]
        return records, sum(len(answer.rewards) for answer in answers)

    @torch.no_grad()
    def respond(self, requests: Sequence[Request]) -> list[Responses]:
        """The `preference.responses` best sessions of each request with log P under M_t and rewards (eq. 8-9)."""
        history, mask = self._histories(requests, self._model.config.history_length)
        beams = beam_search(self._model, self._trie, history, mask, width=self._preference.responses)
        codes = self._leaf_codes[beams.leaves.clamp(min=0)]
        seen, seen_mask = self._histories(requests, self._reward_model.config.history_length)
        # Dead beams are scored too, as the leaf 0, and left out below: the shapes stay the same.
        towers = self._reward_model.rewards(seen, seen_mask, codes, torch.ones(codes.shape[:3], dtype=torch.bool,
                                                                                device=codes.device))
        rewards = combine(towers, self._reward)
        alive = beams.alive
        return [
            Responses(*(part[place][alive[place]].cpu().numpy() for part in (codes, beams.scores, towers, rewards)))
            for place in range(len(requests))
        ]

    def choose(self, request: Request, answer: Responses) -> Pair | Drop:
        """S_w = argmax R and S_l = argmin R (eq. 9); with `preference.rejected` > 1 the next lowest too.

        Of equal rewards the likelier session is taken. Every loser is of other items than the winner and than each other.
        """
        wanted = self._preference.rejected
        if len(answer.rewards) < max(2, 1 + wanted):
            return self._drop(request, "few_responses")
        if not (np.isfinite(answer.towers).all() and np.isfinite(answer.rewards).all() and np.isfinite(answer.log_probs).all()):
            return self._drop(request, "not_finite")
        best = int(answer.rewards.argmax())
        rising = np.argsort(answer.rewards, kind="stable")
        if answer.rewards[rising[0]] == answer.rewards[best]:
            return self._drop(request, "tie")
        taken = {_items(answer.codes[best])}
        if _items(answer.codes[rising[0]]) in taken:
            return self._drop(request, "same_items")
        losers: list[int] = []
        for place in rising.tolist():
            items = _items(answer.codes[place])
            if items not in taken:
                taken.add(items)
                losers.append(place)
            if len(losers) == wanted:
                break
        if len(losers) < wanted:
            return self._drop(request, "few_responses")
        margin = float(answer.rewards[best]) - float(answer.rewards[losers[-1]])
        if margin < self._preference.min_margin or margin <= 0:
            return self._drop(request, "margin")
        return Pair(
            number=0,
            session_id=request.session_id,
            sequence=request.sequence,
            snapshot_step=self.snapshot_step,
            snapshot_version=self.snapshot_version,
            codebook_version=self.codebook_version,
            history=self.history_codes(request),
            chosen=answer.codes[best].tolist(),
            rejected=answer.codes[losers].tolist(),
            chosen_log_prob=float(answer.log_probs[best]),
            rejected_log_probs=answer.log_probs[losers].tolist(),
            chosen_reward=answer.towers[best].tolist(),
            rejected_rewards=answer.towers[losers].tolist(),
            margin=margin,
        )

    @torch.no_grad()
    def judge(self, request: Request, rows: np.ndarray) -> tuple[list[list[int]], float, list[float]]:
        """Codes [m][L] of a session of catalogue rows [m], its log P under M_t, and its four rewards."""
        codes = torch.from_numpy(self._item_codes[rows].astype(np.int64)).to(self._device).unsqueeze(0)
        real = torch.ones(codes.shape[:2], dtype=torch.bool, device=codes.device)
        history, mask = self._histories([request], self._model.config.history_length)
        log_prob = self._model.session_log_prob(history, mask, codes, real)
        seen, seen_mask = self._histories([request], self._reward_model.config.history_length)
        towers = self._reward_model.rewards(seen, seen_mask, codes.unsqueeze(1), real.unsqueeze(1))
        return codes[0].tolist(), float(log_prob), towers[0, 0].tolist()

    def history_codes(self, request: Request) -> list[list[int]]:
        """Codes [h][L] of a request's history as M_t reads it."""
        return self._item_codes[request.history[-self._model.config.history_length :]].tolist()

    def _drop(self, request: Request, reason: str) -> Drop:
        return Drop(number=0, session_id=request.session_id, sequence=request.sequence, snapshot_step=self.snapshot_step,
                    reason=reason)

    def _histories(self, requests: Sequence[Request], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [P, T, L] and mask [P, T] of the newest `longest` items each; T is at least 1."""
        codes, mask = pad_histories([request.history[-longest:] for request in requests], self._item_codes)
        return torch.from_numpy(codes).to(self._device), torch.from_numpy(mask).to(self._device)


def _items(codes: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """The items of a session [m, L] without their order; items that share a tuple count as one."""
    return tuple(sorted(tuple(item) for item in codes.tolist()))
