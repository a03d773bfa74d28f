"""Most watched first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


class Popularity:
    """Counts of the target items learnt so far, all alike (`half_life` None) or fading with the windows that pass.

    half_life: after that many observed windows a count weighs half. Items are catalogue rows; ties go to the lower row.
    """

    def __init__(self, half_life: int | None = None) -> None:
        self.growth = 1.0 if half_life is None else 0.5 ** (-1.0 / half_life)
        self._unit = 1.0
        self._counts: dict[int, float] = {}
        self._ranked: list[int] | None = None

    def observe(self, targets: Sequence[int]) -> None:
        """Learn one window's items."""
        for row in targets:
            self._counts[row] = self._counts.get(row, 0.0) + self._unit
        self._ranked = None
        # Newer counts grow instead of older ones shrinking: same order, one update a window.
        self._unit *= self.growth
        if self._unit > 1e100:
            self._counts = {row: count / self._unit for row, count in self._counts.items()}
            self._unit = 1.0

    def rank(self, k: int) -> list[int]:
        """The `k` best rows, best first; fewer where fewer have been seen."""
        if self._ranked is None or len(self._ranked) < min(k, len(self._counts)):
            self._ranked = heapq.nsmallest(k, self._counts, key=lambda row: (-self._counts[row], row))
        return self._ranked[:k]

    def count(self, row: int) -> float:
        """Weight of a row, 0 for one never seen."""
        return self._counts.get(row, 0.0)

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps: `unit` [1], `rows` [n], `counts` [n]."""
        rows = np.fromiter(self._counts, np.int64, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float64, len(self._counts))
        return {"unit": np.array([self._unit]), "rows": rows, "counts": counts}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take up what `state` gave."""
        self._unit = float(state["unit"][0])
        self._counts = dict(zip(state["rows"].tolist(), state["counts"].tolist(), strict=True))
        self._ranked = None


class PopularityRanker:
    """`Popularity` as an item ranker: the same distribution for every history.

    P(item) = (count + 1/N) / (total + 1): one observation spread over the catalogue, so that no item is impossible and
    the order is that of `Popularity.rank`.
    """

    def __init__(self, items: int) -> None:
        self.items = items
        self._popularity = Popularity()

    def fit(self, sequences: Iterable[Sequence[int]]) -> None:
        """Count every item of every sequence."""
        for sequence in sequences:
            self._popularity.observe([int(row) for row in sequence])

    def log_probs(self, histories: Sequence[object]) -> NDArray[np.float32]:
        """Float32 [B, N], all rows alike."""
        return np.repeat(np.log(probabilities(self._popularity, self.items)).astype(np.float32)[None], len(histories), 0)


def probabilities(popularity: Popularity, items: int) -> NDArray[np.float64]:
    """P(item) [N] of what `popularity` has counted so far, smoothed by one observation."""
    counts = np.array([popularity.count(row) for row in range(items)])
    return (counts + 1.0 / items) / (counts.sum() + 1.0)
