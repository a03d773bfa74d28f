"""The plain engine: a confluent-kafka consumer group. Partitions come and go without the others pausing."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

from confluent_kafka import OFFSET_END, Consumer, KafkaException, TopicPartition

from onerec.errors import Failure
from streaming.kafka import codes, settings
from streaming.kafka.engine import BATCH_MESSAGES, FETCH_BYTES, Engine, message_number
from streaming.kafka.wire import Chunk

HINT_SECONDS: Final = 5.0
"""Between two commits of the group's offsets, which only tell others how far we are."""
POLL_INTERVAL_MS: Final = 60_000
"""A broker that is away holds a batch up; after so long the group counts the worker as gone, and it joins anew. No longer: as
long does a broker back from a crash wait for members that it does not know to be dead."""


class Group:
    """A member of the consumer group of `stream` over the topic `events`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._topic = engine.config.named("events")
        self._paused: set[int] = set()
        self._sought: dict[int, int] = {}
        self._hinted_at = time.monotonic()
        self._consumer = Consumer(
            settings.member(
                engine.config, engine.config.named("stream"),
                max_poll_interval_ms=max(POLL_INTERVAL_MS, engine.config.session_timeout_ms),
                fetch_message_max_bytes=FETCH_BYTES,
            )
        )

    def run(self) -> None:
        """Works until told to stop, or to the end. Raises Failure where the worker cannot go on."""
        engine, linger = self._engine, max(0.005, self._engine.config.linger_ms / 1000)
        self._consumer.subscribe(
            [self._topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked
        )
        try:
            while not engine.stop.is_set() and not engine.ended():
                for partition, chunks in self._taken(self._consumer.consume(BATCH_MESSAGES, linger)).items():
                    again = engine.apply(partition, chunks)
                    if again is not None:
                        self._sought[partition] = again
                engine.check()
                self._pause(engine.fenced())
                self._sought |= engine.opened()
                self._seek()
                self._hint()
            engine.finish()
        finally:
            self._consumer.close()

    def _places(self, partitions: Iterable[int], offset: int = OFFSET_END) -> list[TopicPartition]:
        return [TopicPartition(self._topic, partition, offset) for partition in partitions]

    def _assigned(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        """Takes them, but reads nothing yet: only the store knows from where."""
        numbers = [place.partition for place in partitions]
        consumer.incremental_assign(self._places(numbers))
        self._pause(numbers)
        self._engine.assign(numbers)

    def _revoked(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        numbers = [place.partition for place in partitions]
        self._engine.revoke(numbers)
        self._paused -= set(numbers)
        for partition in numbers:
            self._sought.pop(partition, None)
        consumer.incremental_unassign(partitions)

    def _pause(self, partitions: Iterable[int]) -> None:
        fresh = set(partitions) - self._paused
        if fresh:
            self._consumer.pause(self._places(fresh))
            self._paused |= fresh

    def _seek(self) -> None:
        """Goes to where partitions are to be read from; one that the client has only just got is not ready for it yet."""
        for partition, offset in list(self._sought.items()):
            with suppress(KafkaException):
                self._consumer.seek(TopicPartition(self._topic, partition, offset))
                self._consumer.resume(self._places([partition]))
                self._paused.discard(partition)
                del self._sought[partition]

    def _taken(self, messages: list[Any]) -> dict[int, list[Chunk]]:
        """Messages by partition, those of partitions that do not run left out."""
        found: dict[int, list[Chunk]] = {}
        for message in messages:
            error = message.error()
            if error is not None:
                self._refuse(message.partition(), error)
                continue
            partition = message.partition()
            if partition not in found:
                if not self._engine.runs(partition):
                    continue
                found[partition] = []
            found[partition].append(
                Chunk(message.offset(), message.timestamp()[1], message.value() or b"", message_number(message.headers()))
            )
        return found

    def _refuse(self, partition: int | None, error: Any) -> None:
        """Errors that the client does not mend by itself."""
        if error.code() == codes.FORGOTTEN and partition is not None and partition >= 0:
            # The store sees by the numbers whether anything is missing; if so it asks for it, and then it is said.
            if self._engine.runs(partition):
                self._sought[partition] = self._engine.first(partition)
        elif error.fatal() or error.code() in codes.NO_TOPIC:
            raise Failure(f"topic {self._topic}: {error.str()}; `onerec topics` says what is wrong")

    def _hint(self) -> None:
        if time.monotonic() - self._hinted_at < HINT_SECONDS:
            return
        self._hinted_at = time.monotonic()
        places = [TopicPartition(self._topic, p, offset) for p, offset in self._engine.positions().items()]
        if places:
            with suppress(KafkaException):
                self._consumer.commit(offsets=places, asynchronous=True)
