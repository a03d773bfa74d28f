"""The sampler's side of Kafka: a share of `sessions` in, records of `preference-pairs` out, each session exactly once.

Members of the group `sampler-<run>` share the partitions of `sessions`. What is written of a session and the offset behind
it are one transaction, so that a member may die anywhere: whoever gets its partitions goes on from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import msgspec
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from onerec.closing import Closing
from onerec.errors import Failure
from streaming.kafka import codes, settings
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Bounds
from streaming.kafka.topics import require

TOPIC: Final = "preference-pairs"
RUN_HEADER: Final = "run"
READ: Final = 500
POLL_INTERVAL_MS: Final = 300_000
"""Between two looks at the group: a batch of searches on a slow machine and a broker that is away have to fit."""
CALL_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 10.0


class Sampled(NamedTuple):
    """A session of the sampled share; `place` is its number within the partition, 1, 2, 3 …"""

    session_id: str
    end: int
    history: list[str]
    partition: int
    place: int
    offset: int


class _Session(msgspec.Struct):
    """What a sampler asks of a message of `sessions`."""

    session_id: str
    end: int
    history: list[str]
    high_quality: bool
    position: tuple[int, int]


_decode = msgspec.json.Decoder(_Session).decode


class SampleStream(Closing):
    """A member of the group that samples for one run.

    `member` names the transactional id: one that was killed is fenced by the next of its name, instead of holding readers
    up until its transaction times out. `wanted` says which session ids are sampled. Raises UserError as `topics.require`,
    Failure where Kafka refuses or another process has the same name.
    """

    def __init__(
        self,
        config: KafkaConfig,
        run: str,
        member: str,
        wanted: Callable[[str], bool],
        *,
        hold: int,
        say: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        require(config, ["sessions", TOPIC])
        self._config, self._run, self._wanted, self._hold = config, run, wanted, hold
        self._say, self._stopped = say, stopped
        self._sessions, self._pairs = config.named("sessions"), config.named(TOPIC)
        self._waiting: dict[int, deque[Sampled]] = {}
        self._scanned: dict[int, int | None] = {}
        self._paused = False
        self.refused = 0
        self._producer = Producer(
            settings.producer(config, transactional_id=config.named(f"sampler-{run}-{member}"))
        )
        try:
            self._producer.init_transactions(60.0)
        except KafkaException as error:
            raise self._failure("no transaction can be begun", error) from None
        self._consumer = Consumer(
            settings.member(
                config, config.named(f"sampler-{run}"),
                max_poll_interval_ms=max(POLL_INTERVAL_MS, config.session_timeout_ms),
            )
        )
        self._consumer.subscribe(
            [self._sessions], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked
        )

    @property
    def partitions(self) -> list[int]:
        """Those that this member has."""
        return sorted(self._scanned)

    def _assigned(self, consumer: Any, places: list[TopicPartition]) -> None:
        """Goes to where the group stands, which the client asks the broker for by itself."""
        for place in places:
            self._waiting[place.partition] = deque()
            self._scanned[place.partition] = None
        consumer.incremental_assign([TopicPartition(self._sessions, place.partition) for place in places])
        if self._paused:
            consumer.pause(places)

    def _revoked(self, consumer: Any, places: list[TopicPartition]) -> None:
        """Forgets what is not written: whoever gets the partition reads it again."""
        for place in places:
            self._waiting.pop(place.partition, None)
            self._scanned.pop(place.partition, None)
        consumer.incremental_unassign(places)

    def read(self, seconds: float) -> int:
        """Reads on, unless more than `hold` sampled sessions wait already; how many messages there were."""
        waiting = sum(map(len, self._waiting.values()))
        if self._scanned and self._paused != (waiting >= self._hold):
            places = [TopicPartition(self._sessions, partition) for partition in self._scanned]
            (self._consumer.resume if self._paused else self._consumer.pause)(places)
            self._paused = not self._paused
        messages = self._consumer.consume(READ, seconds)
        for message in messages:
            error = message.error()
            if error is not None:
                self._note(message, error)
            elif message.partition() in self._scanned:
                self._take(message)
        return len(messages)

    def _take(self, message: Any) -> None:
        partition, offset = message.partition(), message.offset()
        self._scanned[partition] = offset + 1
        try:
            found = _decode(message.value() or b"")
        except msgspec.MsgspecError as error:
            self.refused += 1
            self._say(f"topic {self._sessions}, partition {partition}, offset {offset}: left out, no session ({error})")
            return
        if found.high_quality and self._wanted(found.session_id):
            self._waiting[partition].append(
                Sampled(found.session_id, found.end, found.history, partition, found.position[1], offset)
            )

    def _note(self, message: Any, error: Any) -> None:
        if error.code() == codes.FORGOTTEN:
            # The group has no place there yet, or one that Kafka does not have any more.
            partition = message.partition()
            low = self._bounds(self._sessions, partition).low
            if low:
                self._say(
                    f"topic {self._sessions}, partition {partition}: begun at offset {low}; what was before is no longer in "
                    "Kafka, its sessions give no pairs"
                )
            self._consumer.incremental_unassign([TopicPartition(self._sessions, partition)])
            self._consumer.incremental_assign([TopicPartition(self._sessions, partition, low)])
        elif error.fatal() or error.code() in codes.NO_TOPIC:
            raise Failure(f"topic {self._sessions}: {error.str()}; `onerec topics` says what is wrong")

    def due(self, until: int | None) -> int:
        """How many sampled sessions ended by `until` (ms), with all before them in their partition."""
        return len(self.next(until, None))

    def next(self, until: int | None, count: int | None) -> list[Sampled]:
        """The first `count` of those by their end, without taking them away; the order of each partition is kept."""
        if until is None:
            return []
        heads = {partition: iter(waiting) for partition, waiting in self._waiting.items()}
        first = {partition: next(rest, None) for partition, rest in heads.items()}
        found: list[Sampled] = []
        while count is None or len(found) < count:
            ready = [head for head in first.values() if head is not None and head.end <= until]
            if not ready:
                break
            best = min(ready, key=lambda head: (head.end, head.session_id))
            found.append(best)
            first[best.partition] = next(heads[best.partition], None)
        return found

    def commit(self, sampled: Sequence[Sampled], values: Sequence[bytes]) -> bool:
        """Writes one value a session and the offsets behind them, all or nothing; False where the group has moved on.

        `sampled` are what `next` gave since the last `read`. Where nothing was written, they wait as before, or are another's.
        """
        try:
            self._producer.begin_transaction()
            for session, value in zip(sampled, values, strict=True):
                self._producer.produce(
                    self._pairs, value, session.session_id.encode(), partition=0, headers=[(RUN_HEADER, self._run.encode())]
                )
            self._patiently(lambda: self._producer.send_offsets_to_transaction(
                self._offsets(sampled), self._consumer.consumer_group_metadata(), CALL_SECONDS
            ))
            self._patiently(lambda: self._producer.commit_transaction(CALL_SECONDS))
        except KafkaException as error:
            if not error.args[0].txn_requires_abort():
                raise self._failure("the transaction failed", error) from None
            try:
                self._patiently(lambda: self._producer.abort_transaction(CALL_SECONDS))
            except KafkaException as again:
                raise self._failure("the transaction failed and cannot be aborted", again) from None
            return False
        for session in sampled:
            self._waiting[session.partition].popleft()
        return True

    def _offsets(self, sampled: Sequence[Sampled]) -> list[TopicPartition]:
        """Where each partition is to be gone on from once these are written: its next one that waits, or what is not read."""
        taken = {(session.partition, session.offset) for session in sampled}
        return [
            TopicPartition(
                self._sessions, partition,
                next((s.offset for s in self._waiting[partition] if (partition, s.offset) not in taken), scanned),
            )
            for partition, scanned in self._scanned.items() if scanned is not None
        ]

    def _patiently(self, call: Callable[[], Any]) -> None:
        """However long the broker is away, unless we are asked to leave."""
        while True:
            try:
                call()
                return
            except KafkaException as error:
                if not error.args[0].retriable() or self._stopped():
                    raise

    def written(self) -> int:
        """Where `preference-pairs` ends now."""
        return self._bounds(self._pairs, 0).high

    def _bounds(self, topic: str, partition: int) -> Bounds:
        try:
            return Bounds(*self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=ANSWER_SECONDS))
        except KafkaException as error:
            raise self._failure(f"topic {topic}", error) from None

    def _failure(self, what: str, error: KafkaException) -> Failure:
        if error.args[0].code() in codes.FENCED:
            return Failure(
                "another sampler of the same name has taken over, or this one stood still for longer than "
                "kafka.transaction_timeout_ms; start it again, nothing is lost or doubled"
            )
        return Failure(
            f"Kafka at {self._config.bootstrap}: {what}: {error.args[0].str()}; the same command goes on from what is committed"
        )

    def close(self) -> None:
        """Leaves the group; what is not committed is another's."""
        self._consumer.close()
        with suppress(KafkaException):
            self._producer.purge()
