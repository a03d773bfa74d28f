"""Reading a topic from explicit offsets: where its committed end is, and what is said when the log is not what it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import pytest
from confluent_kafka import Producer
from feeding import Worker
from patience import PATIENCE
from test_feed import forget

from onerec.errors import Failure
from streaming.kafka import settings, topics
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Bounds, Tail

TOPIC = "sessions"


@pytest.fixture
def config(cluster: Callable[..., KafkaConfig]) -> KafkaConfig:
    return cluster(partitions=2)


@pytest.fixture
def worker(config: KafkaConfig) -> Iterator[Worker]:
    with Worker(config) as worker:
        yield worker


def put(worker: Worker, partition: int, *values: int, abort: bool = False) -> None:
    worker.transaction(((TOPIC, partition, None, b"%d" % value, None) for value in values), abort=abort)


def tail_of(config: KafkaConfig, offsets: Mapping[int, int | None]) -> Tail:
    return Tail(config, TOPIC, topics.topic_ids(config, [TOPIC])[TOPIC], offsets)


def values(tail: Tail, seconds: float = 30) -> list[int]:
    """All up to the ends."""
    found: list[int] = []
    deadline = time.monotonic() + PATIENCE * seconds
    while not tail.complete():
        found += [int(message.value()) for message in tail.read(100, 0.05)]
        assert time.monotonic() < deadline, (tail.offsets, found)
    return found


def test_the_end_is_that_of_committed_records_and_lies_behind_the_marks(config: KafkaConfig, worker: Worker) -> None:
    put(worker, 0, 1, 2)
    put(worker, 0, 3, abort=True)
    with tail_of(config, {0: None, 1: None}) as tail:
        assert values(tail) == [1, 2]
        assert tail.offsets == {0: 5, 1: 0} and tail.bounds(0) == Bounds(0, 5) and tail.behind() == 0
        other = Producer(settings.producer(config, transactional_id=config.named("other")))
        other.init_transactions(90)
        other.begin_transaction()
        other.produce(config.named(TOPIC), b"9", partition=0)
        other.flush(90)
        put(worker, 1, 7)
        put(worker, 0, 4)
        assert values(tail) == [7], "nothing behind an open transaction is to be read yet"
        assert tail.offsets[0] == 5
        other.commit_transaction(90)
        other.close()
        deadline = time.monotonic() + PATIENCE * 30
        found: list[int] = []
        while len(found) < 2:
            found += values(tail)
            assert time.monotonic() < deadline
        assert found == [9, 4] and tail.offsets[0] == 9
    with tail_of(config, {0: 9}) as tail:
        assert values(tail) == []


def test_partitions_held_back_are_read_on_from_the_same_record(config: KafkaConfig, worker: Worker) -> None:
    with tail_of(config, {0: None, 1: None}) as tail:
        put(worker, 0, 1)
        assert values(tail) == [1]
        tail.hold([0])
        put(worker, 0, 2, 3)
        put(worker, 1, 7)
        deadline = time.monotonic() + PATIENCE * 30
        found: list[int] = []
        while not found:
            found += [int(message.value()) for message in tail.read(100, 0.05)]
            assert time.monotonic() < deadline
        tail.go_on([0])
        assert found + values(tail) == [7, 2, 3]


def test_what_is_deleted_while_it_is_read_is_known_by_its_offsets(config: KafkaConfig, worker: Worker) -> None:
    put(worker, 0, 1)
    with tail_of(config, {0: None}) as tail:
        assert values(tail) == [1]
        tail.hold([0])
        tail.read(1, 0.2)
        put(worker, 0, *range(2, 10))
        forget(config, TOPIC, 0, 6)
        tail.go_on([0])
        assert values(tail) == [6, 7, 8, 9] and tail.forgotten == {0: (2, 6)}
    with tail_of(config, {0: 3}) as tail:
        assert values(tail) == [6, 7, 8, 9] and tail.forgotten == {0: (3, 6)}


def test_a_log_that_ends_before_what_was_read_is_refused(config: KafkaConfig, worker: Worker) -> None:
    put(worker, 0, 1)
    with pytest.raises(Failure, match=r"sessions, partition 0 ends at offset 2, but it has been read up to 3"):
        tail_of(config, {0: 3})


@pytest.mark.parametrize("anew", [False, True])
def test_a_topic_deleted_while_it_is_read_ends_the_reading(
    config: KafkaConfig, worker: Worker, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    monkeypatch.setattr("streaming.kafka.tail.CHECK_SECONDS", 0.3)
    put(worker, 0, 1)
    with tail_of(config, {0: None}) as tail:
        assert values(tail) == [1]
        admin = topics.admin(config)
        for future in admin.delete_topics([config.named(TOPIC)]).values():
            future.result(90)
        deadline = time.monotonic() + PATIENCE * 60
        while anew and any(not state.there for state in topics.create(config, [TOPIC])):
            assert time.monotonic() < deadline
        with pytest.raises(Failure, match="was deleted while it was read"):
            while time.monotonic() < deadline:
                tail.read(10, 0.1)
