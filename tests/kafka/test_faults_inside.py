"""Processes that stop or die inside a step of a write while others take over; the frozen ones wake when long replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from parts import Parts, even_cuts, make_parts
from reference_log import SETTINGS, Shape, lines
from stack import Process, Stack

from streaming.kafka.settings import KafkaConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WRITE_STEPS = ("begin", "produce", "commit", "write")
OPEN_STEPS = ("open:fence", "open:catch-up")
INGEST_STEPS = ("open:fence", "open:read", "begin", "produce", "offsets", "commit", "done:commit_transaction")
QUICK = (*SETTINGS, "stream.idle_ms=1500")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    found = list(lines(Shape(users=400, minutes=24)))
    return make_parts(tmp_path_factory.mktemp("parts"), found, even_cuts(len(found), 6))


def stopped(stack: Stack, trapped: list[Process]) -> None:
    stack.wait(lambda: all(process.is_stopped() for process in trapped), 60, "processes to freeze in their steps")


def died(stack: Stack, trapped: list[Process]) -> None:
    for process in trapped:
        stack.wait(lambda: not process.running, 60, f"{process.name} to die in its step")  # noqa: B023
        assert process.exits == [-9], process.tail()
        process.exits.clear()


def wake(trapped: list[Process]) -> None:
    for process in trapped:
        process.wake()


@pytest.mark.parametrize("engine", ["group", "faust"])
def test_a_worker_that_wakes_inside_a_step_changes_nothing(
    engine: str, parts: Parts, cluster: Callable[..., KafkaConfig], tmp_path: Path
) -> None:
    # Two for each worker: Faust fills its workers up to ⌈partitions / workers⌉, so that of 8 one of five may be left without.
    config = cluster(partitions=10)
    with Stack(tmp_path, config.bootstrap, engine=engine, prefix=config.prefix, partitions=10, semantic=QUICK) as stack:
        stack.ingest().start()
        sound = stack.worker(9).start()
        parts.feed(stack, 0)
        # Frozen inside a write: the sound worker takes their partitions over and goes on.
        trapped = [stack.worker(number).start(trap=f"freeze:{step}:1") for number, step in enumerate(WRITE_STEPS)]
        stack.shared("stream", len(trapped) + 1)
        parts.produce(stack, 1)
        stopped(stack, trapped)
        parts.settle(stack, 1)
        parts.feed(stack, 2)
        wake(trapped)
        parts.feed(stack, 3)
        # Frozen while opening or closing: who wakes in the first fences the rightful owner, who has to come back.
        for process in trapped:
            process.kill()
        closing = stack.worker(5).start(trap="freeze:close:1")
        parts.feed(stack, 4)
        opening = [stack.worker(number + 6).start(trap=f"freeze:{step}:1") for number, step in enumerate(OPEN_STEPS)]
        stopped(stack, [closing, *opening])
        parts.produce(stack, 5, end=True)
        parts.settle(stack, 5)
        wake([closing, *opening])
        stack.finish()
        assert sound.running
        verdict = stack.judge(parts.wanted)
    assert not verdict.faults, verdict.report()


@pytest.mark.parametrize("engine", ["group", "faust"])
def test_a_worker_that_dies_inside_a_step_loses_and_doubles_nothing(
    engine: str, parts: Parts, cluster: Callable[..., KafkaConfig], tmp_path: Path
) -> None:
    config = cluster(partitions=8)
    with Stack(tmp_path, config.bootstrap, engine=engine, prefix=config.prefix, partitions=8, semantic=QUICK) as stack:
        stack.ingest().start()
        for number, steps in enumerate((WRITE_STEPS[:2], WRITE_STEPS[2:], OPEN_STEPS)):
            trapped = [stack.worker(which).start(trap=f"kill:{step}:1") for which, step in enumerate(steps)]
            if steps is not OPEN_STEPS:
                stack.shared("stream", len(trapped))
            parts.produce(stack, number)
            died(stack, trapped)
            again = [process.start() for process in trapped]
            parts.settle(stack, number)
            for process in again:
                process.kill()
        closing = stack.worker(2).start(trap="kill:close:1")
        parts.feed(stack, 3)
        # Partitions are closed when another worker comes for its share.
        stack.worker(0).start()
        died(stack, [closing])
        parts.produce(stack, 4)
        parts.produce(stack, 5, end=True)
        stack.finish()
        verdict = stack.judge(parts.wanted)
    assert not verdict.faults, verdict.report()


@pytest.mark.parametrize("action", ["freeze", "kill"])
def test_an_ingest_that_stops_inside_a_transaction_loses_and_doubles_nothing(
    action: str, parts: Parts, cluster: Callable[..., KafkaConfig], tmp_path: Path
) -> None:
    config = cluster(partitions=8)
    with Stack(
        tmp_path, config.bootstrap, engine="group", prefix=config.prefix, partitions=8, semantic=QUICK
    ) as stack:
        stack.worker().start()
        sound = stack.ingest(9).start()
        parts.feed(stack, 0)
        trapped = [stack.ingest(number).start(trap=f"{action}:{step}:1") for number, step in enumerate(INGEST_STEPS)]
        parts.produce(stack, 1)
        if action == "freeze":
            stopped(stack, trapped)
        else:
            died(stack, trapped)
        parts.settle(stack, 1)
        parts.feed(stack, 2)
        if action == "freeze":
            wake(trapped)
        parts.feed(stack, 3)
        parts.produce(stack, 4)
        parts.produce(stack, 5, end=True)
        stack.finish()
        assert sound.running
        verdict = stack.judge(parts.wanted)
    assert not verdict.faults, verdict.report()
