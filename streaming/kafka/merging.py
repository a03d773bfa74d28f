"""Two raw sources of one partition → one order by event time, with exact positions to go on from (SEMANTICS.md §3).

Lines are taken in runs: as long as a source lies behind the other's next event, all of it goes out in one slice. The order is
that of taking one line at a time from the source whose next `ts` is smallest, ties the first source first; a line that is no
event of this partition is taken as soon as it stands at a head. An end marker holds its source up until the other has one too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final, Literal, NamedTuple

import msgspec

from streaming.events import (
    BLANK,
    DEEP_LINE,
    MAX_DEPTH,
    MAX_LINE_BYTES,
    ItemRecord,
    Line,
    Rejected,
    decode,
    fast_decode,
)
from streaming.kafka.partitioning import Partitioner
from streaming.kafka.wire import END

LINE_OVERHEAD: Final = 120
"""Bytes of memory that a buffered line takes beside its own, about."""


class Position(NamedTuple):
    """Where to go on in a source: the next message, and how many of its lines (blank ones not counted) are done with."""

    offset: int = 0
    lines: int = 0


START: Final = Position()


class Raw(NamedTuple):
    """One message of a raw topic; `timestamp` is that of its log record, ms; `again` if it came from another partition.

    `reason` is set where the whole message is refused.
    """

    offset: int
    timestamp: int
    value: bytes
    again: bool = False
    reason: str = ""


class Aside(NamedTuple):
    """A line that is no event of this partition: refused, of another partition's user, or a catalogue entry.

    `at` is how many events of its batch come before it; `number` counts the lines of its message, blank ones too. `detail` is
    the reason, the user id, or the item id; `topic` is the source's, without prefix.
    """

    at: int
    topic: str
    offset: int
    number: int
    timestamp: int
    raw: bytes
    kind: Literal["refused", "moved", "item"]
    detail: str


class Batch:
    """Messages of one source, decoded: events in order, what else there was, and how far both have been taken."""

    __slots__ = ("asides", "again", "done", "ends", "lines", "passed", "segments", "size", "stamp", "tops", "ts")

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.ts: list[int] = []
        self.tops: list[int] = []
        self.asides: list[Aside] = []
        self.segments: list[tuple[int, int, int]] = []
        """(events before it, offset, lines of it done with before) of each message."""
        self.stamp = 0
        self.size = 0
        self.again = False
        self.done = 0
        self.passed = 0

    def due_asides(self) -> list[Aside]:
        """Those that stand at the head now; they are taken."""
        first, asides = self.passed, self.asides
        while self.passed < len(asides) and asides[self.passed].at <= self.done:
            self.passed += 1
        return asides[first : self.passed] if self.passed > first else []

    def position(self) -> Position:
        """Where the lines taken so far end."""
        if self.done == len(self.lines) and self.passed == len(self.asides):
            return Position(self.segments[-1][1] + 1, 0)
        # All messages before the last one that begins at or before the head are done with.
        start, offset, skipped = self.segments[bisect_right(self.segments, self.done, key=lambda s: s[0]) - 1]
        passed = self.passed
        while passed and self.asides[passed - 1].offset == offset:
            passed -= 1
        return Position(offset, skipped + self.done - start + self.passed - passed)


class Rules(NamedTuple):
    """What decides whether a line is an event of this partition; `future_ms`: how far ahead of its record it may be."""

    partition: int
    owner: Partitioner
    future_ms: int


def read(messages: Iterable[Raw], topic: str, rules: Rules, start: Position = START) -> Batch:
    """Decodes and checks messages of one source; lines of the message at `start` that are done with are left out.

    Never raises for bad input.
    """
    partition, owner, future_ms = rules
    batch = Batch()
    lines, times, asides, segments = batch.lines, batch.ts, batch.asides, batch.segments
    parse, deep, depth, longest = fast_decode, DEEP_LINE, MAX_DEPTH, MAX_LINE_BYTES
    size = 0
    for offset, stamp, value, _, reason in messages:
        max_ts = stamp + future_ms
        rows = value.split(b"\n") if not reason else []
        skip = start.lines if offset == start.offset else 0
        segments.append((len(lines), offset, skip))
        size += len(value) + LINE_OVERHEAD * len(rows)
        if stamp > batch.stamp:
            batch.stamp = stamp
        if reason and not skip:
            asides.append(Aside(len(lines), topic, offset, 0, stamp, value, "refused", reason))
        for number, raw in enumerate(rows):
            if skip:
                if raw.strip(BLANK):
                    skip -= 1
                continue
            try:
                if len(raw) > deep and (raw.count(b"[") + raw.count(b"{") > depth or len(raw) > longest):
                    raise ValueError
                if not raw.isascii():
                    raw.decode()
                line = parse(raw)
                ts = line.ts
                if ts > max_ts or (line.type == "watch" and (line.watch_ms < 0 or line.duration_ms < 0)):
                    raise ValueError
                user_id = line.user_id
            except (ValueError, RecursionError, msgspec.MsgspecError):
                if not raw.strip(BLANK):
                    continue
                found = decode(raw, max_ts)
                if isinstance(found, Line):
                    ts, user_id = found.ts, found.user_id
                else:
                    asides.append(_aside(found, len(lines), topic, offset, number, stamp, raw))
                    continue
            if owner[user_id] != partition:
                asides.append(Aside(len(lines), topic, offset, number, stamp, raw, "moved", user_id))
                continue
            lines.append(raw)
            times.append(ts)
    batch.tops = list(accumulate(times, max))
    batch.size = size
    return batch


def _aside(found: ItemRecord | Rejected, at: int, topic: str, offset: int, number: int, stamp: int, raw: bytes) -> Aside:
    if isinstance(found, Rejected):
        return Aside(at, topic, offset, number, stamp, raw, "refused", found.reason)
    return Aside(at, topic, offset, number, stamp, raw, "item", found.item_id)


class End(NamedTuple):
    """An end marker in a source."""

    offset: int


class Source:
    """What has been read of one topic's partition and not been taken yet."""

    def __init__(self, topic: str, position: Position = START) -> None:
        self.topic = topic
        self._position = position
        self._queue: deque[Batch | End] = deque()
        self.start = position
        """Of the first message that is read after opening."""
        self.size = 0
        """Bytes of memory held, about."""

    def add(self, messages: Sequence[Raw], rules: Rules) -> None:
        """Appends messages, in the order of their offsets; end markers are told apart."""
        first = 0
        for number, message in enumerate(messages):
            if message.value == END:
                self._append(messages[first:number], rules)
                self._queue.append(End(message.offset))
                first = number + 1
        self._append(messages[first:] if first else messages, rules)

    def _append(self, messages: Sequence[Raw], rules: Rules) -> None:
        if messages:
            batch = read(messages, self.topic, rules, self.start)
            batch.again = any(message.again for message in messages)
            self._queue.append(batch)
            self.size += batch.size

    @property
    def empty(self) -> bool:
        """Whether all that was read has been taken."""
        return not self._queue

    @property
    def waiting(self) -> int:
        """Batches and end markers not taken yet."""
        return len(self._queue)

    def position(self) -> Position:
        """Where to go on after a restart."""
        head = self._queue[0] if self._queue else None
        if isinstance(head, Batch) and (head.done or head.passed):
            return head.position()
        return self._position

    def head(self, asides: list[Aside]) -> Batch | End | None:
        """A batch with an event at its head, an end marker, or None; asides on the way are taken."""
        while self._queue:
            first = self._queue[0]
            if isinstance(first, End):
                return first
            asides += first.due_asides()
            if first.done < len(first.lines):
                return first
            self._position = first.position()
            self._queue.popleft()
            self.size -= first.size
        return None

    def pass_end(self) -> None:
        """Takes the end marker at the head."""
        first = self._queue.popleft()
        if not isinstance(first, End):
            raise ValueError("no end marker at the head")
        self._position = Position(first.offset + 1, 0)


