"""`onerec histories-replica` on a real broker: what workers know of users, seconds later on a serving host."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from feeding import T0, Worker
from patience import PATIENCE
from reference_log import SETTINGS, Shape, onerec, reference, write
from reference_log import lines as log_lines
from test_feed import command, fed, forget

from onerec.config import load_config
from onerec.errors import Failure, UserError
from serving_config.recommend.histories import Histories
from streaming.events import WATCH
from streaming.kafka import topics
from streaming.kafka.partitioning import partition_of
from streaming.kafka.partitions import PartitionStore
from streaming.kafka.replica import Replica
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import END, NOTHING, PROGRESS_KEY, Chunk, pack
from streaming.state import KNOWN, RECENT, Event, encode_base, encode_live
from streaming.store import Reader

Cluster = Callable[..., KafkaConfig]


@pytest.fixture
def config(cluster: Cluster) -> KafkaConfig:
    return cluster(partitions=2, stall_seconds=3)


@pytest.fixture
def worker(config: KafkaConfig) -> Iterator[Worker]:
    with Worker(config) as worker:
        yield worker


def base(user: str, *items: str) -> tuple[bytes, bytes]:
    """The entry of a user's compacted history."""
    return b"b" + user.encode(), encode_base(True, {item: T0 + place for place, item in enumerate(items)})


def live(user: str, *items: str) -> tuple[bytes, bytes]:
    """The entry of positives that are newer than the compacted history; none of them: the entry that was removed."""
    events = [
        Event(WATCH, item, T0 + 1_000 + place, 9_000, 9_000, None, None, T0, RECENT | KNOWN) for place, item in enumerate(items)
    ]
    return b"l" + user.encode(), encode_live(T0, events) if events else NOTHING


def replicated(config: KafkaConfig, state: Path, said: list[str] | None = None) -> Replica:
    """Reads to the end; the replica is closed."""
    with Replica(config, state, say=(said if said is not None else []).append) as replica:
        deadline = time.monotonic() + PATIENCE * 30
        while replica.step() or not replica.finished():
            assert time.monotonic() < deadline, replica.status()
    return replica


def shorten(config: KafkaConfig, topic: str) -> None:
    """Sets the wrong cleanup policy: records are deleted for their age."""
    entry = ConfigEntry("cleanup.policy", "delete", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, config.named(topic), incremental_configs=[entry])
    admin = topics.admin(config)
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(90)


def histories(state: Path) -> dict[str, list[str]]:
    with Reader(state) as reader:
        return dict(reader.users())


def test_the_newest_entries_count_and_removed_ones_are_gone(config: KafkaConfig, worker: Worker, tmp_path: Path) -> None:
    worker.commit(0, pairs=[base("a", "i1"), live("a", "i2", "i3"), base("b", "i1")], watermark=4, users=2)
    worker.commit(0, pairs=[base("b", "wrong"), base("never", "i1")], watermark=90, users=5, abort=True)
    worker.commit(1, pairs=[base("ü:%", "i7"), live("ü:%", "i8")], watermark=9, users=1)
    with Replica(config, tmp_path / "state") as replica:
        deadline = time.monotonic() + PATIENCE * 30
        while replica.done.records < 5:
            replica.step()
            assert time.monotonic() < deadline, replica.status()
    assert histories(tmp_path / "state") == {"a": ["i1", "i2", "i3"], "b": ["i1"], "ü:%": ["i7", "i8"]}
    worker.commit(0, pairs=[base("a", "i1", "i2"), live("a")], watermark=5)
    worker.commit(0, pairs=[base("a", "i1", "i2", "i4")], watermark=6)
    worker.end()
    again = replicated(config, tmp_path / "state")
    assert again.done.records == 3
    assert histories(tmp_path / "state") == {"a": ["i1", "i2", "i4"], "b": ["i1"], "ü:%": ["i7", "i8"]}
    with Reader(tmp_path / "state") as reader:
        assert reader.counters().users == 3 and reader.counters().events == 6
        assert reader.watermark() == T0 + 6 * 60_000
    assert replicated(config, tmp_path / "new").done.records == 8
    assert histories(tmp_path / "new") == histories(tmp_path / "state")


