"""What both engines of `onerec stream` share: partitions opened beside those that go on, progress watched, when to leave.

An engine (group.py, app.py) only says which partitions it was given and which it lost, and hands over messages; where to read
from, what was missed and whether another process has taken over is decided by the store, never by the group's own offsets.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any, Final, NamedTuple

from onerec.errors import Failure
from streaming.changes import Counters
from streaming.kafka.ends import LogEnds
from streaming.kafka.partitions import Fenced, Gap, PartitionStore
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import NUMBER_HEADER, Chunk, Progress

BATCH_MESSAGES: Final = 160
"""Messages taken at once, over all partitions: about four thousand events a transaction at eight partitions."""
BATCH_BYTES: Final = 8 << 20
"""Of one partition in one transaction."""
FETCH_BYTES: Final = 1 << 20
"""Of one partition at a time (a larger message comes alone), so that with a backlog all partitions go on side by side."""
CHECK_SECONDS: Final = 0.2
IDLE_SECONDS: Final = 5.0
PATIENCE: Final = 10
"""A partition may wait so many times longer while others of this worker go on."""
ANSWER_AGE: Final = 5.0
"""An end of the log older than this, in seconds, tells nothing any more."""
SETTLE_SECONDS: Final = 5.0
LEAVE_SECONDS: Final = 20.0
"""How long a worker that knows that it is stuck may take to leave by itself."""


class PartitionStatus(NamedTuple):
    """A partition as shown. `state`: opening, running, idle (all read, nothing came for a while) or fenced."""

    partition: int
    state: str
    watermark: int | None
    lag: int | None
    idle_seconds: float


class _Held:
    """A partition that the group gave us."""

    def __init__(self) -> None:
        self.running = False
        self.retry_at: float | None = None
        self.floor = 0
        self.progress: Progress | None = None
        self.given_at = self.applied_at = self.moved_at = time.monotonic()
        self.behind_since: float | None = None


class _Opening(NamedTuple):
    """One call of `store.open`; partitions taken away meanwhile stand in `dropped`."""

    dropped: set[int]
    future: Future[dict[int, int]]


def message_number(headers: Iterable[tuple[str, Any]] | None) -> int | None:
    """The number of a message within its partition; None where there is none of ours."""
    for name, value in headers or ():
        if name == NUMBER_HEADER:
            try:
                return int(value)
            except (TypeError, ValueError):
                return None
    return None


def forgotten(config: KafkaConfig, partition: int, offset: int, first: int) -> Failure:
    """What is said where retention has passed events that were not applied yet."""
    topic = config.named("events")
    return Failure(
        f"Kafka has forgotten offsets {offset} to {first - 1} of topic {topic}, partition {partition}, before they were "
        "applied: its retention passed. Going on would give wrong histories in silence. Produce the raw events again into "
        f"topics of a new kafka.prefix, and give {topic} a longer retention.ms"
    )


class Engine:
    """The partitions of one worker, driven by one engine thread.

    `stop` is set from outside; `until_end`: `ended()` once every partition held has passed an end marker and nothing is left.
    `show` is called with the engine about every second, in a thread of its own.
    """

    def __init__(
        self,
        store: PartitionStore,
        config: KafkaConfig,
        *,
        until_end: bool = False,
        stop: threading.Event | None = None,
        show: Callable[[Engine], None] = lambda engine: None,
    ) -> None:
        self.config = config
        self.stop = stop or threading.Event()
        self._store = store
        self._until_end = until_end
        self._show = show
        self._held: dict[int, _Held] = {}
        self._lock = threading.Lock()
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="open")
        self._openings: list[_Opening] = []
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._began: float | None = None
        self._finished = 0.0
        self._checked_at = 0.0
        self._last: dict[int, Progress] = {}
        self.restored_seconds: float | None = None
        """How long it took from the newest assignment until its partitions could be read on; None before the first."""
        self.events = 0
        """Events applied and committed by this worker since it began."""
        self._ends = LogEnds(config, self.positions)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    # What the group says.

    def assign(self, partitions: Iterable[int]) -> Future[dict[int, int]] | None:
        """Partitions that are ours from now on: opened in a thread, see `opened`. None where there is nothing to open."""
        wanted = sorted(set(partitions) - set(self._held))
        return self._open(wanted) if wanted else None

    def revoke(self, partitions: Iterable[int]) -> None:
        """Partitions that are not ours any more, in agreement or not; returns within seconds."""
        gone = [partition for partition in partitions if partition in self._held]
        with self._lock:
            for partition in gone:
                del self._held[partition]
                for opening in self._openings:
                    opening.dropped.add(partition)
        self._store.close(gone)

    def _open(self, partitions: list[int]) -> Future[dict[int, int]]:
        dropped: set[int] = set()
        with self._lock:
            for partition in partitions:
                self._held[partition] = _Held()
            future = self._opener.submit(self._opened_by_store, partitions, dropped)
            self._openings.append(_Opening(dropped, future))
        return future

    def _opened_by_store(self, partitions: list[int], dropped: set[int]) -> dict[int, int]:
        wanted = [partition for partition in partitions if partition not in dropped]
        try:
            offsets = self._store.open(wanted)
            first, end = self._ends.first(wanted), self._ends.end(wanted)
        except BaseException:
            self._store.close(wanted)
            raise
        with self._lock:
            late = [partition for partition in wanted if partition in dropped]
            numbers = {partition: self._store.progress(partition).number for partition in wanted if partition not in dropped}
        # Taken away while it was being opened: its next owner shuts us out, or has done so.
        self._store.close(late)
        for partition, number in numbers.items():
            if offsets[partition] > end[partition]:
                raise Failure(
                    f"topic {self.config.named('events')}, partition {partition} ends at {end[partition]}, but "
                    f"{offsets[partition]} offsets of it were applied: the topic was made anew, or the cluster has lost "
                    "records. Delete the topics of this kafka.prefix and produce the raw events again, or take a new one"
                )
            # Without a number, nothing tells whether what is missing was only the marker of a transaction.
            if number is None and offsets[partition] < first[partition]:
                raise forgotten(self.config, partition, offsets[partition], first[partition])
        return {partition: max(offsets[partition], first[partition]) for partition in numbers}

    def opened(self) -> dict[int, int]:
        """Partitions that became ready since the last call → offset to read from. Raises what went wrong."""
        ready: dict[int, int] = {}
        for opening in [each for each in self._openings if each.future.done()]:
            self._openings.remove(opening)
            for partition, offset in opening.future.result().items():
                held = self._held.get(partition)
                if held is None or partition in opening.dropped:
                    continue
                held.floor, held.progress = offset, self._store.progress(partition)
                held.running, held.moved_at = True, time.monotonic()
                self.restored_seconds = held.moved_at - held.given_at
                ready[partition] = offset
        return ready

    def opening(self) -> bool:
        """Whether partitions are being opened."""
        return any(not each.future.done() for each in self._openings)

    def fenced(self) -> list[int]:
        """Partitions that another process has taken over while they are assigned to us; opened again in a while."""
        return [partition for partition, held in self._held.items() if held.retry_at is not None]

    # Messages.

    def holds(self, partition: int) -> bool:
        """Whether the partition is ours, open or not."""
        return partition in self._held

    def runs(self, partition: int) -> bool:
        """Whether messages of the partition are wanted now."""
        held = self._held.get(partition)
        return held is not None and held.running

    def apply(self, partition: int, chunks: Sequence[Chunk]) -> int | None:
        """Hands messages to the store. An offset: something was missed, read the partition again from there.

        Raises Failure where that is not in the log any more. A partition taken over by another process joins `fenced`.
        """
        held = self._held.get(partition)
        if held is None or not held.running or not chunks:
            return None
        if self._began is None:
            self._began = time.monotonic()
        held.applied_at = time.monotonic()
        try:
            for part in _bounded(chunks):
                self._store.apply(partition, part)
        except Gap as gap:
            first = self.first(partition)
            if gap.offset < first:
                raise forgotten(self.config, partition, gap.offset, first) from None
            return gap.offset
        except Fenced:
            self._lost(held)
        else:
            self._look(partition, held)
        return None

    def _look(self, partition: int, held: _Held) -> None:
        """Takes notice of what was committed."""
        progress = self._store.progress(partition)
        if held.progress is None or progress.offset != held.progress.offset:
            self.events += progress.counters.events - (held.progress.counters.events if held.progress else 0)
            held.progress = progress
            held.moved_at = self._finished = time.monotonic()

    def _lost(self, held: _Held) -> None:
        held.running = False
        held.retry_at = time.monotonic() + self.config.session_timeout_ms / 1000

    def _settle(self, partitions: Iterable[int]) -> None:
        for partition in partitions:
            held = self._held[partition]
            try:
                self._store.settle(partition)
            except Fenced:
                self._lost(held)
            else:
                self._look(partition, held)

    # Watching.

    def positions(self) -> dict[int, int]:
        """Next offset to read of every partition that runs here, by what is committed."""
        return {
            partition: max(held.floor, held.progress.offset)
            for partition, held in list(self._held.items()) if held.running and held.progress is not None
        }

    def first(self, partition: int) -> int:
        """The oldest offset that Kafka still has of a partition."""
        return self._ends.first([partition])[partition]

    def check(self) -> None:
        """To be called several times a second. Raises Failure where the worker is stuck."""
        self._failure = self._failure or self._ends.refusal
        if self._failure is not None:
            raise self._failure
        now = time.monotonic()
        if now - self._checked_at < CHECK_SECONDS:
            return
        self._checked_at = now
        # A write that failed is noticed here too, not only with the next messages.
        self._settle([
            partition for partition, held in self._held.items() if held.running and now - held.applied_at > CHECK_SECONDS
        ])
        due = [p for p, held in self._held.items() if held.retry_at is not None and now >= held.retry_at]
        if due:
            self._open(due)

    def ended(self) -> bool:
        """With `until_end`: whether every partition held has passed an end marker and is read to the end of the log."""
        if not self._until_end or not self._held:
            return False
        return all(
            held.running and held.progress is not None and held.progress.ended and self._lag(partition, held) == 0
            and self._ends.answered_at > held.moved_at
            for partition, held in self._held.items()
        )

    def _lag(self, partition: int, held: _Held) -> int | None:
        if held.progress is None or not held.running:
            return None
        return self._ends.lag(partition, max(held.floor, held.progress.offset))

    def _watch(self) -> None:
        """In a thread: shows, and finds out when nothing moves although there is something to read."""
        while not self._closing.wait(1.0):
            self._show(self)
            self._find_stall()
            self._failure = self._failure or self._ends.refusal
            if self._failure is None:
                continue
            # The engine's thread may be the one that hangs. The state is good for a kill at any moment.
            if not self._closing.wait(LEAVE_SECONDS):
                sys.stderr.write(f"onerec: {self._failure}\n")
                sys.stderr.flush()
                os._exit(1)

    def _find_stall(self) -> None:
        now = time.monotonic()
        behind: dict[int, float] = {}
        for partition, held in list(self._held.items()):
            if not self._lag(partition, held) or now - self._ends.answered_at > ANSWER_AGE:
                # All read, or the broker is away, which is no fault of ours.
                held.behind_since = None
            else:
                held.behind_since = held.behind_since or now
                behind[partition] = now - max(held.behind_since, held.moved_at)
        allowed = self.config.stall_seconds * (1 if now - self._finished > self.config.stall_seconds else PATIENCE)
        for partition, seconds in behind.items():
            if seconds > allowed:
                self._failure = Failure(
                    f"partition {partition}: nothing applied for {seconds:.0f} s although there are events to read; leaving, "
                    "so that a supervisor starts this worker anew"
                )

    def silent_seconds(self) -> float:
        """Since the broker's last answer, where that is worth a word; else 0."""
        silent = time.monotonic() - self._ends.answered_at
        return silent if self._ends.answered_at and silent > ANSWER_AGE else 0.0

    def status(self) -> list[PartitionStatus]:
        """Every partition held."""
        now = time.monotonic()
        found: list[PartitionStatus] = []
        for partition, held in sorted(self._held.items()):
            lag = self._lag(partition, held)
            quiet = now - held.moved_at
            idle = lag == 0 and quiet > IDLE_SECONDS
            state = "fenced" if held.retry_at is not None else "idle" if idle else "running" if held.running else "opening"
            watermark = held.progress.watermark if held.progress else None
            found.append(PartitionStatus(partition, state, watermark, lag, quiet if idle else 0.0))
        return found

    def users(self) -> int | None:
        """Users of the partitions that run here, as last committed; None where none runs."""
        found = [held.progress.counters.users for held in list(self._held.values()) if held.running and held.progress]
        return sum(found) if found else None

    def summary(self) -> dict[str, Any]:
        """What the partitions held at `finish` had come to, and the pace of this worker from its first to its last batch."""
        progresses = self._last
        total = dict.fromkeys(Counters.__struct_fields__, 0)
        for progress in progresses.values():
            for name in total:
                total[name] += getattr(progress.counters, name)
        seconds = self._finished - self._began if self._began is not None else 0.0
        return {
            **total,
            "partitions": {
                str(p): {"offset": progress.offset, "watermark": progress.watermark, "sessions": progress.sessions}
                for p, progress in progresses.items()
            },
            "seconds": round(max(0.0, seconds), 3),
            "events_per_second": round(self.events / seconds, 1) if seconds > 0 else 0.0,
        }

    def finish(self) -> None:
        """What is on its way is let through, if the broker takes it in time; call it before the group is left."""
        done = self._opener.submit(self._settle, [p for p, held in self._held.items() if held.running])
        try:
            done.result(SETTLE_SECONDS)
        except NotYet:
            self.release()
        self._last = {p: held.progress for p, held in sorted(self._held.items()) if held.progress is not None}

    def release(self) -> None:
        """Closes every partition in the store, from any thread: writes that the broker holds up fail as if fenced."""
        self._store.close(list(self._held))

    def close(self) -> None:
        """Gives all partitions back and ends the threads."""
        self._closing.set()
        self.revoke(list(self._held))
        self._opener.shutdown(wait=True, cancel_futures=True)
        self._ends.close()


def _bounded(chunks: Sequence[Chunk]) -> Iterator[Sequence[Chunk]]:
    """Parts of at most BATCH_BYTES, or of one message."""
    first = size = 0
    for i, chunk in enumerate(chunks):
        if size and size + len(chunk.value) > BATCH_BYTES:
            yield chunks[first:i]
            first, size = i, 0
        size += len(chunk.value)
    if first < len(chunks):
        yield chunks[first:]
