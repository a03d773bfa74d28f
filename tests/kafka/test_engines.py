"""`onerec stream` with both engines over a real broker: what comes out is what `replay` makes, whoever comes, goes or dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson
import pytest
from comparison import judge, read_progress
from confluent_kafka import TopicPartition
from event_log import EventLog
from patience import PATIENCE
from reference_log import SETTINGS, Reference, Shape, lines, reference, settings, write
from stack import Process

from onerec.config import load_config
from streaming.kafka import topics, wire
from streaming.kafka.local import Local
from streaming.kafka.settings import KafkaConfig

HISTORY = load_config(None, list(SETTINGS)).history.length
SESSION_MS = 3_000

Make = Callable[..., KafkaConfig]
Log = tuple[list[bytes], Reference]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
engines = pytest.mark.parametrize("engine", ["group", "faust"])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    folder = tmp_path_factory.mktemp("log")
    found = list(lines(Shape(users=250, minutes=16)))
    write(folder / "log.jsonl", found)
    return found, reference(folder / "log.jsonl", folder / "state")


@pytest.fixture
def worker(tmp_path: Path) -> Callable[..., Process]:
    """`worker(config, engine, name="a", *words, **kafka settings)`: ended after the test."""
    made: list[Process] = []

    def make(config: KafkaConfig, engine: str, name: str = "a", *words: str, **values: object) -> Process:
        values = {
            "prefix": f'"{config.prefix}"', "partitions": config.partitions, "session_timeout_ms": SESSION_MS, **values
        }
        state = tmp_path / name
        line = [
            "stream", "--state", str(state), "--engine", engine, "--bootstrap", config.bootstrap, *words, *settings(SETTINGS),
            *settings(f"kafka.{key}={value}" for key, value in values.items()),
        ]
        made.append(Process(name, line, tmp_path / f"{name}.log", state=state))
        return made[-1]

    yield make
    for process in made:
        if process.running:
            process.kill()


def events(config: KafkaConfig) -> int:
    return sum(found.counters.events for found in read_progress(config).values())


def wait(condition: Callable[[], object], processes: Sequence[Process], seconds: float = 90) -> None:
    deadline = time.monotonic() + PATIENCE * seconds
    while not condition():
        tails = "\n".join(process.tail() for process in processes)
        assert time.monotonic() < deadline, f"nothing within {seconds} s\n{tails}"
        time.sleep(0.2)


def ended(config: KafkaConfig) -> bool:
    found = read_progress(config)
    return len(found) == config.partitions and all(part.ended for part in found.values())


def forget(config: KafkaConfig, ends: dict[int, int]) -> None:
    """What retention does: the log begins at these offsets."""
    places = [TopicPartition(config.named("events"), partition, offset) for partition, offset in ends.items()]
    admin = topics.admin(config)
    for future in admin.delete_records(places).values():
        future.result(90)


@engines
def test_one_worker_makes_what_replay_makes(engine: str, log: Log, cluster: Make, worker: Callable[..., Process]) -> None:
    found, wanted = log
    config = cluster(partitions=3)
    written = EventLog(config)
    written.write(found)
    written.end()
    process = worker(config, engine, "a", "--until-end", "--json").start()
    summary = orjson.loads(process.result(90).splitlines()[-1])
    assert judge(config, HISTORY, wanted).faults == []
    totals = {name: summary[name] for name in wanted.counters}
    assert totals == wanted.counters
    assert {int(p): part["sessions"] for p, part in summary["partitions"].items()} == {
        p: part.sessions for p, part in read_progress(config).items()
    }
    # Retention may take what was applied: nothing is missing, and the worker goes on behind it.
    forget(config, {int(p): part["offset"] + 1 for p, part in summary["partitions"].items()})
    written.send([(0, wire.time_marker(1_800_000_000_000))])
    written.end()
    again = orjson.loads(process.start().result(90).splitlines()[-1])
    assert {name: again[name] for name in wanted.counters} == wanted.counters
    assert again["partitions"]["0"]["watermark"] > summary["partitions"]["0"]["watermark"]


@engines
def test_workers_come_and_go_and_die_under_load(
    engine: str, log: Log, cluster: Make, worker: Callable[..., Process], tmp_path: Path
) -> None:
    found, wanted = log
    config = cluster(partitions=4)
    written = EventLog(config, pack=5, commit=4)
    part = len(found) // 6
    a, b = worker(config, engine, "a"), worker(config, engine, "b", "--standby")

    def feed(number: int, *processes: Process) -> None:
        before = events(config)
        written.write(found[number * part : (number + 1) * part if number < 5 else None])
        wait(lambda: events(config) > before, processes)

    # Frozen inside a commit, replaced, and woken when its session is long over.
    a.start(trap="freeze:commit:3")
    written.write(found[:part])
    wait(a.is_stopped, [a])
    b.start()
    feed(1, b)
    a.wake()
    feed(2, a, b)
    # Killed; its disk is lost.
    b.kill()
    b.wipe()
    b.start()
    feed(3, a, b)
    # Asked to go; then it comes back with the disk of before what b did meanwhile.
    assert a.stop() == 0, a.tail()
    a.keep(tmp_path / "kept")
    feed(4, b)
    a.start()
    feed(5, a, b)
    a.kill()
    a.put_back(tmp_path / "kept")
    a.start()
    written.end()
    wait(lambda: ended(config), [a, b])
    assert b.stop() == 0, b.tail()
    assert judge(config, HISTORY, wanted).faults == []


def test_a_standby_has_a_copy_of_what_another_holds(
    log: Log, cluster: Make, worker: Callable[..., Process], tmp_path: Path
) -> None:
    config = cluster(partitions=1)
    EventLog(config).write(log[0])
    a, b = worker(config, "group", "a"), worker(config, "group", "b", "--standby")
    a.start()
    wait(lambda: events(config), [a])
    b.start()
    wait(lambda: b"idle" in b.log.read_bytes() or b"none" in b.log.read_bytes(), [a, b])
    time.sleep(1.5)
    for process in (b, a):
        assert process.stop() == 0, process.tail()
    copy = Local(tmp_path / "b")
    place = copy.place(0)
    copy.close()
    assert place is not None
    assert place.progress == read_progress(config)[0]


@engines
def test_a_worker_that_cannot_go_on_leaves_with_an_error(
    engine: str, log: Log, cluster: Make, worker: Callable[..., Process]
) -> None:
    config = cluster(partitions=2)
    written = EventLog(config)
    written.write(log[0][:400])
    process = worker(config, engine, stall_seconds=2).start()
    wait(lambda: events(config), [process])
    # A message is missing, by its number: nothing behind it may ever be applied.
    written.send([(1, wire.pack(log[0][400:410]))], skip=1)
    wait(lambda: not process.running, [process])
    assert process.exits == [1]
    assert "partition 1: nothing applied for" in process.tail()


@engines
def test_events_that_kafka_forgot_are_not_skipped_in_silence(
    engine: str, log: Log, cluster: Make, worker: Callable[..., Process]
) -> None:
    config = cluster(partitions=1)
    written = EventLog(config)
    written.write(log[0][:400])
    process = worker(config, engine).start()
    wait(lambda: events(config), [process])
    process.kill()
    offset = read_progress(config)[0].offset
    written.write(log[0][400:800])
    forget(config, {0: offset + 5})
    process.start()
    wait(lambda: not process.running, [process])
    assert process.exits == [1]
    assert f"Kafka has forgotten offsets {offset} to {offset + 4} of topic {config.prefix}events" in process.tail()


def test_the_protocol_of_kip_848_gives_the_same(log: Log, cluster: Make, worker: Callable[..., Process]) -> None:
    found, wanted = log
    config = cluster(partitions=4)
    written = EventLog(config, pack=5)
    a, b = (worker(config, "group", name, group_protocol='"consumer"') for name in "ab")
    a.start()
    written.write(found[: len(found) // 2])
    b.start()
    written.write(found[len(found) // 2 :])
    written.end()
    a.kill()
    wait(lambda: ended(config), [a, b])
    assert b.stop() == 0
    assert judge(config, HISTORY, wanted).faults == []


def test_another_partition_count_is_refused(cluster: Make, worker: Callable[..., Process]) -> None:
    config = cluster(partitions=2)
    process = worker(config, "group", partitions=3).start()
    wait(lambda: not process.running, [process])
    assert process.exits == [2]
    assert "partitions" in process.tail()
