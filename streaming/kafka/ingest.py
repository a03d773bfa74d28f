"""Raw topics → validated, packed `events`, each valid line exactly once: the group around the lanes (SEMANTICS.md §1, §3).

Every partition is a lane with a transactional producer of its own. Where a lane stands in its three raw topics goes into the
transaction that writes its output, so a process may die anywhere. What only the clock can decide, that a source has nothing to
read for long enough to be left out, and when a quiet partition gets a time marker, is decided here and nowhere after.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from onerec.config import Config
from onerec.errors import Failure, OneRecError, UserError
from streaming.kafka import codes, settings, topics
from streaming.kafka.lane import (
    AGAIN_HEADER,
    RAW,
    THEIRS,
    Counts,
    Lane,
    Lost,
    Standing,
    Step,
    made,
    offsets,
    stood,
)
from streaming.kafka.merging import Position, Raw, Rules
from streaming.kafka.outbox import Decisions, wait_decided
from streaming.kafka.partitioning import Partitioner
from streaming.kafka.schemas import Schemas

NAMES: Final = (*RAW, "events", "dead-letters", "catalogue")
FULL_BYTES: Final = 8 << 20
"""Of memory that a source of a partition may hold; beyond it is paused, and below a quarter read on."""
TICK_SECONDS: Final = 0.01
GRACE_SECONDS: Final = 0.25
"""Several answers of the broker (fetch.wait.max.ms) long: what is on its way to a quiet source shows in one of them."""
READ_LINES: Final = 20_000
MOST_MESSAGES: Final = 10_000
REJOIN_MS: Final = 60_000
ANSWER_SECONDS: Final = 10.0
REFUSED: Final = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
)
GRANTS: Final = "grant this user group, topics and transactional ids that begin with {0!r}"
SETTLE_SECONDS: Final = 2.0
"""How long a transaction in flight may take once its partition is to be given away."""


class Lag(NamedTuple):
    """What is left of a partition of a raw topic: `records`, and the broker's time, ms, of the newest read; None: unknown."""

    source: str
    partition: int
    records: int | None
    read_ms: int | None


class Pulse:
    """Whether the brokers answer, partition by partition, by librdkafka's statistics; silence is no sign of an empty topic."""

    def __init__(self, idle_seconds: float) -> None:
        self.interval = max(0.1, min(1.0, idle_seconds / 4))
        self._silence = max(0.3, min(1.0, idle_seconds / 2))
        self._at = 0.0
        self._alive: set[tuple[str, int]] = set()

    def heard(self, text: str) -> None:
        """Takes one report of statistics."""
        found = orjson.loads(text)
        up = {
            broker["nodeid"] for broker in found["brokers"].values()
            if broker["state"] == "UP" and 0 <= broker["rxidle"] < self._silence * 1e6
        }
        self._alive = {
            (topic["topic"], partition["partition"])
            for topic in found["topics"].values() for partition in topic["partitions"].values()
            if partition["leader"] in up
        }
        self._at = time.monotonic()

    def beats(self, topic: str, partition: int) -> bool:
        """Whether the partition's leader has answered just now."""
        return (topic, partition) in self._alive and time.monotonic() - self._at < 3 * self.interval + self._silence


