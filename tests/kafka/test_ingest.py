"""`ingest` on a real broker: `events` holds every valid line once, in the order of the replay's merge."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
from comparison import Tail
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from patience import PATIENCE
from reference_log import BROKEN, Shape, lines, write
from stack import Process

from onerec.config import Config, StreamSettings
from onerec.errors import Failure, UserError
from streaming.cursors import Cursor, next_cursor
from streaming.events import Line
from streaming.kafka import settings, topics
from streaming.kafka.broker import Broker
from streaming.kafka.ingest import Ingest
from streaming.kafka.lane import Counts
from streaming.kafka.outbox import Decisions, Outbox, wait_decided
from streaming.kafka.partitioning import partition_of
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import END, marker_time
from streaming.sources import Batch

pytestmark = pytest.mark.timeout(900)

Cluster = Callable[..., KafkaConfig]
T0 = 1_700_000_000_000


def configured(kafka: KafkaConfig, idle_ms: int = 5_000) -> Config:
    return Config(kafka=kafka, stream=StreamSettings(idle_ms=idle_ms))


def user(partition: int, partitions: int) -> str:
    return next(f"u{n}" for n in range(10_000) if partition_of(f"u{n}", partitions, "crc32") == partition)


def like(ts: int, user_id: str, item: object = "i") -> bytes:
    return orjson.dumps({"type": "like", "user_id": user_id, "item_id": str(item), "ts": T0 + ts})


def watch(ts: int, user_id: str, item: object = "i") -> bytes:
    fields = {"type": "watch", "user_id": user_id, "item_id": str(item), "ts": T0 + ts, "watch_ms": 1, "duration_ms": 2}
    return orjson.dumps(fields)


class Raw:
    """A producer as sites have them: no transactions, any partition, any bytes."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._producer = Producer(settings.producer(config))

    def put(self, topic: str, partition: int, value: bytes | None, **named: Any) -> None:
        self._producer.produce(self._config.named(topic), value, partition=partition, **named)

    def flush(self) -> None:
        assert self._producer.flush(90) == 0

    def end(self) -> None:
        for topic in ("watch", "interactions", "items"):
            for partition in range(self._config.partitions):
                self.put(topic, partition, END)
        self.flush()


def drained(config: Config) -> Counts:
    """One run to the end markers."""
    return Ingest(config).run(until_end=True)


def members(config: KafkaConfig) -> int:
    """Of the consumer group."""
    admin, group = topics.admin(config), config.named("ingest")
    try:
        return len(admin.describe_consumer_groups([group])[group].result(90).members)
    except KafkaException:
        return 0


@contextmanager
def running(config: Config) -> Iterator[Ingest]:
    """An instance in a thread; stopped at exit, its errors raised here."""
    job = Ingest(config)
    faults: list[BaseException] = []

    def run() -> None:
        try:
            job.run()
        except BaseException as fault:  # noqa: BLE001 - handed over to the test
            faults.append(fault)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield job
    finally:
        job.stop()
        thread.join(30)
        assert not thread.is_alive()
    if faults:
        raise faults[0]


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + PATIENCE * seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def messages(config: KafkaConfig, topic: str) -> dict[int, list[Any]]:
    """Committed messages by partition."""
    found: dict[int, list[Any]] = {p: [] for p in range(config.partitions)}
    with Tail(config, topic) as tail:
        for message in tail.rest():
            found[message.partition()].append(message)
    return found


def events(config: KafkaConfig) -> dict[int, list[bytes]]:
    """Lines of `events` by partition, markers among them; message numbers are checked."""
    found = {}
    for partition, part in messages(config, "events").items():
        assert [dict(message.headers())["n"] for message in part] == [b"%d" % n for n in range(len(part))]
        for message in part:
            rows = message.value().split(b"\n")
            assert len(rows) <= 200 and (len(rows) == 1 or len(message.value()) <= 256 << 10)
        found[partition] = [line for message in part for line in message.value().split(b"\n")]
    return found


