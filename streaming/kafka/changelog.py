"""Catching up with the compacted topic `histories`: the state of partitions, from where the local copy stands to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from onerec.errors import Failure
from streaming.kafka import codes, settings
from streaming.kafka.local import Local, Place
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import NOTHING, PROGRESS_KEY, Progress, decode_progress
from streaming.state import VERSION

RECORDS = 10_000


class Changelog:
    """Reads `histories` into a worker's database."""

    def __init__(self, config: KafkaConfig, local: Local, topic_id: str) -> None:
        self._topic = config.named("histories")
        self._topic_id = topic_id
        self._local = local
        self._config = config
        self._consumer = Consumer(
            settings.consumer(config, group_id=config.named("changelog-reader"), enable_partition_eof=True)
        )
        self._places: dict[int, Place] = {}

    def close(self) -> None:
        """Leaves the broker."""
        self._consumer.close()

    def place(self, partition: int) -> Place:
        """What the local copy of a partition holds; a copy of another topic is wiped first."""
        found = self._local.place(partition)
        if found is not None and found.topic_id != self._topic_id:
            self._local.wipe(partition)
            found = None
        return found or Place(topic_id=self._topic_id, progress=Progress(partition=partition))

    def assign(self, partitions: Iterable[int]) -> None:
        """Reads these partitions from now on, each from where its local copy stands."""
        self._places = {partition: self.place(partition) for partition in partitions}
        self._consumer.assign([self._start(partition, place.changelog) for partition, place in self._places.items()])

    def _start(self, partition: int, offset: int) -> TopicPartition:
        """Where to read from. Raises Failure where the log ends before the local copy: it has lost what was committed."""
        try:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), timeout=30)
        except KafkaException as error:
            raise Failure(f"topic {self._topic}, partition {partition}: {error.args[0].str()}") from None
        if offset > high:
            raise Failure(
                f"topic {self._topic}, partition {partition} ends at {high}, but state {self._local.state} has read to {offset}"
                ": the cluster has lost records that it had confirmed. Empty the state folder to go on with what is left"
            )
        return TopicPartition(self._topic, partition, max(low, offset))

    def read(
        self,
        until: float | None = None,
        guard: Callable[[int], AbstractContextManager[bool]] = lambda partition: nullcontext(True),
    ) -> None:
        """Reads to the end of all assigned partitions, or until the monotonic time `until`, whatever comes first.

        Each local write happens within `guard(partition)`, and only if that gives True: a copy must not change while the
        partition is worked on.
        """
        left = set(self._places)
        stalled = time.monotonic() + self._config.stall_seconds
        while left:
            messages = self._consumer.consume(RECORDS, 0.05)
            now = time.monotonic()
            found: dict[int, list[Any]] = {}
            for message in messages:
                error = message.error()
                partition = message.partition() or 0
                if error is None:
                    found.setdefault(partition, []).append(message)
                elif error.code() == codes.END_OF_PARTITION:
                    left.discard(partition)
                elif error.code() not in codes.AWAY and not error.retriable():
                    raise Failure(
                        f"topic {self._topic}, partition {partition}: {error.str()}; `onerec topics` says what is wrong"
                    )
            for partition, part in found.items():
                with guard(partition) as allowed:
                    if allowed:
                        self._apply(partition, part)
            if found:
                stalled = now + self._config.stall_seconds
            if until is not None:
                if now >= until:
                    return
                left, stalled = set(self._places), now + 1
            if now > stalled:
                raise Failure(
                    f"topic {self._topic}: nothing read for {self._config.stall_seconds} s, {len(left)} partitions not at "
                    "their end; is the broker up?"
                )

    def _apply(self, partition: int, messages: list[Any]) -> None:
        place = self._places[partition]
        pairs: list[tuple[bytes, bytes | None]] = []
        for message in messages:
            key, value = message.key(), message.value()
            if key is None or value is None:
                continue
            if key == PROGRESS_KEY:
                place.progress = decode_progress(value, self._where(message))
            elif value == NOTHING:
                pairs.append((key, None))
            elif key[:1] in (b"b", b"l") and value[:1] == bytes((VERSION,)):
                pairs.append((key, value))
            else:
                raise Failure(
                    f"{self._where(message)}: a value of format {value[:1].hex() or 'none'}, this version reads {VERSION:02x}; "
                    "run the version that wrote it, or replay the raw topics into topics of a new kafka.prefix"
                )
        place.changelog = messages[-1].offset() + 1
        self._local.write(partition, pairs, place)

    def _where(self, message: Any) -> str:
        return f"topic {self._topic}, partition {message.partition()}, offset {message.offset()}"

