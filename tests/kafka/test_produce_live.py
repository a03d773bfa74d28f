"""`onerec produce --live --follow`: lines go out when they are due, a file that grows is read on, each line once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson

from streaming.cursors import Clock
from streaming.kafka.outbox import RAW, wait_decided
from streaming.kafka.producing import Produce, Step
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Tail
from streaming.kafka.topics import topic_ids
from streaming.kafka.wire import unpack

Cluster = Callable[..., KafkaConfig]
T0 = 1_790_000_000_000


class Stopped(Exception):
    """What SIGTERM would be."""


class World:
    """A wall clock that moves when somebody sleeps; `grow` happens once at its time, and `end` stops everything."""

    def __init__(self, begin: float, end: float, at: float = 0.0, grow: Callable[[], object] | None = None) -> None:
        self.ms, self._end = T0 + 1000 * begin, T0 + 1000 * end
        self._at, self._grow = T0 + 1000 * at, grow

    def sleep(self, seconds: float) -> None:
        self.ms += 1000 * seconds
        if self._grow is not None and self.ms >= self._at:
            self._grow()
            self._grow = None
        if self.ms >= self._end:
            raise Stopped

    def clock(self) -> Clock:
        return Clock(wall_ms=lambda: int(self.ms), monotonic=lambda: self.ms / 1000, sleep=self.sleep)


def lines(begin: int, end: int) -> bytes:
    """One watch every 100 ms of these tenths of a second."""
    watch = {"type": "watch", "user_id": "u", "item_id": "i", "watch_ms": 8_000, "duration_ms": 9_000}
    return b"".join(orjson.dumps({**watch, "ts": T0 + 100 * place}) + b"\n" for place in range(begin, end))


def produce(config: KafkaConfig, path: Path, world: World, *, live: bool) -> list[tuple[float, int]]:
    """Until the world ends; each commit's time and the lines sent by then."""
    seen: list[tuple[float, int]] = []

    def step(found: Step) -> None:
        seen.append((world.ms - T0, found.counts.lines))

    job = Produce(config, [str(path)], future_ms=60_000, live=live, follow=True, clock=world.clock(), on_step=step)
    try:
        job.run()
    except Stopped:
        pass
    return seen


def sent(config: KafkaConfig) -> bytes:
    """The lines in topic `watch`, of one partition."""
    wait_decided(config, RAW)
    found: list[bytes] = []
    with Tail(config, "watch", topic_ids(config, ["watch"])["watch"], {0: None}) as tail:
        while not tail.complete():
            found += [line for message in tail.read(10_000, 0.05) for line in unpack(message.value())]
    return b"".join(line + b"\n" for line in found)


def test_lines_go_out_when_they_are_due_each_once_over_a_stop_and_a_growing_file(cluster: Cluster, tmp_path: Path) -> None:
    config = cluster(1)
    path = tmp_path / "live.jsonl"
    path.write_bytes(lines(0, 30))
    tick = max(config.linger_ms, 1)
    first = produce(config, path, World(0, 1.55), live=True)
    for when, count in first:
        assert count == int(when) // 100 + 1
    assert first[-1][1] == 16

    def grow() -> None:
        with open(path, "ab") as file:
            file.write(lines(30, 40))

    second = produce(config, path, World(1.9, 6.0, at=4.5, grow=grow), live=True)
    assert second[0][1] == 4  # what became due while nobody was there, at once
    assert [count for _, count in second if count <= 14][-1] == 14
    assert second[-1][1] == 24
    assert second[-1][0] <= 4_500 + 2 * tick + 200
    assert sent(config) == lines(0, 40)
