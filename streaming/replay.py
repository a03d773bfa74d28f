"""Files → core → RocksDB: merged by event time, committed in batches, resumable at any moment (SEMANTICS.md §3, §5)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from onerec.errors import UserError
from streaming.changes import Changes, Counters, DeadLetter
from streaming.core import Core
from streaming.events import BLANK, Line, Rejected, Row, decode
from streaming.formats import open_source, source_name
from streaming.seeds import Seeds
from streaming.sources import Position, Source
from streaming.store import Store

PACE_SECONDS: Final = 0.2
MERGE_RECORDS: Final = 20_000
MERGE_BYTES: Final = 8 << 20
SEED_USERS: Final = 5_000

Record = tuple[Any, bytes | Row]


class Clock(NamedTuple):
    """Time as the replay sees it; tests pass their own."""

    wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Step(NamedTuple):
    """What the replay has come to, for whoever shows it."""

    counters: Counters
    watermark: int | None
    fraction: float | None


class Head(NamedTuple):
    """The next record of a source in a merge: its time (None: no valid event, taken at once), and where it ends."""

    ts: int | None
    record: tuple[int, Row]
    records: int
    bytes: int


def _size(raw: bytes | Row) -> int:
    """Bytes of the source that a record takes, a line's feed included."""
    return raw.size if isinstance(raw, Row) else len(raw) + 1


class _Cursor:
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
            sizes = [_size(raw) for raw in batch.records]
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


class Replay:
    """Applies sources to a store. `run` returns the final line of §9; `on_step` is called after each commit."""

    def __init__(
        self,
        store: Store,
        paths: list[str],
        *,
        wanted: str = "auto",
        mapping: dict[str, str] | None = None,
        speed: float | None = None,
        flush: bool = True,
        clock: Clock | None = None,
        on_step: Callable[[Step], None] | None = None,
        max_batch: int | None = None,
    ) -> None:
        if len({source_name(path) for path in paths}) < len(paths):
            raise UserError("a file is named twice; name each file once")
        self._store = store
        self._clock = clock or Clock()
        self._speed = speed
        self._flush = flush
        self._on_step = on_step or (lambda step: None)
        self._max_batch = max_batch
        self._core: Core = store.core()
        future = store.semantics().stream.future_ms
        self._max_ts = lambda: self._clock.wall_ms() + future
        self._sources = [
            open_source(path, wanted, mapping or {}, self._start(source_name(path))) for path in paths
        ]

    def _start(self, name: str) -> Position:
        stored = self._store.position(name)
        return Position() if stored is None else msgspec.convert(stored, Position)

    def run(self) -> dict[str, Any]:
        """Replays everything. Raises UserError for a source that cannot be read on; what came before it is committed."""
        began = self._clock.monotonic()
        before = self._core.counters.events
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            for source in self._sources:
                if isinstance(source, Seeds):
                    self._seed(source)
            events = [source for source in self._sources if not isinstance(source, Seeds)]
            if len(events) == 1 and self._speed is None:
                self._plain(events[0])
            elif events:
                self._merged(events)
            if self._flush:
                for changes in self._core.flush():
                    self._commit(changes, {})
            self._store.sync()
        finally:
            gc.enable()
            gc.unfreeze()
        seconds = self._clock.monotonic() - began
        done = self._core.counters.events - before
        return {
            **msgspec.structs.asdict(self._core.counters),
            "watermark": self._core.watermark,
            "seconds": round(seconds, 3),
            "events_per_second": round(done / seconds, 1) if seconds > 0 else 0.0,
        }

    def _commit(self, changes: Changes, positions: dict[str, Position]) -> None:
        self._store.commit(
            self._core, changes, {name: msgspec.to_builtins(position) for name, position in positions.items()}
        )
        fractions = [fraction for source in self._sources if (fraction := source.stream.fraction()) is not None]
        fraction = sum(fractions) / len(fractions) if fractions else None
        self._on_step(Step(self._core.counters, self._core.watermark, fraction))

    def _plain(self, source: Source) -> None:
        """One source: whole blocks straight into the core."""
        for batch in source.batches(self._max_ts):
            records, name = batch.records, source.name
            size = self._max_batch or len(records)
            left = 0 if size >= len(records) else sum(map(_size, records))
            for i in range(0, len(records), size):
                # Lazily numbered: a list of pairs would cost a twentieth of the whole.
                part = records[i : i + size] if size < len(records) else records
                changes = self._core.apply(enumerate(part, batch.first + i), self._clock.wall_ms())
                left -= sum(map(_size, part)) if left else 0
                position = source.position(batch.first + i + len(part) - 1, batch.bytes_after - left)
                self._commit(_named(changes, name), {name: position})

    def _merged(self, sources: list[Source]) -> None:
        """Several sources by event time, or one at a pace."""
        cursors = [_Cursor(source, self._max_ts) for source in sources]
        pace = _Pace(self._speed, self._clock) if self._speed is not None else None
        records: list[Record] = []
        size = 0
        while True:
            cursor = _next_cursor(cursors)
            head = cursor.head if cursor else None
            ready = head is None or pace is None or head.ts is None or pace.due(head.ts)
            full = len(records) >= (self._max_batch or MERGE_RECORDS) or size >= MERGE_BYTES
            if records and (full or not ready or head is None):
                changes = self._core.apply(records, self._clock.wall_ms())
                self._commit(changes, {c.source.name: c.position() for c in cursors})
                records, size = [], 0
            if cursor is None or head is None:
                return
            if not ready and pace is not None and head.ts is not None:
                pace.wait(head.ts)
            cursor.take()
            number, row = head.record
            records.append((f"{cursor.source.name}:{number}", row))
            size += len(row.raw)

    def _seed(self, source: Seeds) -> None:
        """Puts histories before the log in place, before any event."""
        dead: list[DeadLetter] = []
        count, number = 0, source.start.records
        for number, raw, seed in source.seeds():
            count += 1
            if isinstance(seed, Rejected):
                dead.append(DeadLetter(f"{source.name}:{number}", raw, seed.reason))
            else:
                self._core.seed(seed.user_id, seed.positives)
            if count % SEED_USERS == 0:
                self._seeded(source, number, dead)
                dead = []
        self._seeded(source, number, dead)

    def _seeded(self, source: Seeds, number: int, dead: list[DeadLetter]) -> None:
        changes = self._core.seeded()
        self._core.counters.dead_letters += len(dead)
        changes.dead_letters += dead
        self._commit(changes, {source.name: source.position(number, 0)})


