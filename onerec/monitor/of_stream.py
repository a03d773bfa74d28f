"""What the stream commits, as metrics: of `onerec replay` and of the workers on Kafka.

Ages are sampled: at most MOST events and the items of at most MOST_SESSIONS sessions a commit, evenly over it, so that a
replay at 100,000 events a second does not feel it; at live pace that is every one.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
from streaming.kafka.wire import Chunk, unpack

if TYPE_CHECKING:
    from streaming.kafka.engine import Engine
    from streaming.kafka.partitions import Commit
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


class Offsets:
    """`onerec_lag_offsets` of one source; partitions that are not mentioned any more become absent."""

    def __init__(self, metrics: Metrics, source: str) -> None:
        self._gauge = metrics.gauge("onerec_lag_offsets")
        self._source = source
        self._shown: set[int] = set()

    def set(self, lags: Mapping[int, int | None]) -> None:
        """Records behind, by partition; None where it is not known."""
        for partition in self._shown - lags.keys():
            self._gauge.forget(source=self._source, partition=str(partition))
        self._shown = set(lags)
        for partition, lag in lags.items():
            self._gauge.set(lag, source=self._source, partition=str(partition))


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

    def commit(self, added: Counters, changes: Changes, records: Sequence[bytes | Row], watermark: int | None) -> None:
        """What one commit has done: `added` is what it added to the counters; `watermark` is the stream's after it, ms."""
        self._events.inc(added.events)
        self._duplicates.inc(added.duplicates)
        self._late["history"].inc(changes.late_used)
        self._late["ignored"].inc(added.late - changes.late_used)
        self._sessions["high"].inc(added.high_quality)
        self._sessions["low"].inc(added.sessions - added.high_quality)
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
        self._stream.commit(step.counters.since(self._before), step.changes, step.records, step.watermark)
        self._before = msgspec.structs.replace(step.counters)
        self._stream.history_watermark(step.watermark)
        self._metrics.gauge("onerec_open_sessions").set(step.changes.open_users)
        self._metrics.gauge("onerec_users").set(step.counters.users)
        if step.behind_ms is not None:
            self._metrics.gauge("onerec_lag_seconds").set(step.behind_ms / 1000, source="files")


def lines_of(chunks: Sequence[Chunk]) -> list[bytes]:
    """At most about MOST of the lines in messages of `events`, evenly over them."""
    some = spread(chunks, MOST)
    lines: list[bytes] = []
    for chunk in some:
        lines += spread(unpack(chunk.value), max(1, MOST // len(some)))
    return lines


class WorkerMetrics:
    """Of `onerec stream`: `committed` to be called with each commit, from any thread, `seen` about every second."""

    def __init__(self, metrics: Metrics, config: Config, database: Path) -> None:
        self._stream = StreamMetrics(metrics, config, database)
        self._metrics = metrics
        self._lock = threading.Lock()
        self._stamps: dict[int, int] = {}
        self._open: dict[int, int] = {}
        self._offsets = Offsets(metrics, "events")

    def committed(self, commit: Commit) -> None:
        """Takes a commit in."""
        with self._lock:
            self._stream.commit(commit.added, commit.changes, lines_of(commit.chunks), commit.watermark)
            self._open[commit.partition] = commit.changes.open_users
            if commit.chunks:
                self._stamps[commit.partition] = commit.chunks[-1].timestamp

    def seen(self, engine: Engine) -> None:
        """Looks at the partitions held."""
        found, gauge = engine.status(), self._metrics.gauge
        held = {each.partition for each in found}
        with self._lock:
            stamps = dict(self._stamps)
            counts = [count for partition, count in self._open.items() if partition in held]
        gauge("onerec_open_sessions").set(sum(counts) if counts else None)
        gauge("onerec_users").set(engine.users())
        gauge("onerec_recovery_seconds").set(engine.restored_seconds)
        self._stream.history_watermark(min((each.watermark for each in found if each.watermark is not None), default=None))
        self._behind({each.partition: each.lag for each in found}, stamps)

    def _behind(self, lags: dict[int, int | None], stamps: dict[int, int]) -> None:
        self._offsets.set(lags)
        wall = now_ms()
        seconds = [
            0.0 if lag == 0 else (wall - stamps[partition]) / 1000
            for partition, lag in lags.items() if lag == 0 or (lag is not None and partition in stamps)
        ]
        self._metrics.gauge("onerec_lag_seconds").set(max(0.0, *seconds) if seconds else None, source="events")

    def ended(self) -> None:
        """Nothing is held any more: what was said of partitions holds no longer."""
        self._behind({}, {})
