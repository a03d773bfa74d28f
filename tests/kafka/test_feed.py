"""`onerec feed` on a real broker: every session once, in one order, whatever dies, and clear words where some are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
from feeding import GAP_MS, T0, Worker, session

from onerec.errors import Failure, UserError
from streaming.kafka.feeder import Feeder
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.wire import session_message
from streaming.sessions import session_json
from streaming.store import Reader

Cluster = Callable[..., KafkaConfig]


@pytest.fixture
def config(cluster: Cluster) -> KafkaConfig:
    return cluster(partitions=3, stall_seconds=3)


@pytest.fixture
def worker(config: KafkaConfig) -> Iterator[Worker]:
    with Worker(config) as worker:
        yield worker


def fed(config: KafkaConfig, state: Path, **options: object) -> Feeder:
    """Feeds to the end; the feeder is closed."""
    with Feeder(config, state, say=lambda text: said.append(text), **options) as feeder:  # type: ignore[arg-type]
        while feeder.step() or not feeder.finished():
            pass
    return feeder


said: list[str] = []


def log(state: Path) -> list[bytes]:
    with Reader(state) as reader:
        return [session_json(found) for _, found in reader.sessions()]


def test_sessions_come_once_in_the_order_of_their_ends_with_all_their_parts(
    config: KafkaConfig, worker: Worker, tmp_path: Path
) -> None:
    a, b, c, d = (session(user, minute) for user, minute in (("a", 3), ("b", 1), ("c", 2), ("d", 4)))
    worker.commit(0, [a], watermark=10)
    worker.commit(1, [b, d], watermark=10)
    worker.commit(1, [session("never", 5)], watermark=90, abort=True)
    worker.commit(2, [c], watermark=7)
    worker.end()
    feeder = fed(config, tmp_path / "state")
    assert log(tmp_path / "state") == [session_json(found) for found in (b, c, a, d)]
    with Reader(tmp_path / "state") as reader:
        assert [found for _, found in reader.sessions()] == [b, c, a, d]
        assert reader.counters().sessions == reader.counters().high_quality == 4
        assert reader.watermark() == T0 + 7 * 60_000
    assert feeder.done.sessions == 4 and feeder.done.repeats == 0