class _Pace:
    """Log time against wall time: `speed` seconds of the log a second, from the first event on."""

    def __init__(self, speed: float, clock: Clock) -> None:
        self._speed = speed
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def _when(self, ts: int) -> float:
        if self._first is None:
            self._first = (ts, self._clock.monotonic())
        return self._first[1] + (ts - self._first[0]) / 1000 / self._speed

    def due(self, ts: int) -> bool:
        """Whether an event of this time may be applied now."""
        return self._when(ts) <= self._clock.monotonic()

    def wait(self, ts: int) -> None:
        """Sleeps until it may, and at least a tick, so that commits stay few."""
        while (left := self._when(ts) - self._clock.monotonic()) > 0:
            self._clock.sleep(max(PACE_SECONDS, min(left, 1.0)))


def _next_cursor(cursors: list[_Cursor]) -> _Cursor | None:
    """The source whose turn it is: one with no valid event at its head, else the smallest time, ties in order."""
    best: _Cursor | None = None
    for cursor in cursors:
        head = cursor.head
        if head is None:
            continue
        if head.ts is None:
            return cursor
        if best is None or best.head is None or (best.head.ts is not None and head.ts < best.head.ts):
            best = cursor
    return best


def _named(changes: Changes, name: str) -> Changes:
    """Dead letters of a single source get its name to their line number."""
    changes.dead_letters = [DeadLetter(f"{name}:{d.position}", d.raw, d.reason) for d in changes.dead_letters]
    return changes
