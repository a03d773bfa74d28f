"""The stateful stream over partitions that come and go: `open`, `close`, `apply`. Nothing is lost and nothing doubled.

A batch of a partition is one Kafka transaction of the partition's own transactional id: sessions, changelog entries, progress.
Then the same entries go into the local RocksDB. Whoever opens a partition first initialises its transactional id, which
*fences* every other process that still believes it has it: their transactions fail, and what did not commit is not written
locally either. Only then the local copy is brought to the end of the changelog; the progress found there says where to go on
in `events`. The consumer group's own offsets decide nothing. What a crash between any two steps leaves: docs/kafka.md.
"""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, repeat
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import msgspec
from confluent_kafka import KafkaException, Producer

from onerec.errors import Failure
from streaming.changes import Changes, Counters
from streaming.core import Core
from streaming.kafka import codes, settings
from streaming.kafka.changelog import Changelog
from streaming.kafka.local import Local, Place
from streaming.kafka.progress import agree
from streaming.kafka.settings import MAX_STATE_BYTES, KafkaConfig
from streaming.kafka.topics import topic_ids
from streaming.kafka.wire import (
    END,
    NOTHING,
    PROGRESS_KEY,
    Chunk,
    Progress,
    marker_time,
    partition_key,
    session_message,
    unpack,
)
from streaming.semantics import Semantics

THREADS: Final = 4
CLOSE_SECONDS: Final = 3.0
FENCE_SECONDS: Final = 60.0

Step = Callable[[str, int], None]


class Commit(NamedTuple):
    """A batch of a partition that was committed: messages applied, what they changed and `added` to the counters."""

    partition: int
    chunks: Sequence[Chunk]
    changes: Changes
    added: Counters
    watermark: int | None


class Fenced(Exception):
    """Another process has taken this partition over; it is closed here. Open it again only if it is still assigned later."""

    def __init__(self, partition: int) -> None:
        super().__init__(f"partition {partition} was taken over by another process")
        self.partition = partition


class Gap(Exception):
    """Messages between the last one applied and this batch are missing; nothing of it was applied."""

    def __init__(self, partition: int, offset: int) -> None:
        super().__init__(f"partition {partition}: messages from offset {offset} on were not handed over")
        self.partition = partition
        self.offset = offset


class _Part:
    """A partition that is open here."""

    def __init__(self, place: Place, core: Core, producer: Producer, overlay: dict[str, Any]) -> None:
        self.place = place
        self.core = core
        self.producer = producer
        self.progress = msgspec.structs.replace(place.progress)
        self.overlay = overlay
        self.flight: Future[None] | None = None
        self.closed = False


