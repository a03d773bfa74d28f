"""One partition of `ingest`: what was read, merged and gathered, and the transactions that write it, one in flight."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import msgspec
import orjson
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from onerec.errors import Failure
from streaming.kafka import codes, settings
from streaming.kafka.merging import Aside, Batch, Merger, Position, Rules, Source, Taken
from streaming.kafka.outbox import CUT_BYTES, packed
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import END, NUMBER_HEADER, time_marker

RAW: Final = ("watch", "interactions", "items")
PACK_LINES: Final = 200
ROOM: Final = 20_000
"""Lines gathered for a transaction, about; with as many in flight."""
ROOM_ASIDES: Final = 20_000
MARK_SECONDS: Final = 1.0
"""Between two time markers of a partition at least."""
CALL_SECONDS: Final = 5.0
DELIVERY_MS: Final = 15_000
"""A message not taken in this time fails its transaction, which is made anew: seen to hang after a broker had stood still."""
AGAIN_HEADER: Final = "moved"
"""On a raw message that `ingest` has put into the right partition: the topic:partition:offset:line it came from."""

Step = Callable[[str, int], None]


class Standing(msgspec.Struct, kw_only=True):
    """What the offset of watch[p] carries beside itself: where `events` of the partition stands.

    `number` is the next message's, `newest` the newest event time or marker written, `ended` as in Merger, `closed` whether
    the last message written is an end marker. `lines` of the next raw message are done with.
    """

    lines: int = 0
    number: int = 0
    newest: int | None = None
    ended: tuple[bool, bool] = (False, False)
    closed: bool = False


class Counts(msgspec.Struct):
    """What was written in committed transactions; `empty` counts raw messages without a byte, `reasons` dead letters."""

    events: int = 0
    dead_letters: int = 0
    rerouted: int = 0
    items: int = 0
    markers: int = 0
    empty: int = 0
    reasons: Counter[str] = msgspec.field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Sums up."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Lost(Exception):
    """The partition's transaction did not go through; `theirs` where another instance has the partition now."""

    def __init__(self, partition: int, theirs: bool, reason: str) -> None:
        super().__init__(reason)
        self.partition = partition
        self.theirs = theirs


