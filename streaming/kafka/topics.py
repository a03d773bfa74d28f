"""The topics of a cluster against what they have to be: made, checked, mended; and the first word with a broker."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

import msgspec

from onerec.errors import Failure, UserError
from streaming.kafka.settings import TOPICS, KafkaConfig, Topic, client

if TYPE_CHECKING:
    from confluent_kafka import KafkaError
    from confluent_kafka.admin import AdminClient, TopicDescription

REACH_SECONDS: Final = 10.0
"""How long a broker may take for its first answer."""
AT_LEAST: Final = ("retention.ms", "max.message.bytes")
"""Settings that may be larger than asked (-1: without end); cleanup.policy has to be the same."""

_HOPELESS: Final = ("_AUTHENTICATION", "SASL_AUTHENTICATION_FAILED", "_SSL")
_SETTINGS: Final = {
    "ssl.key.location": "ssl_key with kafka.ssl_key_password_file", "ssl.certificate.location": "ssl_certificate",
    "ssl.ca.location": "ssl_ca", "SASL mechanism": "sasl_mechanism", "bootstrap.servers": "bootstrap (--bootstrap)",
}
"""What librdkafka calls a setting in a complaint → what it is called here."""


class State(msgspec.Struct, kw_only=True):
    """A topic as found. `faults` is empty where it is right; `mendable` are settings that `create` can put right."""

    topic: str
    there: bool
    led: bool = False
    """Every partition has a leader."""
    partitions: int | None = None
    expected_partitions: int
    replication: int | None = None
    settings: dict[str, str]
    faults: list[str] = msgspec.field(default_factory=list)
    mendable: dict[str, str] = msgspec.field(default_factory=dict)


def admin(config: KafkaConfig, seconds: float = REACH_SECONDS) -> AdminClient:
    """An admin client whose broker has answered.

    Raises UserError, with the remedy, for refused credentials, a TLS fault, a wrong security protocol, and for brokers that
    nobody reaches within `seconds`.
    """
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    said: list[KafkaError] = []
    table: dict[str, Any] = {**client(config), "log_level": 0, "error_cb": said.append}
    try:
        found = AdminClient(table)
    except KafkaException as error:
        raise refused(config, error.args[0]) from None
    answer = found.describe_cluster(request_timeout=seconds)
    while True:
        try:
            answer.result(timeout=0.05)
            return found
        except KafkaException as error:
            known = [fault for fault in said if fault.name() not in ("_ALL_BROKERS_DOWN", "_TIMED_OUT")]
            raise refused(config, known[-1] if known else error.args[0]) from None
        except TimeoutError:
            found.poll(0)
        for fault in said:
            if fault.name() in _HOPELESS or _is_tls(fault):
                raise refused(config, fault)


def _is_tls(error: KafkaError) -> bool:
    # What the broker objects to in TLS 1.3 arrives after the handshake, as a broken connection.
    return error.name() == "_SSL" or "SSL routines" in error.str()


def refused(config: KafkaConfig, error: KafkaError) -> UserError:
    """Why the broker does not let us in, with the remedy."""
    name, said = error.name(), error.str()
    where = f"Kafka at {config.bootstrap}"
    if name in ("_AUTHENTICATION", "SASL_AUTHENTICATION_FAILED"):
        return UserError(
            f"{where} refuses the credentials ({said}); set kafka.sasl_username, kafka.sasl_password_file and "
            "kafka.sasl_mechanism, or ONEREC_KAFKA_SASL_USERNAME, _SASL_PASSWORD and _SASL_MECHANISM, as on the broker"
        )
    if name in ("_INVALID_ARG", "_NOT_IMPLEMENTED"):
        ours = [f"kafka.{setting}" for theirs, setting in _SETTINGS.items() if theirs in said]
        return UserError(
            f"Kafka's client refuses a setting: {said}; correct {' or '.join(ours) or 'section [kafka]'}, or its "
            "ONEREC_KAFKA_ variable in the environment"
        )
    if _is_tls(error):
        return UserError(
            f"{where}: TLS failed ({said}); kafka.ssl_ca is the authority that signed the broker's certificate, whose names "
            "hold the host given, and kafka.ssl_certificate with kafka.ssl_key is what a broker that asks for one trusts"
        )
    return UserError(
        f"{where} does not answer ({said}); is it running (`onerec kafka up`), is --bootstrap its address, and is "
        "kafka.security_protocol that of its listener?"
    )


def _partitions(config: KafkaConfig, topic: Topic) -> int:
    return config.partitions if topic.by_user else 1


def describe(config: KafkaConfig, names: Iterable[str] = TOPICS, *, via: AdminClient | None = None) -> list[State]:
    """The topics as they are, with every fault and its remedy. Raises UserError as `admin` does."""
    from confluent_kafka.admin import ConfigResource, ResourceType

    connected = via or admin(config)
    names = list(names)
    states = _states(config, connected, names)
    there = [(name, state) for name, state in zip(names, states, strict=True) if state.there]
    resources = {state.topic: ConfigResource(ResourceType.TOPIC, state.topic) for _, state in there}
    found = connected.describe_configs(list(resources.values())) if resources else {}
    for name, state in there:
        entries = _done(config, found[resources[state.topic]], f"settings of topic {state.topic}")
        _check_settings(state, TOPICS[name], {key: entry.value for key, entry in entries.items()})
    return states


def _states(config: KafkaConfig, connected: AdminClient, names: list[str]) -> list[State]:
    """By name, because a list of all topics leaves out those that this user may not see."""
    from confluent_kafka import KafkaException, TopicCollection

    found = connected.describe_topics(TopicCollection([config.named(name) for name in names]))
    states = []
    for name in names:
        topic = TOPICS[name]
        state = State(
            topic=config.named(name), there=False, expected_partitions=_partitions(config, topic), settings=topic.settings
        )
        states.append(state)
        future = found[state.topic]
        error = future.exception(timeout=60)
        code = error.args[0].name() if isinstance(error, KafkaException) else ""
        if code == "UNKNOWN_TOPIC_OR_PART":
            state.faults.append("missing; `onerec topics --create` makes it")
        elif code == "TOPIC_AUTHORIZATION_FAILED":
            state.faults.append("this user may not see it; grant it on the cluster (Describe, Read and Write)")
        else:
            _fill(config, state, topic, _done(config, future, f"topic {state.topic}"))
    return states


def _fill(config: KafkaConfig, state: State, topic: Topic, found: TopicDescription) -> None:
    state.there = True
    state.partitions = len(found.partitions)
    state.led = all(partition.leader is not None and partition.leader.id >= 0 for partition in found.partitions)
    state.replication = min((len(partition.replicas) for partition in found.partitions), default=None)
    if state.partitions != state.expected_partitions:
        state.faults.append(_wrong_count(config, topic, state.partitions))
    if state.replication is not None and state.replication < config.replication:
        state.faults.append(
            f"replication {state.replication} where kafka.replication is {config.replication}; raise it with Kafka's "
            "kafka-reassign-partitions, or set kafka.replication to what it is"
        )


def _wrong_count(config: KafkaConfig, topic: Topic, count: int) -> str:
    if not topic.by_user:
        return f"{count} partitions where it takes 1; delete it and run `onerec topics --create`, or set another kafka.prefix"
    return (
        f"{count} partitions where kafka.partitions is {config.partitions}; if the log was made with {count}, set "
        f"kafka.partitions={count}. To change the number, set a new kafka.prefix, run `onerec topics --create` and replay the "
        "raw topics or files into it, because a user's state lives in its partition and would be lost by a move"
    )


def _check_settings(state: State, topic: Topic, found: dict[str, str]) -> None:
    state.settings = {name: found.get(name, "") for name in topic.settings}
    wanted = {name: value for name, value in topic.settings.items() if name in ("cleanup.policy", *AT_LEAST)}
    for name, value in wanted.items():
        has = found.get(name, "")
        if has == value or (name in AT_LEAST and has and (int(has) == -1 or int(has) > int(value))):
            continue
        state.mendable[name] = value
        state.faults.append(f"{name} is {has} where it takes {value}; `onerec topics --create` sets it")


def create(config: KafkaConfig, names: Iterable[str] = TOPICS) -> list[State]:
    """Makes the missing topics and sets wrong settings right; returns the topics as they are then.

    Partition counts and replication of existing topics are left as they are and stay among the faults. Raises UserError as
    `admin` does, and where the cluster refuses.
    """
    from confluent_kafka.admin import (
        AlterConfigOpType,
        ConfigEntry,
        ConfigResource,
        NewTopic,
        ResourceType,
    )

    connected = admin(config)
    names = list(names)
    states = describe(config, names, via=connected)
    missing = [
        NewTopic(
            state.topic, num_partitions=state.expected_partitions, replication_factor=config.replication,
            config=TOPICS[name].settings,
        )
        for name, state in zip(names, states, strict=True) if not state.there
    ]
    if missing:
        for name, future in connected.create_topics(missing).items():
            _done(config, future, f"making topic {name}", ignore="TOPIC_ALREADY_EXISTS")
    wrong = [
        ConfigResource(
            ResourceType.TOPIC, state.topic,
            incremental_configs=[
                ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in state.mendable.items()
            ],
        )
        for state in states if state.mendable
    ]
    if wrong:
        for resource, future in connected.incremental_alter_configs(wrong).items():
            _done(config, future, f"settings of topic {resource.name}")
    if not (missing or wrong):
        return states
    return _settled(config, connected, names)


def _settled(config: KafkaConfig, connected: AdminClient, names: list[str]) -> list[State]:
    """Brokers learn of a change one after another; what they say is believed once it holds no gap, or after a while."""
    deadline = time.monotonic() + REACH_SECONDS
    while True:
        states = describe(config, names, via=connected)
        if all(state.led and not state.mendable for state in states) or time.monotonic() > deadline:
            return states
        time.sleep(0.1)


def require(config: KafkaConfig, names: Iterable[str], seconds: float = REACH_SECONDS) -> None:
    """Returns where all these topics are there with the right number of partitions; commands call it before anything else.

    Raises UserError with the remedy: a topic missing, a wrong count, credentials refused, or no broker within `seconds`.
    """
    connected = admin(config, seconds)
    states = _states(config, connected, list(names))
    wrong = [state for state in states if not state.there or state.partitions != state.expected_partitions]
    if wrong:
        raise UserError(f"Kafka at {config.bootstrap}: " + "; ".join(told(wrong)))


def told(states: Iterable[State]) -> list[str]:
    """One line a fault, with all the topics that have it."""
    lines: dict[str, list[str]] = {}
    for state in states:
        for fault in state.faults:
            lines.setdefault(fault, []).append(state.topic)
    return [f"topic{'s' if len(names) > 1 else ''} {', '.join(names)}: {fault}" for fault, names in lines.items()]


def topic_ids(config: KafkaConfig, names: Iterable[str]) -> dict[str, str]:
    """Name without prefix → the id that Kafka gave the topic when it was made: another one once it was deleted and made anew.

    Raises UserError as `admin` does, and for a topic that is missing.
    """
    from confluent_kafka import TopicCollection

    names = list(names)
    connected = admin(config)
    # A client that is let go takes its answers with it.
    found = connected.describe_topics(TopicCollection([config.named(name) for name in names]))
    return {
        name: str(_done(config, found[config.named(name)], f"topic {config.named(name)}").topic_id) for name in names
    }


def _done(config: KafkaConfig, future: Future[Any], what: str, ignore: str = "") -> Any:
    """The result of an admin call; its error as ours."""
    from confluent_kafka import KafkaException

    try:
        return future.result(timeout=60)
    except TimeoutError:
        raise Failure(f"{what}: no answer from Kafka at {config.bootstrap} in a minute; is the cluster whole?") from None
    except KafkaException as error:
        fault = error.args[0]
    name, said = fault.name(), fault.str()
    if name == ignore:
        return None
    if name == "UNKNOWN_TOPIC_OR_PART":
        raise UserError(f"{what}: is missing on {config.bootstrap}; run `onerec topics --create`")
    if name == "INVALID_REPLICATION_FACTOR":
        raise UserError(f"{what}: {said}; set kafka.replication (--replication) to at most the number of brokers")
    if name.endswith("AUTHORIZATION_FAILED") or name == "POLICY_VIOLATION":
        raise UserError(f"{what}: the cluster refuses it ({said}); grant this user the right, or let an administrator make it")
    if name == "TOPIC_EXCEPTION":
        raise UserError(f"{what}: {said}; choose another kafka.prefix")
    raise Failure(f"{what}: {said or name}; run the command again, and look at the broker's log if it stays so")
