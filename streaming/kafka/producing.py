"""Files → raw topics: keyed, in their users' partitions, merged by event time, each line exactly once (SEMANTICS.md §1, §3)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, Queue
from threading import Thread
from typing import Any, Final, NamedTuple

import msgspec
import orjson

from onerec.errors import Failure, UserError
from streaming.cursors import AHEAD_MS, FOLLOW_SECONDS, Clock, Cursor, next_cursor, pace_of, wait_for_more
from streaming.events import (
    BLANK,
    DEEP_LINE,
    KINDS,
    MAX_DEPTH,
    MAX_LINE_BYTES,
    WATCH,
    Line,
    Rejected,
    Row,
    decode,
    fast_decode,
)
from streaming.formats import open_source, source_name
from streaming.item_files import ItemLines, ItemTable, open_items
from streaming.items import ItemRecord
from streaming.kafka.outbox import Outbox, wait_decided
from streaming.kafka.partitioning import Partitioner, partition_of_bytes
from streaming.kafka.progress import ProgressLog
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import END
from streaming.seeds import Seeds
from streaming.sources import Batch, JsonLines, Position, Source

TRANSACTION_LINES: Final = 50_000
TRANSACTION_BYTES: Final = 16 << 20
TRANSACTION_SECONDS: Final = 1.0
NO_LIMIT: Final = 1 << 62


class Produced(Position, frozen=True):
    """How far a source is in the topics; `ended` when end markers follow its last line."""

    ended: bool = False


class Counts(msgspec.Struct):
    """Lines of this run, by topic; `invalid` ones are among `watch` or `items`."""

    lines: int = 0
    watch: int = 0
    interactions: int = 0
    items: int = 0
    invalid: int = 0


class Step(NamedTuple):
    """What the replay has come to, for whoever shows or measures it; `behind_ms` as in `streaming.replay.Step`."""

    counts: Counts
    fraction: float | None
    behind_ms: int | None


def progress_key(name: str) -> bytes:
    """Key in `progress` of a source."""
    return b"produce:" + name.encode()


def event_json(event: Line | ItemRecord) -> bytes:
    """The JSON line of an event or a catalogue entry (§1)."""
    if isinstance(event, ItemRecord):
        fields = {"type": "item", **{name: getattr(event, name) for name in ("item_id", "ts", "duration_ms", "embedding")}}
        fields |= {"tags": event.tags, "author_id": event.author_id}
        return orjson.dumps({name: value for name, value in fields.items() if value is not None})
    durations = {"watch_ms": event.watch_ms, "duration_ms": event.duration_ms} if event.type == "watch" else {}
    return orjson.dumps({
        "type": event.type, "event_id": event.event_id, "user_id": event.user_id, "item_id": event.item_id, "ts": event.ts,
        **durations, "request_id": event.request_id,
    })


class Produce:
    """Replays files into the raw topics; what is there already is left out. `run` returns the summary.

    `items` are catalogues, which go first. `pack` lines a message; `speed` seconds of the log a second, None flat out; `end`
    writes end markers after the last line. `future_ms` is how far a line may lie ahead of the clock. `live`: each line waits
    until the clock has reached its time. `follow`: files grow, there is no end. Raises UserError for a
    source that cannot be read (on), for KuaiRand's histories, and as `Outbox` does.
    """

    def __init__(
        self,
        config: KafkaConfig,
        paths: list[str],
        *,
        items: Sequence[str] = (),
        future_ms: int,
        wanted: str = "auto",
        mapping: dict[str, str] | None = None,
        speed: float | None = None,
        live: bool = False,
        follow: bool = False,
        pack: int = 1,
        end: bool = False,
        clock: Clock | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        names = [source_name(path) for path in [*items, *paths]]
        if len(set(names)) < len(names):
            raise UserError("a file is named twice; name each file once")
        self._config = config
        self._clock = clock or Clock()
        self._pace = pace_of(speed, live, self._clock, config.linger_ms / 1000)
        self._end = end
        self._on_step = on_step or (lambda step: None)
        future = AHEAD_MS if live else future_ms
        self._max_ts = lambda: self._clock.wall_ms() + future
        self.counts = Counts()
        self._partition = Partitioner(config.partitions, config.partitioner)
        digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
        self._outbox = Outbox(config, f"produce-{digest}", pack)
        try:
            self._produced = self._read_produced(names)
            self._catalogues = [open_items(path, self._start(source_name(path))) for path in items]
            self._events = [
                open_source(path, wanted, mapping or {}, self._start(source_name(path)), follow=follow) for path in paths
            ]
            for source in self._events:
                if isinstance(source, Seeds):
                    raise UserError(
                        f"{source.name} holds histories from before the log, which are no events: in Kafka every history grows "
                        "from the log. Leave the file out, or use `onerec replay`, which puts such histories in place"
                    )
        except BaseException:
            self._outbox.close()
            raise
        self._verbatim = {
            source.name for source in self._events if isinstance(source, JsonLines) and not mapping
        }

    def _read_produced(self, names: list[str]) -> dict[str, Produced]:
        wait_decided(self._config)
        with ProgressLog(self._config) as log:
            log.refresh()
            values = {name: log.produced[name] for name in names if name in log.produced}
        try:
            return {name: msgspec.json.decode(value, type=Produced) for name, value in values.items()}
        except msgspec.MsgspecError as error:
            raise Failure(f"topic {self._config.named('progress')}: no position of onerec ({error})") from None

    def _start(self, name: str) -> Position:
        return self._produced.get(name, Position())

    def run(self) -> dict[str, Any]:
        """Produces everything. What is committed stays, whatever happens; the same call goes on from there."""
        began = self._clock.monotonic()
        with self._outbox:
            for source in self._catalogues:
                self._plain(source)
            if len(self._events) == 1 and self._pace is None:
                self._plain(self._events[0])
            elif self._events:
                self._merged(self._events)
            if self._end and not (self._produced and all(position.ended for position in self._produced.values())):
                self._outbox.put_everywhere(END)
                self._commit({name: msgspec.structs.replace(at, ended=True) for name, at in self._produced.items()})
            self._outbox.settle()
        seconds = self._clock.monotonic() - began
        return {
            **msgspec.structs.asdict(self.counts),
            "partitions": self._config.partitions,
            "seconds": round(seconds, 3),
            "lines_per_second": round(self.counts.lines / seconds, 1) if seconds > 0 else 0.0,
        }

    def _commit(self, positions: dict[str, Produced], behind_ms: int | None = None) -> None:
        self._outbox.commit({progress_key(name): msgspec.json.encode(position) for name, position in positions.items()})
        self._produced |= positions
        streams = [source.stream for source in (*self._catalogues, *self._events)]
        fractions = [fraction for stream in streams if (fraction := stream.fraction()) is not None]
        self._on_step(Step(self.counts, sum(fractions) / len(fractions) if fractions else None, behind_ms))

    def _plain(self, source: Source) -> None:
        """One source flat out: whole blocks; what trickles in is committed once nothing more comes for `linger_ms`."""
        linger = self._config.linger_ms / 1000
        ahead = _Ahead(source.batches(self._max_ts), self._clock.sleep)
        done: tuple[int, int] | None = None
        began = 0.0
        while True:
            item = ahead.get(None if done is None else linger)
            if isinstance(item, Batch):
                began = self._clock.monotonic() if done is None else began
                self._take(source, item)
                done = item.first + len(item.records) - 1, item.bytes_after
                gathered = self._clock.monotonic() - began
                if not (self._full() or gathered > TRANSACTION_SECONDS or (gathered > linger and ahead.empty())):
                    continue
            if done is not None:
                self._commit({source.name: _produced(source.position(*done))})
                done = None
            if isinstance(item, BaseException):
                # What came before a damaged place is committed first.
                self._outbox.settle()
                raise item
            if item is _NO_MORE:
                return

    def _full(self) -> bool:
        return self._outbox.lines >= TRANSACTION_LINES or self._outbox.bytes >= TRANSACTION_BYTES

    def _take(self, source: Source, batch: Batch) -> None:
        """Lines into the outbox. The same quick way in as `Core.feed`: a line it is not sure of goes to `_line`."""
        max_ts = self._max_ts()
        put, partition, parse, kinds = self._outbox.put, self._partition, fast_decode, KINDS
        watches = interactions = 0
        for raw in batch.records:
            if not isinstance(raw, bytes):
                self._row(source, raw)
                continue
            try:
                if len(raw) > DEEP_LINE and (raw.count(b"[") + raw.count(b"{") > MAX_DEPTH or len(raw) > MAX_LINE_BYTES):
                    raise ValueError
                if not raw.isascii():
                    raw.decode()
                line = parse(raw)
                kind = kinds[line.type]
                if line.ts > max_ts or (kind == WATCH and (line.watch_ms < 0 or line.duration_ms < 0)):
                    raise ValueError
            except (ValueError, RecursionError, msgspec.MsgspecError):
                if raw.strip(BLANK):
                    self._line(raw, decode(raw, max_ts))
                continue
            user = line.user_id
            if kind == WATCH:
                watches += 1
                put("watch", partition[user], user, raw)
            else:
                interactions += 1
                put("interactions", partition[user], user, raw)
        self.counts.watch += watches
        self.counts.interactions += interactions
        self.counts.lines += watches + interactions

    def _row(self, source: Source, row: Row) -> None:
        verbatim = source.name in self._verbatim
        topic = "items" if isinstance(source, (ItemLines, ItemTable)) else "watch"
        for event in row.events:
            if verbatim or isinstance(event, Rejected):
                self._line(row.raw, event, topic)
            elif isinstance(source, ItemLines) and decode(row.raw, NO_LIMIT) == event:
                self._line(row.raw, event)
            else:
                self._line(event_json(event), event)

    def _line(self, raw: bytes, event: Line | ItemRecord | Rejected, refused_into: str = "watch") -> None:
        """One line to where its event belongs; a refused one to where its bytes say, for `ingest` to refuse."""
        if isinstance(event, Rejected) and event.reason == "future_ts":
            # The broker's clock decides, when the line is appended.
            again = decode(raw, NO_LIMIT)
            event = event if isinstance(again, Rejected) else again
        self.counts.lines += 1
        if isinstance(event, Line):
            topic = "watch" if event.type == "watch" else "interactions"
            key, partition = event.user_id, self._partition[event.user_id]
        elif isinstance(event, ItemRecord):
            topic, key = "items", event.item_id
            partition = self._partition[event.item_id]
        else:
            # A table's row may hold line feeds, which would part it.
            raw = raw.replace(b"\n", b"\\n")
            self.counts.invalid += 1
            topic, partition = refused_into, partition_of_bytes(raw, self._config.partitions, "crc32")
            setattr(self.counts, topic, getattr(self.counts, topic) + 1)
            self._outbox.put(topic, partition, None, raw)
            return
        setattr(self.counts, topic, getattr(self.counts, topic) + 1)
        self._outbox.put(topic, partition, key, raw)

    def _merged(self, sources: list[Source]) -> None:
        """Several sources by event time, or one at a pace."""
        cursors = [Cursor(source, self._max_ts) for source in sources]
        pace = self._pace
        while True:
            cursor = next_cursor(cursors)
            head = cursor.head if cursor else None
            ready = head is None or pace is None or pace.due(head)
            if self._outbox.lines and (self._full() or not ready or head is None):
                behind = None if pace is None else pace.behind_ms(head) if head else 0
                self._commit({c.source.name: _produced(c.position()) for c in cursors}, behind)
            if cursor is None or head is None:
                if not wait_for_more(cursors, self._clock):
                    return
                continue
            if not ready and pace is not None:
                pace.wait(head)
            cursor.take()
            self._row(cursor.source, head.record[1])


_NO_MORE: Final = object()


class _Ahead:
    """Reads batches in a thread of its own, two ahead, so that a source with nothing to give holds nothing up."""

    def __init__(self, batches: Iterator[Batch], sleep: Callable[[float], None]) -> None:
        self._queue: Queue[object] = Queue(2)
        self._sleep = sleep
        # Left behind in its read when the run is interrupted.
        Thread(target=self._read, args=(batches,), daemon=True).start()

    def _read(self, batches: Iterator[Batch]) -> None:
        try:
            for batch in batches:
                if batch.records:
                    self._queue.put(batch)
                else:
                    self._sleep(FOLLOW_SECONDS)
            self._queue.put(_NO_MORE)
        except BaseException as error:
            self._queue.put(error)

    def empty(self) -> bool:
        """Whether nothing is read ahead."""
        return self._queue.empty()

    def get(self, timeout: float | None) -> object:
        """A batch, _NO_MORE at the end, the error that ended it, or None if nothing came within `timeout` seconds."""
        try:
            return self._queue.get(timeout=timeout)
        except Empty:
            return None


def _produced(position: Position) -> Produced:
    return Produced(**msgspec.structs.asdict(position))