class Lane:
    """Validated, merged and written: one partition. Not thread-safe; its commits run on the pool."""

    def __init__(
        self,
        config: KafkaConfig,
        rules: Rules,
        producer: Producer,
        positions: Sequence[Position],
        standing: Standing,
        on_step: Step,
    ) -> None:
        self.partition = rules.partition
        self.newest = standing.newest
        self.closed = standing.closed
        self.merger = Merger(positions[:2], standing.ended)
        self.items = Source("items", positions[2])
        self.sources = (*self.merger.sources, self.items)
        self.since: list[float | None] = [None, None, None]
        """Monotonic time since which there has been nothing to read, by source; None while there may be."""
        self.arrived_at = 0.0
        """Monotonic time of the newest messages read; `burst_at`: of the first since all was taken."""
        self.burst_at: float | None = None
        self.marked_at = 0.0
        self.ends = [-1, -1, -1]
        """Offset of the end, by source, when it was last reached."""
        self.gathered_at: float | None = None
        self._config = config
        self._on_step = on_step
        self._producer = producer
        self._rules = rules
        self._item_rules = rules._replace(partition=-1)
        self._number = standing.number
        self._written = [source.position() for source in self.sources]
        self._future: Future[Counts] | None = None
        self._given_up = False
        self._fresh()

    def _fresh(self) -> None:
        self._messages: list[tuple[bytes, int]] = []
        self._lines: list[bytes] = []
        self._stamp = 0
        self._asides: list[Aside] = []
        self._counts = Counts()
        self.gathered_at = None

    @property
    def in_flight(self) -> bool:
        """Whether a transaction is on its way."""
        return self._future is not None

    @property
    def busy(self) -> bool:
        """Whether a transaction is in flight or something is gathered for one."""
        return self._future is not None or self.gathered_at is not None

    @property
    def empty(self) -> bool:
        """Whether all that was read has been written."""
        return not self.busy and self.merger.empty and self.items.empty

    def add(self, source: int, messages: list[Any]) -> None:
        """Raw messages, as read."""
        self.sources[source].add(messages, self._rules if source < 2 else self._item_rules)
        self._counts.empty += sum(not message.value for message in messages)

    def gather(self, now: float, idle: Sequence[bool]) -> None:
        """Takes what is due, up to a transaction's size."""
        while self._counts.events < ROOM and len(self._asides) < ROOM_ASIDES:
            taken = self.merger.take(ROOM - self._counts.events, idle)
            if not self._keep(taken):
                break
        self._gather_items()
        if self.gathered_at is None and (
            self._lines or self._messages or self._asides or any(
                source.position() != written for source, written in zip(self.sources, self._written, strict=True)
            )
        ):
            self.gathered_at = now

    def _keep(self, taken: Taken) -> bool:
        self._asides += taken.asides
        if taken.lines:
            closed = self.closed
            self._lines += taken.lines
            self._counts.events += len(taken.lines)
            self._stamp = max(self._stamp, taken.stamp)
            self.newest = max(self.newest or 0, taken.newest)
            self.closed = False
            if closed and taken.again and not taken.end:
                # Lines put right by another partition may come behind the end marker: it holds for them too.
                self._close()
        if taken.end:
            self._close()
        return bool(taken.lines or taken.end)

    def _close(self) -> None:
        self._pack()
        self._messages.append((END, self._stamp))
        self.closed = True

    def _gather_items(self) -> None:
        while len(self._asides) < ROOM_ASIDES:
            head = self.items.head(self._asides)
            if head is None:
                return
            if isinstance(head, Batch):
                raise AssertionError("an event of no partition")
            self.items.pass_end()

    def _pack(self) -> None:
        self._messages += [(value, self._stamp) for value in packed(self._lines, PACK_LINES)]
        self._lines = []

    def mark(self, ts: int, now: float) -> None:
        """Puts a time marker into the quiet partition, if it moves time on there."""
        if self.closed or (self.newest is not None and ts <= self.newest) or now - self.marked_at < MARK_SECONDS:
            return
        self._pack()
        self._messages.append((time_marker(ts), self._stamp))
        self._counts.markers += 1
        self.newest, self.marked_at = ts, now
        if self.gathered_at is None:
            self.gathered_at = now

    def due(self, now: float) -> bool:
        """Whether what is gathered should be written now."""
        if self.gathered_at is None or self._future is not None:
            return False
        full = self._counts.events >= ROOM or len(self._asides) >= ROOM_ASIDES
        return full or now - self.gathered_at >= self._config.linger_ms / 1000

    def flush(self, pool: ThreadPoolExecutor, group: Any) -> None:
        """Begins a transaction of all that is gathered; it is committed on the pool. Raises Lost."""
        self._pack()
        counts, messages, asides = self._counts, self._messages, self._asides
        self._fresh()
        try:
            self._on_step("begin", self.partition)
            self._producer.begin_transaction()
            self._on_step("produce", self.partition)
            self._send(messages)
            for aside in asides:
                self._send_aside(aside, counts)
        except KafkaException as error:
            raise self._lost(error.args[0]) from None
        self._written = [source.position() for source in self.sources]
        standing = Standing(
            lines=self._written[0].lines, number=self._number, newest=self.newest,
            ended=(self.merger.ended[0], self.merger.ended[1]), closed=self.closed,
        )
        self._future = pool.submit(self._commit, offsets(self._config, self.partition, self._written, standing), group, counts)

    def _send(self, messages: list[tuple[bytes, int]]) -> None:
        topic, partition, now = self._config.named("events"), self.partition, int(time.time() * 1000)
        for value, stamp in messages:
            # Never older than the raw records: validity is decided once more where it is read, by this time.
            self._produce(
                topic, value, partition=partition, timestamp=max(now, stamp), headers=[(NUMBER_HEADER, b"%d" % self._number)]
            )
            self._number += 1

    def _send_aside(self, aside: Aside, counts: Counts) -> None:
        source = b"%s:%d:%d:%d" % (aside.topic.encode(), self.partition, aside.offset, aside.number)
        named, owner = self._config.named, self._rules.owner
        if aside.kind == "refused":
            headers = [("source", source), ("reason", aside.detail.encode())]
            self._produce(named("dead-letters"), aside.raw[:CUT_BYTES], partition=0, headers=headers)
            counts.dead_letters += 1
            counts.reasons[aside.detail] += 1
        elif aside.kind == "item":
            self._produce(named("catalogue"), aside.raw, key=aside.detail, partition=owner(aside.detail))
            counts.items += 1
        else:
            topic = aside.topic if aside.topic != "items" else _topic_of(aside.raw)
            self._produce(
                named(topic), aside.raw, key=aside.detail, partition=owner(aside.detail), timestamp=aside.timestamp,
                headers=[(AGAIN_HEADER, source)],
            )
            counts.rerouted += 1

    def _produce(self, topic: str, value: bytes, **named: Any) -> None:
        while True:
            try:
                return self._producer.produce(topic, value, **named)
            except BufferError:
                self._producer.poll(0.1)

    def _commit(self, places: list[TopicPartition], group: Any, counts: Counts) -> Counts:
        """Ends the transaction, however long the broker is away; Lost says that nothing of it has happened, or who knows."""
        self._on_step("offsets", self.partition)
        try:
            self._retried(lambda: self._producer.send_offsets_to_transaction(places, group, CALL_SECONDS))
            self._on_step("commit", self.partition)
            self._retried(lambda: self._producer.commit_transaction(CALL_SECONDS))
        except KafkaException as error:
            code: KafkaError = error.args[0]
            if code.txn_requires_abort():
                try:
                    self._retried(lambda: self._producer.abort_transaction(CALL_SECONDS))
                except KafkaException as again:
                    raise self._lost(again.args[0]) from None
            raise self._lost(code) from None
        return counts

    def _retried(self, call: Callable[[], None]) -> None:
        while True:
            try:
                return call()
            except KafkaException as error:
                if self._given_up or not error.args[0].retriable():
                    raise

    def give_up(self) -> None:
        """Makes a transaction in flight end soon, one way or the other, even while the broker is away."""
        self._given_up = True

    def _lost(self, error: KafkaError) -> Lost:
        return Lost(self.partition, error.code() in THEIRS, error.str())

    def settled(self, seconds: float | None = None) -> Counts | None:
        """What the transaction in flight has written, once it is done; None before. Raises Lost."""
        future = self._future
        if future is None or (seconds is None and not future.done()):
            return None
        try:
            counts = future.result(seconds)
        except TimeoutError:
            return None
        self._future = None
        return counts


