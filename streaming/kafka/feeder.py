"""From the topics `sessions` and `catalogue` into a local session log, which is all that a trainer knows of the stream.

Sessions, what they make of the log's watermark, and offsets are one write of the log: whenever the feeder dies, it goes on
from there. Repeats are known by the position every session carries: [partition, sequence], 1, 2, 3 … without a hole, so
that it is also known how many are missing where Kafka has forgotten some.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from onerec.closing import Closing
from onerec.errors import Failure, UserError
from streaming.events import REASONS, Rejected, decode
from streaming.items import ItemRecord
from streaming.kafka.progress import ProgressLog
from streaming.kafka.session_order import SessionOrder, Waiting
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Delay, Tail, same_topic
from streaming.kafka.topics import require, topic_ids
from streaming.kafka.wire import decode_session_message
from streaming.semantics import Semantics
from streaming.store import FEED, REPLICA, Store

READ: Final = 2_000
READ_SECONDS: Final = 0.05
WRITE: Final = 500
"""Sessions a write."""
HEAR_SECONDS: Final = 0.1
HEAR_BUSY_SECONDS: Final = 1.0
"""Asking for progress takes a moment, which catching up has better use for."""
HOLD_BYTES: Final = 64 << 20
"""Of sessions that wait for those of other partitions; with more, partitions that have some are not read on."""
ITEMS: Final = 1_000
EVER: Final = 1 << 62


class Stopped(Exception):
    """A stop was asked for before there was anything to do."""


class _Head(msgspec.Struct):
    """What the order of a session asks of its message."""

    session_id: str
    end: int
    position: tuple[int, int]


_head = msgspec.json.Decoder(_Head).decode


class Fed(msgspec.Struct, kw_only=True):
    """What a feeder has done in this run; `forgotten` sessions are those that Kafka had deleted before they were read."""

    sessions: int = 0
    repeats: int = 0
    refused: int = 0
    forgotten: int = 0
    items: int = 0


class Feeder(Closing):
    """Copies the partitions `p % ranks == rank` of `sessions`, and all of `catalogue`, into the session log of a state.

    Raises UserError where topics are missing, the state is of another use, rank or count, or a topic was made anew; Failure
    where sessions are missing that Kafka has forgotten, unless `skip_forgotten`.
    """

    def __init__(
        self,
        config: KafkaConfig,
        state: Path,
        *,
        rank: int = 0,
        ranks: int = 1,
        skip_forgotten: bool = False,
        say: Callable[[str], None] = print,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        if not 0 <= rank < ranks:
            raise UserError(f"--rank {rank} of --ranks {ranks}: ranks are numbered from 0, so 0 to {ranks - 1}")
        require(config, ["sessions", "catalogue", "progress"])
        self.done = Fed()
        self.delay = Delay()
        self._config, self._state = config, state
        self._skip_forgotten = skip_forgotten
        self._say, self._stopped = say, stopped
        self._own = [p for p in range(config.partitions) if p % ranks == rank]
        if not self._own:
            raise UserError(f"--rank {rank} of --ranks {ranks}: no partition is left for it, the log has {config.partitions}")
        self._ids = topic_ids(config, ["sessions", "catalogue"])
        self._open: list[Any] = []
        try:
            self._progress = self._enter(ProgressLog(config))
            self._store = self._enter(Store(state, log_settings(self._progress, say, stopped)))
            self._begin({"rank": rank, "ranks": ranks, "partitions": config.partitions})
        except BaseException:
            self.close()
            raise

    def _enter(self, opened: Any) -> Any:
        self._open.append(opened)
        return opened

    def _begin(self, share: dict[str, int]) -> None:
        """Checks whose log this is, and goes to where it stands."""
        store = self._store
        before = store.position(FEED)
        if before is None and (store.last_sequence() or store.position(REPLICA) or next(store.users(), None)):
            raise UserError(
                f"state {self._state} holds what replay or histories-replica wrote; give `onerec feed` a --state folder of its "
                "own"
            )
        if before not in (None, share):
            raise UserError(
                f"state {self._state} was fed as rank {before['rank']} of {before['ranks']}, from {before['partitions']} "
                f"partitions; asked is rank {share['rank']} of {share['ranks']}, from {share['partitions']}: use what it was "
                "fed as, or new --state folders for all ranks"
            )
        if before is None:
            store.append([], {FEED: share}, watermark=None)
        places = {p: self._place("sessions", p) for p in self._own}
        gap_ms = store.semantics().session.gap_ms
        sequences = {p: place.get("sequence", 0) for p, place in places.items()}
        self._order = SessionOrder(sequences, gap_ms, self._config.stall_seconds)
        # Heard before the log's bounds are asked for: the sessions it speaks of then lie before the end, or were forgotten.
        self._hear()
        self._sessions = self._enter(Tail(
            self._config, "sessions", self._ids["sessions"], {p: place.get("offset") for p, place in places.items()}
        ))
        self._held: set[int] = set()
        for partition in self._own:
            self._check_empty(partition)
        self._catalogue = self._enter(Tail(self._config, "catalogue", self._ids["catalogue"]))
        # One after the other, so that items come in the same order however often it dies.
        for partition in range(self._config.partitions):
            self._catalogue.add({partition: self._place("catalogue", partition).get("offset")})
            while not self._catalogue.at_end() and not self._stopped():
                self._take_items(self._catalogue.read(ITEMS, READ_SECONDS))

    def _place(self, topic: str, partition: int) -> dict[str, Any]:
        """Where the log stands in a partition; {} before its first record of it."""
        found = self._store.position(f"{topic}:{partition}") or {}
        same_topic(self._config.named(topic), self._state, found, self._ids[topic])
        return found

    def _check_empty(self, partition: int) -> None:
        """Where nothing is left to read although there were sessions, retention has passed them all."""
        heard = self._progress.partitions.get(partition)
        if heard is None or heard.sessions <= self._order.sequence(partition):
            return
        low, high = self._sessions.bounds(partition)
        if low == high:
            self._missing(partition, self._order.sequence(partition) + 1, heard.sessions, high)

    def _missing(self, partition: int, first: int, last: int, offset: int) -> None:
        """The sessions from `first` to `last` are not there. Raises Failure unless they are to be skipped."""
        count = last - first + 1
        where = f"topic {self._sessions.topic}, partition {partition}, before offset {offset}"
        if not self._skip_forgotten:
            raise Failure(
                f"{where}: {count:,} sessions (positions {first} to {last}) are no longer in Kafka, by retention or by hand. "
                f"The session log in {self._state} keeps what it has. Go on without them with `--skip-forgotten`; to have them "
                "all, replay the raw events into topics of a new kafka.prefix"
            )
        self._say(f"{where}: {count:,} sessions (positions {first} to {last}) are no longer in Kafka; gone on without them")
        self.done.forgotten += count
        self._order.skip_to(partition, last)

    def _hear(self) -> None:
        self._progress.refresh()
        self._order.hear(self._progress.partitions.values())
        self._heard = time.monotonic()

    def step(self) -> int:
        """Reads what is there, for a few hundredths of a second at least, and writes whose turn it is. Returns how many."""
        messages = self._sessions.read(READ, READ_SECONDS)
        self._take(messages)
        if time.monotonic() - self._heard >= (HEAR_SECONDS if len(messages) < READ else HEAR_BUSY_SECONDS):
            self._hear()
        self._regulate()
        written = self._write(self._order.release())
        self._take_items(self._catalogue.read(ITEMS, 0))
        return written

    def _take(self, messages: Iterable[Any]) -> None:
        order = self._order
        for message in messages:
            partition, offset, value = message.partition(), message.offset(), message.value() or b""
            try:
                head = _head(value)
            except msgspec.MsgspecError as error:
                self._refuse("sessions", message, f"no session of onerec ({error})")
                continue
            source, sequence = head.position
            if source != partition:
                self._refuse("sessions", message, f"a session of partition {source}")
                continue
            newest = order.sequence(partition)
            if sequence <= newest:
                self.done.repeats += 1
                continue
            if sequence > newest + 1:
                self._missing(partition, newest + 1, sequence - 1, offset)
            order.add(Waiting(head.end, head.session_id, partition, sequence, offset, len(value), message))

    def _regulate(self) -> None:
        """Bounds what waits: a partition that is ahead of the others is not read on until they have come as far."""
        waiting = set(self._order.waiting())
        # One that has nothing left is read on in any case: the others wait for it.
        over = self._held if self._order.held_bytes < HOLD_BYTES // 2 else self._held - waiting
        if over:
            self._sessions.go_on(over)
            self._held = self._held - over
        if self._order.held_bytes > HOLD_BYTES and waiting - self._held:
            self._sessions.hold(waiting - self._held)
            self._held = self._held | waiting

    def _write(self, released: Iterable[Waiting]) -> int:
        written = 0
        due = iter(released)
        part = list(islice(due, WRITE))
        while part:
            following = list(islice(due, WRITE))
            sessions, positions, times = [], {}, []
            for waiting in part:
                message = waiting.message
                try:
                    sessions.append(decode_session_message(message.value(), message.headers())[0])
                except ValueError as error:
                    self._refuse("sessions", message, str(error))
                positions[f"sessions:{waiting.partition}"] = {
                    "offset": waiting.offset + 1, "sequence": waiting.sequence, "topic": self._ids["sessions"]
                }
                times.append(message.timestamp()[1])
            # Only once all whose turn it is are in the log is it complete to the new watermark.
            self._store.append(
                sessions, positions, watermark=self._store.watermark() if following else self._watermark()
            )
            self.delay.stored(min(times), max(times))
            self.done.sessions += len(sessions)
            written += len(part)
            part = following
        if not written and self._watermark() != self._store.watermark():
            self._store.append([], {}, watermark=self._watermark())
        return written

    def _watermark(self) -> int | None:
        """Of the log: the order's, but never less than it was."""
        before, now = self._store.watermark(), self._order.watermark()
        return before if now is None else max(now, before or now)

    def _take_items(self, messages: list[Any]) -> None:
        if not messages:
            return
        dimension = self._store.progress().dimension
        items: list[ItemRecord] = []
        positions = {}
        for message in messages:
            positions[f"catalogue:{message.partition()}"] = {"offset": message.offset() + 1, "topic": self._ids["catalogue"]}
            value = message.value()
            if value is None:
                continue
            found = decode(value, EVER)
            if isinstance(found, ItemRecord) and found.embedding is not None:
                dimension = dimension or len(found.embedding)
                if len(found.embedding) != dimension:
                    found = Rejected("bad_embedding")
            if isinstance(found, ItemRecord):
                items.append(found)
            else:
                reason = found.reason if isinstance(found, Rejected) else "bad_item"
                self._refuse("catalogue", message, REASONS[reason])
        self._store.append([], positions, watermark=self._store.watermark(), items=items)
        self.done.items += len(items)

    def _refuse(self, topic: str, message: Any, why: str) -> None:
        self.done.refused += 1
        where = f"topic {self._config.named(topic)}, partition {message.partition()}, offset {message.offset()}"
        self._say(f"{where}: left out, {why}: {(message.value() or b'')[:80]!r}")

    def finished(self) -> bool:
        """Whether an end marker ended every partition of this rank, and all that came before is in the log."""
        return self._order.ended() and self._catalogue.complete() and self._sessions.complete()

    def lags(self) -> dict[int, int]:
        """Records between what is stored and the topic's end, by partition."""
        return self._sessions.lags()

    def status(self) -> dict[str, Any]:
        """Where the feeder stands: lag in records and ms, the log's watermark, partitions that are not waited for."""
        behind = self._sessions.behind()
        at_end = behind == 0 and not self._order.waiting()
        return {
            "sessions": self._store.last_sequence(),
            "items": self._store.progress().item_sequence,
            "watermark": self._store.watermark(),
            "lag_records": behind,
            "lag_ms": self.delay.lag_ms(at_end=at_end),
            "delay_p95_ms": self.delay.p95_ms(),
            "waiting": sum(1 for _ in self._order.waiting()),
            "left_out": self._order.left_out(),
        }

    def close(self) -> None:
        """Makes the log safe and lets go of everything."""
        while self._open:
            opened = self._open.pop()
            if isinstance(opened, Store):
                opened.sync()
            opened.close()


def log_settings(log: ProgressLog, say: Callable[[str], None], stopped: Callable[[], bool]) -> Semantics:
    """The semantic values of the log; waits for its first worker, who decides them. Raises Stopped when stopped before."""
    told = False
    while True:
        log.refresh()
        if log.settings is not None:
            return log.settings
        if stopped():
            raise Stopped("stopped before the first worker of this log (`onerec stream`) was started")
        if not told:
            say("waiting for the first worker of this log (`onerec stream`), whose settings are the log's")
            told = True
        time.sleep(0.2)
