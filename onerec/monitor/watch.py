"""The monitor: looks at every part, takes the replicas' answers, and ages what a version brings when it first answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from onerec.errors import Failure, OneRecError
from onerec.freshness import Watermarks
from onerec.monitor.drift import Drift, Drifted
from onerec.monitor.ledger import Ledger, Line, quantiles
from onerec.monitor.log_time import Clock, LogClock
from onerec.monitor.looks import CheckpointMarks, RepositoryLook, RunLook, StateLook, StateMarks
from onerec.monitor.prober import Answer, Users
from onerec.monitor.settings import ClockMode

if TYPE_CHECKING:
    from exporter.bundle import Manifest
    from exporter.release import ReleaseStatus

T = TypeVar("T")

NOTHING: Final = np.empty(0, np.int64)
FILES_SECONDS = 1.0
RELEASE_SECONDS = 2.0
DRIFT_SECONDS = 5.0
SIZE_SECONDS = 10.0
SETTLE_SECONDS = 3.0
"""A ledger's line waits at most so long for the publisher to write down when Triton had loaded the version."""


class News(msgspec.Struct, frozen=True, kw_only=True):
    """What a version brought to a replica's users: event times in ms of what it learnt newly and of new items, and the
    log's clock when it was first seen to answer. What happened before the first version of all is left out."""

    replica: str
    now_ms: int | None
    event_ms: NDArray[np.int64]
    item_ms: NDArray[np.int64]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that was last seen; None and empty where a part does not tell."""

    wall_ms: int
    log_clock_ms: int | None
    live: bool
    factor: float | None
    clock_jumps: int
    state: StateMarks
    checkpoint: CheckpointMarks
    manifest: Manifest | None
    release: ReleaseStatus | None
    answers: tuple[Answer, ...]
    state_bytes: int | None
    drift: Drifted | None
    faults: tuple[str, ...]

    @property
    def answered_ms(self) -> int | None:
        """What the replicas that answer have all learnt up to; None where one has learnt nothing, or none answers."""
        marks = [answer.watermark_ms for answer in self.answers if answer.up]
        known = [mark for mark in marks if mark is not None]
        return min(known) if known and len(known) == len(marks) else None

    @property
    def versions(self) -> list[int]:
        """The versions that answer, ascending; more than one: mixed."""
        return sorted({answer.version for answer in self.answers if answer.up and answer.version is not None})

    @property
    def watermarks(self) -> Watermarks:
        """The chain."""
        return Watermarks(
            event=self.state.newest, history=self.state.watermark, session=self.state.session_end,
            trained=self.checkpoint.watermark, exported=self.manifest.watermark if self.manifest else None,
            served=self.answered_ms,
        )  # fmt: skip


class _Pending(msgspec.Struct, kw_only=True):
    """A line of the ledger that waits for the time at which Triton had loaded its version."""

    line: Line
    ages_ms: dict[str, NDArray[np.float64]]
    event_ms: NDArray[np.int64]
    until: float


class _Due:
    """True at most once in so many seconds."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds, self._next = clock, seconds, float("-inf")

    def __call__(self) -> bool:
        now = self._clock.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True


