"""`onerec kafka up` and `Broker`: data kept over stop and kill, nothing left behind, clear refusals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from patience import PATIENCE

from onerec.errors import UserError
from streaming.kafka import broker as module
from streaming.kafka import settings, topics
from streaming.kafka.broker import Broker, MissingTool, free_port
from streaming.kafka.settings import KafkaConfig


@pytest.fixture(scope="module")
def own(kafka_tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker that tests may stop and kill, as long as they leave it running."""
    with Broker(tmp_path_factory.mktemp("own") / "broker") as running:
        yield running


def jvms(directory: Path) -> list[int]:
    """Processes of Java that run the broker of a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if os.fsencode(directory / "server.properties") in command:
            found.append(int(entry.name))
    return found


def produce(config: KafkaConfig, values: list[bytes]) -> None:
    producer = Producer(settings.producer(config, transactional_id=config.named("test")))
    producer.init_transactions(90)
    producer.begin_transaction()
    for value in values:
        producer.produce(config.named("watch"), value, partition=0)
    producer.commit_transaction(90)


def consume(config: KafkaConfig, count: int, **more: object) -> list[bytes]:
    consumer = Consumer(settings.consumer(config, group_id=config.named("test"), **more))
    consumer.assign([TopicPartition(config.named("watch"), 0, 0)])
    values: list[bytes] = []
    deadline = time.monotonic() + PATIENCE * 30
    while len(values) < count and time.monotonic() < deadline:
        for message in consumer.consume(count, 0.2):
            assert message.error() is None, message.error()
            values.append(message.value())
    consumer.close()
    return values


@pytest.mark.slow
def test_data_are_kept_over_a_clean_stop_and_a_kill_at_the_same_address(own: Broker) -> None:
    config = KafkaConfig(bootstrap=own.bootstrap, partitions=1)
    topics.create(config)
    ids = topics.topic_ids(config, ["watch"])
    values = [b"%d" % number for number in range(200)]
    produce(config, values[:50])
    address, first = own.bootstrap, own.pid
    own.stop()
    assert not jvms(own.directory)
    own.start()
    assert own.bootstrap == address and own.pid != first
    for end in (100, 150, 200):
        produce(config, values[end - 50 : end])
        # At once: the commit is confirmed when the coordinator has it, before the partition's marker is written.
        own.kill()
        assert not jvms(own.directory)
        own.start()
        assert consume(config, end) == values[:end]
    assert topics.topic_ids(config, ["watch"]) == ids


@pytest.mark.slow
def test_a_folder_in_use_is_refused_and_its_broker_goes_on(own: Broker) -> None:
    with pytest.raises(UserError, match="in use by another broker; stop that one, or give --dir another"):
        Broker(own.directory).start()
    assert own.pid in jvms(own.directory)
    topics.admin(KafkaConfig(bootstrap=own.bootstrap))


def test_a_taken_port_is_refused_with_the_way_out(kafka_tools: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} .*taken.*--port"):
            Broker(tmp_path / "broker", port).start()


@pytest.mark.parametrize("make", [lambda path: (path / "notes.txt").write_text("mine"), lambda path: (path / "data").mkdir()])
def test_a_folder_that_holds_something_else_is_left_alone(
    kafka_tools: None, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="give --dir an empty or a new folder"):
        Broker(tmp_path).start()
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_in_place_of_the_folder_is_refused(kafka_tools: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give --dir a folder that can be written"):
        Broker(tmp_path / "file").start()


def test_a_folder_with_a_comma_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="comma"):
        Broker(tmp_path / "a,b")


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(MissingTool, match="let XDG_CACHE_HOME name a folder that can be written"):
        module.jars()


def test_an_impossible_heap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="512m"):
        Broker(tmp_path, heap="half")


@pytest.mark.slow
def test_a_heap_too_small_ends_in_a_failure_that_shows_what_java_said(kafka_tools: None, tmp_path: Path) -> None:
    small = Broker(tmp_path / "broker", heap="1m")
    with pytest.raises(module.Failure, match="Kafka ended at start: .*heap"):
        small.start()
    assert not jvms(small.directory)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_missing_or_old_java_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingTool, match="no java on the PATH; install Java 17"):
        module.java()
    script(tmp_path / "home" / "bin" / "java", "echo 'openjdk version \"11.0.2\" 2019-01-15' >&2")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    with pytest.raises(MissingTool, match="is Java 11, Kafka .* needs 17"):
        module.java()
    script(tmp_path / "home" / "bin" / "java", "echo 'java version \"1.8.0_292\"' >&2")
    with pytest.raises(MissingTool, match="is Java 8, Kafka"):
        module.java()
    script(tmp_path / "home" / "bin" / "java", "echo 'no such library' >&2; exit 3")
    with pytest.raises(MissingTool, match="failed: no such library"):
        module.java()
    script(tmp_path / "home" / "bin" / "java", "echo 'openjdk version \"21\" 2023-09-19' >&2")
    assert module.java() == str(tmp_path / "home" / "bin" / "java")


def test_a_missing_or_failing_maven_is_said_and_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(MissingTool, match="no mvn on the PATH"):
        module.jars()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    script(tmp_path / "bin" / "mvn", "echo '[ERROR] Could not resolve repository'; exit 1")
    with pytest.raises(MissingTool, match="Could not resolve repository; check the network"):
        module.jars()
    assert [path.name for path in (tmp_path / "cache" / "onerec").iterdir() if path.is_dir()] == []


def test_two_who_need_the_jars_fetch_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    script(
        tmp_path / "bin" / "mvn",
        f'echo run >> {tmp_path}/runs; for a; do case "$a" in -DoutputDirectory=*) '
        'sleep 0.3; touch "${a#*=}/kafka_2.13-x.jar";; esac; done',
    )
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(module.jars())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    assert [path.name for path in found[0].iterdir()] == ["kafka_2.13-x.jar"]
    assert (tmp_path / "runs").read_text() == "run\n"


class Command:
    """`onerec kafka up` as a process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "onerec.cli", "kafka", "up", "--dir", str(directory), "--port", str(self.port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )

    def ready(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ends(self, number: signal.Signals) -> tuple[int, str, str]:
        self.process.send_signal(number)
        rest, said = self.process.communicate(timeout=180)
        return self.process.returncode, rest, said


@pytest.fixture
def command(kafka_tools: None, tmp_path: Path) -> Iterator[Command]:
    started = Command(tmp_path / "a brök€r")
    yield started
    started.process.kill()
    started.process.wait()


def gone(directory: Path, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + PATIENCE * seconds
    while jvms(directory):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_the_command_says_one_line_when_ready_and_stops_cleanly(command: Command) -> None:
    assert command.ready() == f"kafka: ready at 127.0.0.1:{command.port}, data in {command.directory}"
    topics.admin(KafkaConfig(bootstrap=f"127.0.0.1:{command.port}"))
    assert command.ends(signal.SIGTERM) == (0, "", "")
    assert not jvms(command.directory)
    assert "Terminating process due to signal SIGTERM" in (command.directory / "broker.log").read_text()
    assert (command.directory / "data" / ".kafka_cleanshutdown").exists()


@pytest.mark.slow
def test_a_killed_command_leaves_no_broker_behind_and_its_folder_can_be_used_at_once(command: Command) -> None:
    assert command.ready()
    command.process.kill()
    command.process.wait()
    with Broker(command.directory, command.port) as again:
        assert again.pid in jvms(command.directory)
    assert gone(command.directory)


@pytest.mark.slow
def test_a_stop_asked_for_during_the_start_is_a_clean_stop(command: Command) -> None:
    deadline = time.monotonic() + PATIENCE * 60
    while not jvms(command.directory) and time.monotonic() < deadline:
        time.sleep(0.05)
    code, rest, said = command.ends(signal.SIGINT)
    assert (code, said) == (0, "")
    assert gone(command.directory)


@pytest.mark.slow
def test_the_command_fails_when_the_broker_dies(command: Command) -> None:
    assert command.ready()
    os.kill(jvms(command.directory)[0], signal.SIGKILL)
    _, said = command.process.communicate(timeout=180)
    assert command.process.returncode == 1
    assert "kafka ended by itself" in said and "broker.log" in said


@pytest.mark.slow
def test_both_group_protocols_hand_out_all_partitions(cluster: Callable[..., KafkaConfig]) -> None:
    config = cluster(partitions=4)
    for protocol in ("classic", "consumer"):
        table = settings.consumer(config, group_id=config.named(protocol), group_protocol=protocol)
        if protocol == "consumer":
            for name in ("session.timeout.ms", "heartbeat.interval.ms"):
                table.pop(name)
        members = [Consumer(table) for _ in range(2)]
        for member in members:
            member.subscribe([config.named("watch")])
        deadline = time.monotonic() + PATIENCE * 30
        held: list[list[int]] = []
        while time.monotonic() < deadline:
            for member in members:
                member.poll(0.1)
            held = [sorted(part.partition for part in member.assignment()) for member in members]
            if [len(part) for part in held] == [2, 2]:
                break
        for member in members:
            member.close()
        assert sorted(held[0] + held[1]) == [0, 1, 2, 3], protocol


def test_a_message_of_the_largest_size_goes_through(cluster: Callable[..., KafkaConfig]) -> None:
    config = cluster(partitions=1)
    value = os.urandom(settings.MAX_MESSAGE_BYTES - 1_000)
    produce(config, [value])
    assert consume(config, 1) == [value]
