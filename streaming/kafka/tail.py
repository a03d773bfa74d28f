"""Partitions of a topic from explicit offsets, without a group: what session logs and serving hosts are fed by."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaException, TopicPartition

from onerec.closing import Closing
from onerec.errors import Failure, UserError
from streaming.kafka import codes, settings
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.topics import topic_ids

ANSWER_SECONDS = 30.0
"""How long the broker may take to say where a log begins and ends."""

CHECK_SECONDS = 30.0
"""How often to ask whether the topic is still the same one: the client goes on in silence where it was deleted."""
FETCH_BYTES = 1 << 20
"""Of a partition at a time: small, so that partitions are read evenly."""


class Bounds(NamedTuple):
    """Offsets of the first record that a partition has and of the next committed one."""

    low: int
    high: int


class Tail(Closing):
    """Reads committed records of one topic's partitions, each from the offset given, or from its beginning.

    `offsets`: partition → where to go on: behind the newest record read, and at the end of the log once that was reached
    (records of transactions are in between). `forgotten`: partition → (offset wanted, first offset that there is), where
    Kafka had deleted what was next; reading has gone on at the latter. `newest`: partition → last record of the last `read`.

    Raises UserError where access is refused, Failure where the log ends before the offset given, or was deleted.
    """

    def __init__(
        self, config: KafkaConfig, topic: str, topic_id: str, offsets: Mapping[int, int | None] | None = None
    ) -> None:
        self.topic = config.named(topic)
        self._config, self._name, self._topic_id = config, topic, topic_id
        self._next_check = time.monotonic() + CHECK_SECONDS
        self.offsets: dict[int, int] = {}
        self.forgotten: dict[int, tuple[int, int]] = {}
        self.newest: dict[Any, Any] = {}
        self._ends: set[int] = set()
        self._fault: Any = None
        self._bootstrap = config.bootstrap
        table = settings.consumer(
            config, group_id=config.named(f"tail-{topic}"), enable_partition_eof=True, fetch_message_max_bytes=FETCH_BYTES
        )
        self._consumer = Consumer({**table, "error_cb": self._heard})
        try:
            self.add(offsets or {})
        except BaseException:
            self._consumer.close()
            raise

    def add(self, offsets: Mapping[int, int | None]) -> None:
        """Reads further partitions."""
        for partition, offset in offsets.items():
            self.offsets[partition] = self._start(partition, offset)
        self._consumer.incremental_assign([TopicPartition(self.topic, p, self.offsets[p]) for p in offsets])

    def _heard(self, error: Any) -> None:
        """What concerns the whole client: a refused credential is for good, a broker away is not."""
        if error.fatal() or error.code() == codes.AUTHENTICATION:
            self._fault = error

    def bounds(self, partition: int) -> Bounds:
        """Where a partition begins and ends now, as the broker says."""
        place = TopicPartition(self.topic, partition)
        try:
            return Bounds(*self._consumer.get_watermark_offsets(place, timeout=ANSWER_SECONDS))
        except KafkaException as error:
            raise Failure(f"topic {self.topic}, partition {partition}: {error.args[0].str()}") from None

    def _start(self, partition: int, offset: int | None) -> int:
        low, high = self.bounds(partition)
        if offset is None or offset < low:
            if offset is not None:
                self.forgotten[partition] = (offset, low)
            return low
        if offset > high:
            raise Failure(
                f"topic {self.topic}, partition {partition} ends at offset {high}, but it has been read up to {offset}: the "
                "cluster has lost records that it had confirmed. Go on with what is left in an empty --state folder"
            )
        return offset

    def read(self, most: int, seconds: float) -> list[Any]:
        """At most `most` records in offset order within their partition, after at most `seconds`."""
        messages = self._consumer.consume(most, seconds)
        found = [message for message in messages if message.error() is None]
        self.newest = {message.partition(): message for message in found}
        for partition, message in self.newest.items():
            self.offsets[partition] = message.offset() + 1
            self._ends.discard(partition)
        if len(found) < len(messages):
            for message in messages:
                if (error := message.error()) is not None:
                    self._note(message, error)
        self._raise_fault()
        if time.monotonic() >= self._next_check:
            self._check()
        return found

    def _note(self, message: Any, error: Any) -> None:
        partition = message.partition()
        if error.code() == codes.END_OF_PARTITION:
            # Behind the last record lie the marks of transactions, which only the end tells of; with records behind it, it
            # was the end no longer.
            if message.offset() >= self.offsets[partition]:
                self.offsets[partition] = message.offset()
                self._ends.add(partition)
        elif error.code() == codes.FORGOTTEN:
            wanted = self.offsets[partition]
            self.offsets[partition] = self._start(partition, wanted)
            # Where this was said, reading has ended.
            self._consumer.incremental_unassign([TopicPartition(self.topic, partition)])
            self._consumer.incremental_assign([TopicPartition(self.topic, partition, self.offsets[partition])])
        elif error.code() in codes.NO_TOPIC:
            raise self._gone()
        elif error.code() not in codes.AWAY and not error.retriable():
            raise Failure(f"topic {self.topic}, partition {partition}: {error.str()}; `onerec topics` says what is wrong")

    def _check(self) -> None:
        """Raises Failure where the topic is another one, or none; says nothing while no broker answers."""
        self._next_check = time.monotonic() + CHECK_SECONDS
        try:
            found = self._consumer.list_topics(self.topic, timeout=2).topics[self.topic]
        except KafkaException:
            return
        if found.error is not None and found.error.code() in codes.NO_TOPIC:
            raise self._gone()
        if found.error is None and topic_ids(self._config, [self._name])[self._name] != self._topic_id:
            raise self._gone()

    def _gone(self) -> Failure:
        return Failure(
            f"topic {self.topic} was deleted while it was read; `onerec topics --create` makes it again, and what is written "
            "into it then goes into an empty --state folder"
        )

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise UserError(
                f"kafka at {self._bootstrap} refuses us: {self._fault.str()}; check kafka.sasl_* and kafka.ssl_*, or "
                f"{settings.ENVIRONMENT}* in the environment"
            )

    def hold(self, partitions: Iterable[int]) -> None:
        """Reads no more of these partitions for now."""
        self._consumer.pause([TopicPartition(self.topic, partition) for partition in partitions])

    def go_on(self, partitions: Iterable[int]) -> None:
        """Reads these partitions again."""
        self._consumer.resume([TopicPartition(self.topic, partition) for partition in partitions])

    def at_end(self) -> bool:
        """Whether nothing was left to read in any partition, as far as is known here."""
        return len(self._ends) == len(self.offsets)

    def complete(self) -> bool:
        """Whether nothing is left to read in any partition, as the broker says when asked now."""
        return self.at_end() and all(self.bounds(p).high <= offset for p, offset in self.offsets.items())

    def lags(self) -> dict[int, int]:
        """Offsets between here and the ends of the logs as last heard of, by partition; 0 once one was read to its end."""
        found = dict.fromkeys(self.offsets, 0)
        for partition in self.offsets.keys() - self._ends:
            _, high = self._consumer.get_watermark_offsets(TopicPartition(self.topic, partition), cached=True)
            found[partition] = max(0, high - self.offsets[partition])
        return found

    def behind(self) -> int:
        """The sum of `lags`."""
        return sum(self.lags().values())

    def close(self) -> None:
        """Leaves the broker."""
        self._consumer.close()


def same_topic(topic: str, state: Path, position: Mapping[str, Any], topic_id: str) -> None:
    """Raises UserError where a stored position belongs to an earlier topic of the same name."""
    if position and position["topic"] != topic_id:
        raise UserError(
            f"topic {topic} was deleted and made anew since state {state} read from it, so its offsets mean something "
            "else now; give --state an empty folder, or a kafka.prefix whose topics it was read from"
        )


class Delay:
    """How old records are when they are stored, in ms; `of` a record is its broker's or producer's time."""

    def __init__(self) -> None:
        self.newest: int | None = None
        """Time of the newest record stored, ms."""
        self._recent: list[int] = []

    def stored(self, oldest: int, newest: int) -> None:
        """Takes note of a batch just stored, by the times of its oldest and newest record."""
        self.newest = newest
        self._recent.append(int(time.time() * 1000) - oldest)
        del self._recent[:-1_000]

    def lag_ms(self, *, at_end: bool) -> int | None:
        """Age of what is stored: 0 where nothing is left to read, None before the first record."""
        if at_end:
            return 0
        return None if self.newest is None else max(0, int(time.time() * 1000) - self.newest)

    def p95_ms(self) -> int | None:
        """95 % of the last thousand batches were stored within so many ms of their oldest record."""
        return sorted(self._recent)[len(self._recent) * 95 // 100] if self._recent else None
