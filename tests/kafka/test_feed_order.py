"""The order of a session log: a function of the partitions' logs, whatever comes first over the network."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from streaming.kafka.session_order import SessionOrder, Waiting
from streaming.kafka.wire import Progress

GAP_MS = 1_000
STALL_SECONDS = 30.0


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def waiting(partition: int, sequence: int, end: int, name: str = "") -> Waiting:
    return Waiting(end, name or f"u{partition}:{sequence}", partition, sequence, sequence * 10, 100, None)


def progress(partition: int, sessions: int, watermark: int | None, *, ended: bool = False) -> Progress:
    return Progress(partition=partition, sessions=sessions, watermark=watermark, ended=ended)


def make(*partitions: int, clock: Clock | None = None) -> SessionOrder:
    return SessionOrder(dict.fromkeys(partitions, 0), GAP_MS, STALL_SECONDS, clock or Clock())


def ends(order: SessionOrder) -> list[int]:
    return [found.end for found in order.release()]


def partition_log(rng: random.Random, partition: int) -> Iterator[Waiting | Progress]:
    """Sessions as a worker makes them final: before each progress with watermark W all that ended before W - gap, by end."""
    times = sorted(rng.randrange(0, 100_000) for _ in range(rng.randrange(0, 40)))
    sequence, watermark = 0, 0
    while watermark < 105_000:
        watermark += rng.randrange(1, 9_000)
        while times and times[0] + GAP_MS < watermark:
            sequence += 1
            yield waiting(partition, sequence, times.pop(0), f"s{rng.randrange(3)}:{partition}:{sequence}")
        yield progress(partition, sequence, watermark)
    yield progress(partition, sequence, watermark, ended=True)


@pytest.mark.parametrize("seed", range(30))
def test_any_interleaving_gives_one_order_and_a_watermark_that_holds(seed: int) -> None:
    rng = random.Random(seed)
    logs = {p: list(partition_log(rng, p)) for p in range(rng.randrange(1, 6))}
    everything = [found for log in logs.values() for found in log if isinstance(found, Waiting)]
    order = make(*logs)
    # Sessions and progress are two topics: either may come before the other.
    sessions = {p: [found for found in log if isinstance(found, Waiting)] for p, log in logs.items()}
    heard = {p: [found for found in log if isinstance(found, Progress)] for p, log in logs.items()}
    released: list[Waiting] = []
    while any(sessions.values()) or any(heard.values()):
        queue = rng.choice([queue for queue in (*sessions.values(), *heard.values()) if queue])
        for found in queue[: rng.randrange(1, 6)]:
            queue.pop(0)
            order.add(found) if isinstance(found, Waiting) else order.hear([found])
        released += order.release()
        watermark = order.watermark()
        due = {(found.partition, found.sequence) for found in everything if watermark and found.end + GAP_MS < watermark}
        assert due <= {(found.partition, found.sequence) for found in released}
    assert [found[:4] for found in released] == sorted(found[:4] for found in everything)
    assert order.ended() and order.held_bytes == 0


def test_progress_counts_only_once_the_sessions_it_speaks_of_were_read() -> None:
    order = make(0, 1)
    order.add(waiting(0, 1, 5_000))
    order.hear([progress(0, 1, 9_000), progress(1, 1, 9_000)])
    assert ends(order) == [] and order.watermark() is None
    order.add(waiting(1, 1, 4_000))
    assert ends(order) == [4_000, 5_000] and order.watermark() == 9_000


def test_far_behind_the_log_is_complete_to_what_comes_next() -> None:
    order = make(0, 1)
    order.hear([progress(0, 900, 90_000), progress(1, 900, 8_000)])
    order.add(waiting(0, 1, 3_000))
    assert ends(order) == [] and order.watermark() is None
    order.add(waiting(1, 1, 2_000))
    order.add(waiting(1, 2, 7_000))
    assert ends(order) == [2_000, 3_000] and order.watermark() == 3_000
    order.add(waiting(0, 2, 9_500))
    assert ends(order) == [7_000] and order.watermark() == 7_000
    order.add(waiting(1, 3, 9_000))
    assert ends(order) == [9_000] and order.watermark() == 8_000, "never beyond what is known of the stream"


def test_a_tie_waits_for_what_may_come_before_it() -> None:
    order = make(0, 1)
    order.add(waiting(0, 1, 5_000, "b"))
    order.hear([progress(1, 0, 6_000)])
    assert ends(order) == []
    order.add(waiting(1, 1, 5_000, "a"))
    order.hear([progress(1, 1, 9_000)])
    assert [found.session_id for found in order.release()] == ["a", "b"]


def test_a_partition_that_stands_still_is_left_out_until_it_moves() -> None:
    clock = Clock()
    order = make(0, 1, 2, clock=clock)
    order.hear([progress(0, 0, 1_000), progress(1, 0, 2_000)])
    order.add(waiting(0, 1, 5_000))
    assert ends(order) == [] and order.left_out() == []
    clock.now = STALL_SECONDS + 1
    assert order.left_out() == [1, 2]
    assert ends(order) == [5_000]
    assert order.watermark() == 1_000, "what the one left out holds back is not complete"
    order.hear([progress(1, 0, 2_001)])
    order.add(waiting(0, 2, 6_000))
    assert ends(order) == [] and order.left_out() == [2]
    order.hear([progress(1, 0, 2_001, ended=True)])
    assert ends(order) == [6_000]


def test_far_behind_only_so_much_progress_is_kept_and_the_newest_of_it() -> None:
    order = make(0)
    for number in range(5_000):
        order.hear([progress(0, 3, 10_000 + number)])
    for sequence in (1, 2, 3):
        order.add(waiting(0, sequence, sequence))
    assert ends(order) == [1, 2, 3] and order.watermark() == 14_999


def test_without_any_event_there_is_no_watermark() -> None:
    order = make(0, 1)
    order.hear([progress(0, 0, None, ended=True)])
    assert ends(order) == [] and order.watermark() is None and not order.ended()
