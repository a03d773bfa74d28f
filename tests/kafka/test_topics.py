"""Topics against what they have to be: each fault is found, named with its remedy, and mended where that is safe."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import orjson
import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType
from patience import PATIENCE, TooSlow
from typer.testing import CliRunner

from onerec.cli import build
from onerec.errors import UserError
from streaming.kafka import topics
from streaming.kafka.broker import Broker, free_port
from streaming.kafka.settings import TOPICS, KafkaConfig

Cluster = Callable[..., KafkaConfig]


@pytest.fixture
def admin(broker: Broker) -> AdminClient:
    return AdminClient({"bootstrap.servers": broker.bootstrap})


@pytest.fixture
def empty(broker: Broker, request: pytest.FixtureRequest, admin: AdminClient) -> Iterator[KafkaConfig]:
    """A prefix without topics."""
    config = KafkaConfig(bootstrap=broker.bootstrap, prefix=f"empty-{request.node.name}-", partitions=3)
    yield config
    there = [name for name in admin.list_topics(timeout=30).topics if name.startswith(config.prefix)]
    for future in (admin.delete_topics(there) if there else {}).values():
        future.result(90)


def alter(admin: AdminClient, topic: str, **values: str) -> None:
    entries = [
        ConfigEntry(name.replace("_", "."), value, incremental_operation=AlterConfigOpType.SET)
        for name, value in values.items()
    ]
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(90)

    def there() -> bool:
        (found,) = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
        return all(found.result(90)[entry.name].value == entry.value for entry in entries)

    await_that(there)


def await_that(there: Callable[[], bool]) -> None:
    """The controller confirms a change before its broker knows of it."""
    deadline = time.monotonic() + PATIENCE * 30
    while not there():
        if time.monotonic() > deadline:
            raise TooSlow("a topic's change did not get around")
        time.sleep(0.02)


def make(admin: AdminClient, topic: str, partitions: int) -> None:
    for future in admin.create_topics([NewTopic(topic, num_partitions=partitions, replication_factor=1)]).values():
        future.result(90)
    await_that(lambda: topic in admin.list_topics(timeout=30).topics)


def delete(admin: AdminClient, topic: str) -> None:
    for future in admin.delete_topics([topic]).values():
        future.result(90)
    await_that(lambda: topic not in admin.list_topics(timeout=30).topics)


def faults(config: KafkaConfig, name: str) -> list[str]:
    return topics.describe(config, [name])[0].faults


def test_missing_topics_are_named_and_made(empty: KafkaConfig) -> None:
    assert [state.faults for state in topics.describe(empty)] == [["missing; `onerec topics --create` makes it"]] * len(TOPICS)
    with pytest.raises(UserError, match=f"topics {empty.prefix}watch, {empty.prefix}items: missing; `onerec topics --create`"):
        topics.require(empty, ["watch", "items"])
    made = topics.create(empty)
    assert [(state.topic, state.faults) for state in made] == [(empty.named(name), []) for name in TOPICS]
    assert [state.partitions for state in made] == [3 if topic.by_user else 1 for topic in TOPICS.values()]
    assert [state.settings for state in made] == [topic.settings for topic in TOPICS.values()]
    topics.require(empty, TOPICS)
    assert topics.create(empty) == made


def test_two_who_make_the_topics_at_once_do_not_disturb_each_other(empty: KafkaConfig) -> None:
    results: list[object] = []

    def run() -> None:
        try:
            results.append([state.faults for state in topics.create(empty)])
        except Exception as error:  # noqa: BLE001
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[[]] * len(TOPICS)] * 4


def test_another_number_of_partitions_is_refused_with_the_way_out_and_never_changed(cluster: Cluster) -> None:
    config = cluster(partitions=2)
    other = KafkaConfig(bootstrap=config.bootstrap, prefix=config.prefix, partitions=4)
    with pytest.raises(UserError, match=r"2 partitions where kafka.partitions is 4; .*kafka.partitions=2.*new kafka.prefix"):
        topics.require(other, ["events"])
    states = {state.topic.removeprefix(config.prefix): state for state in topics.create(other)}
    assert [name for name, state in states.items() if state.faults] == [name for name, topic in TOPICS.items() if topic.by_user]
    assert {state.partitions for name, state in states.items() if TOPICS[name].by_user} == {2}
    topics.require(config, TOPICS)


def test_a_topic_of_one_partition_that_has_more_is_refused(empty: KafkaConfig, admin: AdminClient) -> None:
    make(admin, empty.named("progress"), 3)
    with pytest.raises(UserError, match="progress: 3 partitions where it takes 1; delete it"):
        topics.require(empty, ["progress"])


@pytest.mark.parametrize(("name", "values", "fault"), [
    ("histories", {"cleanup_policy": "delete"}, "cleanup.policy is delete where it takes compact"),
    ("histories", {"cleanup_policy": "compact,delete"}, "cleanup.policy is .* where it takes compact"),
    ("events", {"cleanup_policy": "compact"}, "cleanup.policy is compact where it takes delete"),
    ("events", {"retention_ms": "60000"}, "retention.ms is 60000 where it takes 604800000"),
    ("watch", {"max_message_bytes": "1000"}, "max.message.bytes is 1000 where it takes 2097152"),
])
def test_wrong_settings_are_named_and_mended(
    cluster: Cluster, admin: AdminClient, name: str, values: dict[str, str], fault: str
) -> None:
    config = cluster(partitions=1)
    alter(admin, config.named(name), **values)
    (found,) = faults(config, name)
    assert found.endswith("; `onerec topics --create` sets it")
    assert re.match(fault, found)
    topics.require(config, [name])
    assert [state.faults for state in topics.create(config) if state.faults] == []
    assert faults(config, name) == []


def test_what_keeps_more_than_asked_is_right_and_stays(cluster: Cluster, admin: AdminClient) -> None:
    config = cluster(partitions=1)
    alter(admin, config.named("events"), retention_ms="-1", max_message_bytes="8388608")
    alter(admin, config.named("sessions"), retention_ms=str(400 * 86_400_000))
    topics.create(config)
    events, sessions = topics.describe(config, ["events", "sessions"])
    assert not events.faults and not sessions.faults
    assert (events.settings["retention.ms"], events.settings["max.message.bytes"]) == ("-1", "8388608")
    assert sessions.settings["retention.ms"] == str(400 * 86_400_000)


def test_more_copies_than_brokers_are_refused_and_fewer_than_asked_are_a_fault(cluster: Cluster, empty: KafkaConfig) -> None:
    table = {"bootstrap": empty.bootstrap, "partitions": 3, "replication": 3}
    with pytest.raises(UserError, match=r"set kafka.replication \(--replication\) to at most the number of brokers"):
        topics.create(KafkaConfig(**table, prefix=empty.prefix), ["watch"])
    config = cluster(partitions=3)
    (found,) = faults(KafkaConfig(**table, prefix=config.prefix), "watch")
    assert found.startswith("replication 1 where kafka.replication is 3; raise it")


def test_a_name_that_kafka_does_not_take_is_refused(broker: Broker) -> None:
    config = KafkaConfig(bootstrap=broker.bootstrap, prefix="my shop/")
    with pytest.raises(UserError, match="kafka.prefix"):
        topics.create(config, ["watch"])


def test_the_id_of_a_topic_changes_when_it_is_made_anew(cluster: Cluster, admin: AdminClient) -> None:
    config = cluster(partitions=1)
    before = topics.topic_ids(config, ["watch", "events"])
    assert topics.topic_ids(config, ["watch", "events"]) == before
    assert len(set(before.values())) == 2
    delete(admin, config.named("watch"))
    with pytest.raises(UserError, match="missing"):
        topics.topic_ids(config, ["watch"])
    topics.create(config)
    after = topics.topic_ids(config, ["watch", "events"])
    assert after["watch"] != before["watch"] and after["events"] == before["events"]


def test_nobody_at_the_address_is_said_with_the_remedy() -> None:
    config = KafkaConfig(bootstrap=f"127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"does not answer .*refused.*`onerec kafka up`.*--bootstrap"):
        topics.require(config, ["watch"], seconds=1.0)


def test_a_silent_server_and_one_that_is_not_kafka_are_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = KafkaConfig(bootstrap=f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match="does not answer"):
            topics.require(config, ["watch"], seconds=1.0)

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(UserError, match="does not answer"):
            topics.require(config, ["watch"], seconds=1.0)
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize("bootstrap", ["", "nowhere.invalid:9092", "127.0.0.1:notaport", ",,"])
def test_an_address_that_is_none_is_said(bootstrap: str) -> None:
    with pytest.raises(UserError, match="--bootstrap|kafka.bootstrap"):
        topics.require(KafkaConfig(bootstrap=bootstrap), ["watch"], seconds=1.0)


def test_the_command_prints_and_exits_by_the_state(cluster: Cluster, broker: Broker, admin: AdminClient) -> None:
    config = cluster(partitions=2)
    arguments = ["topics", "--bootstrap", broker.bootstrap, "--set", f"kafka.prefix={config.prefix}"]
    runner = CliRunner(env={"COLUMNS": "120"})
    right = runner.invoke(build(), [*arguments, "--partitions", "2"])
    assert right.exit_code == 0, right.output
    assert f"{config.prefix}preference-pairs" in right.stdout and "wrong" not in right.stdout
    wrong = runner.invoke(build(), [*arguments, "--partitions", "5", "--json"])
    assert isinstance(wrong.exception, UserError) and wrong.exception.exit_code == 2
    assert "7 of 10 topics" in str(wrong.exception)
    (line,) = wrong.stdout.splitlines()
    table = {entry["topic"].removeprefix(config.prefix): entry for entry in orjson.loads(line)}
    assert table["watch"]["partitions"] == 2 and table["watch"]["expected_partitions"] == 5 and table["watch"]["faults"]
    assert table["progress"]["faults"] == []
    delete(admin, config.named("dead-letters"))
    mended = runner.invoke(build(), [*arguments, "--partitions", "2", "--create", "--json"])
    assert mended.exit_code == 0, mended.output
    assert all(entry["faults"] == [] for entry in orjson.loads(mended.stdout))
