"""Raw messages in Avro and Protobuf: written with the registry's own client, read through a registry that answers by HTTP."""

from __future__ import annotations

import datetime
import http.server
import threading
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from comparison import Tail
from confluent_kafka import Producer

from onerec.config import Config
from onerec.errors import Failure, UserError
from streaming.events import Line, decode
from streaming.kafka import settings
from streaming.kafka.ingest import Ingest
from streaming.kafka.schemas import Schemas
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import END

pytest.importorskip("fastavro")
pytest.importorskip("google.protobuf")

T0 = 1_700_000_000_000
AVRO = orjson.dumps({
    "type": "record", "name": "Watched", "fields": [
        {"name": "watch_ms", "type": "int"},
        {"name": "item_id", "type": "string"},
        {"name": "user_id", "type": "string"},
        {"name": "ts", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "duration_ms", "type": ["null", "int"], "default": None},
        {"name": "device", "type": "string", "default": "phone"},
    ],
}).decode()


class Registry(http.server.ThreadingHTTPServer):
    """As much of a schema registry as writing and reading need. `status` makes it fail on purpose."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.schemas: dict[int, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Registry

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, value: object) -> None:
        body = orjson.dumps(value)
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        number = self.path.partition("?")[0].rpartition("/")[2]
        if self.server.status != 200:
            self.answer(self.server.status, {"error_code": self.server.status, "message": "on purpose"})
        elif self.path.startswith("/schemas/ids/") and int(number) in self.server.schemas:
            self.answer(200, self.server.schemas[int(number)])
        else:
            self.answer(404, {"error_code": 40403, "message": "Schema not found"})

    def do_POST(self) -> None:
        body = orjson.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = len(self.server.schemas) + 1
        self.server.schemas[number] = body
        self.answer(200, {"id": number, **body})


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def client(registry: Registry) -> Any:
    from confluent_kafka.schema_registry import SchemaRegistryClient

    return SchemaRegistryClient({"url": registry.url})


def context() -> Any:
    from confluent_kafka.serialization import MessageField, SerializationContext

    return SerializationContext("watch", MessageField.VALUE)


def avro(registry: Registry, **fields: Any) -> bytes:
    from confluent_kafka.schema_registry.avro import AvroSerializer

    return AvroSerializer(client(registry), AVRO)(fields, context())


def protobuf_class() -> Any:
    """A message type with numbers, an enumeration and a Timestamp of its own."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2  # noqa: F401

    file = descriptor_pb2.FileDescriptorProto(
        name="site.proto", package="site", syntax="proto3", dependency=["google/protobuf/timestamp.proto"]
    )
    field = descriptor_pb2.FieldDescriptorProto
    file.message_type.add(name="Other")
    message = file.message_type.add(name="Event")
    kind = message.enum_type.add(name="Kind")
    kind.value.add(name="WATCH", number=0)
    kind.value.add(name="LIKE", number=1)
    for name, number, of in (
        ("user_id", 7, field.TYPE_STRING), ("item_id", 3, field.TYPE_STRING), ("event_id", 4, field.TYPE_STRING),
        ("watch_ms", 12, field.TYPE_INT64), ("duration_ms", 13, field.TYPE_INT32), ("country", 99, field.TYPE_STRING),
    ):
        message.field.add(name=name, number=number, type=of, label=field.LABEL_OPTIONAL)
    message.field.add(name="type", number=1, type=field.TYPE_ENUM, type_name=".site.Event.Kind", label=field.LABEL_OPTIONAL)
    message.field.add(
        name="ts", number=2, type=field.TYPE_MESSAGE, type_name=".google.protobuf.Timestamp", label=field.LABEL_OPTIONAL
    )
    pool = descriptor_pool.Default()
    try:
        found = pool.FindFileByName("site.proto")
    except KeyError:
        pool.Add(file)
        found = pool.FindFileByName("site.proto")
    return message_factory.GetMessageClass(found.message_types_by_name["Event"])


def protobuf(registry: Registry, ts: int, **fields: Any) -> bytes:
    from confluent_kafka.schema_registry.protobuf import ProtobufSerializer

    kind = protobuf_class()
    message = kind(**fields)
    message.ts.FromMilliseconds(ts)
    serializer = ProtobufSerializer(kind, client(registry), {"skip.known.types": True, "use.deprecated.format": False})
    return serializer(message, context())


def schemas(registry: Registry, form: str) -> Schemas:
    return Schemas(KafkaConfig(value_format=form, schema_registry=registry.url))  # type: ignore[arg-type]


