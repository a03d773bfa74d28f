"""The compacted topic `histories` as a local state on a serving host, so that `recommend` looks users up at home.

What a worker keeps of a user is stored as it is. The entries of one transaction become visible together, but for a
host that is catching up, and the offsets are in the same write: whenever it dies, it goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from onerec.closing import Closing
from onerec.errors import Failure, UserError
from streaming.changes import Counters
from streaming.kafka.feeder import log_settings
from streaming.kafka.progress import ProgressLog
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Delay, Tail, same_topic
from streaming.kafka.topics import require, topic_ids
from streaming.kafka.wire import NOTHING, PROGRESS_KEY, Progress, decode_progress
from streaming.state import VERSION
from streaming.store import FEED, REPLICA, Store

READ: Final = 20_000
READ_SECONDS: Final = 0.05
HOLD: Final = 50_000
"""Entries that wait at most for the end of their transactions."""
HOLD_SECONDS: Final = 1.0
_WANTED: Final = (b"b"[0], b"l"[0])


class Copied(msgspec.Struct, kw_only=True):
    """What a replica has done in this run: records read and stored, `refused` of them that were no entry of a worker."""

    records: int = 0
    refused: int = 0


Pair = tuple[bytes, bytes | None]


class _Part(msgspec.Struct):
    """A partition: `ready` entries, up to `offset`, and those `pending` whose transaction has not been read to its end."""

    partition: int
    ready: list[Pair] = []
    offset: int = 0
    newest: int = 0
    pending: list[Pair] = []
    pending_since: float = 0.0
    last: Any = None
    changed: bool = False
    progress: Progress | None = None

    def settle(self, message: Any) -> None:
        """What is pending is ready, up to this message."""
        self.ready += self.pending
        self.pending.clear()
        self.offset, self.newest, self.changed = message.offset() + 1, message.timestamp()[1], True
        self.last = None


class Replica(Closing):
    """Keeps `histories` in a normal state, whose readers need not know about Kafka.

    Raises UserError where topics are missing, the state is of another use, or the topic was made anew; Failure for entries of
    another format, of which nothing is stored.
    """

    def __init__(
        self,
        config: KafkaConfig,
        state: Path,
        *,
        say: Callable[[str], None] = print,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        require(config, ["histories", "progress"])
        self.done = Copied()
        self.delay = Delay()
        self._config, self._state, self._say = config, state, say
        self._oldest: int | None = None
        self._topic_id = topic_id = topic_ids(config, ["histories"])["histories"]
        with ProgressLog(config) as log:
            semantics = log_settings(log, say, stopped)
        self._store = Store(state, semantics)
        try:
            store = self._store
            share = {"partitions": config.partitions}
            before = store.position(REPLICA)
            if before is None:
                if store.position(FEED) or store.last_sequence() or next(store.users(), None):
                    raise UserError(
                        f"state {state} holds what replay or feed wrote; give `onerec histories-replica` a --state folder of "
                        "its own"
                    )
                store.put_histories([], {REPLICA: share}, watermark=None, counters=Counters())
            offsets: dict[int, int | None] = {}
            self._parts = {p: _Part(p) for p in range(config.partitions)}
            for partition, part in self._parts.items():
                found = store.position(f"histories:{partition}") or {}
                same_topic(config.named("histories"), state, found, topic_id)
                offsets[partition] = found.get("offset")
                if found.get("progress"):
                    part.progress = msgspec.convert(found["progress"], Progress)
            self._tail = Tail(config, "histories", topic_id, offsets)
            for partition, (wanted, low) in self._tail.forgotten.items():
                self._tail.close()
                raise self._lost(partition, wanted, low)
        except BaseException:
            self._store.close()
            raise

    def _lost(self, partition: int, wanted: int, low: int) -> Failure:
        return Failure(
            f"topic {self._tail.topic}, partition {partition}: the offsets {wanted} to {low - 1} are no longer in Kafka, and "
            "with them changes of histories. The topic has to be compacted, never shortened (`onerec topics` says what is "
            f"wrong): set that right, then empty {self._state} and start again"
        )

    def step(self) -> int:
        """Reads what is there and stores it. Returns how many records."""
        messages = self._tail.read(READ, READ_SECONDS)
        for partition, (wanted, low) in self._tail.forgotten.items():
            raise self._lost(partition, wanted, low)
        self._take(messages)
        self._write()
        return len(messages)

    def _take(self, messages: list[Any]) -> None:
        parts = self._parts
        if messages and self._oldest is None:
            self._oldest = messages[0].timestamp()[1]
        pending = {partition: part.pending for partition, part in parts.items()}
        for message in messages:
            key, value = message.key(), message.value()
            if key and value and key[0] in _WANTED and (value[0] == VERSION or value == NOTHING):
                pending[message.partition()].append((key, None if value == NOTHING else value))
            else:
                self._take_other(message, key, value)
        now = time.monotonic()
        for partition, message in self._tail.newest.items():
            part = parts[partition]
            if message.offset() >= part.offset:
                part.pending_since = now if part.last is None else part.pending_since
                part.last = message
        late = sum(len(part.pending) for part in parts.values()) > HOLD
        for part in parts.values():
            if part.last is not None and (late or now - part.pending_since > HOLD_SECONDS):
                part.settle(part.last)

    def _take_other(self, message: Any, key: bytes | None, value: bytes | None) -> None:
        """A message that is no entry of a user: progress, which ends a transaction, or something wrong."""
        where = f"topic {self._tail.topic}, partition {message.partition()}, offset {message.offset()}"
        part = self._parts[message.partition()]
        if key == PROGRESS_KEY and value:
            part.progress = decode_progress(value, where)
            part.settle(message)
        elif key and value and key[0] in _WANTED:
            raise Failure(
                f"{where}: an entry of format {value[0]}, this version reads {VERSION}; run the version that wrote it, or "
                "replay the raw topics into topics of a new kafka.prefix"
            )
        else:
            self.done.refused += 1
            self._say(f"{where}: left out, no entry of a worker: {(key or b'')[:80]!r}")

    def _write(self) -> None:
        """Stores what is ready."""
        due = [part for part in self._parts.values() if part.changed]
        if not due:
            return
        known = [part.progress for part in self._parts.values() if part.progress is not None]
        watermarks = [progress.watermark for progress in known if progress.watermark is not None]
        before = self._store.watermark()
        pairs: dict[bytes, bytes | None] = {}
        for part in due:
            pairs.update(part.ready)
        self._store.put_histories(
            pairs.items(),
            {f"histories:{part.partition}": self._position(part) for part in due},
            watermark=max(min(watermarks), before or 0) if watermarks else before,
            counters=_sum(known),
        )
        newest = max(part.newest for part in due)
        self.delay.stored(newest if self._oldest is None else self._oldest, newest)
        self._oldest = None
        for part in due:
            self.done.records += len(part.ready)
            part.ready, part.changed = [], False

    def _position(self, part: _Part) -> dict[str, Any]:
        progress = None if part.progress is None else msgspec.to_builtins(part.progress)
        return {"offset": part.offset, "topic": self._topic_id, "progress": progress}

    def finished(self) -> bool:
        """Whether an end marker ended every partition, and everything there is has been stored."""
        return (
            all(part.progress is not None and part.progress.ended and part.last is None for part in self._parts.values())
            and self._tail.complete()
        )

    def lags(self) -> dict[int, int]:
        """Records between what is stored and the topic's end, by partition."""
        return self._tail.lags()

    def status(self) -> dict[str, Any]:
        """Where the replica stands: users, lag in records and ms, watermark."""
        behind = self._tail.behind()
        return {
            "users": self._store.counters().users,
            "watermark": self._store.watermark(),
            "lag_records": behind,
            "lag_ms": self.delay.lag_ms(at_end=behind == 0),
            "delay_p95_ms": self.delay.p95_ms(),
        }

    def close(self) -> None:
        """Makes the state safe and lets go of everything."""
        self._tail.close()
        self._store.sync()
        self._store.close()


def _sum(progress: list[Progress]) -> Counters:
    fields = Counters.__struct_fields__
    return Counters(**{name: sum(getattr(found.counters, name) for found in progress) for name in fields})
