"""Files into Kafka: every line once, in order, in its user's partition, whatever dies on the way."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Message, Producer
from patience import PATIENCE
from reference_log import Shape, lines, write
from stack import Process

from onerec.errors import Failure, UserError
from streaming.events import Line, decode
from streaming.item_files import read_items
from streaming.items import ItemRecord
from streaming.kafka import settings, topics
from streaming.kafka.broker import Broker
from streaming.kafka.outbox import CUT_BYTES, PACK_BYTES, RAW, Outbox, packed, wait_decided
from streaming.kafka.partitioning import Partitioner, partition_of, partition_of_bytes
from streaming.kafka.producing import Produce, event_json, progress_key
from streaming.kafka.progress import ProgressLog
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Tail
from streaming.kafka.topics import topic_ids
from streaming.kafka.wire import END, unpack
from streaming.rows import KUAIRAND, events_of
from streaming.sources import Position
from streaming.streams import open_stream
from streaming.tables import Csv

Cluster = Callable[..., KafkaConfig]
Placed = dict[tuple[str, int], list[bytes]]
FAR = 1 << 62


def watch(user: str, ts: int, item: str = "i") -> bytes:
    return orjson.dumps({"type": "watch", "user_id": user, "item_id": item, "ts": ts, "watch_ms": 8_000, "duration_ms": 9_000})


def produce(config: KafkaConfig, *paths: Path, **named: Any) -> dict[str, Any]:
    return Produce(config, [str(path) for path in paths], future_ms=60_000, **named).run()


def messages(config: KafkaConfig, topic: str) -> list[Message]:
    """Everything committed, in order within each partition."""
    with Tail(config, topic, topic_ids(config, [topic])[topic], dict.fromkeys(range(config.partitions))) as tail:
        read: list[Message] = []
        while not tail.complete():
            read += tail.read(10_000, 0.05)
        return read


def found(config: KafkaConfig) -> Placed:
    """Committed lines by topic and partition, in order."""
    placed: Placed = defaultdict(list)
    wait_decided(config, RAW)
    for topic in RAW:
        for message in messages(config, topic):
            placed[topic, message.partition()] += unpack(message.value())
    return dict(placed)


def wanted(config: KafkaConfig, source: Iterable[bytes]) -> Placed:
    """Where the lines of one source belong, by the rules alone."""
    placed: Placed = defaultdict(list)
    for line in source:
        if not line.strip(b" \t\r"):
            continue
        event = decode(line, FAR)
        if isinstance(event, Line):
            topic = "watch" if event.type == "watch" else "interactions"
            place = topic, partition_of(event.user_id, config.partitions, config.partitioner)
        elif isinstance(event, ItemRecord):
            place = "items", partition_of(event.item_id, config.partitions, config.partitioner)
        else:
            place = "watch", partition_of_bytes(line, config.partitions, "crc32")
        placed[place].append(line)
    return dict(placed)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    write(path, lines(Shape(users=150, minutes=20, items=300)))
    return path


def words(config: KafkaConfig, *more: str | Path) -> list[str]:
    return ["produce", *map(str, more), "--bootstrap", config.bootstrap, "--set", f"kafka.prefix={config.prefix}",
            "--set", f"kafka.partitions={config.partitions}", "--json"]


@pytest.mark.parametrize("kind", ["crc32", "murmur2"])
def test_partitions_are_those_of_the_clients_own_partitioners(cluster: Cluster, kind: str) -> None:
    config = cluster(7)
    name = {"crc32": "consistent", "murmur2": "murmur2"}[kind]
    keys = [f"u{n}" for n in range(300)] + ["7", "usér", "日本", "a:b%", "x" * 255, "ab", "abc", "abcd"]
    given: dict[str, int] = {}
    producer = Producer(settings.producer(config, partitioner=name))
    for key in keys:
        producer.produce(
            config.named("watch"), b"x", key, on_delivery=lambda error, m: given.update({m.key().decode(): m.partition()})
        )
    assert producer.flush(90) == 0
    assert given == {key: partition_of(key, 7, kind) for key in keys}
    partitioner = Partitioner(7, kind)
    assert [partitioner(key) for key in keys] == [partitioner[key] for key in keys] == [given[key] for key in keys]
    assert len(set(given.values())) == 7


def test_an_unknown_partitioner_is_refused() -> None:
    with pytest.raises(ValueError, match="crc32 or murmur2"):
        Partitioner(4, "random")


@pytest.mark.parametrize("pack", [1, 7, 200])
def test_every_line_goes_once_in_order_as_its_bytes(cluster: Cluster, log: Path, pack: int) -> None:
    config = cluster(5)
    summary = produce(config, log, pack=pack)
    source = log.read_bytes().split(b"\n")[:-1]
    assert found(config) == wanted(config, source)
    placed = wanted(config, source)
    by_topic = {topic: sum(len(some) for (name, _), some in placed.items() if name == topic) for topic in RAW}
    assert {name: summary[name] for name in RAW} == by_topic
    assert summary["lines"] == sum(by_topic.values()) and summary["partitions"] == 5
    assert summary["invalid"] == sum(1 for line in source if line.strip() and not isinstance(decode(line, FAR), Line))
    for topic in RAW:
        for message in messages(config, topic):
            held = unpack(message.value())
            event = decode(held[0], FAR)
            assert len(held) <= pack
            assert message.key() == (event.user_id.encode() if pack == 1 and isinstance(event, Line) else None)
            assert abs(message.timestamp()[1] / 1000 - time.time()) < 600, "the time of the log record is that of producing"
    assert produce(config, log)["lines"] == 0
    assert found(config) == placed


def test_a_packed_message_holds_no_more_bytes_than_allowed() -> None:
    rng = random.Random(5)
    for _ in range(200):
        sizes = (10, 2_000, 100_000, PACK_BYTES - 1, PACK_BYTES, 400_000)
        source = [b"x" * rng.choice(sizes) for _ in range(rng.randint(1, 30))]
        pack = rng.randint(2, 20)
        made = packed(source, pack)
        assert [len(line) for message in made for line in message.split(b"\n")] == [len(line) for line in source]
        assert all(len(message) <= PACK_BYTES or b"\n" not in message for message in made)
        assert all(message.count(b"\n") < pack for message in made)


def test_lines_that_are_no_events_go_too(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(3)
    ahead = watch("u", int(time.time() * 1000) + 10**9)
    source = [
        b"{", watch("u", 1_700_000_000_000), b"\xff\xfe\x00", b"  ", b'{"type":"watch"}', ahead, b"x" * 100, b"y" * (3 << 20),
        b'{"type":"item","item_id":"i","ts":1700000000000}', b"x" * 100, watch("a" * 257, 1_700_000_000_000),
    ]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(source))
    summary = produce(config, path, pack=50)
    source[7] = source[7][:CUT_BYTES]
    assert found(config)["watch", partition_of("u", 3, "crc32")].count(ahead) == 1
    expected = {place: sorted(some) for place, some in wanted(config, source).items() if place[0] != "watch"}
    assert {place: sorted(some) for place, some in found(config).items() if place[0] != "watch"} == expected
    assert sorted(line for (topic, _), some in found(config).items() if topic == "watch" for line in some) == sorted(
        line for line in source if line.strip() and b'"item"' not in line
    )
    assert summary == {**summary, "lines": 10, "invalid": 7, "items": 1, "watch": 9}


def test_several_files_are_merged_by_event_time(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(2)
    rng = random.Random(3)
    start = 1_700_000_000_000
    paths = []
    for name in ("a", "b", "c"):
        times = sorted(rng.randrange(0, 10_000) for _ in range(400))
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_bytes(b"\n".join(watch(f"u{rng.randrange(9)}", start + ts, name) for ts in times))
    produce(config, *paths, pack=10)
    placed = found(config)
    assert sum(map(len, placed.values())) == 1_200
    for some in placed.values():
        order = [(orjson.loads(line)["ts"], orjson.loads(line)["item_id"]) for line in some]
        assert order == sorted(order)


def test_a_pace_is_that_of_the_log(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(1)
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join(watch("u", 1_700_000_000_000 + second * 1_000) for second in range(5)))
    began = time.monotonic()
    produce(config, path, speed=4.0, pack=10)
    assert time.monotonic() - began >= 1.0
    assert len(found(config)["watch", 0]) == 5


def test_end_markers_go_everywhere_once_and_again_after_more_lines(cluster: Cluster, log: Path) -> None:
    config = cluster(3)
    everywhere = {(topic, partition) for topic in RAW for partition in range(3)}

    def ends() -> dict[tuple[str, int], int]:
        placed = found(config)
        return {place: placed.get(place, []).count(END) for place in everywhere}

    produce(config, log, pack=20)
    assert set(ends().values()) == {0}
    produce(config, log, pack=20, end=True)
    produce(config, log, pack=20, end=True)
    assert set(ends().values()) == {1}
    for topic in RAW:
        last = {message.partition(): message for message in messages(config, topic)}
        assert {partition: (message.value(), message.key()) for partition, message in last.items()} == dict.fromkeys(
            range(3), (END, None)
        )
    with log.open("ab") as file:
        file.write(watch("u", 1_800_000_000_000) + b"\n")
    assert produce(config, log, end=True)["lines"] == 1
    assert set(ends().values()) == {2}
    assert found(config)["watch", partition_of("u", 3, "crc32")][-2:] == [watch("u", 1_800_000_000_000), END]
    produce(config, end=True)
    assert set(ends().values()) == {3}, "markers alone, without a file"


def test_lines_of_a_pipe_are_there_before_it_ends(cluster: Cluster) -> None:
    config = cluster(1)
    source = [watch(f"u{n}", 1_700_000_000_000 + n) for n in range(3)]
    run = [sys.executable, "-m", "onerec.cli", *words(config, "-", "--pack", "100")]
    process = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"\n".join(source[:2]) + b"\n")
    process.stdin.flush()
    deadline = time.monotonic() + PATIENCE * 60
    while found(config) != {("watch", 0): source[:2]}:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    said, _ = process.communicate(source[2] + b"\n", timeout=180)
    assert process.returncode == 0 and orjson.loads(said)["lines"] == 3
    assert found(config) == {("watch", 0): source}


def test_what_stands_before_a_damaged_place_is_there_and_the_whole_file_goes_on(cluster: Cluster, log: Path) -> None:
    config = cluster(2)
    packed_log = log.with_suffix(".jsonl.gz")
    whole = gzip.compress(log.read_bytes(), compresslevel=1)
    packed_log.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or truncated"):
        produce(config, packed_log, pack=10)
    placed, right = found(config), wanted(config, log.read_bytes().split(b"\n"))
    before = sum(map(len, placed.values()))
    assert before > 100 and all(some == right[place][: len(some)] for place, some in placed.items())
    packed_log.write_bytes(whole)
    assert produce(config, packed_log, pack=10)["lines"] == sum(map(len, right.values())) - before
    assert found(config) == right


def test_another_file_under_the_same_name_is_refused(cluster: Cluster, log: Path) -> None:
    config = cluster(2)
    produce(config, log)
    before = found(config)
    log.write_bytes(watch("u", 1_700_000_000_000) + b"\n")
    with pytest.raises(UserError, match="is not the file that was replayed under this name before"):
        produce(config, log)
    assert found(config) == before


def test_histories_from_before_the_log_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(2)
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"user_id":1,"last_time_ms":1700000000000,"long_watch_seq":[1],"like_seq":[2]}\n')
    with pytest.raises(UserError, match="use `onerec replay`"):
        produce(config, path)
    assert found(config) == {}


def test_columns_become_lines_and_broken_rows_go_as_they_are(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(2)
    path = tmp_path / "log.csv"
    path.write_text('uid,item_id,ts,watch_ms,liked\n7,i1,1700000000000,8000,1\n8,i2,x,1,0\n"a\nb",i3\n', encoding="utf-8")
    summary = produce(config, path, mapping={"uid": "user_id", "liked": "like"})
    placed = [line for some in found(config).values() for line in some]
    assert summary == {**summary, "lines": 4, "invalid": 2, "watch": 3, "interactions": 1}
    assert sorted(placed) == sorted([
        b'{"type":"watch","event_id":null,"user_id":"7","item_id":"i1","ts":1700000000000,"watch_ms":8000,"duration_ms":0,'
        b'"request_id":null}',
        b'{"type":"like","event_id":null,"user_id":"7","item_id":"i1","ts":1700000000000,"request_id":null}',
        b"8,i2,x,1,0", b'"a\\nb",i3',
    ])


def test_catalogue_entries_go_by_item(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(3)
    whole = b'{"type":"item", "item_id":"i1","ts":1700000000000,"tags":["39"],"embedding":[0.25,-1.5],"author_id":"a","more":1}'
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\n".join([whole, b'{"item_id":"i2","duration_ms":5}', b'{"item_id":""}', b""]))
    summary = produce(config, items=[str(path)], pack=9, end=True)
    entries = {line for (topic, _), some in found(config).items() if topic == "items" for line in some if line != END}
    assert entries == {whole, b'{"type":"item","item_id":"i2","ts":631152000000,"duration_ms":5,"tags":[]}', b'{"item_id":""}'}
    assert whole in found(config)["items", partition_of("i1", 3, "crc32")]
    assert summary == {**summary, "lines": 3, "items": 3, "invalid": 1}


def test_a_real_log_comes_through_as_the_same_events(cluster: Cluster, tmp_path: Path) -> None:
    folder = os.environ.get("ONEREC_DATA")
    if not folder:
        pytest.skip("ONEREC_DATA does not name the folder of the KuaiRand log")
    events = next(Path(folder).glob("events_*.csv.gz"))
    part = tmp_path / "part.csv.gz"
    with gzip.open(events, "rt") as source, gzip.open(part, "wt", compresslevel=1) as target:
        target.writelines(row for row, _ in zip(source, range(20_001), strict=False))
    videos = next(Path(folder).glob("videos.csv.gz"))
    config = cluster(4)
    summary = produce(config, part, items=[str(videos)], pack=100)
    table = Csv(str(part), open_stream(str(part)), Position(), KUAIRAND)
    mapping = table.checked_mapping()
    rows = [event for _, row in table.rows() if row is not None for event in events_of(row, mapping, FAR)]
    assert found_events(config, ("watch", "interactions")) == wanted(config, [event_json(event) for event in rows])
    catalogue = [entry for batch in read_items(str(videos), [], None) for entry in batch]
    got = [decode(line, FAR) for (topic, _), some in found(config).items() if topic == "items" for line in some]
    assert sorted(got, key=lambda entry: entry.item_id) == sorted(catalogue, key=lambda entry: entry.item_id)
    assert summary["invalid"] == 0 and summary["lines"] == len(rows) + len(catalogue)


def found_events(config: KafkaConfig, topics: Iterable[str]) -> Placed:
    return {place: some for place, some in found(config).items() if place[0] in topics}


def test_a_second_producer_of_the_same_files_takes_over(cluster: Cluster, log: Path) -> None:
    config = cluster(2)
    with Outbox(config, "produce-x") as first, Outbox(config, "produce-x") as second:
        first.put("watch", 0, "u", b"of the first")
        first.commit({})
        with pytest.raises(Failure, match="has taken over"):
            first.settle()
        second.put("watch", 0, "u", b"of the second")
        second.commit({})
        second.settle()
    assert found(config) == {("watch", 0): [b"of the second"]}


PLACES = ("call:init_transactions:1", "call:begin_transaction:1", "call:commit_transaction:2", "done:commit_transaction:1",
          "done:commit_transaction:3")


def test_killed_at_every_step_of_a_transaction_it_goes_on(cluster: Cluster, log: Path, tmp_path: Path) -> None:
    config = cluster(3)
    options = ["--speed", "600", "--pack", "5", "--end"]
    for place in PLACES:
        process = Process("produce", words(config, log, *options), tmp_path / "produce.log").start(trap=f"kill:{place}")
        deadline = time.monotonic() + PATIENCE * 60
        while process.running:
            assert time.monotonic() < deadline, process.tail()
            time.sleep(0.02)
        assert process.exits == [-9], process.tail()
    produce(config, log, pack=5, end=True)
    placed = found(config)
    assert {some.pop() for some in placed.values()} == {END}
    assert {place: some for place, some in placed.items() if some} == wanted(config, log.read_bytes().split(b"\n"))


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(cluster: Cluster, log: Path, tmp_path: Path) -> None:
    config = cluster(3)
    rng = random.Random(11)
    other = tmp_path / "other.jsonl"
    write(other, lines(Shape(users=60, minutes=20, items=300, seed=2)))
    run = words(config, log, other, "--speed", "300", "--pack", "3", "--end")
    for _ in range(8):
        process = Process("produce", run, tmp_path / "produce.log").start()
        time.sleep(rng.uniform(0.6, 2.2))
        process.kill()
    summary = json.loads(Process("produce", run, tmp_path / "produce.log").start().result(120).splitlines()[-1])
    assert summary["lines"] >= 0
    for place, some in found(config).items():
        assert some.pop() == END and END not in some
        for path in (log, other):
            mine = wanted(config, path.read_bytes().split(b"\n")).get(place, [])
            held = set(mine)
            assert [line for line in some if line in held] == mine
    total = sum(len(some) for path in (log, other) for some in wanted(config, path.read_bytes().split(b"\n")).values())
    assert sum(len(some) - 1 for some in found(config).values()) == total


@pytest.mark.slow
def test_a_frozen_producer_that_wakes_doubles_nothing(cluster: Cluster, log: Path, tmp_path: Path) -> None:
    config = cluster(3)
    frozen = Process("frozen", words(config, log, "--speed", "600"), tmp_path / "frozen.log")
    frozen.start(trap="freeze:call:commit_transaction:3")
    deadline = time.monotonic() + PATIENCE * 60
    while not frozen.is_stopped():
        assert time.monotonic() < deadline and frozen.running, frozen.tail()
        time.sleep(0.02)
    produce(config, log)
    frozen.wake()
    deadline = time.monotonic() + PATIENCE * 60
    while frozen.running:
        assert time.monotonic() < deadline, frozen.tail()
        time.sleep(0.02)
    assert frozen.exits == [1] and "has taken over" in frozen.tail(), frozen.tail()
    assert found(config) == wanted(config, log.read_bytes().split(b"\n"))


@pytest.mark.slow
def test_a_broker_that_dies_is_waited_for_and_left_when_asked(kafka_tools: None, log: Path, tmp_path: Path) -> None:
    with Broker(tmp_path / "broker") as broker:
        config = KafkaConfig(bootstrap=broker.bootstrap, partitions=2)
        topics.create(config)
        other = tmp_path / "other.jsonl"
        write(other, lines(Shape(users=60, minutes=20, items=300, seed=2)))
        leaving = Process("leaving", words(config, log, "--speed", "30"), tmp_path / "leaving.log").start()
        staying = Process("staying", words(config, other, "--speed", "30"), tmp_path / "staying.log").start()
        while len(found(config)) < 4:
            assert leaving.running and staying.running, leaving.tail() + staying.tail()
        broker.kill()
        time.sleep(1)
        assert leaving.stop(60) == 130, leaving.tail()
        broker.start()
        staying.result(120)
        produce(config, log)
        placed = found(config)
        for path in (log, other):
            for place, mine in wanted(config, path.read_bytes().split(b"\n")).items():
                held = set(mine)
                assert [line for line in placed[place] if line in held] == mine
                placed[place] = [line for line in placed[place] if line not in held]
        assert not any(placed.values())


@pytest.mark.parametrize("decided", ["committed", "aborted"])
def test_a_transaction_left_open_over_other_files_is_waited_for(cluster: Cluster, log: Path, decided: str) -> None:
    config = cluster(2)
    whole = produce(config, log)["lines"]
    with ProgressLog(config) as known:
        known.refresh()
        position = known.produced[str(log)]
    anew = cluster(2)
    other = Producer(settings.producer(anew, transactional_id=anew.named("produce-of-more-files")))
    other.init_transactions()
    other.begin_transaction()
    other.produce(anew.named("progress"), position, progress_key(str(log)), partition=0)
    other.flush(90)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(produce, anew, log)
        time.sleep(2)
        assert not running.done()
        other.commit_transaction() if decided == "committed" else other.abort_transaction()
        assert running.result(60)["lines"] == (0 if decided == "committed" else whole)
