"""Dead letters in Kafka: shown, mended, sent again once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Producer
from patience import PATIENCE
from reference_log import onerec
from stack import Process

from onerec.errors import UserError
from streaming.kafka import settings
from streaming.kafka.dead_letters import Letter, entry, letters, redrive
from streaming.kafka.outbox import RAW, wait_decided
from streaming.kafka.partitioning import partition_of
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Tail
from streaming.kafka.topics import topic_ids

Cluster = Callable[..., KafkaConfig]
TS = 1_700_000_000_000


def watch(user_key: str = "user_id", **fields: Any) -> bytes:
    return orjson.dumps({
        "type": "watch", user_key: "u", "item_id": "i", "ts": TS, "watch_ms": 8_000, "duration_ms": 9_000, **fields,
    })


def refuse(config: KafkaConfig, *found: tuple[str, str, bytes]) -> None:
    """Puts (source, reason, line) among the dead letters, as `ingest` and `stream` do."""
    producer = Producer(settings.producer(config))
    for source, reason, raw in found:
        headers: list[tuple[str, str | bytes | None]] = [("source", source.encode()), ("reason", reason.encode())]
        producer.produce(config.named("dead-letters"), raw, partition=0, headers=headers)
    assert producer.flush(90) == 0


def raw_lines(config: KafkaConfig) -> list[tuple[str, int, bytes]]:
    """(topic, partition, line) of everything in the raw topics."""
    wait_decided(config, RAW)
    found = []
    for topic in RAW:
        with Tail(config, topic, topic_ids(config, [topic])[topic], dict.fromkeys(range(config.partitions))) as tail:
            while not tail.complete():
                found += [(topic, message.partition(), message.value()) for message in tail.read(1_000, 0.05)]
    return found


def options(config: KafkaConfig) -> list[str]:
    return ["--bootstrap", config.bootstrap, "--set", f"kafka.prefix={config.prefix}", "--set",
            f"kafka.partitions={config.partitions}", "--json"]


def test_letters_are_shown_with_where_they_stood_and_why(cluster: Cluster) -> None:
    config = cluster(2)
    refuse(config, ("watch:1:17:0", "not_json", b"{"), ("events:0:5:3", "user_overflow", b"\xff"))
    shown = [orjson.loads(line) for line in onerec("dead-letters", *options(config)).splitlines()]
    assert shown == [
        {"number": 0, "source": "watch:1:17:0", "reason": "not_json", "line": "{"},
        {"number": 1, "source": "events:0:5:3", "reason": "user_overflow", "line": "\ufffd", "base64": "/w=="},
    ]
    assert list(letters(config, "user_overflow")) == [Letter(1, "events:0:5:3", "user_overflow", b"\xff")]
    assert entry(Letter(1, "a", "b", b"c")) == {"number": 1, "source": "a", "reason": "b", "line": "c"}


def test_what_is_valid_now_goes_back_once_and_the_rest_stays(cluster: Cluster) -> None:
    config = cluster(3)
    like = b'{"type":"like","user_id":"v","item_id":"i","ts":1700000000000}'
    refuse(
        config, ("watch:0:1:0", "future_ts", watch()), ("watch:2:8:0", "not_json", b"{"),
        ("events:1:5:2", "user_overflow", like), ("interactions:1:4:0", "future_ts", watch(ts=TS + 1)),
        ("items:1:4:0", "bad_type", b'{"item_id":"i"}'),
    )
    assert redrive(config, future_ms=60_000) == {"redriven": 3, "refused": 2}
    user, other = partition_of("u", 3, "crc32"), partition_of("v", 3, "crc32")
    back = [("watch", user, watch()), ("interactions", user, watch(ts=TS + 1)), ("interactions", other, like)]
    assert sorted(raw_lines(config)) == sorted(back)
    rest = [(letter.source, letter.reason, letter.raw) for letter in letters(config)]
    assert rest == [("watch:2:8:0", "not_json", b"{"), ("items:1:4:0", "bad_type", b'{"item_id":"i"}')]
    assert redrive(config, future_ms=60_000) == {"redriven": 0, "refused": 2}
    assert [(letter.source, letter.reason, letter.raw) for letter in letters(config)] == rest
    assert sorted(raw_lines(config)) == sorted(back)


def test_renamed_keys_mend_lines(cluster: Cluster) -> None:
    config = cluster(2)
    refuse(config, ("watch:0:1:0", "bad_user_id", watch("uid")), ("watch:0:2:0", "bad_user_id", b'{"type":"watch"}'))
    assert redrive(config, future_ms=60_000) == {"redriven": 0, "refused": 2}
    assert redrive(config, future_ms=60_000, mapping={"uid": "user_id"}) == {"redriven": 1, "refused": 1}
    [(topic, partition, line)] = raw_lines(config)
    assert (topic, partition) == ("watch", partition_of("u", 2, "crc32"))
    assert orjson.loads(line) == {**orjson.loads(watch()), "event_id": None, "request_id": None}


def test_letters_of_one_reason_go_back_alone(cluster: Cluster) -> None:
    config = cluster(2)
    refuse(
        config, ("watch:0:1:0", "future_ts", watch()), ("events:0:2:0", "user_overflow", watch(ts=TS + 1)),
        ("watch:0:3:0", "future_ts", watch(ts=TS + 2)),
    )
    assert redrive(config, future_ms=60_000, reason="user_overflow") == {"redriven": 1, "refused": 0}
    assert [letter.source for letter in letters(config)] == ["watch:0:1:0", "watch:0:3:0"]
    assert redrive(config, future_ms=60_000) == {"redriven": 2, "refused": 0}
    assert sorted(line for _, _, line in raw_lines(config)) == sorted(watch(ts=TS + n) for n in range(3))
    assert list(letters(config)) == []


def test_killed_while_it_sends_letters_again_it_doubles_none(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(2)
    refuse(config, *[(f"watch:0:{n}:0", "future_ts", watch(ts=TS + n)) for n in range(50)], ("watch:1:0:0", "not_json", b"["))
    for place in ("call:commit_transaction:1", "done:commit_transaction:1"):
        process = Process("redrive", ["dead-letters", *options(config), "--redrive"], tmp_path / "log")
        process.start(trap=f"kill:{place}")
        deadline = time.monotonic() + PATIENCE * 60
        while process.running:
            assert time.monotonic() < deadline, process.tail()
            time.sleep(0.02)
        assert process.exits == [-9], process.tail()
    assert redrive(config, future_ms=60_000) == {"redriven": 0, "refused": 1}
    assert sorted(line for _, _, line in raw_lines(config)) == sorted(watch(ts=TS + n) for n in range(50))
    assert [letter.source for letter in letters(config)] == ["watch:1:0:0"]


def test_topics_that_are_missing_are_named(cluster: Cluster) -> None:
    config = cluster(2)
    with pytest.raises(UserError, match="nowhere-dead-letters.*onerec topics --create"):
        list(letters(KafkaConfig(bootstrap=config.bootstrap, prefix="nowhere-", partitions=2)))
