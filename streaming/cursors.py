"""Several sources by event time, at a pace: what a replay into a state and one into Kafka share (SEMANTICS.md §3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from streaming.events import BLANK, Line, Rejected, Row, decode
from streaming.sources import Position, Source

PACE_SECONDS: Final = 0.2
LIVE_SECONDS: Final = 0.1
"""Between two commits at live pace: bounds how long an event waits for its history."""
FOLLOW_SECONDS: Final = 0.1
"""Between two looks at the end of a file that grows."""
AHEAD_MS: Final = 3_600_000
"""At live pace a line may be written so far ahead of the clock; one beyond is refused at once, lest it hold up the rest."""


class Clock(NamedTuple):
    """Time as the replay sees it; tests pass their own."""

    wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Head(NamedTuple):
    """The next record of a source in a merge: its time (None: no valid event, taken at once), and where it ends.

    `due` is the time of an event or a catalogue entry, at which it may go out at live pace.
    """

    ts: int | None
    record: tuple[int, Row]
    records: int
    bytes: int
    due: int | None


def size_of(raw: bytes | Row) -> int:
    """Bytes of the source that a record takes, a line's feed included."""
    return raw.size if isinstance(raw, Row) else len(raw) + 1


class Cursor:
    """One source of a merge, record by record; without a `head` it has `ended`, or waits for a file to grow."""

    def __init__(self, source: Source, max_ts: Callable[[], int]) -> None:
        self.source = source
        self._taken: Head | None = None
        self._heads = self._read(max_ts)
        self.ended = False
        self.head: Head | None = None
        self.look()

    def look(self) -> None:
        """The next head, where there is none and the source has one by now."""
        if self.head is None and not self.ended:
            try:
                self.head = next(self._heads)
            except StopIteration:
                self.ended = True

    def _read(self, max_ts: Callable[[], int]) -> Iterator[Head | None]:
        done = 0
        for batch in self.source.batches(max_ts):
            if not batch.records:
                yield None
            # Bytes are counted from the batch's end, so that a byte-order mark or a missing last line feed is no matter.
            sizes = [size_of(raw) for raw in batch.records]
            done = batch.bytes_after - sum(sizes)
            for number, (raw, size) in enumerate(zip(batch.records, sizes, strict=True), batch.first):
                done = min(done + size, batch.bytes_after)
                if isinstance(raw, Row):
                    row = raw
                elif raw.strip(BLANK):
                    row = Row(raw, [decode(raw, max_ts())])
                else:
                    row = Row(raw, [])
                ts = next((event.ts for event in row.events if isinstance(event, Line)), None)
                due = next((event.ts for event in row.events if not isinstance(event, Rejected)), None)
                yield Head(ts, (number, row), number, done, due)

    def take(self) -> Head:
        """The head, and moves on."""
        head = self.head
        if head is None:
            raise StopIteration
        self._taken, self.head = head, None
        self.look()
        return head

    def position(self) -> Position:
        """Where the records taken so far end; made for a commit only, as it hashes the source's beginning."""
        if self._taken is None:
            return self.source.start
        return self.source.position(self._taken.records, self._taken.bytes)


class Pace:
    """Log time against wall time: `speed` seconds of the log a second, from the first event on."""

    def __init__(self, speed: float, clock: Clock, tick: float = PACE_SECONDS) -> None:
        self._speed = speed
        self._clock = clock
        self._tick = tick
        self._first: tuple[int, float] | None = None

    def _when(self, ts: int) -> float:
        if self._first is None:
            self._first = (ts, self._clock.monotonic())
        return self._first[1] + (ts - self._first[0]) / 1000 / self._speed

    def due(self, head: Head) -> bool:
        """Whether a record may be applied now; what is no event always may."""
        return head.ts is None or self._when(head.ts) <= self._clock.monotonic()

    def behind_ms(self, head: Head) -> int:
        """Log time since the record should have been applied; 0 where it may not be yet."""
        return 0 if head.ts is None else max(0, int((self._clock.monotonic() - self._when(head.ts)) * self._speed * 1000))

    def wait(self, head: Head) -> None:
        """Sleeps until it may, and at least a tick, so that commits stay few."""
        while head.ts is not None and (left := self._when(head.ts) - self._clock.monotonic()) > 0:
            self._clock.sleep(max(self._tick, min(left, 1.0)))


class LivePace:
    """Log time is wall time: a record goes out when the clock reaches its time, or that of the newest before it.

    So an event that comes late or twice keeps its place behind those that it came after.
    """

    def __init__(self, clock: Clock, tick: float = LIVE_SECONDS) -> None:
        self._clock = clock
        self._tick = tick
        self._newest = 0

    def due(self, head: Head) -> bool:
        """Whether a record may be applied now; what is no event and no catalogue entry always may."""
        if head.due is not None and head.due > self._newest:
            self._newest = head.due
        return self._newest <= self._clock.wall_ms()

    def behind_ms(self, head: Head) -> int:
        """Time since the record should have been applied; 0 where it may not be yet."""
        return max(0, self._clock.wall_ms() - self._newest) if self.due(head) else 0

    def wait(self, head: Head) -> None:
        """Sleeps until it may, and at least a tick, so that commits stay few."""
        while not self.due(head):
            left = (self._newest - self._clock.wall_ms()) / 1000
            self._clock.sleep(max(self._tick, min(left, 1.0)))


def pace_of(speed: float | None, live: bool, clock: Clock, tick: float | None = None) -> Pace | LivePace | None:
    """The pace that was asked for; None: as fast as it goes. `tick`: least seconds between commits."""
    if live:
        return LivePace(clock, tick or LIVE_SECONDS)
    return Pace(speed, clock, tick or PACE_SECONDS) if speed is not None else None


def wait_for_more(cursors: list[Cursor], clock: Clock) -> bool:
    """Where no source has a head: False once all have ended, else a pause and a look at those that may still grow."""
    if all(each.ended for each in cursors):
        return False
    clock.sleep(FOLLOW_SECONDS)
    for each in cursors:
        each.look()
    return True


def next_cursor(cursors: list[Cursor]) -> Cursor | None:
    """The source whose turn it is: one with no valid event at its head, else the smallest time, ties in order."""
    best: Cursor | None = None
    for cursor in cursors:
        head = cursor.head
        if head is None:
            continue
        if head.ts is None:
            return cursor
        if best is None or best.head is None or (best.head.ts is not None and head.ts < best.head.ts):
            best = cursor
    return best
