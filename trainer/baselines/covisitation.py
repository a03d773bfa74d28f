"""What others watched after the item that this user watched last."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.baselines.popularity import Popularity, probabilities

FOLLOWERS = 64


class CoVisitation:
    """For each last item of a history, counts of the items of the windows that came next, and of neighbours in windows.

    At most `FOLLOWERS` followers an item are kept, the rarest leaving first: memory is bounded by the catalogue. What
    a last item cannot fill is filled by popularity, which learns from the same windows. Items are catalogue rows.
    """

    def __init__(self) -> None:
        self.popularity = Popularity()
        self._followers: dict[int, dict[int, int]] = {}

    def observe(self, history: Sequence[int], targets: Sequence[int]) -> None:
        """Learn one window: its items follow the last item of the history and, each, the item before."""
        self.popularity.observe(targets)
        if len(history):
            for row in targets:
                self._count(history[-1], row)
        for before, after in zip(targets, targets[1:], strict=False):
            self._count(before, after)

    def rank(self, history: Sequence[int], k: int) -> list[int]:
        """The `k` best rows after the last item of `history`, ties to the more popular, then popularity's."""
        followers = self._followers.get(history[-1], {}) if len(history) else {}
        order = self.popularity.rank(k)
        weight = self.popularity.count
        ranked = heapq.nsmallest(k, followers, key=lambda row: (-followers[row], -weight(row), row))
        return (ranked + [row for row in order if row not in followers])[:k]

    def followers(self, row: int) -> Mapping[int, int]:
        """How often each item came next after `row`."""
        return self._followers.get(row, {})

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps: popularity's state, and `pairs` [p, 3] of item, follower, count."""
        pairs = [(row, after, n) for row, followers in self._followers.items() for after, n in followers.items()]
        return {**self.popularity.state(), "pairs": np.array(pairs, np.int64).reshape(-1, 3)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up what `state` gave."""
        self.popularity.restore(state)
        self._followers = {}
        for row, after, count in state["pairs"].tolist():
            self._followers.setdefault(row, {})[after] = count

    def _count(self, before: int, after: int) -> None:
        followers = self._followers.setdefault(before, {})
        if after not in followers and len(followers) >= FOLLOWERS:
            del followers[min(followers, key=lambda row: followers[row])]
        followers[after] = followers.get(after, 0) + 1


class CoVisitationRanker:
    """`CoVisitation` as an item ranker: what came next after the last item, popularity where that says nothing.

    P(item | last) = (followed + P_popularity(item)) / (all that followed + 1): popularity is worth one observation, so it
    decides only between items that followed equally often, and the order is that of `CoVisitation.rank`.
    """

    def __init__(self, items: int) -> None:
        self.items = items
        self._covisitation = CoVisitation()
        self._popularity: NDArray[np.float64] | None = None

    def fit(self, sequences: Iterable[Sequence[int]]) -> None:
        """Count each item as the follower of the one before it in its sequence."""
        for sequence in sequences:
            self._covisitation.observe([], [int(row) for row in sequence])
        self._popularity = None

    def log_probs(self, histories: Sequence[Sequence[int] | NDArray[np.integer]]) -> NDArray[np.float32]:
        """Float32 [B, N] given the last item of each history; without one, popularity's."""
        if self._popularity is None:
            self._popularity = probabilities(self._covisitation.popularity, self.items)
        found = np.empty((len(histories), self.items), np.float32)
        for row, history in zip(found, histories, strict=True):
            followers = self._covisitation.followers(int(history[-1])) if len(history) else {}
            mass = self._popularity.copy()
            mass[list(followers)] += list(followers.values())
            row[:] = np.log(mass / (sum(followers.values()) + 1.0))
        return found
