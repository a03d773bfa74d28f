"""Messages gathered for a transaction and written in one, with records of `progress` that say what they were."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, NamedTuple

from confluent_kafka import IsolationLevel, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import OffsetSpec

from onerec.closing import Closing
from onerec.errors import Failure
from streaming.kafka import codes, settings
from streaming.kafka.progress import TOPIC as PROGRESS
from streaming.kafka.settings import MAX_MESSAGE_BYTES, TOPICS, KafkaConfig
from streaming.kafka.topics import admin, require
from streaming.kafka.wire import Headers

PACK_BYTES: Final = 256 << 10
"""Of a message of several lines; one longer line goes alone."""
CUT_BYTES: Final = MAX_MESSAGE_BYTES - (64 << 10)
"""What is kept of a line that no message can hold; it stays too long for a line (§1), and so a dead letter."""
RAW: Final = ("watch", "interactions", "items")
ATTEMPTS: Final = 5
CALL_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 30.0

Placed = dict[str, list[list[dict[str, Any]]]]
"""Messages, as the client takes them in batches, by topic and partition."""


class Gathered(NamedTuple):
    """One transaction: messages by topic and partition, those with headers (topic, value, headers), records of `progress`."""

    messages: Placed
    apart: list[tuple[str, bytes, Headers]]
    records: Mapping[bytes, bytes]


class Outbox(Closing):
    """A transactional producer that writes whole transactions, one in flight while the next is gathered.

    `pack` lines of one partition go into one message; `topics` are needed beside the raw ones. Opening it fences whoever used
    the transactional id before, and ends what he had begun. Raises UserError as `topics.require`, Failure where no transaction
    can be begun.
    """

    def __init__(self, config: KafkaConfig, transactional_id: str, pack: int = 1, *, topics: Sequence[str] = ()) -> None:
        self._config = config
        self._pack = pack
        require(config, (*RAW, PROGRESS, *topics))
        self._producer = Producer(settings.producer(config, transactional_id=config.named(transactional_id)))
        self._fresh()
        self._flying: Future[None] | None = None
        self._leaving = False
        try:
            self._producer.init_transactions(60.0)
        except KafkaException as error:
            raise self._failure("no transaction can be begun", error) from None
        self._thread = ThreadPoolExecutor(1, "outbox")

    def _fresh(self) -> None:
        self.lines = 0
        self.bytes = 0
        self._messages: Placed = {topic: [[] for _ in range(self._config.partitions)] for topic in RAW}
        self._apart: list[tuple[str, bytes, Headers]] = []
        self._packs: dict[str, list[list[bytes]]] = {topic: [[] for _ in range(self._config.partitions)] for topic in RAW}

    def put(self, topic: str, partition: int, key: str | None, line: bytes) -> None:
        """A line of the next transaction. `topic` is one of RAW; the key stays with messages of one line only."""
        self.lines += 1
        self.bytes += len(line)
        if len(line) > CUT_BYTES:
            line = line[:CUT_BYTES]
        if self._pack > 1:
            self._packs[topic][partition].append(line)
        else:
            self._messages[topic][partition].append({"value": line, "key": key})

    def put_apart(self, topic: str, value: bytes, headers: Headers) -> None:
        """A message with headers, into the only partition of another topic."""
        self.lines += 1
        self._apart.append((topic, value, headers))

    def put_everywhere(self, value: bytes) -> None:
        """A message of its own into every partition of the raw topics, after the lines gathered so far."""
        self._close_packs()
        for partitions in self._messages.values():
            for messages in partitions:
                messages.append({"value": value})

    def _close_packs(self) -> None:
        for topic, partitions in self._packs.items():
            for partition, lines in enumerate(partitions):
                if lines:
                    self._messages[topic][partition] += [{"value": value} for value in packed(lines, self._pack)]
                    partitions[partition] = []

    def commit(self, records: Mapping[bytes, bytes]) -> None:
        """Writes what was gathered and `records` of `progress` in one transaction; returns while it is on its way.

        Raises what became of the transaction before: Failure where Kafka refused it, or another process took over.
        """
        self._close_packs()
        gathered = Gathered(self._messages, self._apart, records)
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
                self._patiently(self._producer.commit_transaction)
                return
            except KafkaException as error:
                if not error.args[0].txn_requires_abort() or attempt == ATTEMPTS:
                    raise self._failure("the transaction failed", error) from None
            try:
                self._patiently(self._producer.abort_transaction)
            except KafkaException as error:
                raise self._failure("the transaction failed and cannot be aborted", error) from None

    def _patiently(self, end: Callable[[float], None]) -> None:
        """Commits or aborts, however long the broker is away, unless we are asked to leave."""
        while True:
            try:
                return end(CALL_SECONDS)
            except KafkaException as error:
                if not error.args[0].retriable() or self._leaving:
                    raise

    def _send(self, gathered: Gathered) -> None:
        for topic, partitions in gathered.messages.items():
            name = self._config.named(topic)
            for partition, messages in enumerate(partitions):
                # The client heeds the partition of a batch only, not that of a message in it.
                sent = self._producer.produce_batch(name, messages, partition) if messages else 0
                # A queue too small would let later messages overtake refused ones; it holds many transactions: a fault.
                if sent != len(messages):
                    error = next((message["_error"] for message in messages if "_error" in message), "unknown")
                    raise Failure(f"topic {name}: {len(messages) - sent:,} messages were not taken by the client: {error}")
        for topic, value, headers in gathered.apart:
            self._producer.produce(self._config.named(topic), value, partition=0, headers=[*headers])
        for key, value in gathered.records.items():
            self._producer.produce(self._config.named(PROGRESS), value, key, partition=0)

    def _failure(self, what: str, error: KafkaException) -> Failure:
        if error.args[0].code() in codes.FENCED:
            return Failure(
                "another run of the same command has taken over, or this one stood still for longer than "
                "kafka.transaction_timeout_ms; run it again, nothing is lost or doubled"
            )
        said = error.args[0].str()
        return Failure(f"Kafka at {self._config.bootstrap}: {what}: {said}; the same command goes on from what is committed")

    def close(self) -> None:
        """Gives up what is not committed, after at most a few seconds."""
        self._leaving = True
        self._thread.shutdown(wait=True)
        self._producer.purge()
        # What cannot be aborted from here, the next one's fence or the broker aborts.
        with warnings.catch_warnings(), suppress(KafkaException):
            warnings.simplefilter("ignore", RuntimeWarning)
            self._producer.close()


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


class Decisions:
    """Whether transactions are still open in some topics: a commit is answered before its markers are in the topics."""

    def __init__(self, config: KafkaConfig, names: Sequence[str]) -> None:
        self._admin = admin(config)
        self._names = names
        self._parts = [
            TopicPartition(config.named(name), partition)
            for name in names for partition in range(config.partitions if TOPICS[name].by_user else 1)
        ]

    def ends(self, level: IsolationLevel) -> list[int]:
        """The end of every partition. Raises Failure where the broker does not say for `ANSWER_SECONDS`."""
        patience = time.monotonic() + ANSWER_SECONDS
        while True:
            wanted = {part: OffsetSpec.latest() for part in self._parts}
            found = self._admin.list_offsets(wanted, isolation_level=level, request_timeout=10.0)
            try:
                return [int(found[part].result().offset) for part in self._parts]
            except KafkaException as error:
                # A topic just made, or a broker just back, has no leader or another one for a moment.
                if time.monotonic() > patience:
                    raise Failure(
                        f"topics {', '.join(self._names)}: {error.args[0].str()}; look at the broker's log"
                    ) from None
            time.sleep(0.1)

    def pending(self) -> bool:
        """Whether anything is written that is neither committed nor aborted."""
        committed = self.ends(IsolationLevel.READ_COMMITTED)
        return any(map(int.__lt__, committed, self.ends(IsolationLevel.READ_UNCOMMITTED)))


def wait_decided(config: KafkaConfig, names: Sequence[str] = (PROGRESS,)) -> None:
    """Waits until every transaction now open in these topics is committed or aborted, so that reading them misses none.

    One that a killed process left open is aborted by the broker after kafka.transaction_timeout_ms. Raises Failure beyond.
    """
    asked = Decisions(config, names)
    deadline = time.monotonic() + config.transaction_timeout_ms / 1000 + 30
    wanted = asked.ends(IsolationLevel.READ_UNCOMMITTED)
    while any(map(int.__lt__, asked.ends(IsolationLevel.READ_COMMITTED), wanted)):
        if time.monotonic() > deadline:
            raise Failure(f"topics {', '.join(names)}: a transaction stays open beyond its timeout; look at the broker's log")
        time.sleep(0.02)
