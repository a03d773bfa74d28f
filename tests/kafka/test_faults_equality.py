"""The same log through Kafka with 1, 2 and 4 workers, flat out and paced, gives what embedded `replay` gives, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import make_log
from reference_log import Reference, Shape
from stack import Stack

from streaming.kafka.settings import KafkaConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    return make_log(tmp_path_factory.mktemp("log"), Shape(users=600, minutes=12))


@pytest.mark.parametrize(
    "engine, workers, speed",
    [("faust", 1, 0), ("faust", 2, 60), ("faust", 4, 0), ("group", 1, 60), ("group", 2, 0), ("group", 4, 0)],
)
def test_sessions_histories_and_counters_are_those_of_replay(
    engine: str, workers: int, speed: int, log: tuple[Path, Reference], cluster: Callable[..., KafkaConfig], tmp_path: Path
) -> None:
    path, wanted = log
    config = cluster(partitions=4)
    with Stack(tmp_path, config.bootstrap, engine=engine, prefix=config.prefix) as stack:
        feeds, replica = [stack.feeder(rank, 2) for rank in range(2)], stack.replica()
        for process in (stack.ingest(), *map(stack.worker, range(workers)), *feeds, replica):
            process.start()
        stack.produce(path, options=["--end", *(["--speed", str(speed)] if speed else [])])
        stack.finish()
        stack.drain(*feeds, replica)
        verdict = stack.judge(wanted, feeds=feeds, replica=replica)
    assert not verdict.faults, verdict.report()
    assert verdict.sessions == wanted.counters["sessions"] > 400
