"""Several sources by event time, at a pace: what a replay into a state and one into Kafka share (SEMANTICS.md §3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from streaming.events import BLANK, Line, Row, decode
from streaming.sources import Position, Source

PACE_SECONDS: Final = 0.2


class Clock(NamedTuple):
    """Time as the replay sees it; tests pass their own."""

    wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Head(NamedTuple):
    """The next record of a source in a merge: its time (None: no valid event, taken at once), and where it ends."""

    ts: int | None
    record: tuple[int, Row]
    records: int
    bytes: int


def size_of(raw: bytes | Row) -> int:
    """Bytes of the source that a record takes, a line's feed included."""
    return raw.size if isinstance(raw, Row) else len(raw) + 1


class Cursor:
    """One source of a merge, record by record."""

    def __init__(self, source: Source, max_ts: Callable[[], int]) -> None:
        self.source = source
        self._taken: Head | None = None
        self._heads = self._read(max_ts)
        self.head = next(self._heads, None)

    def _read(self, max_ts: Callable[[], int]) -> Iterator[Head]:
        done = 0
        for batch in self.source.batches(max_ts):
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
                yield Head(ts, (number, row), number, done)

    def take(self) -> Head:
        """The head, and moves on."""
        head = self.head
        if head is None:
            raise StopIteration
        self._taken = head
        self.head = next(self._heads, None)
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

    def due(self, ts: int) -> bool:
        """Whether an event of this time may be applied now."""
        return self._when(ts) <= self._clock.monotonic()

    def behind_ms(self, ts: int) -> int:
        """Log time since an event of this time should have been applied; 0 where it may not be yet."""
        return max(0, int((self._clock.monotonic() - self._when(ts)) * self._speed * 1000))

    def wait(self, ts: int) -> None:
        """Sleeps until it may, and at least a tick, so that commits stay few."""
        while (left := self._when(ts) - self._clock.monotonic()) > 0:
            self._clock.sleep(max(self._tick, min(left, 1.0)))


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
