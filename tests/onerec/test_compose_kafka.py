"""The brokers of docker-compose.yml, with their own start script and settings, on the jars of `onerec kafka up`."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType
from ruamel.yaml import YAML

from onerec.errors import UserError
from streaming.kafka.broker import free_port, jars, java

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
READY_SECONDS = 60.0


def ends_with_parent() -> None:
    """In the child before it becomes a broker: killed when the tests are."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Brokers:
    """Services of the file as processes: names become ports of this machine, the image's programs Java calls."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        services = YAML(typ="safe").load(ROOT / "docker-compose.yml")["services"]
        self.folder = folder
        self.healthcheck = services[names[0]]["healthcheck"]["test"]
        self.ports = {(name, port): free_port() for name in names for port in (9092, 9093, 9094)}
        self.environments = {name: self._on_this_machine(name, services[name]["environment"]) for name in names}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        programs = {"kafka-storage.sh": "kafka.tools.StorageTool", "kafka-server-start.sh": "kafka.Kafka"}
        (folder / "bin").mkdir()
        for name, java_class in programs.items():
            (folder / "bin" / name).write_text(
                f"#!/bin/sh\nexec {java()} -Xmx300m $KAFKA_GC_LOG_OPTS $KAFKA_LOG4J_OPTS -cp '{jars()}/*' {java_class} \"$@\"\n"
            )
            (folder / "bin" / name).chmod(0o755)

    def _on_this_machine(self, name: str, environment: dict[str, str]) -> dict[str, str]:
        """The container's variables; of names and ports, those of this machine."""
        changed = dict(environment)
        for (other, port), mine in self.ports.items():
            for key in ("VOTERS", "ADVERTISED"):
                changed[key] = changed[key].replace(f"{other}:{port}", f"127.0.0.1:{mine}")
            if other == name:
                changed["LISTENERS"] = changed["LISTENERS"].replace(f"://:{port}", f"://127.0.0.1:{mine}")
        assert name not in changed["VOTERS"] + changed["ADVERTISED"]
        return changed | {
            "DATA": str(self.folder / name / "data"),
            "SETTINGS": str(self.folder / name / "server.properties"),
            "KAFKA_HOME": str(self.folder),
            "KAFKA_LOG4J_OPTS": changed["KAFKA_LOG4J_OPTS"].replace("/etc/onerec", str(ROOT / "serving_config" / "kafka")),
        }

    def start(self, name: str) -> None:
        (self.folder / name).mkdir(exist_ok=True)
        with (self.folder / name / "log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                ["/bin/bash", str(ROOT / "serving_config" / "kafka" / "start.sh")], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, env={"PATH": os.environ["PATH"], **self.environments[name]}, preexec_fn=ends_with_parent,
            )

    def healthy(self, name: str) -> bool:
        """What the container's health check says."""
        _, *command = (word.replace("/9092", f"/{self.ports[name, 9092]}") for word in self.healthcheck)
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(60)

    def await_brokers(self, count: int) -> AdminClient:
        """A client of a cluster that has so many brokers."""
        servers = ",".join(f"127.0.0.1:{port}" for (_, inside), port in self.ports.items() if inside == 9092)
        admin = AdminClient({"bootstrap.servers": servers, "log_level": 0})
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            try:
                if len(admin.list_topics(timeout=1).brokers) == count:
                    return admin
            except KafkaException:
                pass
            time.sleep(0.2)
        raise AssertionError({name: (self.folder / name / "log").read_text()[-2000:] for name in self.environments})

    def settings(self) -> dict[str, Any]:
        """For clients."""
        return {
            "bootstrap.servers": ",".join(f"127.0.0.1:{port}" for (_, inside), port in self.ports.items() if inside == 9092),
            "log_level": 0,
        }


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[Callable[..., Brokers]]:
    """A factory of brokers by the names of their services; killed at the end."""
    made: list[Brokers] = []

    def make(*names: str) -> Brokers:
        try:
            made.append(Brokers(tmp_path, list(names)))
        except UserError as error:
            pytest.skip(str(error))
        for name in names:
            made[-1].start(name)
        return made[-1]

    yield make
    for group in made:
        for name in list(group.processes):
            group.stop(name, signal.SIGKILL)


def write(settings: dict[str, Any], topic: str, values: list[bytes]) -> None:
    """All of them in one transaction."""
    producer = Producer({**settings, "transactional.id": "compose", "message.max.bytes": 4_000_000})
    producer.init_transactions(30)
    producer.begin_transaction()
    for value in values:
        producer.produce(topic, value, partition=0)
    producer.commit_transaction(30)


def read(settings: dict[str, Any], topic: str, count: int) -> list[bytes]:
    consumer = Consumer({**settings, "group.id": "compose", "isolation.level": "read_committed"})
    consumer.assign([TopicPartition(topic, 0, 0)])
    found: list[bytes] = []
    deadline = time.monotonic() + 30
    while len(found) < count and time.monotonic() < deadline:
        found += [message.value() for message in consumer.consume(count, 0.5) if message.error() is None]
    consumer.close()
    return found


def create(admin: AdminClient, topic: str) -> None:
    """With the broker's own replication and defaults."""
    admin.create_topics([NewTopic(topic, 1)])[topic].result(30)


def test_the_single_broker_takes_transactions_and_keeps_its_data_over_a_restart(brokers: Callable[..., Brokers]) -> None:
    group = brokers("kafka")
    create(group.await_brokers(1), "events")
    assert group.healthy("kafka")
    values = [b"x" * (2 << 20), b"small"]
    write(group.settings(), "events", values)
    assert group.stop("kafka") in (0, 143, -signal.SIGTERM)
    assert not group.healthy("kafka")
    group.start("kafka")
    group.await_brokers(1)
    assert read(group.settings(), "events", 2) == values


def test_of_three_brokers_two_suffice(brokers: Callable[..., Brokers]) -> None:
    group = brokers("kafka-1", "kafka-2", "kafka-3")
    admin = group.await_brokers(3)
    create(admin, "events")
    (setting,) = admin.describe_configs([ConfigResource(ResourceType.TOPIC, "events")]).values()
    assert setting.result(30)["min.insync.replicas"].value == "2"
    topics = admin.list_topics(timeout=10).topics
    assert len(topics["events"].partitions[0].replicas) == 3
    write(group.settings(), "events", [b"one"])
    leader = admin.list_topics(timeout=10).topics["events"].partitions[0].leader
    group.stop(f"kafka-{leader}", signal.SIGKILL)
    write(group.settings(), "events", [b"two"])
    assert read(group.settings(), "events", 2) == [b"one", b"two"]
