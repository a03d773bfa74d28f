"""The merge of a partition's two raw topics: one order, whatever the messages, the chunks and the places where it is cut."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import hypothesis.strategies as st
import orjson
from hypothesis import given, settings

from streaming.cursors import Cursor, next_cursor
from streaming.events import MIN_TS, Line, decode
from streaming.kafka.merging import Merger, Position, Raw, Rules, Taken
from streaming.kafka.partitioning import Partitioner, partition_of
from streaming.kafka.wire import END
from streaming.sources import Batch

PARTITIONS = 4
HERE = partition_of("here", PARTITIONS, "crc32")
THERE = next(f"there{n}" for n in range(99) if partition_of(f"there{n}", PARTITIONS, "crc32") != HERE)
RULES = Rules(HERE, Partitioner(PARTITIONS, "crc32"), 60_000)
NOW = MIN_TS + 1_000_000


def event(ts: int, item: object = "i", user: str = "here", kind: str = "like") -> bytes:
    return b'{"type":"%s","user_id":"%s","item_id":"%s","ts":%d}' % (
        kind.encode(), user.encode(), str(item).encode(), MIN_TS + ts,
    )


class Case(NamedTuple):
    """Lines of two topics and the messages that they come in; an end marker may stand between messages."""

    lines: tuple[list[bytes], list[bytes]]
    messages: tuple[list[Raw], list[Raw]]


BAD = (b"no JSON", b'{"type":"wink"}', event(2_000_000), b'{"type":"time","ts":1650000000000}', b'{"type":"end"} ')
BLANKS = (b"", b" ", b"\t\r")


@st.composite
def topic(draw: st.DrawFn, name: str, epochs: int) -> tuple[list[bytes], list[Raw]]:
    """Lines (blank and broken ones and other partitions' among them) and their messages; each epoch ends with END."""
    found: list[bytes] = []
    messages: list[Raw] = []
    offset = draw(st.integers(0, 5))
    serial = 0
    for _ in range(epochs):
        times = draw(st.lists(st.integers(0, 30), max_size=25))
        if draw(st.booleans()):
            times.sort()
        lines = []
        for ts in times:
            serial += 1
            match draw(st.integers(0, 11)):
                case 0:
                    lines.append(draw(st.sampled_from(BAD)))
                case 1:
                    lines.append(draw(st.sampled_from(BLANKS)))
                case 2:
                    lines.append(event(ts, f"{name}{serial}", THERE))
                case 3:
                    lines.append(b'{"type":"item","item_id":"%s%d","ts":%d}' % (name.encode(), serial, MIN_TS))
                case _:
                    lines.append(event(ts, f"{name}{serial}"))
        first = 0
        while first < len(lines):
            size = draw(st.integers(1, 6))
            messages.append(Raw(offset, NOW, b"\n".join(lines[first : first + size])))
            # Transactions leave their marks between messages: offsets have holes.
            offset += draw(st.integers(1, 3))
            first += size
        if draw(st.booleans()):
            messages.append(Raw(offset, NOW, b""))
            offset += 1
        messages.append(Raw(offset, NOW, END))
        offset += 1
        found += [*lines, END]
    return found, messages


@st.composite
def cases(draw: st.DrawFn) -> Case:
    epochs = draw(st.integers(1, 3))
    a_lines, a = draw(topic("w", epochs))
    b_lines, b = draw(topic("x", epochs))
    return Case((a_lines, b_lines), (a, b))


class Lines:
    """Lines as a source of the replay."""

    def __init__(self, lines: list[bytes]) -> None:
        self.lines = lines

    def batches(self, max_ts: object) -> Iterator[Batch]:
        yield Batch(1, self.lines, sum(len(line) + 1 for line in self.lines))


def replayed(lines: Sequence[list[bytes]]) -> list[bytes]:
    """Events in the order of the replay's own merge, each epoch by itself, END behind it."""
    out: list[bytes] = []
    for parts in zip(*map(epochs_of, lines), strict=True):
        sources: list[Any] = [Lines([line for line in part if THERE.encode() not in line]) for part in parts]
        cursors = [Cursor(source, lambda: NOW + RULES.future_ms) for source in sources]
        while (cursor := next_cursor(cursors)) is not None:
            row = cursor.take().record[1]
            out += [row.raw for found in row.events if isinstance(found, Line)]
        out.append(END)
    return out


def epochs_of(lines: list[bytes]) -> list[list[bytes]]:
    parts: list[list[bytes]] = [[]]
    for line in lines:
        if line == END:
            parts.append([])
        else:
            parts[-1].append(line)
    return parts[:-1]


def is_event(line: bytes) -> bool:
    return THERE.encode() not in line and isinstance(decode(line, NOW + RULES.future_ms), Line)


def asides_of(lines: Sequence[list[bytes]]) -> list[bytes]:
    return sorted(line for part in lines for line in part if line.strip() and line != END and not is_event(line))


def time_of(line: bytes) -> int:
    return int(orjson.loads(line)["ts"])


def written(taken: Taken) -> list[bytes]:
    return taken.lines + ([END] if taken.end else [])


class Feeder:
    """Gives a merger the messages of its sources in chunks; after a cut, again from the positions that were kept."""

    def __init__(self, case: Case) -> None:
        self.messages = case.messages
        self.given = [0, 0]
        self.merger = Merger([Position(m[0].offset) for m in case.messages])

    def give(self, source: int, count: int) -> None:
        found = self.messages[source][self.given[source] : self.given[source] + count]
        self.given[source] += len(found)
        self.merger.sources[source].add(found, RULES)

    def cut(self) -> None:
        """Everything in memory is lost."""
        positions = [source.position() for source in self.merger.sources]
        self.merger = Merger(positions, self.merger.ended)
        for number, at in enumerate(positions):
            self.given[number] = sum(message.offset < at.offset for message in self.messages[number])

    @property
    def done(self) -> bool:
        return all(given == len(found) for given, found in zip(self.given, self.messages, strict=True))


@given(cases(), st.integers(0, 1 << 30))
@settings(max_examples=300, deadline=None)
def test_any_messages_chunks_and_cuts_give_the_order_of_the_replays_merge(case: Case, seed: int) -> None:
    feeder, rng = Feeder(case), random.Random(seed)
    out: list[bytes] = []
    asides: list[bytes] = []
    while True:
        done = feeder.done
        if not done:
            feeder.give(rng.randrange(2), rng.randrange(5))
        taken = feeder.merger.take(rng.randrange(1, 40), (False, False))
        out += written(taken)
        asides += [aside.raw for aside in taken.asides]
        if taken.lines:
            assert taken.newest == max(map(time_of, taken.lines))
        if rng.random() < 0.2:
            feeder.cut()
        elif done and not written(taken):
            break
    assert out == replayed(case.lines)
    assert sorted(asides) == asides_of(case.lines)
    assert feeder.merger.empty
    assert [source.position() for source in feeder.merger.sources] == [
        Position(messages[-1].offset + 1, 0) for messages in case.messages
    ]




def messages(*values: bytes, first: int = 0) -> list[Raw]:
    return [Raw(first + number, NOW, value) for number, value in enumerate(values)]


def merger(watch: list[Raw], other: list[Raw]) -> Merger:
    made = Merger()
    made.sources[0].add(watch, RULES)
    made.sources[1].add(other, RULES)
    return made


def test_a_source_that_may_have_more_is_waited_for() -> None:
    made = merger(messages(event(5), event(9)), messages(event(7)))
    assert made.take(100, (False, False)).lines == [event(5), event(7)]
    made.sources[1].add(messages(event(8), first=1), RULES)
    assert made.take(100, (False, False)).lines == [event(8)]
    assert not made.empty


def test_an_idle_source_is_left_out_until_it_has_something() -> None:
    made = merger(messages(event(5), event(9)), [])
    assert made.take(100, (True, False)).lines == []
    assert made.take(1, (False, True)).lines == [event(5)]
    made.sources[1].add(messages(event(7)), RULES)
    assert made.take(100, (False, True)).lines == [event(7), event(9)]


def test_what_is_no_event_is_taken_at_once_while_events_wait() -> None:
    made = merger(messages(b"no JSON\n" + event(5) + b"\n{}", b"[]"), [])
    taken = made.take(100, (False, False))
    assert (taken.lines, [(a.offset, a.number, a.detail) for a in taken.asides]) == ([], [(0, 0, "not_json")])
    assert made.sources[0].position() == Position(0, 1)
    taken = made.take(100, (False, True))
    assert [(a.offset, a.number, a.detail) for a in taken.asides] == [(0, 2, "bad_type"), (1, 0, "not_json")]


def test_an_end_marker_is_written_once_both_sources_have_passed_theirs() -> None:
    made = merger(messages(event(5), END, event(1)), messages(event(7)))
    taken = made.take(100, (False, False))
    assert (taken.lines, taken.end) == ([event(5), event(7)], False)
    made.sources[1].add(messages(event(8), END, event(3), first=1), RULES)
    taken = made.take(100, (False, False))
    assert (taken.lines, taken.end) == ([event(8)], True)
    assert made.take(100, (False, False)).lines == [event(1)]
    assert [source.position() for source in made.sources] == [Position(3), Position(3)]


def test_an_end_marker_in_one_topic_alone_holds_nothing_up_for_ever() -> None:
    made = merger(messages(END), messages(event(7)))
    assert made.take(100, (True, True)).lines == [event(7)]
    assert made.held() and not made.empty
    made.sources[0].add(messages(event(9), first=1), RULES)
    assert made.take(100, (False, False)).lines == []
    taken = made.take(100, (False, True))
    assert (taken.lines, taken.end, made.ended) == ([event(9)], False, [True, False])
    made.sources[1].add(messages(END, first=1), RULES)
    assert made.take(100, (False, False)).end
    assert made.ended == [False, False]


def test_the_room_bounds_what_is_taken_and_nothing_is_skipped() -> None:
    made = merger(messages(b"\n".join(event(n, n) for n in range(100)), END), messages(END))
    taken = [made.take(7, (False, False)) for _ in range(16)]
    assert all(len(part.lines) <= 7 for part in taken)
    assert [line for part in taken for line in written(part)] == [*(event(n, n) for n in range(100)), END]


def test_moved_lines_and_items_name_their_owner_and_place() -> None:
    item = b'{"type":"item","item_id":"v","ts":%d}' % MIN_TS
    made = merger(messages(b"\n" + event(1, user=THERE) + b"\n" + item, first=4), [])
    made.sources[0].start = Position(4)
    found = made.take(10, (False, False)).asides
    assert [(a.kind, a.detail, a.topic, a.offset, a.number, a.raw) for a in found] == [
        ("moved", THERE, "watch", 4, 1, event(1, user=THERE)), ("item", "v", "watch", 4, 2, item),
    ]


def test_memory_held_is_told_and_given_back() -> None:
    made = merger(messages(event(1), event(2)), messages(event(3)))
    assert made.sources[0].size > len(event(1)) * 2
    made.take(10, (False, False))
    assert made.sources[0].size == 0 < made.sources[1].size


def test_a_batch_cut_short_by_the_room_stays_in_order_before_a_source_that_came_back() -> None:
    made = merger(messages(event(30) + b"\n" + event(5) + b"\n" + event(40)), [])
    assert made.take(1, (False, True)).lines == [event(30)]
    made.sources[1].add(messages(event(7), event(35)), RULES)
    assert made.take(100, (False, False)).lines == [event(5), event(7), event(35)]


NOTHING = b""
"""Stands for whatever is no event; it is taken at once."""


class OneByOne:
    """The rule of the module's docstring, line by line: what `Merger` must agree with, whatever is idle when."""

    def __init__(self) -> None:
        self.queues: tuple[list[bytes], list[bytes]] = ([], [])
        self.ended = [False, False]

    def take(self, idle: tuple[bool, bool]) -> list[bytes]:
        out: list[bytes] = []
        while True:
            for queue in self.queues:
                while queue and queue[0] == NOTHING:
                    queue.pop(0)
            heads = [queue[0] if queue else None for queue in self.queues]
            times = [None if head is None or head == END else time_of(head) for head in heads]
            if times[0] is not None and times[1] is not None:
                turn = 0 if times[0] <= times[1] else 1
            elif times[0] is not None and (heads[1] == END or idle[1]):
                turn = 0
            elif times[1] is not None and (heads[0] == END or idle[0]):
                turn = 1
            else:
                if heads == [END, END] or (END in heads and self.ended[1 - heads.index(END)]):
                    for queue, head in zip(self.queues, heads, strict=True):
                        if head == END:
                            queue.pop(0)
                    self.ended = [False, False]
                    out.append(END)
                    continue
                stuck = next((n for n in (0, 1) if heads[n] == END and idle[1 - n] and len(self.queues[n]) > 1), None)
                if stuck is None:
                    return out
                self.queues[stuck].pop(0)
                self.ended[stuck] = True
                continue
            out.append(self.queues[turn].pop(0))


@given(cases(), st.integers(0, 1 << 30))
@settings(max_examples=200, deadline=None)
def test_what_the_clock_decides_changes_the_order_as_one_line_at_a_time_would(case: Case, seed: int) -> None:
    rng, feeder, model = random.Random(seed), Feeder(case), OneByOne()
    for _ in range(200):
        source = rng.randrange(2)
        before = feeder.given[source]
        feeder.give(source, rng.randrange(4))
        for message in feeder.messages[source][before : feeder.given[source]]:
            model.queues[source].append(NOTHING)
            model.queues[source].extend(line for line in message.value.split(b"\n") if line == END or is_event(line))
        idle = (rng.random() < 0.3, rng.random() < 0.3)
        out: list[bytes] = []
        while found := written(feeder.merger.take(rng.choice((1, 3, 100)), idle)):
            out += found
        assert out == model.take(idle)
        assert feeder.merger.ended == model.ended
        if feeder.done and feeder.merger.empty:
            break
        if rng.random() < 0.1:
            given = list(feeder.given)
            feeder.cut()
            for number in (0, 1):
                feeder.give(number, given[number] - feeder.given[number])
