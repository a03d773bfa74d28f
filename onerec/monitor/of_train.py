"""What the trainer tells of itself, as metrics: ages at the stage `trained`, losses, test-then-train hit rates, checkpoints."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from onerec.monitor.metrics import Metrics

if TYPE_CHECKING:
    from trainer.checkpoint import Checkpoint
    from trainer.evaluate import Line
    from trainer.loop import Progress

HIT = "hit@10"
"""A window is hit where its next item is among the ten that were ranked first."""
MODELS = ("onerec", "popularity", "covisitation")
ROLLING_WINDOWS = 1_000
VERSION_WINDOWS = 100
"""Of fewer windows a hit rate says little: a checkpoint that has less is taken together with the next."""
OUTCOMES = ("learnt", "stale", "early", "other_codebook")
"""What the trainer does with a pair; what the sampler drops, the sampler counts."""


class HitRate:
    """Hit rates over the newest `windows` scored windows, in whole batches."""

    def __init__(self, windows: int = ROLLING_WINDOWS) -> None:
        self._most = windows
        self._batches: deque[tuple[int, dict[str, float]]] = deque()
        self._windows = 0

    def add(self, windows: int, hits: Mapping[str, float]) -> None:
        """A batch: windows scored, and how many of them each model hit."""
        self._batches.append((windows, dict(hits)))
        self._windows += windows
        while self._windows - self._batches[0][0] >= self._most:
            self._windows -= self._batches.popleft()[0]

    def rates(self) -> dict[str, float]:
        """Hit rate by model; empty before the first scored window."""
        total: dict[str, float] = {}
        for _, hits in self._batches:
            for model, count in hits.items():
                total[model] = total.get(model, 0.0) + count
        return {model: count / self._windows for model, count in total.items()} if self._windows else {}


class VersionRates:
    """Hit rates of windows by the checkpoint that was the newest when they were scored, just before they were learnt.

    `served` is the newest checkpoint that another has followed, `previous` the one before it: how good each was on what
    came right after it. They are of different windows, and the weights had gone on for at most one checkpoint.
    """

    def __init__(self, windows: int = VERSION_WINDOWS) -> None:
        self._least = windows
        self._scored, self._hits = 0, 0.0
        self._begun = False
        self.rates: list[float] = []
        """At most two, `previous` first."""

    def add(self, windows: int, hits: float) -> None:
        """A batch scored since the last `checkpoint`; what was scored before the first is of none."""
        if self._begun:
            self._scored, self._hits = self._scored + windows, self._hits + hits

    def checkpoint(self) -> None:
        """One was written."""
        self._begun = True
        if self._scored >= self._least:
            self.rates = [*self.rates[-1:], self._hits / self._scored]
            self._scored, self._hits = 0, 0.0


class TrainMetrics:
    """Callbacks for `trainer.loop.train`. `clock` is `StateClock.now_ms`."""

    def __init__(self, metrics: Metrics, clock: Callable[[int | None], int | None]) -> None:
        self._metrics, self._clock = metrics, clock
        self._rolling, self._versions = HitRate(), VersionRates()
        for name in ("train_steps", "train_sessions", "skipped_steps", "preference_steps"):
            metrics.counter(f"onerec_{name}_total")
        for outcome in OUTCOMES:
            metrics.counter("onerec_pairs_total").labels(outcome=outcome)

    def ready(self, seconds: float) -> None:
        """The trainer can learn, so long after its start."""
        self._metrics.gauge("onerec_recovery_seconds").set(seconds)

    def step(self, progress: Progress) -> None:
        """A step is done."""
        metrics, line = self._metrics, progress.line
        metrics.counter("onerec_train_steps_total").inc()
        metrics.counter("onerec_train_sessions_total").inc(line.sessions)
        metrics.counter("onerec_skipped_steps_total").inc(not line.applied)
        metrics.counter("onerec_preference_steps_total").inc(line.preference is not None)
        for outcome in OUTCOMES:
            metrics.counter("onerec_pairs_total").labels(outcome=outcome).inc(getattr(progress.pairs, outcome))
        self._losses(line)
        self._hits(line)
        if progress.watermark is not None:
            metrics.gauge("onerec_watermark_seconds").set(progress.watermark / 1000, stage="trained")
        newest = max((*progress.event_ms, *progress.pair_ms), default=None)
        if newest is not None:
            now = self._clock(newest)
            metrics.ages.observe("trained", now, progress.event_ms)
            metrics.age_family("onerec_pair_age_seconds").observe("trained", now, progress.pair_ms)

    def saved(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is there."""
        self._metrics.gauge("onerec_checkpoint_timestamp_seconds").set(checkpoint.created_ms / 1000)
        self._metrics.gauge("onerec_checkpoint_step").set(checkpoint.step)
        self._versions.checkpoint()
        for which, rate in zip(("served", "previous"), reversed(self._versions.rates), strict=False):
            self._metrics.gauge("onerec_version_hit_rate").set(rate, which=which)

    def _losses(self, line: Line) -> None:
        losses = {"ntp": line.loss, "reward": line.reward_loss}
        if line.preference is not None:
            losses["preference"] = line.preference.loss
        for objective, loss in losses.items():
            self._metrics.gauge("onerec_loss").set(loss, objective=objective)
        self._metrics.gauge("onerec_gradient_norm").set(line.gradient)
        if line.expert_load is not None:
            for bound, load in zip(("least", "most"), line.expert_load, strict=True):
                self._metrics.gauge("onerec_expert_load").set(load, bound=bound)

    def _hits(self, line: Line) -> None:
        if not line.scored:
            return
        hour = f"{datetime.fromtimestamp(line.ts / 1000, UTC).hour:02d}"
        hits = {model: line.scores[model][HIT] for model in MODELS if model in line.scores}
        self._metrics.counter("onerec_scored_total").labels(hour=hour).inc(line.scored)
        for model, count in hits.items():
            self._metrics.counter("onerec_hits_total").labels(model=model, hour=hour).inc(count)
        self._rolling.add(line.scored, hits)
        for model, rate in self._rolling.rates().items():
            self._metrics.gauge("onerec_hit_rate").set(rate, model=model)
        self._versions.add(line.scored, hits.get("onerec", 0.0))