class Monitor:
    """One `step` after the other, by one thread; answers come in through `answered`, from any thread.

    Args:
        state, run, repository: the parts, looked at each on its own.
        replicas: names of the replicas, in the order of `Snapshot.answers`.
        mode: `freshness.clock`.
        ledger: what has been counted; None: ages at first answers are not told.
        drift: None: drift is not told.
        on_answer: called with every answer and the log's clock then.
        on_news: called at the first sight of a version at a replica.
        say: gets what the operator should know.
    """

    def __init__(
        self,
        state: StateLook,
        run: RunLook,
        repository: RepositoryLook,
        replicas: Sequence[str],
        *,
        mode: ClockMode = "auto",
        ledger: Ledger | None = None,
        drift: Drift | None = None,
        clock: Clock | None = None,
        on_answer: Callable[[Answer, int | None], None] = lambda answer, now_ms: None,
        on_news: Callable[[News], None] = lambda news: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.users = Users()
        self._state, self._run, self._repository = state, run, repository
        self._replicas, self._mode, self._ledger, self._drift = tuple(replicas), mode, ledger, drift
        self._clock = clock or Clock()
        self._log = LogClock(mode, self._clock)
        self._on_answer, self._on_news, self._say = on_answer, on_news, say
        self._queue: deque[Answer] = deque()
        self._answers: dict[str, Answer] = {}
        self._pending: list[_Pending] = []
        self._said: set[str] = set()
        self._release: ReleaseStatus | None = None
        self._bytes: int | None = None
        self._drifted: Drifted | None = None
        self._files_due, self._release_due, self._drift_due, self._size_due = (
            _Due(self._clock, seconds) for seconds in (FILES_SECONDS, RELEASE_SECONDS, DRIFT_SECONDS, SIZE_SECONDS)
        )

    def answered(self, answer: Answer) -> None:
        """An answer of a replica; taken in by the next step."""
        self._queue.append(answer)

    def step(self) -> Snapshot:
        """Look at all that is due, take in the answers that came; returns what is known now."""
        marks = self._state.look()
        self._log.look(marks.newest, marks.sequence)
        if self._files_due():
            self._run.look()
            self._repository.look()
            self._safely("recent users", lambda: self.users.fill(self._state.recent_users()))
        if self._release_due():
            self._release = self._repository.release()
        if self._size_due():
            self._bytes = self._state.size()
        if self._drift is not None and self._drift_due():
            self._look_for_drift(self._drift)
        while self._queue:
            self._take(self._queue.popleft())
        self._settle(everything=False)
        return self.snapshot()

    def snapshot(self) -> Snapshot:
        """What is known."""
        return Snapshot(
            wall_ms=self._clock.wall_ms(),
            log_clock_ms=self._log.now_ms,
            live=self._log.live,
            factor=self._log.factor,
            clock_jumps=self._log.jumps,
            state=self._state.marks,
            checkpoint=self._run.marks,
            manifest=self._repository.newest,
            release=self._release,
            answers=tuple(self._answers[name] for name in self._replicas if name in self._answers),
            state_bytes=self._bytes,
            drift=self._drifted,
            faults=tuple(fault for fault in (self._state.fault, self._run.fault, self._repository.fault) if fault),
        )

    def close(self) -> None:
        """Write down what waits, and let go of the state."""
        while self._queue:
            self._take(self._queue.popleft())
        self._settle(everything=True)
        self._state.close()

    def _look_for_drift(self, drift: Drift) -> None:
        reader = self._state.reader
        if reader is None:
            self._drifted = None
            return
        self._drifted = self._safely("drift", lambda: drift.look(reader))

    def _safely(self, what: str, question: Callable[[], T]) -> T | None:
        """The answer; None, said once, where the state went away meanwhile, for which rocksdict raises bare Exceptions."""
        try:
            return question()
        except Exception as error:
            self._once(str(error) if isinstance(error, OneRecError) else f"{what}: {error}")
            return None

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def _take(self, answer: Answer) -> None:
        before = self._answers.get(answer.replica)
        self._answers[answer.replica] = answer
        if before is None or before.up != answer.up:
            self._say(f"{answer.replica} answers" if answer.up else f"{answer.replica} does not answer: {answer.fault}")
        now = self._log.at(answer.at_ms) or self._log.now_ms
        self._on_answer(answer, now)
        ledger = self._ledger
        if ledger is None or not answer.up or answer.version is None:
            return
        self._settle(everything=True, replica=answer.replica, unless=answer.version)
        pending = any(entry.line.replica == answer.replica for entry in self._pending)
        if not pending and not ledger.knows(answer.replica, answer.version, answer.watermark_ms):
            self._first_sight(ledger, answer, answer.version, now)

    def _first_sight(self, ledger: Ledger, answer: Answer, version: int, now: int | None) -> None:
        marks = self._state.look()
        manifest = self._repository.manifest(version)
        reached = ledger.reached(answer.replica)
        sequence = manifest.sequence if manifest else None
        if sequence is None and answer.watermark_ms is not None and self._state.reader is not None:
            sequence = self._safely("the session log", partial(self._state.sequence_at, answer.watermark_ms))
        item_sequence = manifest.item_sequence if manifest else None
        # A replica that was never seen before has brought nothing new: nobody saw what it answered until now.
        after, items_after = reached.sequence, reached.item_sequence
        after, items_after = sequence if after is None else after, item_sequence if items_after is None else items_after
        times, sequences, stride = NOTHING, NOTHING, 1
        item_ms = NOTHING
        if after is not None and sequence is not None:
            found = self._safely("the news of a version", partial(self._state.event_times, after, sequence))
            times, sequences, stride = found or (NOTHING, NOTHING, 1)
        if items_after is not None and item_sequence is not None:
            new = self._safely("new items", partial(self._state.item_times, items_after, item_sequence))
            item_ms = NOTHING if new is None else new
        began = self._began(ledger)
        if began is not None:
            kept = times > began
            times, sequences, item_ms = times[kept], sequences[kept], item_ms[item_ms > began]
        self._on_news(News(replica=answer.replica, now_ms=now, event_ms=times, item_ms=item_ms))
        ages: dict[str, NDArray[np.float64]] = {
            "history": self._log.reached(times) - times,
            "session": self._log.committed(sequences) - times,
            "trained": self._log.since(self._log.at(manifest.checkpoint_created_ms if manifest else None), times),
            "exported": self._log.since(self._log.at(manifest.created_ms if manifest else None), times),
            "answered": self._log.since(now, times),
        }
        known = marks.sequence > 0 and sequence is not None
        line = Line(
            version=version,
            replica=answer.replica,
            first_answered_ms=answer.at_ms,
            log_clock_ms=now,
            mode="live" if self._log.live else "log",
            factor=None if self._log.factor is None else round(self._log.factor, 3),
            watermark_ms=answer.watermark_ms,
            step=manifest.step if manifest else None,
            sequence_from=after if known else None,
            sequence_to=max(sequence or 0, after or 0) if known else None,
            events=len(times) if known else None,
            stride=stride if stride > 1 else None,
            gate=msgspec.to_builtins(manifest.gate) if manifest and manifest.gate else None,
            items=len(item_ms) if item_sequence is not None else None,
            item_age_s=quantiles((now - item_ms) / 1000) if now is not None else None,
            item_sequence=item_sequence,
            codebook_version=manifest.codebook_version if manifest else None,
        )
        self._pending.append(
            _Pending(line=line, ages_ms=ages, event_ms=times, until=self._clock.monotonic() + SETTLE_SECONDS)
        )

    def _began(self, ledger: Ledger) -> int | None:
        """The log's clock when the first version of all was loaded, or was first seen to answer."""
        from onerec.monitor.ages import log_clock

        first = self._release.first if self._release else None
        told = log_clock(first.newest_event_ms, first.at_ms, self._mode) if first else None
        return ledger.began_ms if told is None else told

    def _settle(self, *, everything: bool, replica: str | None = None, unless: int | None = None) -> None:
        """Write the lines whose time has come; with `replica` those of it, but not that of version `unless`."""
        waiting: list[_Pending] = []
        for entry in self._pending:
            line = entry.line
            if replica is not None and (line.replica != replica or line.version == unless):
                waiting.append(entry)
                continue
            loaded = self._repository.published_ms(line.version)
            if loaded is None and not everything and self._clock.monotonic() < entry.until:
                waiting.append(entry)
                continue
            # The publisher writes its record after it has asked the version itself; users may have been quicker.
            loaded = None if loaded is None else min(loaded, line.first_answered_ms)
            ages = {**entry.ages_ms, "loaded": self._log.since(self._log.at(loaded), entry.event_ms)}
            order = ("history", "session", "trained", "exported", "loaded", "answered")
            found = {name: quantiles(ages[name] / 1000) for name in order}
            known = {name: value for name, value in found.items() if value is not None}
            self._write(msgspec.structs.replace(line, age_s=known or None))
        self._pending = waiting

    def _write(self, line: Line) -> None:
        assert self._ledger is not None
        age = (line.age_s or {}).get("answered")
        news = f", its news {age['p50']:.1f} s old, p95 {age['p95']:.1f} s" if age else ""
        self._say(f"version {line.version} answers at {line.replica}{news}")
        try:
            self._ledger.append(line)
        except Failure as error:
            self._once(str(error))
