"""`PartitionStore` against a real broker: whatever step a process dies at, the log ends up as one undisturbed core makes it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import orjson
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from reference_log import Shape, lines

from onerec.errors import Failure, UserError
from streaming.core import Core
from streaming.kafka import settings, topics, wire
from streaming.kafka.partitions import Fenced, Gap, PartitionStore
from streaming.kafka.settings import KafkaConfig
from streaming.semantics import Semantics, SessionConfig
from streaming.sessions import session_json
from streaming.state import history_of

SEMANTICS = Semantics(session=SessionConfig(gap_ms=120_000, max_ms=1_200_000, max_items=40))
STEPS = ("open:fence", "open:catch-up", "begin", "produce", "commit", "write")
NOW = 1_900_000_000_000

Make = Callable[..., KafkaConfig]


class Died(BaseException):
    """Stands for the end of the process at this point: nothing of it runs on."""


class World:
    """What a log makes: sessions in order, histories, counters."""

    def __init__(self, sessions: list[bytes], histories: dict[str, list[str]], counters: object, watermark: int | None) -> None:
        self.sessions, self.histories, self.counters, self.watermark = sessions, histories, counters, watermark

    def __eq__(self, other: object) -> bool:
        return isinstance(other, World) and vars(self) == vars(other)


def chunks(found: Iterable[bytes], sizes: Sequence[int] = (7, 1, 30)) -> list[wire.Chunk]:
    """Packed messages with holes between their offsets, as transactions leave them; the last is the end marker."""
    rng, left, made = random.Random(3), list(found), []
    offset = 0
    while left:
        size = rng.choice(sizes)
        part, left = left[:size], left[size:]
        made.append(wire.Chunk(offset, NOW, wire.pack(part), len(made)))
        offset += rng.choice((1, 2))
    return [*made, wire.Chunk(offset, NOW, wire.END, len(made))]


def embedded(found: Iterable[wire.Chunk]) -> World:
    """One core over all, with nothing in its way."""
    core, users, sessions = Core(SEMANTICS), {}, []

    def keep(changes: object) -> None:
        sessions.extend(session_json(session) for session in changes.sessions)
        for user_id, (live, base) in changes.users.items():
            users[user_id] = (live, base if base is not None else users[user_id][1])

    for chunk in found:
        if chunk.value == wire.END:
            keep(core.changes())
            for changes in core.flush():
                keep(changes)
        elif (ts := wire.marker_time(chunk.value)) is not None:
            core.advance(ts)
        else:
            keep(core.apply(((None, line) for line in wire.unpack(chunk.value)), NOW))
    histories = {user_id: history_of(live, base, SEMANTICS.history.length) for user_id, (live, base) in users.items()}
    return World(sessions, histories, core.counters, core.watermark)


def read(config: KafkaConfig, topic: str, partition: int = 0) -> list[object]:
    """Every committed record of a partition."""
    consumer = Consumer(settings.consumer(config, group_id="look", enable_partition_eof=True))
    consumer.assign([TopicPartition(config.named(topic), partition, 0)])
    found: list[object] = []
    try:
        while True:
            for message in consumer.consume(1_000, 0.1):
                if message.error() is not None:
                    return found
                found.append(message)
    finally:
        consumer.close()


def on_kafka(config: KafkaConfig, partition: int = 0) -> World:
    """What `sessions` and `histories` hold; every session exactly once, in the order of its position."""
    sessions = []
    for number, message in enumerate(read(config, "sessions", partition), 1):
        value = orjson.loads(message.value())
        assert value.pop("position") == [partition, number]
        assert message.key() == value["user_id"].encode()
        sessions.append(orjson.dumps(value))
    newest = {message.key(): message.value() for message in read(config, "histories", partition)}
    progress = wire.decode_progress(newest.pop(wire.PROGRESS_KEY), "here")
    assert progress.sessions == len(sessions)
    histories = {}
    for key, base in newest.items():
        if key[:1] == b"b":
            live = newest[b"l" + key[1:]]
            histories[key[1:].decode()] = history_of(
                None if live == wire.NOTHING else live, base, SEMANTICS.history.length
            )
    return World(sessions, histories, progress.counters, progress.watermark)


def rest(found: Sequence[wire.Chunk], offset: int) -> Iterator[list[wire.Chunk]]:
    """Batches of what is left, a few messages each."""
    left = [chunk for chunk in found if chunk.offset >= offset]
    for place in range(0, len(left), 9):
        yield left[place : place + 9]


@pytest.fixture(scope="module")
def log() -> list[wire.Chunk]:
    return chunks(lines(Shape(users=150, minutes=30, seed=5)))


@pytest.fixture(scope="module")
def world(log: list[wire.Chunk]) -> World:
    return embedded(log)


def test_equals_the_embedded_core(cluster: Make, tmp_path: Path, log: list[wire.Chunk], world: World) -> None:
    config = cluster(1)
    with PartitionStore(tmp_path / "w", SEMANTICS, config) as store:
        assert store.open([0]) == {0: 0}
        for batch in rest(log, 0):
            store.apply(0, batch)
        store.settle()
        assert store.progress(0).ended and store.progress(0).offset == log[-1].offset + 1
    assert on_kafka(config) == world
    letters = read(config, "dead-letters")
    assert len(letters) == world.counters.dead_letters > 0
    by_offset = {chunk.offset: wire.unpack(chunk.value) for chunk in log[:-1]}
    for letter in letters:
        headers = dict(letter.headers())
        topic, partition, offset, line = headers["source"].decode().split(":")
        assert (topic, partition) == ("events", "0") and headers["reason"]
        assert by_offset[int(offset)][int(line)] == letter.value()


@pytest.mark.parametrize("step", STEPS)
def test_a_death_at_any_step_changes_nothing(
    cluster: Make, tmp_path: Path, log: list[wire.Chunk], world: World, step: str
) -> None:
    config, rng = cluster(1), random.Random(step)
    # Two lives on one disk, one on an empty one, then the first disk again, stale by then.
    disks = iter(["a", "a", "b", "a", "b"])
    lives = 0
    while True:
        lives += 1
        left = (1 if step.startswith("open") else rng.randrange(1, 5)) if lives < 5 else None

        def die(now: str, partition: int, step: str = step) -> None:
            nonlocal left
            if now == step and left is not None:
                left -= 1
                if left <= 0:
                    raise Died

        store = PartitionStore(tmp_path / next(disks), SEMANTICS, config, on_step=die)
        try:
            for batch in rest(log, store.open([0])[0]):
                store.apply(0, batch)
            store.settle()
            break
        except Died:
            store.close_all()
            continue
        finally:
            if left is None:
                store.close_all()
    assert lives == 5
    assert on_kafka(config) == world


def test_whoever_was_taken_over_from_writes_nothing(
    cluster: Make, tmp_path: Path, log: list[wire.Chunk], world: World
) -> None:
    config = cluster(1)
    batches = list(rest(log, 0))
    with PartitionStore(tmp_path / "a", SEMANTICS, config) as old, PartitionStore(tmp_path / "b", SEMANTICS, config) as new:
        old.open([0])
        for batch in batches[:5]:
            old.apply(0, batch)
        old.settle()
        assert new.open([0]) == {0: batches[4][-1].offset + 1}
        with pytest.raises(Fenced) as raised:
            for batch in batches[5:9]:
                old.apply(0, batch)
        assert raised.value.partition == 0 and old.opened == set()
        for batch in batches[5:]:
            new.apply(0, batch)
        new.settle()
        assert on_kafka(config) == world
        # Its local copy stopped at what it had committed, and is brought on from there.
        assert old.open([0]) == {0: log[-1].offset + 1}
        with pytest.raises(Fenced):
            new.apply(0, [wire.Chunk(log[-1].offset + 5, NOW, wire.END, None)])
            new.settle()
    assert on_kafka(config) == world


def test_repeats_are_skipped_and_holes_asked_for(
    cluster: Make, tmp_path: Path, log: list[wire.Chunk], world: World
) -> None:
    config, rng = cluster(1), random.Random(1)
    with PartitionStore(tmp_path / "w", SEMANTICS, config) as store:
        place = store.open([0])[0]
        while place <= log[-1].offset:
            at = next(i for i, chunk in enumerate(log) if chunk.offset >= place)
            with pytest.raises(Gap) as raised:
                store.apply(0, log[at + 1 : at + 3] or [wire.Chunk(10**6, NOW, wire.END, len(log) + 3)])
            assert raised.value.offset == place
            begin = max(0, at - rng.randrange(4))
            store.apply(0, log[begin : at + rng.randrange(1, 20)])
            store.settle()
            place = store.progress(0).offset
    assert on_kafka(config) == world


def test_time_markers_make_sessions_final(cluster: Make, tmp_path: Path) -> None:
    config, t0 = cluster(1), 1_700_000_000_000
    event = b'{"type":"watch","user_id":"u","item_id":"i","ts":%d,"watch_ms":9000,"duration_ms":9000}' % t0
    late = t0 + 300_000 + 120_000
    found = [
        wire.Chunk(0, NOW, event, 0),
        wire.Chunk(1, NOW, wire.time_marker(late), 1),
        wire.Chunk(2, NOW, wire.time_marker(t0), 2),
    ]
    with PartitionStore(tmp_path / "w", SEMANTICS, config) as store:
        store.open([0])
        store.apply(0, found)
        store.settle()
        assert (store.progress(0).watermark, store.progress(0).sessions) == (late - 300_000, 0)
        store.apply(0, [wire.Chunk(3, NOW, wire.time_marker(late + 1), 3)])
        store.settle()
        assert (store.progress(0).sessions, store.progress(0).counters.events) == (1, 1)
    assert [orjson.loads(message.value())["session_id"] for message in read(config, "sessions")] == [f"u:{t0}"]


def test_a_standby_copy_follows_and_never_overwrites(
    cluster: Make, tmp_path: Path, log: list[wire.Chunk], world: World
) -> None:
    config = cluster(1)
    batches = list(rest(log, 0))
    opened: list[str] = []
    with PartitionStore(tmp_path / "a", SEMANTICS, config) as first, PartitionStore(
        tmp_path / "b", SEMANTICS, config, on_step=lambda step, partition: opened.append(step)
    ) as second:
        first.open([0])
        for batch in batches[:6]:
            first.apply(0, batch)
        first.settle()
        second.standby([0], 0.5)
        # Taken over, worked on, given back: the follower must not put its older values over the newer ones.
        place = second.open([0])[0]
        for batch in rest(log, place):
            second.apply(0, batch[:5])
            break
        second.settle()
        second.close([0])
        second.standby([0], 0.5)
        place = second.open([0])[0]
        for batch in rest(log, place):
            second.apply(0, batch)
        second.settle()
    assert on_kafka(config) == world
    assert opened.count("open:fence") == 2


def test_another_value_format_is_refused_by_name(cluster: Make, tmp_path: Path) -> None:
    config = cluster(1)
    producer = Producer(settings.producer(config))
    producer.produce(config.named("histories"), b"\x07old", b"bu1", partition=0)
    producer.flush()
    with PartitionStore(tmp_path / "w", SEMANTICS, config) as store:
        with pytest.raises(Failure, match="offset 0: a value of format 07"):
            store.open([0])


def test_a_changelog_made_anew_is_not_the_one_before(
    cluster: Make, tmp_path: Path, log: list[wire.Chunk], world: World
) -> None:
    config = cluster(1)
    with PartitionStore(tmp_path / "w", SEMANTICS, config) as store:
        store.open([0])
        store.apply(0, log[:40])
        store.settle()
    admin = topics.admin(config)
    for future in admin.delete_topics([config.named("histories"), config.named("sessions")]).values():
        future.result(90)
    topics.create(config)
    with PartitionStore(tmp_path / "w", SEMANTICS, config) as store:
        assert store.open([0]) == {0: 0}
        store.apply(0, log)
        store.settle()
    assert on_kafka(config) == world


def test_other_settings_or_partitions_are_refused(cluster: Make, tmp_path: Path) -> None:
    config = cluster(2)
    PartitionStore(tmp_path / "w", SEMANTICS, config).close_all()
    with pytest.raises(UserError, match="session.gap_ms is 120000, asked 1800000"):
        PartitionStore(tmp_path / "w", Semantics(), config)
    with pytest.raises(UserError, match="has 2 partitions, kafka.partitions is 4"):
        PartitionStore(tmp_path / "w", SEMANTICS, msgspec.structs.replace(config, partitions=4))
    PartitionStore(tmp_path / "w", SEMANTICS, config).close_all()


def test_a_session_survives_its_message(cluster: Make, tmp_path: Path, log: list[wire.Chunk]) -> None:
    config = cluster(1)
    with PartitionStore(tmp_path / "w", SEMANTICS, config) as store:
        store.open([0])
        store.apply(0, log)
        store.settle()
    core, expected = Core(SEMANTICS), []
    for chunk in log[:-1]:
        expected += core.apply(((None, line) for line in wire.unpack(chunk.value)), NOW).sessions
    for changes in core.flush():
        expected += changes.sessions
    found = [wire.decode_session_message(message.value(), message.headers())[0] for message in read(config, "sessions")]
    assert found == expected
