"""How to reach Kafka and what things are called there: one section `[kafka]`, one place that makes client settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

from onerec.errors import UserError

Positive = Annotated[int, Meta(ge=1)]

ENVIRONMENT: Final = "ONEREC_KAFKA_"
"""Prefix of the environment variables that stand in for settings left out, such as ONEREC_KAFKA_SASL_PASSWORD."""
MAX_MESSAGE_BYTES: Final = 2 << 20
"""Of a message: a line of the largest allowed size and its frame fit."""
MAX_STATE_BYTES: Final = 16 << 20
"""Of a changelog value: a user with stream.max_open_events open events whose ids are as long as they may be."""


class KafkaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cluster, the names there, and how to prove who we are.

    Empty security settings fall back to ONEREC_KAFKA_<NAME> in the environment; a password is best given as a file or there.
    """

    bootstrap: str = "127.0.0.1:9092"
    prefix: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,200}$")] = ""
    """Put before every topic, consumer group and transactional id."""
    partitions: Positive = 8
    """Of every topic by user; fixed for the life of a log."""
    replication: Positive = 1
    partitioner: Literal["crc32", "murmur2"] = "crc32"
    """Which partition a user belongs to: crc32 is librdkafka's default, murmur2 Java's."""
    linger_ms: Annotated[int, Meta(ge=0)] = 50
    """How long `ingest` and `stream` gather before they commit; bounds their latency."""
    value_format: Literal["json", "avro", "protobuf"] = "json"
    """Of the raw topics: JSON lines, or records of a schema registry, which `ingest` turns into lines."""
    schema_registry: str = ""
    """Its URL, with user:password@ where it asks for them."""
    session_timeout_ms: Annotated[int, Meta(ge=1_000)] = 6_000
    group_protocol: Literal["classic", "consumer"] = "classic"
    """Of consumer groups: `consumer` is KIP-848's, whose timeouts are the broker's; Faust knows only the classic one."""
    transaction_timeout_ms: Annotated[int, Meta(ge=1_000)] = 60_000
    stall_seconds: Positive = 30
    """`stream` leaves with an error when there is lag and nothing moved for so long."""
    security_protocol: Literal["", "PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = ""
    sasl_mechanism: str = ""
    sasl_username: str = ""
    sasl_password: str = ""
    sasl_password_file: str = ""
    ssl_ca: str = ""
    ssl_certificate: str = ""
    ssl_key: str = ""
    ssl_key_password: str = ""
    ssl_key_password_file: str = ""

    def __repr__(self) -> str:
        """Without secrets."""
        shown = {
            name: "***" if _is_secret(name, value) else value
            for name in self.__struct_fields__
            if (value := getattr(self, name)) not in ("", None)
        }
        return f"KafkaConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def named(self, name: str) -> str:
        """A topic, group or transactional id with the prefix."""
        return self.prefix + name


def _is_secret(name: str, value: object) -> bool:
    if name == "schema_registry":
        return "@" in str(value)
    return "password" in name and not name.endswith("_file")


class Topic(NamedTuple):
    """What a topic has to be; `by_user` ones have `kafka.partitions` partitions."""

    name: str
    by_user: bool
    settings: dict[str, str]


def _days(count: int) -> str:
    return str(count * 86_400_000)


_LARGE = {"max.message.bytes": str(MAX_MESSAGE_BYTES)}
_COMPACT = {**_LARGE, "cleanup.policy": "compact"}

TOPICS: Final[dict[str, Topic]] = {
    topic.name: topic
    for topic in (
        Topic("watch", True, {**_LARGE, "cleanup.policy": "delete", "retention.ms": _days(7)}),
        Topic("interactions", True, {**_LARGE, "cleanup.policy": "delete", "retention.ms": _days(7)}),
        Topic("items", True, {**_LARGE, "cleanup.policy": "delete", "retention.ms": _days(7)}),
        Topic("events", True, {**_LARGE, "cleanup.policy": "delete", "retention.ms": _days(7)}),
        Topic("sessions", True, {**_LARGE, "cleanup.policy": "delete", "retention.ms": _days(30)}),
        Topic("histories", True, {
            **_COMPACT, "max.message.bytes": str(MAX_STATE_BYTES), "segment.bytes": str(128 << 20),
            "min.cleanable.dirty.ratio": "0.3",
        }),
        Topic("catalogue", True, _COMPACT),
        Topic("progress", False, {**_COMPACT, "segment.bytes": str(16 << 20), "min.cleanable.dirty.ratio": "0.1"}),
        Topic("dead-letters", False, {**_LARGE, "cleanup.policy": "delete", "retention.ms": _days(30)}),
        Topic("preference-pairs", False, {**_LARGE, "cleanup.policy": "delete", "retention.ms": _days(7)}),
    )
}
"""Name without prefix → topic. `catalogue` holds valid items by item id; `progress` one record a partition of the stream."""


def _secret(config: KafkaConfig, name: str) -> str:
    """A password: its file, its value, else the environment (value, then file)."""
    path = getattr(config, f"{name}_file") or ("" if getattr(config, name) else _environment(f"{name}_file"))
    if path:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"kafka.{name}_file {path}: {error.strerror}; name a file that holds the password") from None
    return getattr(config, name) or _environment(name)