class Lines:
    """Lines as a source of the replay."""

    def __init__(self, found: list[bytes]) -> None:
        self.found = found

    def batches(self, max_ts: object) -> Iterator[Batch]:
        yield Batch(1, self.found, sum(len(line) + 1 for line in self.found))


def merged(config: KafkaConfig) -> dict[int, list[bytes]]:
    """What `events` has to hold: the replay's merge of each partition's topics, then the end."""
    raw = {topic: messages(config, topic) for topic in ("watch", "interactions")}
    wanted = {}
    for partition in range(config.partitions):
        sources: list[Any] = [
            Lines([line for m in raw[topic][partition] if m.value() != END for line in m.value().split(b"\n")]) for topic in raw
        ]
        cursors = [Cursor(source, lambda: 1 << 60) for source in sources]
        out = []
        while (cursor := next_cursor(cursors)) is not None:
            row = cursor.take().record[1]
            out += [row.raw for found in row.events if isinstance(found, Line)]
        wanted[partition] = [*out, END]
    return wanted


def produced(config: KafkaConfig, folder: Path, shape: Shape, *options: str) -> Process:
    """`onerec produce` of a log with broken lines, started."""
    found = [line for n, line in enumerate(lines(shape)) for line in ([line, BROKEN[n % 4]] if n % 200 == 0 else [line])]
    write(folder / "log.jsonl", found)
    words = [str(folder / "log.jsonl"), "--end", *options, *words_of(config)]
    return Process("produce", ["produce", *words], folder / "produce.log").start()


def words_of(config: KafkaConfig, *values: str) -> list[str]:
    found = [f"kafka.prefix={config.prefix}", f"kafka.partitions={config.partitions}", *values]
    return ["--bootstrap", config.bootstrap, *(word for value in found for word in ("--set", value))]


