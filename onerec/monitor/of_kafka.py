"""Metrics of what moves records in and out of Kafka: `produce`, `ingest`, and the copies that `feed` and its kin keep."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from onerec.monitor.metrics import Metrics
from onerec.monitor.of_stream import Offsets, dead_letters, now_ms

if TYPE_CHECKING:
    from onerec.commands.feed import Job
    from streaming.kafka.ingest import Ingest
    from streaming.kafka.lane import Counts
    from streaming.kafka.producing import Step

LEFT_OUT: Final = "left_out"
"""Reason of a record that a copy cannot read; the command says on standard error where it lies."""


class IngestMetrics:
    """Of `onerec ingest`: to be called with the job and what it has counted, now and then and at the end."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.monotonic()
        self._events = metrics.counter("onerec_events_total")
        self._dead = dead_letters(metrics)
        self._counted: tuple[int, Counter[str]] = 0, Counter()
        self._offsets: dict[str, Offsets] = {}
        self._open = False

    def __call__(self, job: Ingest, counts: Counts, partitions: int) -> None:
        """Takes in where the job stands."""
        events, reasons = self._counted
        self._counted = counts.events, Counter(counts.reasons)
        self._events.inc(counts.events - events)
        for reason, count in (self._counted[1] - reasons).items():
            self._dead.labels(reason=reason).inc(count)
        if job.newest is not None:
            self._metrics.gauge("onerec_watermark_seconds").set(job.newest / 1000, stage="event")
        if partitions and not self._open:
            self._open = True
            self._metrics.gauge("onerec_recovery_seconds").set(time.monotonic() - self._began)
        self._behind(job)

    def _behind(self, job: Ingest) -> None:
        lags: dict[str, dict[int, int | None]] = {source: {} for source in self._offsets}
        seconds: dict[str, list[float]] = {}
        wall = now_ms()
        for lag in job.lags():
            lags.setdefault(lag.source, {})[lag.partition] = lag.records
            if lag.records == 0:
                seconds.setdefault(lag.source, []).append(0.0)
            elif lag.records is not None and lag.read_ms is not None:
                seconds.setdefault(lag.source, []).append(max(0.0, (wall - lag.read_ms) / 1000))
        gauge = self._metrics.gauge("onerec_lag_seconds")
        for source, found in lags.items():
            self._offsets.setdefault(source, Offsets(self._metrics, source)).set(found)
            gauge.set(max(seconds[source]) if source in seconds else None, source=source)


class CopyMetrics:
    """Of `feed`, `histories-replica` and `pairs-replica`: to be called with the job about every second, and at the end.

    `source` is the topic, without prefix; `stage` whose watermark the copy has, None for one that has none.
    """

    def __init__(self, metrics: Metrics, source: str, stage: str | None = None) -> None:
        self._metrics = metrics
        self._source, self._stage = source, stage
        self._began = time.monotonic()
        self._offsets = Offsets(metrics, source)
        self._refused = metrics.counter("onerec_dead_letters_total").labels(reason=LEFT_OUT)
        self._seen = 0
        self._open = False

    def __call__(self, job: Job) -> None:
        """Takes in where the copy stands."""
        gauge, status, refused = self._metrics.gauge, job.status(), job.done.refused
        if not self._open:
            self._open = True
            gauge("onerec_recovery_seconds").set(time.monotonic() - self._began)
        self._refused.inc(refused - self._seen)
        self._seen = refused
        self._offsets.set(job.lags())
        lag_ms, watermark = status["lag_ms"], status.get("watermark")
        gauge("onerec_lag_seconds").set(None if lag_ms is None else lag_ms / 1000, source=self._source)
        if watermark is not None and self._stage is not None:
            gauge("onerec_watermark_seconds").set(watermark / 1000, stage=self._stage)
        if "users" in status:
            gauge("onerec_users").set(status["users"])


class ProduceMetrics:
    """Of `onerec produce`: to be called with each of its steps. Lines that `ingest` will refuse count as events here."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._events = metrics.counter("onerec_events_total")
        self._counted = 0

    def __call__(self, step: Step) -> None:
        """Takes a step in."""
        events = step.counts.watch + step.counts.interactions
        self._events.inc(events - self._counted)
        self._counted = events
        if step.behind_ms is not None:
            self._metrics.gauge("onerec_lag_seconds").set(step.behind_ms / 1000, source="files")
