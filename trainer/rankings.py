"""From scores of single items to sessions: how a method that ranks items takes part in a judgement of sessions."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
"""Histories scored at once."""


class ItemRanker(Protocol):
    """A method that gives every item of the catalogue a log-probability of being next; items are catalogue rows."""

    def log_probs(self, histories: Sequence[Sequence[int] | NDArray[np.integer]]) -> NDArray[np.float32]:
        """Float32 [B, N] for B histories, oldest item first, each of any length; -inf for an item that is never next."""


class WithHistory(Protocol):
    """What a recommender reads of a case."""

    @property
    def history(self) -> NDArray[np.integer]:
        """Catalogue rows, oldest first."""


def best_rows(log_probs: NDArray[np.floating], k: int) -> NDArray[np.int32]:
    """The `k` most likely rows of `log_probs` [N], best first, equals by the lower row; none of -inf."""
    possible = int((log_probs > -np.inf).sum())
    if k < possible < len(log_probs) or k * 4 < possible:
        # Everything that ties with the k-th best stays in, so that equals are still decided by the row.
        bound = np.partition(log_probs, len(log_probs) - k)[len(log_probs) - k]
        rows = np.flatnonzero(log_probs >= bound)
    else:
        rows = np.arange(len(log_probs))
    order = np.lexsort((rows, -log_probs[rows]))
    return rows[order][: min(k, possible)].astype(np.int32)


def best_sessions(log_probs: NDArray[np.floating], m: int, count: int) -> NDArray[np.int32]:
    """The `count` most likely sets of `m` different items, each drawn on its own: int32 [n <= count, m], best first.

    log_probs [N]; the log-probability of a set is the sum over its items, which stand in falling probability. Exact
    best-first enumeration: the places of a set in the ranking, moved down one at a time, never make it more likely, so
    that the next best is always among those already met. Equal sets come in the order of their places; items of -inf are
    in none. Fewer than `count` sets where there are no more.
    """
    # A set that reaches place j has j - m + 1 others at least as likely, so later places cannot be needed.
    ranked = best_rows(log_probs, m + count - 1)
    if m < 1 or count < 1 or len(ranked) < m:
        return np.empty((0, max(m, 0)), np.int32)
    values = log_probs[ranked].astype(np.float64).tolist()
    first = tuple(range(m))
    heap: list[tuple[float, tuple[int, ...]]] = [(-sum(values[:m]), first)]
    met = {first}
    found: list[tuple[int, ...]] = []
    while heap and len(found) < count:
        _, places = heapq.heappop(heap)
        found.append(places)
        for moved in range(m):
            after = places[moved] + 1
            if after == (places[moved + 1] if moved + 1 < m else len(values)):
                continue
            successor = (*places[:moved], after, *places[moved + 1 :])
            if successor not in met:
                met.add(successor)
                # Summed anew, not updated, so that equal sets have equal bytes.
                heapq.heappush(heap, (-sum(values[place] for place in successor), successor))
    return ranked[np.array(found, np.int64).reshape(-1, m)]


class RankingRecommender:
    """An `ItemRanker` as a recommender of items and of sessions of `m` items (`trainer.judge.Recommender`)."""

    def __init__(self, ranker: ItemRanker, m: int) -> None:
        self.ranker = ranker
        self.m = m

    def items(self, cases: Sequence[WithHistory], k: int) -> list[NDArray[np.int32]]:
        """The `k` most likely next items of each case, rows, best first: a full ranking, nothing filtered out."""
        return [best_rows(row, k) for row in self._rows(cases)]

    def sessions(self, cases: Sequence[WithHistory], count: int) -> list[NDArray[np.int32]]:
        """The `count` most likely sessions of each case, int32 [n <= count, m], no item twice within one."""
        return [best_sessions(row, self.m, count) for row in self._rows(cases)]

    def _rows(self, cases: Sequence[WithHistory]) -> list[NDArray[np.float32]]:
        blocks = (cases[start : start + BLOCK] for start in range(0, len(cases), BLOCK))
        return [row for block in blocks for row in self.ranker.log_probs([case.history for case in block])]
