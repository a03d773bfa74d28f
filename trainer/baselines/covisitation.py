"""What others watched after the item that this user watched last."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from trainer.baselines.popularity import Popularity

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
