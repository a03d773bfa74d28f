"""Raw messages in Avro or Protobuf, read by the schema that they name in a Confluent schema registry, as JSON lines.

Fields are found by their names (SEMANTICS.md §1), whatever their numbers or order; others are ignored. A record of the topics
`watch` and `items` may do without `type`; times may be Avro's timestamp-millis or Protobuf's Timestamp; an enumeration's name
stands for the type of the same name in small letters. Messages that begin as JSON does are JSON lines in these topics too: end
markers, and dead letters sent again.
"""

from __future__ import annotations

import base64
import datetime
import time
from collections.abc import Callable
from typing import Any, Final

import orjson

from onerec.errors import Failure, UserError
from streaming.kafka.settings import KafkaConfig

FIELDS: Final = (
    "type", "event_id", "user_id", "item_id", "ts", "watch_ms", "duration_ms", "request_id", "embedding", "tags", "author_id",
)
TYPES: Final = {"watch": "watch", "items": "item"}
"""Topic → the type of a record that has none."""
MAGIC: Final = b"\x00"
"""First byte of a message that names its schema."""
ANSWER_SECONDS: Final = 10.0
UNKNOWN_SECONDS: Final = 60.0
"""For so long a schema that the registry does not know is not asked for again."""

Decoder = Callable[[bytes], dict[str, Any]]


class Schemas:
    """Reads raw messages of the configured format. Raises UserError where the extra or the registry's address is missing."""

    def __init__(self, config: KafkaConfig) -> None:
        if not config.schema_registry:
            raise UserError(
                f"kafka.value_format is {config.value_format}, but kafka.schema_registry is not set; set it to the registry's "
                "URL, such as http://127.0.0.1:8081"
            )
        try:
            from confluent_kafka.schema_registry import SchemaRegistryClient, SchemaRegistryError
        except ImportError as error:
            raise UserError(
                f"kafka.value_format is {config.value_format}, but {error.name} is not installed; "
                "pip install 'onerec-stream[schema]'"
            ) from None
        self._url = config.schema_registry.rpartition("@")[2]
        self._refusal = SchemaRegistryError
        client = SchemaRegistryClient({"url": config.schema_registry, "timeout": ANSWER_SECONDS})
        self._decode: Decoder = _avro(client) if config.value_format == "avro" else _Protobuf(client).decode
        self._unknown: dict[bytes, float] = {}

    def line(self, topic: str, value: bytes) -> bytes | None:
        """A message of the topic (without prefix) as JSON lines; None where its schema cannot read it.

        Raises Failure where the registry does not answer, UserError where it refuses us: neither tells of the message.
        """
        if value[:1] != MAGIC:
            return value
        known_since = self._unknown.get(value[:5])
        if known_since is not None and time.monotonic() - known_since < UNKNOWN_SECONDS:
            return None
        try:
            fields = self._decode(value)
            fields.setdefault("type", TYPES.get(topic))
            return orjson.dumps({name: _plain(fields[name]) for name in FIELDS if fields.get(name) is not None})
        except self._refusal as error:
            self._check(error)
            self._unknown[value[:5]] = time.monotonic()
            return None
        except Exception as error:
            # Bytes that do not fit their schema raise whatever the reader stumbles over; only the way there is told apart.
            if type(error).__module__.startswith("httpx"):
                raise Failure(
                    f"schema registry {self._url} does not answer ({error}); is it up, and the address right?"
                ) from None
            return None

    def _check(self, error: Any) -> None:
        status = error.http_status_code
        if status in (401, 403):
            raise UserError(
                f"schema registry {self._url} refuses us ({status}); give kafka.schema_registry as http://user:password@host"
            ) from None
        if status not in (404, 422):
            raise Failure(f"schema registry {self._url} fails ({error}); nothing is lost, start again once it works") from None


def _plain(value: Any) -> Any:
    """What JSON has for it."""
    if isinstance(value, datetime.datetime):
        since = value - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC if value.tzinfo else None)
        return since // datetime.timedelta(milliseconds=1)
    return value


def _avro(client: Any) -> Decoder:
    from confluent_kafka.schema_registry.avro import AvroDeserializer

    decode = AvroDeserializer(client)

    def fields(value: bytes) -> dict[str, Any]:
        found = decode(value, None)
        if not isinstance(found, dict):
            raise TypeError("not a record")
        if isinstance(found.get("type"), str):
            found["type"] = found["type"].lower()
        return found

    return fields


class _Protobuf:
    """Messages by the very schema they were written with, so that nobody has to share our field numbers."""

    def __init__(self, client: Any) -> None:
        from confluent_kafka.schema_registry import dual_schema_id_deserializer
        from confluent_kafka.schema_registry.serde import SchemaId

        self._client = client
        self._schema_id = SchemaId
        self._split = dual_schema_id_deserializer
        self._classes: dict[tuple[int, tuple[int, ...]], Any] = {}

    def decode(self, value: bytes) -> dict[str, Any]:
        place = self._schema_id("PROTOBUF")
        payload = self._split(value, None, place)
        if place.id is None:
            raise ValueError("no schema id")
        key = (place.id, tuple(place.message_indexes or (0,)))
        kind = self._classes.get(key)
        if kind is None:
            kind = self._classes[key] = self._class(*key)
        message = kind()
        message.ParseFromString(payload.read())
        found = {}
        for field in message.DESCRIPTOR.fields:
            if field.name in FIELDS and (not field.has_presence or message.HasField(field.name)):
                found[field.name] = self._value(field, getattr(message, field.name))
        return {name: value for name, value in found.items() if value not in ("", [])}

    def _class(self, number: int, indexes: tuple[int, ...]) -> Any:
        from google.protobuf import descriptor_pb2, message_factory, timestamp_pb2
        from google.protobuf.descriptor_pool import DescriptorPool

        pool = DescriptorPool()
        pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)

        def add(schema: Any, name: str) -> Any:
            for reference in schema.references or []:
                version = self._client.get_version(reference.subject, reference.version, fmt="serialized")
                add(version.schema, reference.name)
            file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(schema.schema_str))
            file.name = name
            pool.Add(file)
            return pool.FindFileByName(name)

        file = add(self._client.get_schema(number, fmt="serialized"), f"schema-{number}")
        found = list(file.message_types_by_name.values())[indexes[0]]
        for index in indexes[1:]:
            found = found.nested_types[index]
        return message_factory.GetMessageClass(found)

    def _value(self, field: Any, value: Any) -> Any:
        if field.message_type is not None and field.message_type.full_name == "google.protobuf.Timestamp":
            return value.seconds * 1000 + value.nanos // 1_000_000
        if field.enum_type is not None:
            return field.enum_type.values_by_number[value].name.lower()
        if isinstance(value, str | int | float):
            return value
        return list(value)
