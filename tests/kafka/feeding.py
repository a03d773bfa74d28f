"""Topics as a worker leaves them: sessions, changelog entries and progress of a partition in one transaction."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any, Self

import msgspec
from confluent_kafka import Producer

from streaming.kafka import settings
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import PROGRESS_KEY, SETTINGS_KEY, Progress, encode_settings, partition_key, session_message
from streaming.semantics import Semantics, SessionConfig
from streaming.sessions import Session, SessionItem

T0 = 1_700_000_000_000
GAP_MS = 60_000
SEMANTICS = Semantics(session=SessionConfig(gap_ms=GAP_MS, target_items=3, min_total_watch_ms=1, min_interactions=0))


def session(user: str, minute: float, watches: int = 5, *, items: int = 24) -> Session:
    """A session that ends `minute` minutes after T0; its items go on in steps of eight, so there is something to learn."""
    end = T0 + int(minute * 60_000)
    start = end - 1_000 * (watches - 1)
    seed = sum(user.encode()) + int(minute)
    ids = [f"i{(seed + 8 * k) % items}" for k in range(-2, watches)]
    watched = [SessionItem(item, start + 1_000 * k, 9_000, 9_000, [], True) for k, item in enumerate(ids[2:])]
    positives = [(item.ts, item.item_id) for item in watched[:-1]]
    return Session(
        f"{user}:{start}", user, None, start, end, watched, ids[:2], watches, 9_000 * watches, 0, True, 0.1, 1.0, 0, 0,
        positives,
    )


class Worker:
    """Writes what a worker writes; it knows no rules, the test says what comes."""

    def __init__(self, config: KafkaConfig, semantics: Semantics = SEMANTICS) -> None:
        self.config = config
        self.semantics = semantics
        self.progress = {p: Progress(partition=p) for p in range(config.partitions)}
        self._producer = Producer(settings.producer(config, transactional_id=config.named("test-worker")))
        self._producer.init_transactions(90)
        self.transaction([("progress", 0, SETTINGS_KEY, encode_settings(semantics, config.partitions), None)])

    def transaction(self, records: Iterable[tuple[str, int, bytes | None, bytes | None, Any]], *, abort: bool = False) -> None:
        """(topic, partition, key, value, headers) in one transaction, committed or aborted after all of it is in the log."""
        self._producer.begin_transaction()
        for topic, partition, key, value, headers in records:
            self._producer.produce(self.config.named(topic), value, key, partition=partition, headers=headers)
        self._producer.flush(90)
        if abort:
            self._producer.abort_transaction(90)
        else:
            self._producer.commit_transaction(90)

    def commit(
        self,
        partition: int,
        sessions: Iterable[Session] = (),
        pairs: Iterable[tuple[bytes, bytes]] = (),
        *,
        watermark: int | None = None,
        ended: bool = False,
        users: int = 0,
        abort: bool = False,
    ) -> None:
        """One batch of a partition; `watermark` in minutes after T0, None leaves it as it was."""
        progress = msgspec.structs.replace(self.progress[partition], ended=ended)
        records: list[tuple[str, int, bytes | None, bytes | None, Any]] = []
        for found in sessions:
            progress.sessions += 1
            value, headers = session_message(found, partition, progress.sessions)
            records.append(("sessions", partition, found.user_id.encode(), value, headers))
        records += [("histories", partition, key, value, None) for key, value in pairs]
        if watermark is not None:
            progress.watermark = T0 + 60_000 * watermark
        progress.offset += 1
        before = progress.counters
        progress.counters = msgspec.structs.replace(before, users=before.users + users, events=before.events + 1)
        value = msgspec.json.encode(progress)
        records.append(("progress", 0, partition_key(partition), value, None))
        records.append(("histories", partition, PROGRESS_KEY, value, None))
        self.transaction(records, abort=abort)
        if not abort:
            self.progress[partition] = progress

    def end(self) -> None:
        """An end marker applied in every partition."""
        for partition in self.progress:
            self.commit(partition, ended=True)

    def catalogue(self, items: Iterable[tuple[str, bytes | None]]) -> None:
        """Items as `ingest` writes them, in partitions by turns."""
        self.transaction(
            ("catalogue", number % self.config.partitions, item.encode(), value, None)
            for number, (item, value) in enumerate(items)
        )

    def close(self) -> None:
        """Gives up what is not committed."""
        self._producer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


