"""What the engines share, without an engine: partitions taken away while they open, ends of the log, credentials for Faust."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import pytest
from event_log import EventLog
from patience import PATIENCE

from onerec.errors import Failure
from streaming.kafka import wire
from streaming.kafka.app import credentials
from streaming.kafka.ends import LogEnds
from streaming.kafka.engine import Engine, message_number
from streaming.kafka.partitions import Fenced, Gap
from streaming.kafka.settings import KafkaConfig

Make = Callable[..., KafkaConfig]


class Store:
    """A store in memory whose partitions open when `gate` is set, and which fails as told."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.open_ones: dict[int, wire.Progress] = {}
        self.calls: list[tuple[str, list[int]]] = []
        self.fault: Exception | None = None

    def open(self, partitions: Iterable[int]) -> dict[int, int]:
        wanted = list(partitions)
        self.calls.append(("open", wanted))
        assert self.gate.wait(PATIENCE * 20)
        self.open_ones |= {partition: wire.Progress(partition=partition, number=0) for partition in wanted}
        return dict.fromkeys(wanted, 0)

    def close(self, partitions: Iterable[int]) -> None:
        gone = [partition for partition in partitions if self.open_ones.pop(partition, None)]
        if gone:
            self.calls.append(("close", gone))

    def apply(self, partition: int, chunks: list[wire.Chunk]) -> None:
        if self.fault:
            fault, self.fault = self.fault, None
            raise fault
        self.open_ones[partition] = wire.Progress(partition=partition, number=0, offset=chunks[-1].offset + 1)

    def settle(self, partition: int) -> None:
        pass

    def progress(self, partition: int) -> wire.Progress:
        return self.open_ones[partition]


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + PATIENCE * seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def engine(cluster: Make) -> Iterable[tuple[Engine, Store]]:
    store = Store()
    made = Engine(store, cluster(partitions=3, session_timeout_ms=1_000))  # type: ignore[arg-type]
    yield made, store
    store.gate.set()
    made.close()


def test_a_partition_taken_away_while_it_opens_is_closed_again_and_never_read(engine: tuple[Engine, Store]) -> None:
    driven, store = engine
    driven.assign([0, 1])
    until(lambda: store.calls)
    driven.revoke([1])
    driven.assign([1])
    store.gate.set()
    ready: dict[int, int] = {}
    until(lambda: ready.update(driven.opened()) or len(ready) == 2)
    assert store.calls == [("open", [0, 1]), ("close", [1]), ("open", [1])]
    assert driven.positions() == {0: 0, 1: 0}


def test_messages_are_refused_before_a_partition_runs_and_after_it_is_gone(engine: tuple[Engine, Store]) -> None:
    driven, store = engine
    chunk = wire.Chunk(0, 0, b"{}", 0)
    driven.assign([0])
    assert driven.apply(0, [chunk]) is None
    store.gate.set()
    until(driven.opened)
    assert driven.apply(0, [chunk]) is None
    assert driven.positions() == {0: 1}
    driven.revoke([0])
    assert driven.apply(0, [chunk]) is None
    assert driven.positions() == {}


def test_a_gap_is_read_again_and_a_fenced_partition_opened_again_after_a_session(engine: tuple[Engine, Store]) -> None:
    driven, store = engine
    store.gate.set()
    driven.assign([0])
    until(driven.opened)
    chunk = wire.Chunk(9, 0, b"{}", 9)
    store.fault = Gap(0, 4)
    assert driven.apply(0, [chunk]) == 4
    store.fault = Fenced(0)
    store.open_ones.clear()
    assert driven.apply(0, [chunk]) is None
    assert (driven.fenced(), driven.runs(0)) == ([0], False)
    began = time.monotonic()
    until(lambda: driven.check() or driven.opened())
    assert time.monotonic() - began > 0.5
    assert (driven.fenced(), driven.runs(0)) == ([], True)


def test_a_write_that_fails_while_opening_is_told(engine: tuple[Engine, Store]) -> None:
    driven, store = engine

    def refuse(partitions: Iterable[int]) -> dict[int, int]:
        raise Failure("the disk is full")

    store.open = refuse  # type: ignore[method-assign]
    driven.assign([0])
    with pytest.raises(Failure, match="the disk is full"):
        until(driven.opened)


def test_the_marker_of_a_transaction_is_no_lag(cluster: Make) -> None:
    config = cluster(partitions=2)
    log = EventLog(config)
    log.send([(0, b"{}"), (0, b"{}"), (1, b"{}")])
    positions = {0: 2, 1: 0}
    ends = LogEnds(config, lambda: positions)
    try:
        until(lambda: ends.lag(0, 2) == 0)
        assert ends.lag(1, 0) == 2
        log.send([(0, b"{}")])
        until(lambda: ends.lag(0, 2))
        assert ends.first([0, 1]) == {0: 0, 1: 0}
    finally:
        ends.close()


@pytest.mark.parametrize(
    ("headers", "number"),
    [([("n", b"17")], 17), ([("x", b"1"), ("n", b"0")], 0), ([], None), (None, None), ([("n", b"?")], None)],
)
def test_the_number_stands_in_a_header(headers: list[tuple[str, bytes]] | None, number: int | None) -> None:
    assert message_number(headers) == number


def test_faust_gets_the_credentials_of_the_configuration() -> None:
    found = credentials(
        KafkaConfig(
            security_protocol="SASL_PLAINTEXT", sasl_mechanism="SCRAM-SHA-512", sasl_username="me", sasl_password="hidden"  # noqa: S106
        )
    )
    assert found is not None
    assert (found.protocol.value, found.mechanism.value, found.username, found.password) == (
        "SASL_PLAINTEXT", "SCRAM-SHA-512", "me", "hidden"
    )
    assert "hidden" not in repr(found)
    assert credentials(KafkaConfig()) is None
    secure = credentials(KafkaConfig(security_protocol="SSL"))
    assert secure is not None and secure.protocol.value == "SSL" and secure.context.check_hostname