class PartitionStore:
    """The partitions of one worker over one RocksDB.

    `on_step(step, partition)` is called before each step: "open:fence", "open:catch-up", "begin", "produce", "commit",
    "write", "close"; `on_commit` after each transaction, in a thread of the store. `max_users` bounds the users kept decoded,
    over all partitions.
    Raises UserError where the state is foreign or the log was built with other settings.
    """

    def __init__(
        self,
        state: Path,
        semantics: Semantics,
        config: KafkaConfig,
        *,
        on_step: Step = lambda step, partition: None,
        on_commit: Callable[[Commit], None] = lambda commit: None,
        max_users: int = 65_536,
    ) -> None:
        self._semantics = semantics
        self._config = config
        self._on_step = on_step
        self._on_commit = on_commit
        self._max_users = max_users
        self._local = Local(Path(state))
        self._parts: dict[int, _Part] = {}
        self._busy: set[int] = set()
        # Guards the local copies: who may write one is decided and done under it.
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="write")
        try:
            agree(config, semantics)
            self._topic_id = topic_ids(config, ["histories"])["histories"]
        except BaseException:
            self._local.close()
            raise
        self._follower: Changelog | None = None
        self._followed: tuple[int, list[int]] | None = None
        self._turn = 0

    @property
    def opened(self) -> set[int]:
        """Partitions that are open here."""
        return set(self._parts)

    def open(self, partitions: Iterable[int]) -> dict[int, int]:
        """Takes partitions over: partition → offset of `events` to read from. May take as long as the changelog is.

        Raises Failure where the broker does not answer or the changelog cannot be read.
        """
        wanted = sorted(set(partitions))
        if again := [partition for partition in wanted if partition in self._parts]:
            raise ValueError(f"partitions {again} are open already")
        if not wanted:
            return {}
        with self._lock:
            self._busy.update(wanted)
            self._turn += 1
        producers: dict[int, Producer] = {}
        try:
            with ThreadPoolExecutor(min(8, len(wanted)), thread_name_prefix="fence") as pool:
                producers = dict(zip(wanted, pool.map(self._fence, wanted), strict=True))
            for partition in wanted:
                self._on_step("open:catch-up", partition)
            changelog = Changelog(self._config, self._local, self._topic_id)
            try:
                changelog.assign(wanted)
                changelog.read()
            finally:
                changelog.close()
            share = max(1_024, self._max_users // max(1, len(self._parts) + len(wanted)))
            for partition in wanted:
                self._parts[partition] = self._part(partition, producers[partition], share)
        except BaseException:
            with self._lock:
                self._busy -= set(wanted) - set(self._parts)
            raise
        return {partition: self._parts[partition].progress.offset for partition in wanted}

    def _fence(self, partition: int) -> Producer:
        """A producer with the partition's transactional id, after which every older one is shut out."""
        self._on_step("open:fence", partition)
        producer = Producer(
            settings.producer(
                self._config,
                transactional_id=self._config.named(f"stream-{partition}"),
                message_max_bytes=MAX_STATE_BYTES,
            )
        )
        deadline = time.monotonic() + FENCE_SECONDS
        while True:
            try:
                producer.init_transactions(10)
                return producer
            except KafkaException as exception:
                error = exception.args[0]
                if not error.retriable() or time.monotonic() > deadline:
                    raise Failure(
                        f"partition {partition}: the broker at {self._config.bootstrap} does not let us begin ({error.str()})"
                    ) from None

    def _part(self, partition: int, producer: Producer, max_users: int) -> _Part:
        place = self._local.place(partition) or Place(
            topic_id=self._topic_id, progress=Progress(partition=partition)
        )
        overlay: dict[str, Any] = {}

        def load(user_id: str) -> tuple[bytes | None, bytes | None] | None:
            # A batch on its way to the disk: newer than what the disk holds.
            flying = overlay.get(user_id)
            stored = None
            if flying is None or flying[1] is None:
                stored = self._local.load(partition, user_id)
            if flying is None:
                return stored
            return flying if stored is None else (flying[0], stored[1])

        progress = place.progress
        core = Core(
            self._semantics,
            load,
            counters=msgspec.structs.replace(progress.counters),
            watermark=progress.watermark,
            due=self._local.due(partition),
            max_users=max_users,
        )
        return _Part(place, core, producer, overlay)

    def progress(self, partition: int) -> Progress:
        """What an open partition has come to, as last committed."""
        return self._parts[partition].place.progress

    def apply(self, partition: int, chunks: Sequence[Chunk]) -> None:
        """Applies messages of `events` in order; those applied before are skipped.

        Returns when the batch before this one is committed; this one is then on its way. Raises Fenced, Gap or Failure.
        """
        part = self._parts[partition]
        fresh = self._fresh(part, chunks)
        core, progress = part.core, part.progress
        try:
            for chunk in fresh:
                if chunk.value == END:
                    self._flush(partition, part)
                elif (ts := marker_time(chunk.value)) is not None:
                    core.advance(ts)
                else:
                    # (offset, line) of each record, made without a step of Python a line.
                    core.feed(zip(zip(repeat(chunk.offset), count()), unpack(chunk.value)), chunk.timestamp)  # noqa: B905
                progress.offset = chunk.offset + 1
                progress.ended = chunk.value == END
                if chunk.number is not None:
                    progress.number = chunk.number + 1
            if fresh:
                self._send(partition, part, core.changes(), fresh)
        except Fenced:
            self._drop(partition)
            raise

    def _fresh(self, part: _Part, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The messages not applied before. Raises Gap where one before them is missing."""
        progress = part.progress
        fresh = [chunk for chunk in chunks if chunk.offset >= progress.offset]
        expected = 0 if progress.offset == 0 else progress.number
        for chunk in fresh:
            # Number 0 is a new beginning: whoever numbers has lost its own place.
            if chunk.number and expected is not None and chunk.number != expected:
                raise Gap(progress.partition, progress.offset)
            if chunk.number is not None:
                expected = chunk.number + 1
        return fresh

    def _flush(self, partition: int, part: _Part) -> None:
        """All that came before an end marker, then every open session, each part committed before the next is made."""
        self._send(partition, part, part.core.changes())
        for changes in part.core.flush():
            self._wait(partition, part)
            self._send(partition, part, changes)

    def _send(self, partition: int, part: _Part, changes: Changes, chunks: Sequence[Chunk] = ()) -> None:
        """Waits for the batch before, then lets the pool write this one."""
        self._wait(partition, part)
        progress, core = part.progress, part.core
        progress.sessions += len(changes.sessions)
        progress.watermark = core.watermark
        progress.counters = msgspec.structs.replace(core.counters)
        part.overlay.clear()
        part.overlay.update(changes.users)
        part.flight = self._pool.submit(self._write, partition, part, changes, msgspec.structs.replace(progress), chunks)

    def _wait(self, partition: int, part: _Part) -> None:
        flight, part.flight = part.flight, None
        if flight is not None:
            flight.result()

    def _write(
        self, partition: int, part: _Part, changes: Changes, progress: Progress, chunks: Sequence[Chunk]
    ) -> None:
        """One batch: the transaction, then the local copy. Raises Fenced, and then nothing was written locally."""
        pairs = _pairs(changes)
        while True:
            ends: list[int] = []
            try:
                self._on_step("begin", partition)
                part.producer.begin_transaction()
                self._on_step("produce", partition)
                self._produce(partition, part.producer, changes, pairs, progress, ends)
                self._on_step("commit", partition)
                self._ended(part, part.producer.commit_transaction)
                break
            except KafkaException as exception:
                error = exception.args[0]
                if error.code() in codes.FENCED or error.fatal() or part.closed:
                    raise Fenced(partition) from None
                if not error.txn_requires_abort():
                    raise Failure(f"partition {partition}: the broker refused a transaction: {error.str()}") from None
                self._abort(partition, part)
        added = progress.counters.since(part.place.progress.counters)
        self._on_commit(Commit(partition, chunks, changes, added, progress.watermark))
        place = Place(topic_id=self._topic_id, changelog=ends[-1] + 1 if ends else part.place.changelog, progress=progress)
        self._on_step("write", partition)
        with self._lock:
            # Closed meanwhile: whoever opens it next reads this batch from the changelog.
            if not part.closed:
                self._local.write(
                    partition, ((key, None if value == NOTHING else value) for key, value in pairs), place
                )
                part.place = place

    def _ended(self, part: _Part, end: Callable[[float], None]) -> None:
        """Commits or aborts, however long the broker is away, as long as the partition is ours."""
        while True:
            try:
                return end(10)
            except KafkaException as exception:
                if not exception.args[0].retriable() or part.closed:
                    raise

    def _abort(self, partition: int, part: _Part) -> None:
        try:
            self._ended(part, part.producer.abort_transaction)
        except KafkaException as exception:
            error = exception.args[0]
            if error.code() in codes.FENCED or error.fatal() or part.closed:
                raise Fenced(partition) from None
            raise Failure(
                f"partition {partition}: a transaction cannot be ended ({error.str()}); started again, the worker goes on from "
                "what is committed"
            ) from None

    def _produce(
        self,
        partition: int,
        producer: Producer,
        changes: Changes,
        pairs: list[tuple[bytes, bytes]],
        progress: Progress,
        ends: list[int],
    ) -> None:
        named = self._config.named
        sessions, histories, letters = named("sessions"), named("histories"), named("dead-letters")

        def produce(topic: str, value: bytes, key: bytes | str | None, **options: Any) -> None:
            while True:
                try:
                    return producer.produce(topic, value, key, **options)
                except BufferError:
                    producer.poll(0.05)

        first = progress.sessions - len(changes.sessions) + 1
        for sequence, session in enumerate(changes.sessions, first):
            value, headers = session_message(session, partition, sequence)
            produce(sessions, value, session.user_id, partition=partition, headers=headers)
        for key, value in pairs:
            produce(histories, value, key, partition=partition)
        for letter in changes.dead_letters:
            offset, line = letter.position
            headers = [("source", b"events:%d:%d:%d" % (partition, offset, line)), ("reason", letter.reason.encode())]
            produce(letters, letter.raw, None, partition=0, headers=headers)
        value = msgspec.json.encode(progress)
        produce(named("progress"), value, partition_key(partition), partition=0)
        # The last of the partition's entries: where it lies, the changelog ends.
        produce(
            histories, value, PROGRESS_KEY, partition=partition,
            on_delivery=lambda error, message: None if error else ends.append(message.offset()),
        )

    def settle(self, partition: int | None = None) -> None:
        """Waits until nothing is on its way any more. Raises Fenced (the partition is closed then) or Failure."""
        for each in sorted(self._parts) if partition is None else [partition]:
            try:
                self._wait(each, self._parts[each])
            except Fenced:
                self._drop(each)
                raise

    def close(self, partitions: Iterable[int]) -> None:
        """Gives partitions back. Waits a few seconds for what is on its way; what does not make it is not done at all."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for partition in list(partitions):
            part = self._parts.get(partition)
            if part is None:
                continue
            self._on_step("close", partition)
            if part.flight is not None:
                try:
                    part.flight.result(max(0.0, deadline - time.monotonic()))
                except Exception:
                    # Whatever failed: the next owner finds in the changelog what was committed.
                    part.flight = None
            self._drop(partition)

    def _drop(self, partition: int) -> None:
        part = self._parts.pop(partition, None)
        with self._lock:
            if part is not None:
                part.closed = True
            self._busy.discard(partition)
            self._turn += 1

    def standby(self, partitions: Iterable[int], seconds: float) -> None:
        """Keeps the copies of partitions that are not open here near the end of the changelog, for about so long."""
        with self._lock:
            wanted = sorted(set(partitions) - self._busy)
            turn = self._turn
        if not wanted:
            time.sleep(seconds)
            return
        if self._follower is None:
            self._follower = Changelog(self._config, self._local, self._topic_id)
        if self._followed != (turn, wanted):
            self._follower.assign(wanted)
            self._followed = turn, wanted

        @contextmanager
        def guard(partition: int) -> Iterator[bool]:
            # A copy that was worked on in between is ahead of what the follower knows of it.
            with self._lock:
                yield self._turn == turn and partition not in self._busy

        self._follower.read(time.monotonic() + seconds, guard)

    def close_all(self) -> None:
        """Closes every partition and the database."""
        self.close(list(self._parts))
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._follower is not None:
            self._follower.close()
        self._local.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close_all()


def _pairs(changes: Changes) -> list[tuple[bytes, bytes]]:
    """Changed values as the changelog holds them."""
    pairs: list[tuple[bytes, bytes]] = []
    for user_id, (live, base) in changes.users.items():
        name = user_id.encode()
        if base is not None:
            pairs.append((b"b" + name, base))
        pairs.append((b"l" + name, NOTHING if live is None else live))
    return pairs