def _environment(name: str) -> str:
    return os.environ.get(ENVIRONMENT + name.upper(), "")


def _value(config: KafkaConfig, name: str) -> str:
    return getattr(config, name) or _environment(name)


class Security(NamedTuple):
    """Security settings in force, secrets included: never log one."""

    protocol: str
    mechanism: str
    username: str
    password: str
    ca: str
    certificate: str
    key: str
    key_password: str

    def __repr__(self) -> str:
        """Without secrets."""
        return f"Security({self.protocol}, {self.mechanism}, {self.username})"


def security(config: KafkaConfig) -> Security:
    """The security settings in force: configuration, then environment. Raises UserError where one is missing or wrong."""
    protocol = _value(config, "security_protocol") or "PLAINTEXT"
    found = Security(
        protocol,
        _value(config, "sasl_mechanism"),
        _value(config, "sasl_username"),
        _secret(config, "sasl_password"),
        _value(config, "ssl_ca"),
        _value(config, "ssl_certificate"),
        _value(config, "ssl_key"),
        _secret(config, "ssl_key_password"),
    )
    if protocol not in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"):
        raise UserError(f"kafka.security_protocol {protocol!r}: one of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL")
    if protocol.startswith("SASL"):
        missing = [name for name, value in (
            ("sasl_mechanism", found.mechanism), ("sasl_username", found.username), ("sasl_password", found.password)
        ) if not value]
        if missing:
            raise UserError(
                f"kafka.security_protocol is {protocol}, but kafka.{' and kafka.'.join(missing)} is not set; set it, or "
                + " and ".join(ENVIRONMENT + name.upper() for name in missing) + " in the environment"
            )
    for name, path in (("ssl_ca", found.ca), ("ssl_certificate", found.certificate), ("ssl_key", found.key)):
        if path and not os.access(path, os.R_OK):
            raise UserError(f"kafka.{name} {path} cannot be read; name a readable PEM file")
    return found


def client(config: KafkaConfig, **settings: Any) -> dict[str, Any]:
    """librdkafka settings of one client: cluster and security, then `settings` (dots as underscores)."""
    found = security(config)
    table: dict[str, Any] = {
        "bootstrap.servers": config.bootstrap,
        "security.protocol": found.protocol,
        "client.id": "onerec",
        # Level 3 is a line a connection refused, many a second from each client; the commands say that a broker is away.
        "log_level": 2,
        "socket.keepalive.enable": True,
        "reconnect.backoff.max.ms": 2_000,
    }
    named = {
        "sasl.mechanism": found.mechanism, "sasl.username": found.username, "sasl.password": found.password,
        "ssl.ca.location": found.ca, "ssl.certificate.location": found.certificate, "ssl.key.location": found.key,
        "ssl.key.password": found.key_password,
    }
    table |= {name: value for name, value in named.items() if value}
    # The one setting that librdkafka itself spells with an underscore.
    table |= {name if name == "log_level" else name.replace("_", "."): value for name, value in settings.items()}
    return table


def consumer(config: KafkaConfig, **settings: Any) -> dict[str, Any]:
    """Settings of a consumer: committed records only, no automatic commit, an error where the log has forgotten the offset."""
    return client(
        config,
        **{
            "isolation_level": "read_committed",
            "enable_auto_commit": False,
            "enable_auto_offset_store": False,
            "auto_offset_reset": "error",
            "fetch_message_max_bytes": 8 << 20,
            "fetch_wait_max_ms": 50,
            "queued_max_messages_kbytes": 65_536,
            "session_timeout_ms": config.session_timeout_ms,
            "heartbeat_interval_ms": max(500, config.session_timeout_ms // 3),
            **settings,
        },
    )


def member(config: KafkaConfig, group: str, **settings: Any) -> dict[str, Any]:
    """Settings of a member of a consumer group, whose partitions come and go one by one. `group` has the prefix already."""
    table = consumer(config, group_id=group, **settings)
    if config.group_protocol == "consumer":
        for name in ("session.timeout.ms", "heartbeat.interval.ms"):
            del table[name]
        return table | {"group.protocol": "consumer"}
    return table | {"partition.assignment.strategy": "cooperative-sticky"}


def producer(config: KafkaConfig, **settings: Any) -> dict[str, Any]:
    """Settings of an idempotent producer, transactional where `transactional_id` is among `settings`."""
    return client(
        config,
        **{
            "enable_idempotence": True,
            "message_max_bytes": MAX_MESSAGE_BYTES,
            "compression_type": "lz4",
            "linger_ms": 5,
            "batch_size": 1 << 20,
            "queue_buffering_max_messages": 1_000_000,
            "queue_buffering_max_kbytes": 262_144,
            **({"transaction_timeout_ms": config.transaction_timeout_ms} if "transactional_id" in settings else {}),
            **settings,
        },
    )
