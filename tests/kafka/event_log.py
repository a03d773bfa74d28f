"""Packed, numbered messages straight into the topic `events`, in transactions, as `ingest` writes them."""

from __future__ import annotations

from collections.abc import Iterable

import orjson
from confluent_kafka import Producer

from streaming.kafka import settings, wire
from streaming.kafka.partitioning import partition_of
from streaming.kafka.settings import KafkaConfig


class EventLog:
    """The writer of one log. `pack` lines a message, `commit` messages a transaction."""

    def __init__(self, config: KafkaConfig, *, pack: int = 20, commit: int = 10) -> None:
        self._config, self._pack, self._commit = config, pack, commit
        self._numbers = [0] * config.partitions
        self._producer = Producer(settings.producer(config, transactional_id=config.named("event-log")))
        self._producer.init_transactions(180)

    def write(self, found: Iterable[bytes]) -> None:
        """Lines, each to its user's partition; broken ones to partition 0."""
        waiting: list[list[bytes]] = [[] for _ in self._numbers]
        messages: list[tuple[int, bytes]] = []
        for line in found:
            try:
                user_id = orjson.loads(line)["user_id"]
            except (orjson.JSONDecodeError, KeyError):
                user_id = None
            partition = partition_of(user_id, len(self._numbers), self._config.partitioner) if user_id else 0
            waiting[partition].append(line)
            if len(waiting[partition]) == self._pack:
                messages.append((partition, wire.pack(waiting[partition])))
                waiting[partition].clear()
        messages += [(partition, wire.pack(lines)) for partition, lines in enumerate(waiting) if lines]
        for i in range(0, len(messages), self._commit):
            self.send(messages[i : i + self._commit])

    def end(self) -> None:
        """An end marker into every partition."""
        self.send([(partition, wire.END) for partition in range(len(self._numbers))])

    def send(self, messages: Iterable[tuple[int, bytes]], *, skip: int = 0) -> None:
        """(partition, value) in one transaction; `skip` numbers are left out before them, as if messages had been lost."""
        self._producer.begin_transaction()
        for partition, value in messages:
            self._numbers[partition] += skip
            self._producer.produce(
                self._config.named("events"), value, None, partition=partition,
                headers=[(wire.NUMBER_HEADER, str(self._numbers[partition]).encode())],
            )
            self._numbers[partition] += 1
        self._producer.commit_transaction(180)