def test_a_serving_host_sees_a_history_moments_after_it_was_written(
    config: KafkaConfig, worker: Worker, tmp_path: Path
) -> None:
    worker.commit(0, pairs=[base("a", "i1")], watermark=1, users=1)
    stop = threading.Event()
    with Replica(config, tmp_path / "state") as replica:
        replica.step()
        lookup = Histories(tmp_path / "state")
        threading.Thread(target=lambda: [replica.step() for _ in iter(stop.is_set, True)]).start()
        try:
            for number in range(2, 8):
                worker.commit(0, pairs=[live("a", *(f"i{k}" for k in range(2, number + 1)))], watermark=number)
                deadline = time.monotonic() + PATIENCE * 20
                while lookup.of("a") != [f"i{k}" for k in range(1, number + 1)]:
                    assert time.monotonic() < deadline, lookup.of("a")
                    time.sleep(0.01)
                    lookup.catch_up()
            assert lookup.of("unknown") is None
        finally:
            stop.set()
            lookup.close()
            time.sleep(0.3)
        status = replica.status()
    assert status["lag_ms"] == 0 and 0 < status["delay_p95_ms"] < 20_000


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        (b"ba", b"\x02" + base("a", "i1")[1][1:], "an entry of format 2, this version reads 1; run the version that wrote it"),
        (b"la", b"\x00\x00", "an entry of format 0"),
        (PROGRESS_KEY, b'{"partition":1,"version":2}', "progress of format 2, this version reads 1"),
        (PROGRESS_KEY, b"{}", "no progress record of onerec"),
    ],
    ids=["newer", "older", "progress", "no progress"],
)
def test_entries_of_another_version_are_refused_and_nothing_is_stored(
    config: KafkaConfig, worker: Worker, tmp_path: Path, key: bytes, value: bytes, fault: str
) -> None:
    worker.transaction([("histories", 1, *base("b", "i1"), None), ("histories", 1, key, value, None)])
    worker.end()
    with pytest.raises(Failure, match=rf"histories, partition 1, offset 1: {fault}"):
        replicated(config, tmp_path / "state")
    assert histories(tmp_path / "state") == {}


def test_foreign_records_are_left_out_and_told_of(config: KafkaConfig, worker: Worker, tmp_path: Path) -> None:
    strange: list[tuple[bytes | None, bytes | None]] = [(b"ba", None), (b"q", b"\x01"), (b"", b"\x01"), (b"ba", b"")]
    worker.transaction(("histories", 0, key, value, None) for key, value in strange)
    worker.commit(0, pairs=[base("a", "i1")], watermark=1, users=1)
    worker.end()
    said: list[str] = []
    replica = replicated(config, tmp_path / "state", said)
    assert replica.done.refused == len(said) == 4 and histories(tmp_path / "state") == {"a": ["i1"]}


def test_a_topic_shortened_or_made_anew_and_a_foreign_state_are_refused(
    config: KafkaConfig, worker: Worker, tmp_path: Path
) -> None:
    worker.commit(0, pairs=[base("a", "i1")], watermark=1, users=1)
    worker.end()
    replicated(config, tmp_path / "state")
    fed(config, tmp_path / "fed")
    with pytest.raises(UserError, match="holds what replay or feed wrote"):
        Replica(config, tmp_path / "fed")
    with pytest.raises(UserError, match="holds what replay or histories-replica wrote"):
        fed(config, tmp_path / "state")
    for number in range(4):
        worker.commit(0, pairs=[base("a", f"i{number}")], watermark=number)
    shorten(config, "histories")
    forget(config, "histories", 0, 9)
    with pytest.raises(Failure, match=r"histories, partition 0: the offsets \d+ to 8 are no longer in Kafka.*compacted"):
        replicated(config, tmp_path / "state")
    admin = topics.admin(config)
    for future in admin.delete_topics([config.named("histories")]).values():
        future.result(90)
    deadline = time.monotonic() + PATIENCE * 30
    while any(not state.there for state in topics.create(config, ["histories"])):
        assert time.monotonic() < deadline
    with pytest.raises(UserError, match="histories was deleted and made anew"):
        Replica(config, tmp_path / "state")


