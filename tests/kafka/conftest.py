"""One real broker for the whole run; each test gets topics of its own under a prefix of its own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from onerec.errors import OneRecError
from streaming.kafka import topics
from streaming.kafka.broker import Broker, MissingTool, jars, java
from streaming.kafka.settings import TOPICS, KafkaConfig

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def kafka_tools() -> None:
    """Java and Kafka's jars; without them the test is skipped."""
    try:
        java()
        jars()
    except MissingTool as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def broker(kafka_tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """The broker that all tests share: do not stop it; a test that has to starts a `Broker` of its own."""
    with Broker(Path(tmp_path_factory.mktemp("kafka")) / "broker") as running:
        yield running


@pytest.fixture
def cluster(broker: Broker) -> Iterator[Callable[..., KafkaConfig]]:
    """`cluster(partitions=4, **settings)` → a KafkaConfig with its own prefix, all topics made; gone after the test."""
    made: list[KafkaConfig] = []

    def make(partitions: int = 4, **settings: Any) -> KafkaConfig:
        config = KafkaConfig(bootstrap=broker.bootstrap, prefix=f"t{next(_numbers)}-", partitions=partitions, **settings)
        made.append(config)
        wrong = [state for state in topics.create(config) if state.faults]
        assert not wrong, wrong
        return config

    yield make
    for config in made:
        with suppress(OneRecError, TimeoutError):
            admin = topics.admin(config)
            for name, future in admin.delete_topics([config.named(name) for name in TOPICS]).items():
                if error := future.exception(timeout=30):
                    logging.getLogger(__name__).info("topic %s: %s", name, error)
