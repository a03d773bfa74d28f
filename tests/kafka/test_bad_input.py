"""What a site may throw at the system: broken messages, a user who is half of all traffic, wrong topics, a wrong password."""

from __future__ import annotations

import base64
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
from confluent_kafka import Producer
from reference_log import SETTINGS, T0, Shape, lines, onerec, reference, write
from stack import Stack

from streaming.events import MAX_LINE_BYTES, Line, decode
from streaming.kafka import settings
from streaming.kafka.broker import Broker
from streaming.kafka.dead_letters import letters
from streaming.kafka.partitioning import partition_of
from streaming.kafka.settings import KafkaConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Cluster = Callable[..., KafkaConfig]
COMMANDS = {
    "produce": ["produce", "{log}"], "ingest": ["ingest"], "stream": ["stream", "--state", "{state}", "--engine", "group"],
    "feed": ["feed", "--state", "{state}"], "histories-replica": ["histories-replica", "--state", "{state}"],
    "dead-letters": ["dead-letters"],
}


def padded(line: bytes, size: int) -> bytes:
    """The same event with a field that nobody reads, `size` bytes in all."""
    return line[:-1] + b',"more":"' + b"x" * (size - len(line) - 10) + b'"}'


def watch(user: str, ts: int, item: str) -> bytes:
    return orjson.dumps({"type": "watch", "user_id": user, "item_id": item, "ts": ts, "watch_ms": 8_000, "duration_ms": 9_000})


BAD = (
    b"\xff\x00\xfe", b"[1]", b"{}", b'{"a":' * 200 + b"1" + b"}" * 200, b'"text"', b'{"type":"watch","user_id":"u"}', b"\x00",
    watch("u", T0 + 1, "i")[:-1], watch("u" * 257, T0 + 1, "i"), b"y" * (MAX_LINE_BYTES + 1),
)


def refused(config: KafkaConfig) -> Counter[tuple[bytes, str]]:
    """(line, reason) of every dead letter."""
    return Counter((letter.raw, letter.reason) for letter in letters(config))


def refused_by_replay(state: Path) -> Counter[tuple[bytes, str]]:
    found = map(orjson.loads, onerec("dead-letters", "--state", state, "--json").splitlines())
    return Counter(
        (base64.b64decode(one["base64"]) if "base64" in one else one["line"].encode(), one["reason"]) for one in found
    )


def send_anyhow(config: KafkaConfig, source: list[bytes], rng: random.Random) -> None:
    """Lines as a careless client would: any keys, one in ten in a wrong partition, one alone or several packed, empty ones."""
    producer = Producer(settings.producer(config))
    packs: dict[tuple[str, int], list[bytes]] = {}
    for line in source:
        event = decode(line, 1 << 62)
        user = event.user_id if isinstance(event, Line) else ""
        topic = "interactions" if isinstance(event, Line) and event.type != "watch" else "watch"
        partition = partition_of(user, config.partitions, "crc32")
        if rng.random() < 0.1:
            partition = rng.randrange(config.partitions)
        key = rng.choice((None, b"", b"\xff\xfe\x00", user.encode(), b"another"))
        pack = packs.setdefault((topic, partition), [])
        pack.append(line)
        if sum(map(len, pack)) > 1_000_000 or rng.random() < 0.3:
            producer.produce(config.named(topic), b"\n".join(pack), key, partition=partition)
            pack.clear()
        if rng.random() < 0.02:
            producer.produce(config.named(topic), rng.choice((None, b"", b"\n \r\n", b" ")), key, partition=partition)
        producer.poll(0)
    for (topic, partition), pack in packs.items():
        producer.produce(config.named(topic), b"\n".join(pack), partition=partition)
    assert producer.flush(180) == 0


def test_broken_messages_and_a_user_who_is_half_of_all_traffic(cluster: Cluster, tmp_path: Path) -> None:
    """All of it within the out-of-orderness, so that arrival order is no matter and `replay` is the reference."""
    rng = random.Random(7)
    source = list(lines(Shape(users=1_500, minutes=4, items=300)))
    times = sorted(rng.randrange(0, 240_000) for _ in range(len(source)))
    source += [watch("hot", T0 + ts, f"i{n % 300}") for n, ts in enumerate(times)]
    source += [watch("large", T0, "i0"), padded(watch("large", T0 + 1_000, "i1"), MAX_LINE_BYTES)]
    source += [line for line in BAD for _ in range(3)]
    source.sort(key=lambda line: event.ts if isinstance(event := decode(line, 1 << 62), Line) else T0)
    log = tmp_path / "log.jsonl"
    write(log, source)
    wanted = reference(log, tmp_path / "reference")
    config = cluster(partitions=3)
    with Stack(tmp_path / "stack", config.bootstrap, prefix=config.prefix, partitions=3) as stack:
        feed, replica = stack.feeder(), stack.replica()
        for process in (stack.ingest(), stack.worker(), feed, replica):
            process.start()
        send_anyhow(config, source, rng)
        stack.wait(lambda: stack.events() >= wanted.counters["events"], 120, "all events", data=True)
        stack.produce(options=["--end"])
        stack.finish()
        stack.drain(feed, replica)
        verdict = stack.judge(wanted, feeds=[feed], replica=replica)
    assert verdict.faults == []
    assert refused(config) == refused_by_replay(tmp_path / "reference")
    assert refused(config)[BAD[-1], "too_long"] == 3
    hot = sum(b'"hot"' in line for line in source)
    assert hot > 0.45 * len(source)


