"""Disks that are lost or come back stale, lines produced twice, workers that come and go: the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from parts import Parts, even_cuts, make_parts
from reference_log import SETTINGS, Shape, lines
from stack import Stack

from streaming.kafka.settings import KafkaConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUICK = (*SETTINGS, "stream.idle_ms=1500")
PART = 5
"""Parts that a log is cut into."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    found = list(lines(Shape(users=400, minutes=20, seed=5)))
    return make_parts(tmp_path_factory.mktemp("parts"), found, even_cuts(len(found), PART))


@pytest.mark.parametrize("engine", ["faust", "group"])
def test_disks_wiped_and_stale(engine: str, parts: Parts, cluster: Callable[..., KafkaConfig], tmp_path: Path) -> None:
    config = cluster(partitions=4)
    with Stack(tmp_path, config.bootstrap, engine=engine, prefix=config.prefix, semantic=QUICK) as stack:
        workers, feed, replica = [stack.worker(number) for number in range(2)], stack.feeder(), stack.replica()
        for process in (stack.ingest(), *workers, feed, replica):
            process.start()
        parts.feed(stack, 0)
        workers[0].kill()
        workers[0].keep(tmp_path / "earlier")
        # Alone, the other worker takes every partition further than the copy knows.
        parts.feed(stack, 1)
        workers[0].start()
        parts.feed(stack, 2)
        workers[0].kill()
        workers[0].put_back(tmp_path / "earlier")
        workers[1].kill()
        workers[1].wipe()
        feed.kill()
        feed.wipe()
        workers[0].start()
        parts.feed(stack, 3)
        workers[0].stop()
        for process in (workers[1], feed):
            process.start()
        replica.kill()
        replica.wipe()
        parts.produce(stack, 4, end=True)
        stack.finish()
        stack.drain(feed, replica)
        verdict = stack.judge(parts.wanted, feeds=[feed], replica=replica)
    assert not verdict.faults, verdict.report()


def test_lines_produced_again_under_another_name_are_counted_and_change_nothing(
    cluster: Callable[..., KafkaConfig], tmp_path: Path
) -> None:
    found = list(lines(Shape(users=400, minutes=20, seed=6)))
    half, end = len(found) // 2, len(found)
    # Older than the out-of-orderness, younger than the horizon: late repeats of events that are known.
    again = [line for line in found[max(0, half - 4_000) : half] if b'"ts"' in line]
    assert orjson.loads(found[half])["ts"] - orjson.loads(again[0])["ts"] > 400_000
    parts = make_parts(tmp_path, [*found[:half], *again, *found[half:]], [half, half + len(again)])
    assert parts.wanted.counters["late"] == 0 and parts.wanted.counters["events"] == parts.events[-1] > end
    config = cluster(partitions=4)
    with Stack(tmp_path / "run", config.bootstrap, engine="group", prefix=config.prefix, semantic=QUICK) as stack:
        for process in (stack.ingest(), stack.worker(0), stack.worker(1)):
            process.start()
        parts.feed(stack, 0)
        parts.produce(stack, 1)
        stack.worker(0).kill()
        parts.settle(stack, 1)
        parts.produce(stack, 2, end=True)
        stack.finish()
        verdict = stack.judge(parts.wanted)
    assert not verdict.faults, verdict.report()


@pytest.mark.parametrize("engine", ["faust", "group"])
def test_workers_come_and_go_under_load(engine: str, cluster: Callable[..., KafkaConfig], tmp_path: Path) -> None:
    found = list(lines(Shape(users=400, minutes=24, seed=7)))
    parts = make_parts(tmp_path, found, [])
    config = cluster(partitions=4)
    with Stack(tmp_path / "run", config.bootstrap, engine=engine, prefix=config.prefix) as stack:
        workers = [stack.worker(number) for number in range(3)]
        ingests = [stack.ingest(number) for number in range(2)]
        for process in (ingests[0], workers[0]):
            process.start()
        producer = stack.producer(parts.files[0], options=["--speed", "60", "--end"]).start()

        def pass_on(share: float) -> None:
            stack.wait(lambda: stack.events() >= share * parts.events[-1], 90, f"{share:.0%} of the events", data=True)

        pass_on(0.1)
        for process in (workers[1], workers[2], ingests[1]):
            process.start()
        pass_on(0.3)
        assert workers[0].stop() == 0 and ingests[0].stop() == 0
        pass_on(0.45)
        # A rolling restart.
        for process in workers[1:]:
            assert process.stop() == 0
            process.start()
        ingests[0].start()
        pass_on(0.7)
        workers[1].kill()
        producer.result(60)
        stack.finish()
        verdict = stack.judge(parts.wanted)
    assert not verdict.faults, verdict.report()
