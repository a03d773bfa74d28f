"""The publisher's figures: ages of what it brings out, what became of each candidate, and how releases stand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporter.publisher import Moment, Outcome
from exporter.release import First, ReleaseStatus
from onerec.monitor.ages import log_clock
from onerec.monitor.metrics import Metrics
from onerec.monitor.settings import ClockMode


class PublishMetrics:
    """Turns outcomes and the repository's status into metrics.

    Args:
        metrics: where they go.
        mode: the clock that ages are taken against.
        every_s: how often the publisher looks for something to publish; None: once.
    """

    def __init__(self, metrics: Metrics, mode: ClockMode, every_s: float | None = None) -> None:
        self._metrics, self._mode = metrics, mode
        for outcome in ("published", "held", "failed"):
            metrics.counter("onerec_publishes_total").labels(outcome=outcome)
        metrics.gauge("onerec_publish_interval_seconds").set(every_s)

    def outcome(self, outcome: Outcome, event_ms: Sequence[int], first: First | None) -> None:
        """A candidate and the times of the events that it brings; those before `first` answered are backlog."""
        metrics = self._metrics
        metrics.counter("onerec_publishes_total").labels(outcome=outcome.kind).inc()
        for step, seconds in outcome.seconds.items():
            metrics.histogram("onerec_publish_seconds").labels(step=step).observe(seconds)
        if outcome.scores is not None and not outcome.items_only:
            for model, score in (("candidate", outcome.scores.candidate), ("served", outcome.scores.served)):
                metrics.gauge("onerec_gate_score").set(score, model=model)
        times = np.asarray(event_ms, dtype=np.float64)
        if first is not None:
            began = log_clock(first.newest_event_ms, first.at_ms, self._mode)
            times = times[times >= began] if began is not None else times
        for stage, moment in (("exported", outcome.exported), ("loaded", outcome.loaded)):
            if moment is not None:
                metrics.ages.observe(stage, self._clock(moment), times)
                if (watermark := outcome.manifest.watermark) is not None:
                    metrics.gauge("onerec_watermark_seconds").set(watermark / 1000, stage=stage)

    def failed(self) -> None:
        """A publish that ended by a fault."""
        self._metrics.counter("onerec_publishes_total").labels(outcome="failed").inc()

    def status(self, status: ReleaseStatus) -> None:
        """How releases stand now."""
        metrics = self._metrics
        metrics.gauge("onerec_published_version").set(status.serving)
        when = status.weights_at_ms
        metrics.gauge("onerec_publish_timestamp_seconds").set(None if when is None else when / 1000)
        metrics.gauge("onerec_gate_failed").set(float(status.failed))
        metrics.gauge("onerec_publishing_on_hold").set(float(status.hold is not None))

    def _clock(self, moment: Moment) -> int | None:
        return log_clock(moment.newest_event_ms, moment.wall_ms, self._mode)
