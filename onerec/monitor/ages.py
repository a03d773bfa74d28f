"""Ages at a hand-off as Prometheus histograms, counted in blocks: a replay of 100,000 events a second must not feel it.

The log's clock is the wall clock in live time; in a replay it is the newest event, so that an age means the same in both.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from onerec.monitor.families import FAMILIES
from onerec.monitor.settings import ClockMode

LIVE_MS = 3_600_000
"""With `auto`, a log whose newest event is at most so far from the wall clock is taken for live."""


def log_clock(newest_ms: int | None, wall_ms: int, mode: ClockMode = "auto") -> int | None:
    """The log's clock in epoch ms: `wall_ms` in live time, else the newest event; None where a replay has no event yet."""
    if mode == "live":
        return wall_ms
    if newest_ms is None:
        return None
    return wall_ms if mode == "auto" and abs(wall_ms - newest_ms) <= LIVE_MS else newest_ms


class Ages(Collector):
    """One histogram family, a series for each value of its only label; a series is absent until something was observed.

    Thread-safe. Register it with a `prometheus_client` registry.
    """

    def __init__(self, name: str = "onerec_age_seconds") -> None:
        family = FAMILIES[name]
        self._name, self._family = name, family
        self._bounds: NDArray[np.float64] = np.array(family.buckets)
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._sums: dict[str, float] = {}
        self.negative: dict[str, int] = {}
        """How many ages were below zero, by label; those are in no bucket."""
        self._lock = threading.Lock()

    def observe(self, label: str, now_ms: int | None, event_ms: ArrayLike) -> None:
        """Counts `now_ms - event_ms` for every event time, epoch ms; nothing where there is no clock or no event."""
        times = np.asarray(event_ms, dtype=np.float64).ravel()
        if now_ms is None or not len(times):
            return
        ages = (now_ms - times) / 1000
        negative = int((ages < 0).sum())
        if negative:
            ages = ages[ages >= 0]
        # A bucket holds what is at most its bound.
        found = np.bincount(np.searchsorted(self._bounds, ages, side="left"), minlength=len(self._bounds) + 1)
        with self._lock:
            if negative:
                self.negative[label] = self.negative.get(label, 0) + negative
            if label in self._counts:
                self._counts[label] += found
            else:
                self._counts[label] = found.astype(np.int64)
            self._sums[label] = self._sums.get(label, 0.0) + float(ages.sum())

    def describe(self) -> Iterable[Metric]:
        """Its name, by which it can be asked for alone."""
        yield HistogramMetricFamily(self._name, self._family.help, labels=self._family.labels)

    def collect(self) -> Iterable[Metric]:
        """The family as Prometheus reads it."""
        found = HistogramMetricFamily(self._name, self._family.help, labels=self._family.labels)
        with self._lock:
            for label, counts in self._counts.items():
                running = np.cumsum(counts)
                bounds: Sequence[str] = [*map(str, self._bounds.tolist()), "+Inf"]
                buckets = list(zip(bounds, running.tolist(), strict=True))
                found.add_metric([label], buckets, self._sums[label])
        yield found

    def quantile(self, label: str, share: float) -> float | None:
        """The age in seconds below which `share` of a series lies, interpolated within its bucket as Prometheus does.

        None without observations; the highest bound where it lies beyond.
        """
        with self._lock:
            counts = self._counts.get(label)
            if counts is None or not counts.sum():
                return None
            running = np.cumsum(counts)
        rank = share * running[-1]
        place = int(np.searchsorted(running, rank, side="left"))
        if place >= len(self._bounds):
            return float(self._bounds[-1])
        low = self._bounds[place - 1] if place else 0.0
        before = running[place - 1] if place else 0
        inside = running[place] - before
        return float(low + (self._bounds[place] - low) * ((rank - before) / inside if inside else 1.0))
