"""Files → core → RocksDB: merged by event time, committed in batches, resumable at any moment (SEMANTICS.md §3, §5)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from onerec.errors import UserError
from streaming.changes import Changes, Counters, DeadLetter
from streaming.core import Core
from streaming.cursors import AHEAD_MS, FOLLOW_SECONDS, Clock, Cursor, next_cursor, pace_of, size_of, wait_for_more
from streaming.events import Rejected, Row
from streaming.formats import open_source, source_name
from streaming.seeds import Seeds
from streaming.sources import Position, Source
from streaming.store import Store

MERGE_RECORDS: Final = 20_000
MERGE_BYTES: Final = 8 << 20
SEED_USERS: Final = 5_000

Record = tuple[Any, bytes | Row]


class Step(NamedTuple):
    """What a commit has brought the replay to, for whoever shows or measures it.

    `records` are those applied, `changes` what they changed; `behind_ms` is how much log time is due and not applied, None
    where the log has no pace.
    """

    counters: Counters
    watermark: int | None
    fraction: float | None
    changes: Changes
    records: Sequence[bytes | Row]
    behind_ms: int | None


class Replay:
    """Applies sources to a store. `run` returns the final line of §9; `on_step` is called after each commit.

    `live`: each record waits until the wall clock has reached its time. `follow`: files grow, there is no end.
    `on_ready` is called once, when the first record is there to be applied.
    """

    def __init__(
        self,
        store: Store,
        paths: list[str],
        *,
        wanted: str = "auto",
        mapping: dict[str, str] | None = None,
        speed: float | None = None,
        live: bool = False,
        follow: bool = False,
        flush: bool = True,
        clock: Clock | None = None,
        on_step: Callable[[Step], None] | None = None,
        on_ready: Callable[[], None] | None = None,
        max_batch: int | None = None,
    ) -> None:
        if len({source_name(path) for path in paths}) < len(paths):
            raise UserError("a file is named twice; name each file once")
        self._store = store
        self._clock = clock or Clock()
        self._pace = pace_of(speed, live, self._clock)
        self._flush = flush
        self._on_step = on_step or (lambda step: None)
        self._on_ready = on_ready
        self._max_batch = max_batch
        self._core: Core = store.core()
        future = AHEAD_MS if live else store.semantics().stream.future_ms
        self._max_ts = lambda: self._clock.wall_ms() + future
        self._sources = [
            open_source(path, wanted, mapping or {}, self._start(source_name(path)), follow=follow) for path in paths
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
            if len(events) == 1 and self._pace is None:
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

    def _ready(self) -> None:
        told, self._on_ready = self._on_ready, None
        if told is not None:
            told()

    def _commit(
        self,
        changes: Changes,
        positions: dict[str, Position],
        records: Sequence[bytes | Row] = (),
        behind_ms: int | None = None,
    ) -> None:
        self._store.commit(
            self._core, changes, {name: msgspec.to_builtins(position) for name, position in positions.items()}
        )
        fractions = [fraction for source in self._sources if (fraction := source.stream.fraction()) is not None]
        fraction = sum(fractions) / len(fractions) if fractions else None
        self._on_step(Step(self._core.counters, self._core.watermark, fraction, changes, records, behind_ms))

    def _plain(self, source: Source) -> None:
        """One source: whole blocks straight into the core."""
        for batch in source.batches(self._max_ts):
            self._ready()
            records, name = batch.records, source.name
            if not records:
                self._clock.sleep(FOLLOW_SECONDS)
                continue
            size = self._max_batch or len(records)
            left = 0 if size >= len(records) else sum(map(size_of, records))
            for i in range(0, len(records), size):
                # Lazily numbered: a list of pairs would cost a twentieth of the whole.
                part = records[i : i + size] if size < len(records) else records
                changes = self._core.apply(enumerate(part, batch.first + i), self._clock.wall_ms())
                left -= sum(map(size_of, part)) if left else 0
                position = source.position(batch.first + i + len(part) - 1, batch.bytes_after - left)
                self._commit(_named(changes, name), {name: position}, part)

    def _merged(self, sources: list[Source]) -> None:
        """Several sources by event time, or one at a pace."""
        cursors = [Cursor(source, self._max_ts) for source in sources]
        pace = self._pace
        records: list[Record] = []
        size = 0
        self._ready()
        while True:
            cursor = next_cursor(cursors)
            head = cursor.head if cursor else None
            ready = head is None or pace is None or pace.due(head)
            full = len(records) >= (self._max_batch or MERGE_RECORDS) or size >= MERGE_BYTES
            if records and (full or not ready or head is None):
                changes = self._core.apply(records, self._clock.wall_ms())
                behind = None if pace is None else pace.behind_ms(head) if head else 0
                positions = {c.source.name: c.position() for c in cursors}
                self._commit(changes, positions, [row for _, row in records], behind)
                records, size = [], 0
            if cursor is None or head is None:
                if not wait_for_more(cursors, self._clock):
                    return
                continue
            if not ready and pace is not None:
                pace.wait(head)
            cursor.take()
            number, row = head.record
            records.append((f"{cursor.source.name}:{number}", row))
            size += len(row.raw)

    def _seed(self, source: Seeds) -> None:
        """Puts histories before the log in place, before any event."""
        dead: list[DeadLetter] = []
        count, number = 0, source.start.records
        for number, raw, seed in source.seeds():
            self._ready()
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


def _named(changes: Changes, name: str) -> Changes:
    """Dead letters of a single source get its name to their line number."""
    changes.dead_letters = [DeadLetter(f"{name}:{d.position}", d.raw, d.reason) for d in changes.dead_letters]
    return changes