class Taken:
    """What a merge gave: lines in order, asides, the newest event time, and whether an end marker comes after the lines."""

    __slots__ = ("again", "asides", "end", "lines", "newest", "stamp")

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.asides: list[Aside] = []
        self.newest = 0
        self.stamp = 0
        self.end = False
        self.again = False


class Merger:
    """The two sources of a partition, merged. `ended` says which have passed an end marker that the other has not."""

    def __init__(self, positions: Sequence[Position] = (START, START), ended: Sequence[bool] = (False, False)) -> None:
        self.sources = (Source("watch", positions[0]), Source("interactions", positions[1]))
        self.ended = list(ended)

    @property
    def empty(self) -> bool:
        """Whether no event waits in either source."""
        return all(source.empty for source in self.sources)

    def held(self) -> bool:
        """Whether nothing but an end marker that waits for the other source's is there."""
        return all(source.empty or (source.waiting == 1 and source.size == 0) for source in self.sources)

    def take(self, room: int, idle: Sequence[bool]) -> Taken:
        """About `room` lines in order, fewer where a source must be waited for; up to an end marker at most.

        `idle[i]` leaves source i out while it has nothing: the caller's decision, made by the clock.
        """
        taken = Taken()
        watch, other = self.sources
        while len(taken.lines) < room:
            first, second = watch.head(taken.asides), other.head(taken.asides)
            if isinstance(first, Batch) and isinstance(second, Batch):
                _merge(first, second, room, taken)
            elif isinstance(first, Batch) and (isinstance(second, End) or idle[1]):
                _all(first, room, taken)
            elif isinstance(second, Batch) and (isinstance(first, End) or idle[0]):
                _all(second, room, taken)
            elif self._pass_ends(first, second, idle):
                if not any(self.ended):
                    taken.end = True
                    break
            else:
                break
        # What stands at the heads now is taken with these lines, so that an aside never waits for an event.
        for source in self.sources:
            source.head(taken.asides)
        return taken

    def _pass_ends(self, first: Batch | End | None, second: Batch | End | None, idle: Sequence[bool]) -> bool:
        """Takes end markers whose time has come; False if there are none. With both taken, `ended` is clear again."""
        heads = (first, second)
        for i in (0, 1):
            if isinstance(heads[i], End) and (isinstance(heads[1 - i], End) or self.ended[1 - i]):
                self.sources[i].pass_end()
                if isinstance(heads[1 - i], End):
                    self.sources[1 - i].pass_end()
                self.ended = [False, False]
                return True
        for i in (0, 1):
            # One topic got an end marker and then more, the other neither: it must not be held up for ever.
            if isinstance(heads[i], End) and idle[1 - i] and self.sources[i].waiting > 1:
                self.sources[i].pass_end()
                self.ended[i] = True
                return True
        return False