class Ingest:
    """One instance of the consumer group `ingest`. `run` returns when told to stop, or at the end with `until_end`.

    `on_step(step, partition)` is called before each step that Kafka could see: "open:fence", "open:read", "begin", "produce",
    "offsets", "commit". `on_status` gets the counts and how many partitions are open, twice a second. Raises UserError for
    missing topics and refused credentials, Failure where Kafka has forgotten what was not read yet.
    """

    def __init__(
        self,
        config: Config,
        *,
        on_step: Step = lambda step, partition: None,
        on_status: Callable[[Counts, int], None] = lambda counts, partitions: None,
    ) -> None:
        self._kafka = config.kafka
        self._idle = config.stream.idle_ms / 1000
        self._future_ms = config.semantics.stream.future_ms
        self._on_status = on_status
        self._on_step = on_step
        self._owner = Partitioner(self._kafka.partitions, self._kafka.partitioner)
        self.counts = Counts()
        self._newest: deque[tuple[float, int]] = deque()
        self._lanes: dict[int, Lane] = {}
        self._reopen: dict[int, float] = {}
        self._assigned: list[int] | None = None
        self._paused: set[tuple[int, int]] = set()
        self._fault: UserError | Failure | None = None
        self._stopping = False
        self._decisions: Decisions | None = None
        self._most = 200
        self._read_ms: dict[tuple[int, int], int] = {}
        self._pulse = Pulse(self._idle)
        self._source = {self._kafka.named(name): number for number, name in enumerate(RAW)}
        self._topics = [self._kafka.named(name) for name in RAW]
        self._schemas = Schemas(self._kafka) if self._kafka.value_format != "json" else None
        topics.require(self._kafka, NAMES)
        self._pool = ThreadPoolExecutor(max(8, 2 * self._kafka.partitions), "ingest")
        self._consumer = Consumer(
            settings.consumer(
                self._kafka,
                group_id=self._kafka.named("ingest"),
                # The only strategy that gives one member the same partition of all three topics.
                partition_assignment_strategy="range",
                enable_partition_eof=True,
                statistics_interval_ms=int(self._pulse.interval * 1000),
                fetch_queue_backoff_ms=20,
                # The longest that a rebalance waits for a member which is gone: a broker back from a crash may not notice.
                max_poll_interval_ms=max(REJOIN_MS, self._kafka.session_timeout_ms),
            )
            | {"error_cb": self._heard, "stats_cb": self._pulse.heard}
        )

    @property
    def partitions(self) -> list[int]:
        """Those that this instance has open."""
        return sorted(self._lanes)

    @property
    def newest(self) -> int | None:
        """Newest event time written, ms; None before the first."""
        return self._newest[-1][1] if self._newest else None

    def lags(self) -> list[Lag]:
        """How far each partition that is open is behind, as last heard from the brokers; for the thread of `run`."""
        found = []
        for partition, lane in sorted(self._lanes.items()):
            for number, source in enumerate(lane.sources):
                end = self._consumer.get_watermark_offsets(TopicPartition(self._topics[number], partition), cached=True)[1]
                # Behind the last record lies the mark of its transaction, which only the partition's end tells of.
                done = source.empty and lane.since[number] is not None and end <= lane.ends[number]
                left = 0 if done else None if end < 0 else max(0, end - source.position().offset)
                found.append(Lag(RAW[number], partition, left, self._read_ms.get((partition, number))))
        return found

    def stop(self) -> None:
        """Makes `run` end cleanly; from a signal handler too."""
        self._stopping = True

    def run(self, *, until_end: bool = False) -> Counts:
        """Reads and writes until stopped; with `until_end`, until all partitions passed an end marker and nothing is left."""
        self._consumer.subscribe(self._topics, on_assign=self._given, on_revoke=self._taken, on_lost=self._taken)
        told = looked = before = time.monotonic()
        try:
            while not self._stopping:
                busy = any(lane.busy for lane in self._lanes.values())
                messages = self._consumer.consume(self._most, TICK_SECONDS if busy else 2 * TICK_SECONDS)
                self._raise_fault()
                now = time.monotonic()
                if now - before > max(0.25, self._idle / 2):
                    # We stood still ourselves: what the topics hold now is not known.
                    self._forget_idle(now)
                before = now
                self._receive(messages, now)
                if now - looked > self._pulse.interval:
                    looked = now
                    self._watch_brokers(now)
                for lane in list(self._lanes.values()):
                    self._drive(lane, now)
                self._balance()
                self._open_due(now)
                if now - told > 0.5:
                    told = now
                    self._on_status(self.counts, len(self._lanes))
                if until_end and self._ended():
                    break
            self._finish()
            if until_end and not self._stopping:
                # Whoever starts when this has ended finds all of it.
                wait_decided(self._kafka, ("events", "dead-letters", "catalogue"))
        finally:
            self._close()
        return self.counts

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _heard(self, error: Any) -> None:
        """Errors of a whole client, from any thread."""
        if error.code() == codes.AUTHENTICATION:
            self._fault = UserError(
                f"kafka at {self._kafka.bootstrap} refuses us: {error.str()}; check kafka.sasl_* and kafka.ssl_*, or "
                f"{settings.ENVIRONMENT}* in the environment"
            )
        elif error.code() in REFUSED:
            self._fault = UserError(f"kafka at {self._kafka.bootstrap}: {error.str()}; {GRANTS.format(self._kafka.prefix)}")
        elif error.code() in codes.AWAY:
            self._forget_idle(time.monotonic())

    def _given(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        """Notes the new assignment; it is opened outside the callback, so that no message from before can slip in."""
        consumer.assign([])
        self._assigned = sorted({place.partition for place in places})
        have = {(place.topic, place.partition) for place in places}
        apart = [p for p in self._assigned if any((topic, p) not in have for topic in self._topics)]
        if apart:
            self._fault = Failure(
                f"group {self._kafka.named('ingest')}: partitions {apart} of {', '.join(self._topics)} did not come together; "
                "is a member of another version or program in the group?"
            )

    def _taken(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        """Lets transactions in flight end, gives up the rest: whoever comes next reads it again."""
        deadline = time.monotonic() + SETTLE_SECONDS
        for lane in self._lanes.values():
            self._settle(lane, max(0.0, deadline - time.monotonic()))
            lane.give_up()
        self._lanes.clear()
        self._reopen.clear()
        self._paused.clear()
        self._assigned = None

    def _open(self, partitions: list[int]) -> list[TopicPartition]:
        """Fences, and only then reads where to go on. Returns the offsets to read from."""
        fenced = list(self._pool.map(lambda p: made(self._kafka, p, self._on_step, self._heard), partitions))
        for partition in partitions:
            self._on_step("open:read", partition)
        wanted = [TopicPartition(topic, partition) for partition in partitions for topic in self._topics]
        committed = {(place.topic, place.partition): place for place in self._consumer.committed(wanted, ANSWER_SECONDS)}
        found: list[TopicPartition] = []
        for partition, producer in zip(partitions, fenced, strict=True):
            places = [committed[topic, partition] for topic in self._topics]
            positions, standing = (
                self._begin(partition, producer) if all(place.offset < 0 for place in places)
                else stood(self._kafka, partition, places)
            )
            rules = Rules(partition, self._owner, self._future_ms)
            lane = self._lanes[partition] = Lane(self._kafka, rules, producer, positions, standing, self._on_step)
            self._see(lane)
            found += [
                TopicPartition(topic, partition, at.offset) for topic, at in zip(self._topics, positions, strict=True)
            ]
        return found

    def _begin(self, partition: int, producer: Producer) -> tuple[list[Position], Standing]:
        """The very first start: from the oldest records there are. The offsets are written down before anything else is."""
        events = self._kafka.named("events")
        if self._consumer.get_watermark_offsets(TopicPartition(events, partition), timeout=ANSWER_SECONDS)[1] > 0:
            raise Failure(
                f"group {self._kafka.named('ingest')} has no offsets for partition {partition}, but {events} has been written: "
                "Kafka forgot them (offsets.retention.minutes), or they were deleted. Going on would write events twice; read "
                "the raw topics into topics of a new kafka.prefix"
            )
        positions = [
            Position(self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=ANSWER_SECONDS)[0])
            for topic in self._topics
        ]
        producer.begin_transaction()
        producer.send_offsets_to_transaction(
            offsets(self._kafka, partition, positions, Standing()), self._consumer.consumer_group_metadata(), ANSWER_SECONDS
        )
        producer.commit_transaction(ANSWER_SECONDS)
        return positions, Standing()

    def _open_due(self, now: float) -> None:
        """Opens what has been assigned, and what was lost to another instance and is still ours after its time."""
        if self._assigned and not self._lanes and not self._reopen:
            partitions = self._assigned
        else:
            partitions = [partition for partition, at in self._reopen.items() if at <= now]
        if not partitions:
            return
        anew = not self._lanes and len(partitions) == len(self._assigned or ())
        try:
            places = self._open(partitions)
            if anew:
                self._consumer.assign(places)
            else:
                for place in places:
                    self._consumer.seek(place)
                self._consumer.resume(places)
        except KafkaException as error:
            # The group may have moved on, or the broker be away: all of it again, a little later.
            for partition in partitions:
                self._lanes.pop(partition, None)
                self._reopen[partition] = now + 1.0
            code = error.args[0]
            self._heard(code)
            if not code.retriable() and code.code() not in (*codes.AWAY, *THEIRS, codes.STATE):
                raise Failure(f"partitions {partitions} cannot be opened: {code.str()}") from None
            return
        for partition in partitions:
            self._reopen.pop(partition, None)

    def _receive(self, messages: list[Any], now: float) -> None:
        """Sorts messages into their lanes; ends of partitions start the idle clocks."""
        runs: dict[tuple[str, int], list[Raw]] = {}
        ends: dict[tuple[str, int], int] = {}
        for message in messages:
            if message.error() is not None:
                place = self._note(message, now)
                if place is not None:
                    ends[place] = len(runs.get(place, ()))
                continue
            place = (message.topic(), message.partition())
            run = runs.get(place)
            if run is None:
                run = runs[place] = []
            headers = message.headers()
            again = headers is not None and any(name == AGAIN_HEADER for name, _ in headers)
            run.append(Raw(message.offset(), message.timestamp()[1], message.value() or b"", again))
        count = lines = 0
        for (topic, partition), run in runs.items():
            lane, source = self._lanes.get(partition), self._source[topic]
            if lane is None:
                continue
            if ends.get((topic, partition)) != len(run):
                lane.since[source] = None
            self._read_ms[partition, source] = run[-1].timestamp
            lane.arrived_at = now
            lane.burst_at = lane.burst_at or now
            lane.add(source, run if self._schemas is None else [self._read(self._schemas, source, raw) for raw in run])
            count += len(run[:50])
            lines += sum(raw.value.count(b"\n") + 1 for raw in run[:50])
        if count:
            self._most = max(10, min(MOST_MESSAGES, READ_LINES * count // lines))

    def _read(self, schemas: Schemas, source: int, raw: Raw) -> Raw:
        line = schemas.line(RAW[source], raw.value) if raw.value else raw.value
        return raw._replace(reason="bad_schema") if line is None else raw._replace(value=line)

    def _note(self, message: Any, now: float) -> tuple[str, int] | None:
        """What the client has to say in place of a message; topic and partition where it is that the end was reached."""
        error, topic, partition = message.error(), message.topic(), message.partition()
        code = error.code()
        if topic is None:
            self._heard(error)
            self._raise_fault()
            if error.fatal():
                raise Failure(f"kafka at {self._kafka.bootstrap}: {error.str()}; start `onerec ingest` again")
            self._forget_idle(now)
            return None
        source = self._source[topic]
        if code == codes.END_OF_PARTITION:
            lane = self._lanes.get(partition)
            if lane is not None:
                lane.since[source], lane.ends[source] = now, message.offset()
            return topic, partition
        if code == codes.FORGOTTEN:
            raise Failure(
                f"Kafka has forgotten offsets of {self._topics[source]}, partition {partition}, that were not read yet: "
                "retention passed, or the topic was made anew. What was lost is lost; read what is left into topics of a new "
                "kafka.prefix, and raise retention.ms"
            )
        if code in codes.NO_TOPIC:
            raise UserError(f"topic {self._topics[source]} is gone; `onerec topics --create` makes it")
        if code in REFUSED:
            raise UserError(f"topic {self._topics[source]}: {error.str()}; grant this user the right to read it")
        self._forget_idle(now)
        return None

    def _forget_idle(self, now: float) -> None:
        """Time that passed while nobody could tell what the topics hold does not count."""
        for lane in list(self._lanes.values()):
            lane.since = [None if since is None else now for since in lane.since]

    def _watch_brokers(self, now: float) -> None:
        for partition, lane in self._lanes.items():
            for source, topic in enumerate(self._topics):
                if lane.since[source] is not None and not self._pulse.beats(topic, partition):
                    lane.since[source] = now

    def _drive(self, lane: Lane, now: float) -> None:
        """One round of a lane: what was committed, what is due to be taken, what is due to be written."""
        try:
            counts = lane.settled()
            if counts is not None:
                self.counts.add(counts)
                self._see(lane)
            idle = [self._is_idle(lane, source, now) for source in range(len(RAW))]
            lane.gather(now, idle)
            if lane.merger.empty:
                lane.burst_at = None
            if idle[0] and idle[1] and not lane.busy and lane.merger.held():
                newest = self._newest_before(now - self._idle)
                if newest is not None:
                    lane.mark(newest, now)
            if lane.due(now):
                lane.flush(self._pool, self._consumer.consumer_group_metadata())
        except Lost as lost:
            self._lose(lost, now)

    def _is_idle(self, lane: Lane, source: int, now: float) -> bool:
        """Whether a source is left out: nothing to read for long, and nothing on its way with what its neighbours just got.

        A producer's transaction becomes visible in one partition after another. Until it has, the log goes on behind our end.
        """
        since = lane.since[source]
        if since is None or now - since < self._idle:
            return False
        place = TopicPartition(self._topics[source], lane.partition)
        if self._consumer.get_watermark_offsets(place, cached=True)[1] > lane.ends[source]:
            return False
        return lane.burst_at is None or now - lane.arrived_at >= GRACE_SECONDS or now - lane.burst_at >= 4 * GRACE_SECONDS

    def _see(self, lane: Lane) -> None:
        newest = self._newest[-1][1] if self._newest else None
        if lane.newest is not None and (newest is None or lane.newest > newest):
            self._newest.append((time.monotonic(), lane.newest))

    def _newest_before(self, moment: float) -> int | None:
        """The newest event time that was known then: later ones may have company on its way to a partition that looks quiet."""
        while len(self._newest) > 1 and self._newest[1][0] <= moment:
            self._newest.popleft()
        return self._newest[0][1] if self._newest and self._newest[0][0] <= moment else None

    def _lose(self, lost: Lost, now: float) -> None:
        """Drops what the lane held. It is opened again: at once after a mishap, else when the other must have been heard of."""
        self._lanes.pop(lost.partition).give_up()
        self._reopen[lost.partition] = now + (self._kafka.session_timeout_ms / 1000 if lost.theirs else 0.5)
        self._consumer.pause([TopicPartition(topic, lost.partition) for topic in self._topics])
        self._paused -= {(lost.partition, source) for source in range(len(RAW))}
        self._forget_idle(now)

    def _balance(self) -> None:
        """Pauses sources that hold much, until the other has caught up."""
        for partition, lane in self._lanes.items():
            for number, source in enumerate(lane.sources):
                key = (partition, number)
                if source.size > FULL_BYTES and key not in self._paused:
                    self._consumer.pause([TopicPartition(self._topics[number], partition)])
                    self._paused.add(key)
                elif source.size < FULL_BYTES // 4 and key in self._paused:
                    self._consumer.resume([TopicPartition(self._topics[number], partition)])
                    self._paused.discard(key)

    def _ended(self) -> bool:
        """Whether every partition has passed an end marker, and nothing is left to read or write."""
        lanes = list(self._lanes.values())
        if not lanes or len(lanes) < len(self._assigned or ()):
            return False
        if not all(lane.closed and lane.empty and None not in lane.since for lane in lanes):
            return False
        # Another partition may have put lines into one of ours since its end was reached.
        places = [
            (TopicPartition(topic, lane.partition), lane.ends[number])
            for lane in lanes for number, topic in enumerate(self._topics)
        ]
        try:
            if self._decisions is None:
                self._decisions = Decisions(self._kafka, RAW)
            # In this order: what was committed by the first question is within the end that the second one gets.
            return not self._decisions.pending() and all(
                self._consumer.get_watermark_offsets(place, timeout=ANSWER_SECONDS)[1] <= end for place, end in places
            )
        except (KafkaException, OneRecError):
            return False

    def _settle(self, lane: Lane, seconds: float) -> None:
        """Waits for the transaction in flight; what becomes of a lost one is the next owner's to find out."""
        try:
            counts = lane.settled(seconds)
        except Lost:
            return
        if counts is not None:
            self.counts.add(counts)

    def _finish(self) -> None:
        """A clean stop writes what has been gathered."""
        lanes = list(self._lanes.values())
        for lane in lanes:
            self._settle(lane, SETTLE_SECONDS)
        for lane in lanes:
            if lane.gathered_at is not None and not lane.in_flight:
                try:
                    lane.flush(self._pool, self._consumer.consumer_group_metadata())
                except Lost:
                    continue
        for lane in lanes:
            self._settle(lane, SETTLE_SECONDS)

    def _close(self) -> None:
        self._stopping = True
        self._consumer.close()
        for lane in self._lanes.values():
            lane.give_up()
        self._lanes.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
