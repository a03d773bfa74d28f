"""What the monitor sees, as metrics: answers as they come, the rest whenever somebody scrapes."""

from __future__ import annotations

from onerec.monitor.metrics import Metrics
from onerec.monitor.prober import Answer
from onerec.monitor.watch import News, Snapshot


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000


class MonitorMetrics:
    """Callbacks for `onerec.monitor.watch.Monitor`; `snapshot` is what a scrape shows."""

    def __init__(self, metrics: Metrics, objective_s: float) -> None:
        self.snapshot: Snapshot | None = None
        self._metrics = metrics
        self._jumps = 0
        metrics.gauge("onerec_freshness_objective_seconds").set(objective_s)
        metrics.counter("onerec_clock_jumps_total")
        metrics.before_scrape.append(self._show)

    def answered(self, answer: Answer, now_ms: int | None) -> None:
        """A replica answered, or did not; `now_ms` is the log's clock then."""
        metrics, replica = self._metrics, answer.replica
        metrics.gauge("onerec_replica_up").set(float(answer.up), replica=replica)
        metrics.gauge("onerec_replica_version").set(answer.version, replica=replica)
        fresh = None if now_ms is None or answer.watermark_ms is None else (now_ms - answer.watermark_ms) / 1000
        metrics.gauge("onerec_freshness_seconds").set(fresh, replica=replica)
        if answer.up and answer.whole:
            metrics.histogram("onerec_answer_seconds").labels(replica=replica).observe(answer.seconds)
        if answer.by_user and answer.history_watermark_ms is not None:
            used = metrics.age_family("onerec_history_used_age_seconds")
            used.observe(replica, now_ms, [answer.history_watermark_ms])

    def news(self, news: News) -> None:
        """A version was first seen to answer."""
        self._metrics.ages.observe("answered", news.now_ms, news.event_ms)
        self._metrics.age_family("onerec_new_item_age_seconds").observe(news.replica, news.now_ms, news.item_ms)

    def _show(self) -> None:
        seen, metrics = self.snapshot, self._metrics
        if seen is None:
            return
        metrics.counter("onerec_clock_jumps_total").inc(seen.clock_jumps - self._jumps)
        self._jumps = seen.clock_jumps
        marks = seen.watermarks
        stages = {
            "event": marks.event, "history": marks.history, "session": marks.session, "trained": marks.trained,
            "exported": marks.exported, "answered": marks.served,
        }  # fmt: skip
        for stage, mark in stages.items():
            metrics.gauge("onerec_watermark_seconds").set(_seconds(mark), stage=stage)
        plain = {
            "onerec_log_clock_seconds": _seconds(seen.log_clock_ms),
            "onerec_log_factor": seen.factor,
            "onerec_state_bytes": seen.state_bytes,
            "onerec_checkpoint_step": seen.checkpoint.step,
            "onerec_checkpoint_timestamp_seconds": _seconds(seen.checkpoint.created_ms),
            "onerec_published_version": seen.manifest.version if seen.manifest else None,
        }
        for name, value in plain.items():
            metrics.gauge(name).set(value)
        self._release(seen)
        for feature, index in (seen.drift.indices() if seen.drift else {}).items():
            metrics.gauge("onerec_drift_psi").set(index, feature=feature)
        metrics.gauge("onerec_unseen_item_share").set(seen.drift.unseen if seen.drift else None)

    def _release(self, seen: Snapshot) -> None:
        release = seen.release
        # Of a folder that holds no version nothing has failed and nothing is on hold: nothing is known.
        known = release is not None and (release.versions or release.held)
        gauge = self._metrics.gauge
        gauge("onerec_publish_timestamp_seconds").set(_seconds(release.weights_at_ms) if release else None)
        gauge("onerec_gate_failed").set(float(release.failed) if release and known else None)
        gauge("onerec_publishing_on_hold").set(float(release.hold is not None) if release and known else None)