@pytest.mark.parametrize("pack", [1, 40])
def test_events_of_a_partition_are_the_replays_merge_of_its_topics(pack: int, cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(partitions=3)
    produced(config, tmp_path, Shape(users=250, minutes=15), "--pack", str(pack)).result(60)
    counts = drained(configured(config))
    found = events(config)
    assert found == merged(config)
    assert counts.events == sum(map(len, found.values())) - config.partitions > 2_000
    letters = messages(config, "dead-letters")[0]
    assert counts.dead_letters == len(letters) > 0
    read = {topic: messages(config, topic) for topic in ("watch", "interactions")}
    for letter in letters:
        headers = dict(letter.headers())
        topic, partition, offset, number = headers["source"].decode().split(":")
        assert headers["reason"] in (b"not_json", b"bad_user_id", b"bad_type", b"bad_ts")
        raw = {message.offset(): message.value() for message in read[topic][int(partition)]}
        assert raw[int(offset)].split(b"\n")[int(number)] == letter.value()


@pytest.mark.slow
def test_instances_killed_at_any_moment_write_every_line_once_and_in_order(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(partitions=4, session_timeout_ms=3_000)
    words = words_of(config, "stream.idle_ms=600000", "kafka.session_timeout_ms=3000", "kafka.linger_ms=10")
    pair = [Process(f"ingest{n}", ["ingest", *words], tmp_path / f"ingest{n}.log").start() for n in range(2)]
    source = produced(config, tmp_path, Shape(users=300, minutes=20), "--pack", "5", "--speed", "60")
    try:
        kills = 0
        while source.running:
            time.sleep(0.4 + 0.37 * (kills % 5))
            pair[kills % 2].kill()
            pair[kills % 2].start()
            kills += 1
        assert kills > 5 and source.exits == [0]
        pair[0].kill()
        pair[1].kill()
        pair[0].start("--until-end").result(60)
    finally:
        for process in (*pair, source):
            process.kill()
    assert events(config) == merged(config)


def test_a_commit_that_readers_do_not_see_yet_is_waited_for(cluster: Cluster) -> None:
    config = cluster(partitions=1)
    names, place = ["events"], TopicPartition(config.named("events"), 0)
    asked = Decisions(config, names)
    reader = Consumer(settings.consumer(config, group_id="ends"))
    producer = Producer(settings.producer(config, transactional_id=config.named("test")))
    producer.init_transactions(60)
    early = 0
    for number in range(1, 101):
        producer.begin_transaction()
        producer.produce(config.named("events"), b"line", partition=0)
        producer.flush(60)
        assert asked.pending()
        producer.commit_transaction(60)
        early += reader.get_watermark_offsets(place, timeout=60)[1] < 2 * number
        wait_decided(config, names)
        assert not asked.pending() and reader.get_watermark_offsets(place, timeout=60)[1] == 2 * number
    reader.close()
    # Else this test shows nothing: a commit is answered before its marker is in the topic, here one in two to five times.
    assert early > 0


def test_a_quiet_topic_is_left_out_and_a_quiet_partition_gets_the_newest_event_time(cluster: Cluster) -> None:
    config = cluster(partitions=2)
    raw = Raw(config)
    busy, other = user(0, 2), user(1, 2)
    with running(configured(config, idle_ms=600)) as job:
        raw.put("watch", 0, watch(5, busy) + b"\n" + watch(9, busy))
        raw.put("watch", 1, watch(1, other))
        raw.flush()
        until(lambda: job.counts.events == 3 and job.counts.markers == 1)
        raw.put("watch", 0, watch(20, busy))
        raw.flush()
        until(lambda: job.counts.markers == 2)
        # Nothing new: time stands still, and so do the markers.
        time.sleep(2)
        assert job.counts.markers == 2
    found = events(config)
    assert found[0] == [watch(5, busy), watch(9, busy), watch(20, busy)]
    assert found[1][0] == watch(1, other) and [marker_time(line) for line in found[1][1:]] == [T0 + 9, T0 + 20]
    # The next instance knows what was newest, and does not say it again.
    with running(configured(config, idle_ms=300)) as job:
        raw.put("watch", 1, watch(30, other))
        raw.flush()
        until(lambda: job.counts.markers == 1)
    assert [marker_time(line) for line in events(config)[0][3:]] == [T0 + 30]
    assert events(config)[1][3:] == [watch(30, other)]


def test_misplaced_and_broken_input_stops_nothing_and_loses_nothing(cluster: Cluster) -> None:
    config = cluster(partitions=3)
    raw = Raw(config)
    users = [user(p, 3) for p in range(3)]
    item = orjson.dumps({"type": "item", "item_id": "v1", "ts": T0, "embedding": [0.5, 1.0]})
    big = orjson.dumps({"type": "like", "user_id": users[0], "item_id": "big", "ts": T0 + 3, "x": "y" * 1_000_000})
    stamp = T0 + 86_400_000
    raw.put("watch", 0, b"\xff\xfe\x00", key=b"\xff")
    raw.put("watch", 0, None, key=b"k")
    raw.put("watch", 0, b"")
    raw.put("watch", 0, b"\n".join([watch(1, users[0]), watch(2, users[1]), b"", watch(3, users[2]), item]), timestamp=stamp)
    raw.put("interactions", 0, big)
    raw.put("interactions", 0, b"z" * ((1 << 20) + 1))
    raw.put("interactions", 1, like(4, users[1]) + b"\r\n \t\n" + like(5, users[0]))
    raw.put("items", 2, item.replace(b"v1", b"v2") + b"\n{}\n" + like(6, users[2]))
    raw.put("items", 1, None)
    raw.end()
    counts = drained(configured(config, idle_ms=500))
    assert msgspec.structs.asdict(counts) == {
        "events": 7, "dead_letters": 3, "rerouted": 4, "items": 2, "markers": 0, "empty": 3,
        "reasons": {"not_json": 1, "too_long": 1, "bad_type": 1},
    }
    found = events(config)
    assert sorted(line for line in found[0] if line != END) == sorted([watch(1, users[0]), big, like(5, users[0])])
    assert sorted(line for line in found[1] if line != END) == sorted([watch(2, users[1]), like(4, users[1]) + b"\r"])
    assert sorted(line for line in found[2] if line != END) == sorted([watch(3, users[2]), like(6, users[2])])
    # What came behind the end marker from another partition is covered by one more.
    assert all(lines[-1] == END for lines in found.values())
    moved = [m for part in messages(config, "watch").values() for m in part if m.headers()]
    assert {(m.partition(), m.key().decode(), m.value()): m.timestamp()[1] == stamp for m in moved} == {
        (1, users[1], watch(2, users[1])): True, (2, users[2], watch(3, users[2])): True,
    }
    with Tail(config, "catalogue") as tail:
        assert {m.key(): m.value() for m in tail.rest()} == {b"v1": item, b"v2": item.replace(b"v1", b"v2")}
    letters = {(dict(m.headers())["reason"], m.value()[:3]) for m in messages(config, "dead-letters")[0]}
    assert letters == {(b"not_json", b"\xff\xfe\x00"), (b"too_long", b"zzz"), (b"bad_type", b"{}")}


def test_an_instance_that_was_fenced_drops_what_it_held_and_comes_back(cluster: Cluster) -> None:
    config = cluster(partitions=2, session_timeout_ms=3_000, linger_ms=1_000)
    raw = Raw(config)
    users = [user(p, 2) for p in range(2)]
    with running(configured(config, idle_ms=300)) as job:
        for n in range(4):
            for partition in range(2):
                raw.put("watch", partition, watch(n, users[partition]))
            raw.flush()
            until(lambda: job.counts.events >= 2 * n)  # noqa: B023
            if n == 1:
                zombie = Producer(settings.producer(config, transactional_id=config.named("ingest-0")))
                zombie.init_transactions(90)
        until(lambda: job.counts.events == 8)
    found = events(config)
    for partition in range(2):
        lines = [line for line in found[partition] if marker_time(line) is None]
        assert lines == [watch(n, users[partition]) for n in range(4)]


def test_a_time_ahead_of_its_record_is_refused_by_the_records_time(cluster: Cluster) -> None:
    config = cluster(partitions=1)
    raw = Raw(config)
    raw.put("watch", 0, watch(60_000, "u") + b"\n" + watch(60_001, "u"), timestamp=T0)
    raw.end()
    assert drained(configured(config)).events == 1
    assert events(config)[0] == [watch(60_000, "u"), END]


def test_offsets_that_kafka_forgot_end_it_with_the_way_out(cluster: Cluster) -> None:
    config = cluster(partitions=1)
    raw = Raw(config)

    def forget(offset: int) -> None:
        admin = topics.admin(config)
        places = [TopicPartition(config.named("watch"), 0, offset)]
        for future in admin.delete_records(places).values():
            future.result(90)

    for n in range(5):
        raw.put("watch", 0, watch(n, "u", n))
    raw.flush()
    forget(2)
    # The first start begins where the log does.
    with running(configured(config, idle_ms=300)) as job:
        until(lambda: job.counts.events == 3)
    for n in range(5, 9):
        raw.put("watch", 0, watch(n, "u", n))
    raw.flush()
    forget(7)
    with pytest.raises(Failure, match=r"forgotten offsets of .*watch, partition 0.*retention"):
        Ingest(configured(config)).run(until_end=True)
    until(lambda: not members(config))
    admin = topics.admin(config)
    for future in admin.delete_consumer_groups([config.named("ingest")]).values():
        future.result(90)
    with pytest.raises(Failure, match=r"no offsets for partition 0, but .*events has been written"):
        Ingest(configured(config)).run(until_end=True)


def test_offsets_of_another_program_are_refused(cluster: Cluster) -> None:
    config = cluster(partitions=1)
    places = [TopicPartition(config.named(name), 0, 0) for name in ("watch", "interactions", "items")]
    other = Consumer(settings.consumer(config, group_id=config.named("ingest")))
    other.commit(offsets=places, asynchronous=False)
    other.close()
    with pytest.raises(Failure, match="written by another program"):
        Ingest(configured(config)).run(until_end=True)


def test_topics_that_are_missing_are_named(broker: Broker) -> None:
    with pytest.raises(UserError, match=r"nothing-here-watch.*onerec topics --create"):
        Ingest(configured(KafkaConfig(bootstrap=broker.bootstrap, prefix="nothing-here-")))


def test_a_members_partitions_of_all_topics_are_the_same(cluster: Cluster) -> None:
    config = cluster(partitions=5)
    with running(configured(config)) as first, running(configured(config)) as second:
        until(lambda: {len(first.partitions), len(second.partitions)} == {2, 3})
        assert sorted(first.partitions + second.partitions) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_time_in_which_the_broker_does_not_answer_makes_no_topic_idle(kafka_tools: None, tmp_path: Path) -> None:
    with Broker(tmp_path / "kafka") as broker:
        config = KafkaConfig(bootstrap=broker.bootstrap, partitions=1)
        topics.create(config)
        raw = Raw(config)
        # Long enough for a slow machine to come from the first message to the stop before the topic counts as idle.
        with running(configured(config, idle_ms=12_000)) as job:
            until(lambda: job.partitions == [0], 60)
            lane = job._lanes[0]
            raw.put("interactions", 0, like(1, "u"))
            raw.put("watch", 0, watch(10, "u"))
            raw.flush()
            # The watch waits for what the other topic may have next.
            until(lambda: job.counts.events == 1)
            os.kill(broker.pid, signal.SIGSTOP)
            try:
                time.sleep(14)
                assert not lane.merger.empty and not lane.busy
            finally:
                os.kill(broker.pid, signal.SIGCONT)
            until(lambda: job.counts.events == 2, 90)
        assert events(config)[0] == [like(1, "u"), watch(10, "u")]


def test_a_backfill_after_a_quiet_time_is_merged_and_marks_nobody_late(cluster: Cluster) -> None:
    config = cluster(partitions=6)
    users = [user(partition, 6) for partition in range(6)]
    with running(configured(config, idle_ms=1_000)) as job:
        until(lambda: len(job.partitions) == 6)
        time.sleep(2)
        # A week in one transaction, as `produce` writes it: every partition has been idle for long when it comes.
        with Outbox(config, "backfill") as outbox:
            for hour in range(7 * 24):
                for partition, name in enumerate(users):
                    outbox.put("watch", partition, name, watch(hour * 3_600_000, name))
                    outbox.put("interactions", partition, name, like(hour * 3_600_000 + 1, name))
            outbox.commit({})
            outbox.settle()
        until(lambda: sum(len(part) for part in events(config).values()) >= 6 * 7 * 24 * 2)
    for part in events(config).values():
        times = [marker_time(line) or orjson.loads(line)["ts"] for line in part]
        assert times == sorted(times)


def test_the_command_prints_one_line_of_json(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(partitions=1)
    raw = Raw(config)
    raw.put("watch", 0, watch(1, "u"))
    raw.end()
    process = Process("ingest", ["ingest", "--json", *words_of(config)], tmp_path / "ingest.log").start("--until-end")
    summary = orjson.loads(process.result(60).splitlines()[-1])
    assert list(summary) == [
        "events", "dead_letters", "rerouted", "items", "markers", "empty", "seconds", "events_per_second",
    ]
    assert (summary["events"], summary["dead_letters"]) == (1, 0)


def test_sigterm_is_a_clean_stop(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(partitions=1)
    process = Process("ingest", ["ingest", *words_of(config)], tmp_path / "ingest.log").start()
    until(lambda: members(config))
    assert process.stop() == 0
    assert not members(config)