def test_an_avro_record_becomes_a_line_by_the_names_of_its_fields(registry: Registry) -> None:
    ts = datetime.datetime.fromtimestamp(T0 / 1000, datetime.UTC) + datetime.timedelta(milliseconds=7)
    value = avro(registry, user_id="ü", item_id="i", ts=ts, watch_ms=3, duration_ms=4)
    line = schemas(registry, "avro").line("watch", value)
    assert line is not None and decode(line, 1 << 60) == Line(
        type="watch", user_id="ü", item_id="i", ts=T0 + 7, watch_ms=3, duration_ms=4
    )
    without = schemas(registry, "avro").line("watch", avro(registry, user_id="u", item_id="i", ts=ts, watch_ms=3))
    assert without is not None and b"duration_ms" not in without and b"device" not in without


def test_a_protobuf_message_is_read_by_the_schema_it_was_written_with(registry: Registry) -> None:
    reader = schemas(registry, "protobuf")
    found = [
        reader.line("interactions", protobuf(registry, T0 + 7, user_id="u", item_id="i", type=1, country="x")),
        reader.line("watch", protobuf(registry, T0 + 8, user_id="u", item_id="i", event_id="e", watch_ms=5)),
    ]
    lines = [decode(line or b"", 1 << 60) for line in found]
    assert [(line.type, line.ts, line.event_id) for line in lines if isinstance(line, Line)] == [
        ("like", T0 + 7, None), ("watch", T0 + 8, "e"),
    ]
    assert b'"duration_ms":0' in (found[1] or b"")


@pytest.mark.parametrize("form", ["avro", "protobuf"])
def test_json_passes_and_what_no_schema_reads_is_told(form: str, registry: Registry) -> None:
    reader = schemas(registry, form)
    assert reader.line("watch", END) == END
    good = avro(registry, user_id="u", item_id="i", ts=T0, watch_ms=1) if form == "avro" else \
        protobuf(registry, T0, user_id="u", item_id="i")
    assert reader.line("watch", good) is not None
    assert reader.line("watch", good[:5] + b"\xff\xff\xff") is None
    assert reader.line("watch", b"\x00") is None
    unknown = b"\x00\x00\x00\x99\x99\x00abc"
    assert reader.line("watch", unknown) is None
    before = len(registry.asked)
    assert reader.line("watch", unknown) is None and len(registry.asked) == before


def test_a_registry_that_is_away_or_refuses_condemns_no_message(registry: Registry) -> None:
    value = b"\x00\x00\x00\x00\x07\x00abc"
    registry.status = 401
    with pytest.raises(UserError, match=r"refuses us \(401\).*user:password@host"):
        schemas(registry, "avro").line("watch", value)
    reader = Schemas(KafkaConfig(value_format="avro", schema_registry="http://user:geheim@127.0.0.1:1"))
    with pytest.raises(Failure, match="127.0.0.1:1 does not answer") as caught:
        reader.line("watch", value)
    assert "geheim" not in str(caught.value)


def test_the_registry_has_to_be_named_and_its_password_is_not_shown() -> None:
    with pytest.raises(UserError, match=r"kafka.schema_registry is not set"):
        Schemas(KafkaConfig(value_format="avro"))
    assert "geheim" not in repr(KafkaConfig(schema_registry="http://user:geheim@host"))


@pytest.mark.parametrize("form", ["avro", "protobuf"])
def test_ingest_writes_lines_and_dead_letters(form: str, registry: Registry, cluster: Callable[..., KafkaConfig]) -> None:
    config = cluster(partitions=1, value_format=form, schema_registry=registry.url)
    one = {"user_id": "u", "item_id": "i", "watch_ms": 3, "duration_ms": 4}
    values = [
        avro(registry, **{**one, "ts": T0 + n}) if form == "avro" else protobuf(registry, T0 + n, **one) for n in range(5)
    ]
    broken = values[0][:5] + b"\xff\xff\xff"
    producer = Producer(settings.producer(config))
    for value in (*values, broken, values[0][:1]):
        producer.produce(config.named("watch"), value, partition=0)
    for topic in ("watch", "interactions", "items"):
        producer.produce(config.named(topic), END, partition=0)
    assert producer.flush(90) == 0
    counts = Ingest(Config(kafka=config)).run(until_end=True)
    assert (counts.events, counts.dead_letters) == (5, 2)
    with Tail(config, "events") as tail:
        lines = [line for message in tail.rest() for line in message.value().split(b"\n")]
    assert [orjson.loads(line) for line in lines[:-1]] == [{"type": "watch", "ts": T0 + n, **one} for n in range(5)]
    with Tail(config, "dead-letters") as tail:
        letters = [(message.value(), dict(message.headers())["reason"]) for message in tail.rest()]
    assert letters == [(broken, b"bad_schema"), (values[0][:1], b"bad_schema")]