THEIRS: Final = (
    *codes.FENCED, KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID,
    KafkaError.STALE_MEMBER_EPOCH,
)
"""Another instance owns the partition now, or may."""


def _topic_of(raw: bytes) -> str:
    """The raw topic of an event that was found among the items."""
    try:
        kind = orjson.loads(raw).get("type")
    except orjson.JSONDecodeError:
        return "watch"
    return "watch" if kind == "watch" else "interactions"


def offsets(config: KafkaConfig, partition: int, positions: Sequence[Position], standing: Standing) -> list[TopicPartition]:
    """What a transaction commits for the group: next offsets, and in their metadata what goes with them."""
    metadata = [msgspec.json.encode(standing)] + [msgspec.json.encode({"lines": at.lines}) for at in positions[1:]]
    return [
        TopicPartition(config.named(topic), partition, at.offset, metadata=text.decode())
        for topic, at, text in zip(RAW, positions, metadata, strict=True)
    ]


def stood(config: KafkaConfig, partition: int, committed: Sequence[TopicPartition]) -> tuple[list[Position], Standing]:
    """Inverse of `offsets`. Raises Failure where another program has written the group's offsets."""
    try:
        standing = msgspec.json.decode(committed[0].metadata or "", type=Standing)
        lines = [msgspec.json.decode(place.metadata or "", type=dict[str, Any])["lines"] for place in committed]
    except (msgspec.MsgspecError, KeyError):
        raise Failure(
            f"group {config.named('ingest')}: the offsets of partition {partition} were written by another program; `ingest` "
            "keeps more than a number in them. Read the raw topics again into topics of a new kafka.prefix"
        ) from None
    return [Position(place.offset, taken) for place, taken in zip(committed, lines, strict=True)], standing


def made(config: KafkaConfig, partition: int, on_step: Step, error_cb: Callable[[Any], None]) -> Producer:
    """The partition's producer; whoever had it before is fenced and what he had begun is aborted."""
    on_step("open:fence", partition)
    producer = Producer(
        settings.producer(
            config,
            transactional_id=config.named(f"ingest-{partition}"),
            message_timeout_ms=min(DELIVERY_MS, config.transaction_timeout_ms),
        )
        | {"error_cb": error_cb}
    )
    producer.init_transactions(10.0)
    return producer
