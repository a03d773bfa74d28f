"""The part of a step that every rank does: score its share of the batch, then learn it.

NTP and balance loss are means over the batch of all ranks together, so a step is that of one process up to rounding,
whatever the number of ranks and of micro-batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer import preference
from trainer.batches import pair_batch, window_batch
from trainer.config import ModelConfig
from trainer.data import Example
from trainer.evaluate import ModelScorer, add, is_scored
from trainer.model import Batch, OneRec
from trainer.optim import Optimizer, Parts
from trainer.pairs import Pair
from trainer.ranks import Ranks
from trainer.runs import Run

PARTITIONS = 1024
"""Users are spread over so many partitions, and these over the ranks in turn."""


def owns(ranks: Ranks, session_id: str) -> bool:
    """Whether this rank learns the sessions of that session's user, who is the first part of its id (SEMANTICS.md §5)."""
    user = session_id.partition(":")[0]
    return zlib.crc32(user.encode()) % PARTITIONS % ranks.size == ranks.rank


def share(ranks: Ranks, examples: Sequence[Example]) -> list[Example]:
    """Those of a batch's `examples` that this rank learns; over all ranks each exactly once."""
    return [example for example in examples if owns(ranks, example.session_id)]



def micro_batches(examples: Sequence[Example], most: int) -> list[list[Example]]:
    """`examples` in groups of at most `most` (0: one group), of like lengths of history so that little is padded."""
    if not most or len(examples) <= most:
        return [list(examples)] if examples else []
    ordered = sorted(examples, key=lambda example: len(example.history))
    count = -(-len(ordered) // most)
    return [ordered[place * len(ordered) // count : (place + 1) * len(ordered) // count] for place in range(count)]


def ntp_parts(ranks: Ranks, batches: Sequence[Batch], config: ModelConfig) -> Parts:
    """NTP and balance loss of the global batch, of which this rank has `batches`: none, one, or several micro-batches.

    Both are means over the global batch. NTP: a part's mean counts by its share of the target items. Balance (E Σ f_e
    P_e): f over all ranks and micro-batches enters every part's gradient, so it must be known before the first; one
    batch a rank counts in its own forward pass, several in a forward pass without gradients before.
    """

    def parts(model: OneRec) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        if ranks.size == 1 and len(batches) == 1:
            yield model.loss(batches[0])
            return
        if len(batches) == 1:
            yield model.loss(batches[0], ranks.sum_)
            return
        size = 1 + config.decoder_layers * config.experts
        census = torch.zeros(size, dtype=torch.int64, device=model.bos.device)
        with torch.no_grad():
            for batch in batches:
                census += model.census(batch)
        ranks.sum_(census)
        for batch in batches:
            yield model.loss(batch, lambda own: census)

    return parts


class Learned(NamedTuple):
    """What a step gave, of all ranks together: the optimiser's stats, and sums of the metrics over the `scored` windows."""

    stats: dict[str, Any]
    scored: list[Example]
    scores: dict[str, float]


class Learner:
    """Scores and learns this rank's share of each batch; all ranks hold the same weights and see the same batches."""

    def __init__(self, run: Run, ranks: Ranks, model: OneRec, optimizer: Optimizer) -> None:
        self._run, self._ranks, self._model, self._optimizer = run, ranks, model, optimizer
        self._scorer: ModelScorer | None = None
        self._scorer_known = -1

    def learn(self, examples: Sequence[Example], pairs: Sequence[Pair], item_codes: np.ndarray, known: int) -> Learned:
        """Score, then one step on the whole batch's `examples` and `pairs`, of which this rank does its share.

        `item_codes [N, L]` of the catalogue, whose first `known` rows may be generated. Stats are `Optimizer.step`'s, with
        pairs also `preference`: `preference.loss`' and its `loss`.
        """
        chosen = [e for e in examples if e.scored and is_scored(e.session_id, self._run.config.score_share)]
        scores = self._score(chosen, item_codes, known) if chosen else {}
        own_pairs = list(pairs[self._ranks.rank :: self._ranks.size])
        groups = micro_batches(share(self._ranks, examples), self._run.config.micro_windows)
        batches = [self._batch(group, item_codes) for group in groups]

        def parts(model: OneRec) -> Iterator[tuple[Tensor, dict[str, Any]]]:
            # L = L_NTP + λ L_DPO (Algorithm 2, line 13), each the mean over what it is of.
            yield from ntp_parts(self._ranks, batches, self._run.model)(model)
            if own_pairs:
                aligned, stats = preference.loss(model, pair_batch(own_pairs, self._ranks.device), self._run.preference)
                weight = len(own_pairs) / len(pairs)
                of_pairs = {name: value * weight for name, value in (stats | {"loss": aligned.detach()}).items()}
                yield aligned * (weight * self._run.preference.weight), {"preference": of_pairs}

        return Learned(self._optimizer.step_parts(parts), chosen, scores)

    def _batch(self, examples: Sequence[Example], item_codes: np.ndarray) -> Batch:
        return window_batch(examples, item_codes, m=self._run.model.session_items, device=self._ranks.device)

    def _score(self, examples: Sequence[Example], item_codes: np.ndarray, known: int) -> dict[str, float]:
        own = share(self._ranks, examples)
        if own and (self._scorer is None or self._scorer_known != known):
            beams, device = self._run.config.score_beams, self._ranks.device
            self._scorer = ModelScorer(self._model, item_codes[:known], beams=beams, device=device)
            self._scorer_known = known
        scores = self._scorer.score(own) if own and self._scorer else {}
        total: dict[str, float] = {}
        for part in self._ranks.collect(scores, dict[str, float]):
            add(total, part)
        return total