def test_through_kafka_sessions_and_histories_are_those_of_replay(cluster: Cluster, tmp_path: Path) -> None:
    """Both feeds read from real workers' transactions what embedded replay makes of the same log, byte for byte."""
    config = cluster(partitions=3)
    path = tmp_path / "log.jsonl"
    write(path, log_lines(Shape(users=60, minutes=60, seed=3)))
    wanted = reference(path, tmp_path / "replayed")
    assert len(wanted.sessions) > 300
    parts: list[list[bytes]] = [[] for _ in range(config.partitions)]
    for line in path.read_bytes().splitlines():
        try:
            parts[partition_of(orjson.loads(line)["user_id"], config.partitions, config.partitioner)].append(line)
        except (ValueError, KeyError):
            parts[0].append(line)
    semantics = load_config(None, list(SETTINGS)).semantics
    with PartitionStore(tmp_path / "worker", semantics, config) as store:
        store.open(range(config.partitions))
        now = int(time.time() * 1_000)
        for partition, found in enumerate(parts):
            values = [*(pack(found[place : place + 50]) for place in range(0, len(found), 50)), END]
            chunks = [Chunk(offset, now, value, offset) for offset, value in enumerate(values)]
            for place in range(0, len(chunks), 7):
                store.apply(partition, chunks[place : place + 7])
        store.settle()
    fed(config, tmp_path / "fed")
    replicated(config, tmp_path / "replica")
    sessions = onerec("sessions", "--state", tmp_path / "fed", "--json").splitlines()
    assert sorted(sessions) == sorted(wanted.sessions.values())
    keys = [(found["end"], found["session_id"]) for found in map(orjson.loads, sessions)]
    assert keys == sorted(keys)
    assert onerec("histories", "--state", tmp_path / "replica", "--json").splitlines() == wanted.histories
    with Reader(tmp_path / "replica") as reader, Reader(tmp_path / "replayed") as replayed:
        assert reader.counters() == replayed.counters()


@pytest.mark.slow
def test_killed_anywhere_the_replica_ends_with_the_same_entries(
    config: KafkaConfig, worker: Worker, tmp_path: Path
) -> None:
    rng = random.Random(7)

    def work() -> None:
        for number in range(400):
            users = rng.sample(range(300), 40)
            pairs = [base(f"u{user}", f"i{number}", f"i{user}") for user in users[:20]]
            pairs += [live(f"u{user}", *(["i5"] if rng.random() < 0.5 else [])) for user in users[20:]]
            worker.commit(number % 2, pairs=pairs, watermark=number, abort=rng.random() < 0.1)
        worker.end()

    writing = threading.Thread(target=work)
    writing.start()
    kills = 0
    while writing.is_alive():
        running = command("histories-replica", config, tmp_path / "killed")
        time.sleep(rng.uniform(1.0, 2.5))
        running.kill()
        running.communicate()
        kills += 1
    writing.join()
    running = command("histories-replica", config, tmp_path / "killed", "--until-end")
    printed, complaints = running.communicate(timeout=180)
    assert running.returncode == 0, complaints
    assert orjson.loads(printed)["ended"] is True and kills > 1
    replicated(config, tmp_path / "whole")
    assert entries(tmp_path / "killed") == entries(tmp_path / "whole")


def entries(state: Path) -> tuple[Any, ...]:
    with Reader(state) as reader:
        return dict(reader.users()), reader.progress()