def _run(batch: Batch, stop: int, taken: Taken) -> None:
    taken.newest = max(taken.newest, max(batch.ts[batch.done : stop]))
    if batch.stamp > taken.stamp:
        taken.stamp = batch.stamp
    taken.again = taken.again or batch.again
    batch.done = stop


def _all(batch: Batch, room: int, taken: Taken) -> None:
    stop = min(len(batch.lines), batch.done + room - len(taken.lines))
    taken.lines += batch.lines[batch.done : stop]
    _run(batch, stop, taken)


def _merge(first: Batch, second: Batch, room: int, taken: Taken) -> None:
    """Runs of one batch and the other until one is used up, or the room."""
    out = taken.lines
    a_lines, a_ts, a_tops, a, a_end = first.lines, first.ts, first.tops, first.done, len(first.lines)
    b_lines, b_ts, b_tops, b, b_end = second.lines, second.ts, second.tops, second.done, len(second.lines)
    while len(out) < room:
        bound = b_ts[b]
        if a_ts[a] <= bound:
            # The newest time so far grows, so it can be searched; what it hides in disorder is found one by one.
            stop = bisect_right(a_tops, bound, a)
            while stop < a_end and a_ts[stop] <= bound:
                stop += 1
            out += a_lines[a:stop]
            a = stop
            if a == a_end:
                break
        bound = a_ts[a]
        stop = bisect_left(b_tops, bound, b)
        while stop < b_end and b_ts[stop] < bound:
            stop += 1
        out += b_lines[b:stop]
        b = stop
        if b == b_end:
            break
    if a > first.done:
        _run(first, a, taken)
    if b > second.done:
        _run(second, b, taken)
