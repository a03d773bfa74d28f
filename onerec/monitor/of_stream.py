"""What the stream commits, as metrics: of `onerec replay` and of the workers on Kafka.

Ages are sampled: at most MOST events and the items of at most MOST_SESSIONS sessions a commit, evenly over it, so that a
replay at 100,000 events a second does not feel it; at live pace that is every one.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import numpy as np
import prometheus_client
from numpy.typing import NDArray

from onerec.config import Config
from onerec.monitor.ages import log_clock
from onerec.monitor.metrics import Metrics
from streaming.changes import Changes, Counters
from streaming.events import REASONS, Line, Row, fast_decode

if TYPE_CHECKING:
    from streaming.replay import Step
    from streaming.sessions import Session

MOST: Final = 256
MOST_SESSIONS: Final = 64
FACTOR_SECONDS: Final = 2.0
"""Over which the log's factor is measured at least."""

T = TypeVar("T")


def spread(values: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of the values, evenly over them."""
    return values if len(values) <= most else values[:: -(-len(values) // most)]


def event_times(records: Iterable[bytes | Row]) -> NDArray[np.int64]:
    """`ts` of the valid events among JSON lines and rows, ms."""
    times: list[int] = []
    for record in records:
        if isinstance(record, bytes):
            try:
                times.append(fast_decode(record).ts)
            except (ValueError, RecursionError, msgspec.MsgspecError):
                continue
        else:
            times += [event.ts for event in record.events if isinstance(event, Line)]
    return np.array(times, dtype=np.int64)


def item_times(sessions: Iterable[Session]) -> NDArray[np.int64]:
    """`ts` of every watch of the sessions, ms."""
    return np.array([item.ts for session in sessions for item in session.items], dtype=np.int64)


def folder_bytes(folder: Path) -> int | None:
    """Size of the files directly in a folder; None where there is no folder."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    total += entry.stat().st_size
                except FileNotFoundError:
                    # RocksDB removes files whenever it likes.
                    continue
    except FileNotFoundError:
        return None
    return total


def now_ms() -> int:
    """The wall clock, epoch ms."""
    return time.time_ns() // 1_000_000


class StreamMetrics:
    """Counts, ages, watermarks and the clock of a log, from what was committed. Thread-safe but for `commit`.

    Counters tell what this process has done since it started. `database` is the folder that RocksDB fills.
    """

    def __init__(self, metrics: Metrics, config: Config, database: Path) -> None:
        self.metrics = metrics
        self._mode = config.freshness.clock
        self._lateness_ms = config.semantics.stream.max_out_of_orderness_ms
        self._database = database
        self._events = metrics.counter("onerec_events_total")
        self._duplicates = metrics.counter("onerec_duplicates_total")
        self._dead = dead_letters(metrics)
        late = metrics.counter("onerec_late_total")
        self._late = {outcome: late.labels(outcome=outcome) for outcome in ("history", "ignored")}
        sessions = metrics.counter("onerec_sessions_total")
        self._sessions = {quality: sessions.labels(quality=quality) for quality in ("high", "low")}
        self._newest: int | None = None
        self._session_end: int | None = None
        self._measured: tuple[float, int] | None = None
        metrics.before_scrape.append(self._look)

    def commit(self, done: Counters, changes: Changes, records: Sequence[bytes | Row], watermark: int | None) -> None:
        """What one commit has done: `done` is what it added to the counters; `watermark` is the stream's after it, ms."""
        self._events.inc(done.events)
        self._duplicates.inc(done.duplicates)
        self._late["history"].inc(changes.late_used)
        self._late["ignored"].inc(done.late - changes.late_used)
        self._sessions["high"].inc(done.high_quality)
        self._sessions["low"].inc(done.sessions - done.high_quality)
        for reason, count in Counter(letter.reason for letter in changes.dead_letters).items():
            self._dead.labels(reason=reason).inc(count)
        if watermark is not None and (self._newest is None or watermark + self._lateness_ms > self._newest):
            self._newest = watermark + self._lateness_ms
        now = log_clock(self._newest, now_ms(), self._mode)
        ages = self.metrics.ages
        ages.observe("history", now, event_times(spread(records, MOST)))
        if changes.sessions:
            ages.observe("session", now, item_times(spread(changes.sessions, MOST_SESSIONS)))
            self._session_end = max(self._session_end or 0, max(session.end for session in changes.sessions))
        gauge = self.metrics.gauge("onerec_watermark_seconds")
        for stage, ms in (("event", self._newest), ("session", self._session_end)):
            if ms is not None:
                gauge.set(ms / 1000, stage=stage)

    def _look(self) -> None:
        """The clock and the size of the state."""
        self.metrics.gauge("onerec_state_bytes").set(folder_bytes(self._database))
        wall = now_ms()
        now = log_clock(self._newest, wall, self._mode)
        self.metrics.gauge("onerec_log_clock_seconds").set(None if now is None else now / 1000)
        if now is None or self._newest is None:
            return
        at, factor = time.monotonic(), self.metrics.gauge("onerec_log_factor")
        if now == wall:
            factor.set(1.0)
        elif self._measured is None:
            self._measured = at, self._newest
        elif at - self._measured[0] >= FACTOR_SECONDS:
            factor.set((self._newest - self._measured[1]) / 1000 / (at - self._measured[0]))
            self._measured = at, self._newest

    def history_watermark(self, ms: int | None) -> None:
        """The event time up to which histories are complete."""
        if ms is not None:
            self.metrics.gauge("onerec_watermark_seconds").set(ms / 1000, stage="history")


def dead_letters(metrics: Metrics) -> prometheus_client.Counter:
    """Dead letters by reason, each there from the start: a rate does not see the first of a series that comes with a value."""
    found = metrics.counter("onerec_dead_letters_total")
    for reason in REASONS:
        found.labels(reason=reason)
    return found


def counted(before: Counters, after: Counters) -> Counters:
    """What was added to the counters."""
    return Counters(**{name: getattr(after, name) - getattr(before, name) for name in Counters.__struct_fields__})


class ReplayMetrics:
    """Of `onerec replay`: to be called with each of its steps.

    `counters` are the state's before it began, at monotonic time `began`.
    """

    def __init__(self, metrics: Metrics, config: Config, database: Path, counters: Counters, began: float) -> None:
        self._stream = StreamMetrics(metrics, config, database)
        self._metrics = metrics
        self._before = msgspec.structs.replace(counters)
        self._began = began

    def ready(self) -> None:
        """The first record is there to be applied."""
        self._metrics.gauge("onerec_recovery_seconds").set(time.monotonic() - self._began)

    def __call__(self, step: Step) -> None:
        """Takes a step in."""
        self._stream.commit(counted(self._before, step.counters), step.changes, step.records, step.watermark)
        self._before = msgspec.structs.replace(step.counters)
        self._stream.history_watermark(step.watermark)
        self._metrics.gauge("onerec_open_sessions").set(step.changes.open_users)
        self._metrics.gauge("onerec_users").set(step.counters.users)
        if step.behind_ms is not None:
            self._metrics.gauge("onerec_lag_seconds").set(step.behind_ms / 1000, source="files")