def test_a_user_with_too_many_open_events_holds_up_nobody(cluster: Cluster, tmp_path: Path) -> None:
    source = [watch("hot", T0 + n * 10, f"i{n}") for n in range(3_000)]
    source += [watch(f"u{n % 50}", T0 + n * 30, f"i{n}") for n in range(1_000)]
    source.sort(key=lambda line: orjson.loads(line)["ts"])
    log = tmp_path / "log.jsonl"
    write(log, source)
    config = cluster(partitions=1)
    limit = "stream.max_open_events=500"
    named = [word for value in (*SETTINGS, limit) for word in ("--set", value)]
    summary = orjson.loads(onerec("replay", log, "--state", tmp_path / "s", "--json", *named).splitlines()[-1])
    assert summary["dead_letters"] > 2_000
    with Stack(tmp_path / "stack", config.bootstrap, engine="group", prefix=config.prefix, partitions=1,
               semantic=(*SETTINGS, limit)) as stack:
        stack.produce(log, options=["--end", "--pack", "50"])
        for process in (stack.ingest(), stack.worker()):
            process.start()
        stack.finish()
        found = stack.progress()[0].counters
    assert refused(config) == refused_by_replay(tmp_path / "s")
    assert (found.events, found.sessions) == (summary["events"], summary["sessions"])


def command(words: list[str], tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    log = tmp_path / "log.jsonl"
    log.write_bytes(watch("u", T0, "i") + b"\n")
    line = [word.format(log=log, state=tmp_path / "state") for word in words]
    return subprocess.run(
        [sys.executable, "-m", "onerec.cli", *line, *more], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_topics_are_named_with_the_remedy(cluster: Cluster, tmp_path: Path, name: str) -> None:
    config = cluster(partitions=2)
    done = command(COMMANDS[name], tmp_path, "--bootstrap", config.bootstrap, "--set", "kafka.prefix=nowhere-")
    assert done.returncode == 2
    assert "nowhere-" in done.stderr and "onerec topics --create" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "dead-letters"])
def test_another_partition_count_is_refused_with_the_way_out(cluster: Cluster, tmp_path: Path, name: str) -> None:
    config = cluster(partitions=2)
    done = command(
        COMMANDS[name], tmp_path, "--bootstrap", config.bootstrap, "--set", f"kafka.prefix={config.prefix}",
        "--set", "kafka.partitions=3",
    )
    assert done.returncode == 2
    assert "kafka.partitions" in done.stderr and "2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("engine", ["faust", "group"])
def test_an_old_changelog_value_stops_the_worker_with_its_place(cluster: Cluster, tmp_path: Path, engine: str) -> None:
    config = cluster(partitions=2)
    producer = Producer(settings.producer(config))
    producer.produce(config.named("histories"), b"\x63older", b"bu", partition=1)
    assert producer.flush(90) == 0
    done = command(
        ["stream", "--state", "{state}", "--engine", engine], tmp_path, "--bootstrap", config.bootstrap,
        "--set", f"kafka.prefix={config.prefix}", "--set", "kafka.partitions=2",
    )
    assert done.returncode == 1
    assert f"topic {config.named('histories')}, partition 1, offset 0" in done.stderr, done.stderr
    assert "format 63" in done.stderr and "run the version that wrote it" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def guarded(kafka_tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a broker that asks for a password."""
    properties = {
        "listener.name.guarded.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.guarded.plain.sasl.jaas.config":
            'org.apache.kafka.common.security.plain.PlainLoginModule required user_alice="right";',
    }
    folder = tmp_path_factory.mktemp("guarded")
    with Broker(folder / "kafka", listeners={"GUARDED": "SASL_PLAINTEXT"}, properties=properties) as broker:
        yield broker.addresses["GUARDED"]


@pytest.mark.parametrize("name", COMMANDS)
def test_refused_credentials_are_told_at_once(guarded: str, tmp_path: Path, name: str) -> None:
    done = command(
        COMMANDS[name], tmp_path, "--bootstrap", guarded, "--set", "kafka.security_protocol=SASL_PLAINTEXT",
        "--set", "kafka.sasl_mechanism=PLAIN", "--set", "kafka.sasl_username=alice", "--set", "kafka.sasl_password=wrong",
    )
    assert done.returncode == 2
    assert "refuses the credentials" in done.stderr and "kafka.sasl_password_file" in done.stderr
    assert "wrong" not in done.stderr.replace("wrong password", "") and "Traceback" not in done.stderr
