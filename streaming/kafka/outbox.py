"""Messages gathered for a transaction and written in one, with records of `progress` that say what they were."""

from __future__ import annotations

import time
import types
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple, Self

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import OffsetSpec

from onerec.errors import Failure
from streaming.kafka import codes, settings
from streaming.kafka.progress import TOPIC as PROGRESS
from streaming.kafka.settings import MAX_MESSAGE_BYTES, KafkaConfig
from streaming.kafka.topics import admin, require

PACK_BYTES: Final = 256 << 10
"""Of a message of several lines; one longer line goes alone."""
CUT_BYTES: Final = MAX_MESSAGE_BYTES - (64 << 10)
"""What is kept of a line that no message can hold; it stays too long for a line (§1), and so a dead letter."""
TOUCHED: Final = ("watch", "interactions", "items", PROGRESS)
ATTEMPTS: Final = 5

Message = dict[str, Any]


class Gathered(NamedTuple):
    """One transaction: messages by topic, and records of `progress`."""

    messages: dict[str, list[Message]]
    records: Mapping[bytes, bytes]


class Outbox:
    """A transactional producer that writes whole transactions, one in flight while the next is gathered.

    `pack` lines of one partition go into one message. Opening it fences whoever used the transactional id before, and ends what
    he had begun. Raises UserError as `topics.require`, Failure where no transaction can be begun.
    """

    def __init__(self, config: KafkaConfig, transactional_id: str, pack: int = 1) -> None:
        self._config = config
        self._pack = pack
        require(config, TOUCHED)
        self._producer = Producer(settings.producer(config, transactional_id=config.named(transactional_id)))
        self._fresh()
        self._flying: Future[None] | None = None
        try:
            self._producer.init_transactions(60.0)
        except KafkaException as error:
            raise self._failure("no transaction can be begun", error) from None
        self._thread = ThreadPoolExecutor(1, "outbox")

    def _fresh(self) -> None:
        self.lines = 0
        self.bytes = 0
        self._singles: dict[str, list[Message]] = {}
        self._packs: dict[tuple[str, int], list[bytes]] = {}

    def put(self, topic: str, partition: int, key: str | None, line: bytes) -> None:
        """A line of the next transaction. `topic` is without prefix; the key stays with messages of one line only."""
        self.lines += 1
        self.bytes += len(line)
        if len(line) > CUT_BYTES:
            line = line[:CUT_BYTES]
        if self._pack > 1:
            lines = self._packs.get((topic, partition))
            if lines is None:
                self._packs[topic, partition] = [line]
            else:
                lines.append(line)
        else:
            messages = self._singles.get(topic)
            if messages is None:
                messages = self._singles[topic] = []
            messages.append({"value": line, "key": key, "partition": partition})

    def put_everywhere(self, topics: tuple[str, ...], value: bytes) -> None:
        """A message of its own into every partition of the topics, after the lines gathered so far."""
        self._close_packs()
        for topic in topics:
            self._singles.setdefault(topic, []).extend(
                {"value": value, "partition": partition} for partition in range(self._config.partitions)
            )

    def _close_packs(self) -> None:
        for (topic, partition), lines in self._packs.items():
            self._singles.setdefault(topic, []).extend(
                {"value": value, "partition": partition} for value in packed(lines, self._pack)
            )
        self._packs = {}

    def commit(self, records: Mapping[bytes, bytes]) -> None:
        """Writes what was gathered and `records` of `progress` in one transaction; returns while it is on its way.

        Raises what became of the transaction before: Failure where Kafka refused it, or another process took over.
        """
        self._close_packs()
        gathered = Gathered(self._singles, records)
        self._fresh()
        self.settle()
        self._flying = self._thread.submit(self._write, gathered)

    def settle(self) -> None:
        """Waits for the transaction on its way; raises as `commit` does."""
        flying, self._flying = self._flying, None
        if flying is not None:
            flying.result()

    def _write(self, gathered: Gathered) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._producer.begin_transaction()
                self._send(gathered)
                self._end(gathered)
                return
            except KafkaException as error:
                code: KafkaError = error.args[0]
                if code.code() in codes.FENCED:
                    raise Failure(
                        "another `onerec produce` of the same files has taken over; let it finish, nothing is lost or doubled"
                    ) from None
                if not code.txn_requires_abort() or attempt == ATTEMPTS:
                    raise self._failure("the transaction failed", error) from None
                self._producer.abort_transaction(60.0)

    def _send(self, gathered: Gathered) -> None:
        for topic, messages in gathered.messages.items():
            name = self._config.named(topic)
            sent = self._producer.produce_batch(name, messages)
            # A queue too small would let later messages overtake refused ones; it holds many transactions, so this is a fault.
            if sent != len(messages):
                error = next((message["_error"] for message in messages if "_error" in message), "unknown")
                raise Failure(f"topic {name}: {len(messages) - sent:,} messages were not taken by the client: {error}")
        for key, value in gathered.records.items():
            self._producer.produce(self._config.named(PROGRESS), value, key, partition=0)

    def _end(self, gathered: Gathered) -> None:
        while True:
            try:
                return self._producer.commit_transaction(60.0)
            except KafkaException as error:
                if not error.args[0].retriable():
                    raise

    def _failure(self, what: str, error: KafkaException) -> Failure:
        said = error.args[0].str()
        return Failure(f"Kafka at {self._config.bootstrap}: {what}: {said}; the same command goes on from what is committed")

    def close(self) -> None:
        """Gives up what is not committed."""
        self._thread.shutdown(wait=True)
        self._producer.purge()
        self._producer.poll(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


def packed(lines: list[bytes], pack: int) -> list[bytes]:
    """Lines → messages of at most `pack` lines and PACK_BYTES."""
    messages: list[bytes] = []
    for i in range(0, len(lines), pack):
        part = lines[i : i + pack]
        if sum(map(len, part)) + len(part) <= PACK_BYTES:
            messages.append(b"\n".join(part))
            continue
        begin, size = 0, 0
        for end, line in enumerate(part):
            if size and size + len(line) > PACK_BYTES:
                messages.append(b"\n".join(part[begin:end]))
                begin, size = end, 0
            size += len(line) + 1
        messages.append(b"\n".join(part[begin:]))
    return messages


def wait_decided(config: KafkaConfig) -> None:
    """Waits until every transaction now open in `progress` is committed or aborted, so that reading it misses none.

    One that a killed process left is aborted by the broker after kafka.transaction_timeout_ms. Raises Failure beyond that.
    """
    asked = admin(config)
    where = TopicPartition(config.named(PROGRESS), 0)
    deadline = time.monotonic() + config.transaction_timeout_ms / 1000 + 30

    def end(level: IsolationLevel) -> int:
        while True:
            future = asked.list_offsets({where: OffsetSpec.latest()}, isolation_level=level, request_timeout=10.0)[where]
            try:
                return int(future.result().offset)
            except KafkaException as error:
                # A topic just made has no leader for a moment.
                if error.args[0].code() not in codes.AWAY or time.monotonic() > deadline:
                    raise Failure(f"topic {where.topic}: {error.args[0].str()}; look at the broker's log") from None
            time.sleep(0.1)

    wanted = end(IsolationLevel.READ_UNCOMMITTED)
    while end(IsolationLevel.READ_COMMITTED) < wanted:
        if time.monotonic() > deadline:
            raise Failure(f"topic {where.topic}: a transaction stays open beyond its timeout; what holds it?")
        time.sleep(0.1)
