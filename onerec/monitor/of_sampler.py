"""What the preference sampler tells of itself, as metrics: pairs by outcome, their age, what waits, how old its snapshot is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from onerec.monitor.metrics import Metrics

if TYPE_CHECKING:
    from trainer.pairs import Record
    from trainer.sampler_stats import Stats

MADE = "made"


class SamplerMetrics:
    """Callbacks for `trainer.sampler.sample` and `trainer.kafka_sampler.sample_from_kafka`.

    `clock` is `StateClock.now_ms`; `newest_version` gives that of the run's newest checkpoint, None where there is none.
    """

    def __init__(
        self, metrics: Metrics, clock: Callable[[int | None], int | None], newest_version: Callable[[], int | None]
    ) -> None:
        from trainer.sampling import REASONS

        self._metrics, self._clock, self._newest_version = metrics, clock, newest_version
        for outcome in (MADE, *REASONS):
            metrics.counter("onerec_pairs_total").labels(outcome=outcome)

    def wrote(self, records: Sequence[Record]) -> None:
        """Records are in the log or the topic."""
        from trainer.pairs import Pair

        for record in records:
            outcome = MADE if isinstance(record, Pair) else record.reason
            self._metrics.counter("onerec_pairs_total").labels(outcome=outcome).inc()
        ends = [record.ended for record in records if isinstance(record, Pair) and record.ended is not None]
        if ends:
            self._metrics.age_family("onerec_pair_age_seconds").observe("pair", self._clock(max(ends)), ends)

    def progress(self, stats: Stats) -> None:
        """Where the sampler stands."""
        if stats.snapshot_version is None:
            return
        self._metrics.gauge("onerec_pairs_unread").set(stats.unread)
        newest = self._newest_version()
        behind = None if newest is None else max(0, newest - stats.snapshot_version)
        self._metrics.gauge("onerec_sampler_versions_behind").set(behind)
