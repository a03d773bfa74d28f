"""The log's clock: the wall clock in live time, the newest event in a replay; and when something was first there."""

from __future__ import annotations

import numpy as np
import pytest
from watched import T0, HandClock

from onerec.monitor.log_time import LogClock


def test_live_time_is_the_wall_clock_and_a_replay_has_its_own_pace() -> None:
    clock = HandClock()
    live, log = LogClock("live", clock), LogClock("log", clock)
    assert (live.look(None, 0), live.factor) == (T0, 1.0)
    assert (log.look(None, 0), log.factor) == (None, None)
    assert log.look(5_000, 0) == 5_000
    assert log.factor is None, "one look tells no pace"
    for _ in range(4):
        clock.sleep(1)
        log.look(log.now_ms + 3_600_000, 0)  # type: ignore[operator]
    assert log.factor == pytest.approx(3_600)
    for _ in range(60):
        clock.sleep(1)
        log.look(log.now_ms, 0)
    assert log.factor == 0, "the replay stands still"


def test_auto_takes_a_log_of_now_for_live() -> None:
    clock = HandClock()
    found = LogClock("auto", clock)
    assert found.look(T0 - 60_000, 0) == T0 and found.live
    assert found.look(T0 - 10**9, 0) == T0 - 10**9 and not found.live


def test_jumps_of_the_wall_clock_are_counted_and_end_what_was_known() -> None:
    clock = HandClock()
    found = LogClock("live", clock)
    found.look(T0, 0)
    clock.sleep(5)
    found.look(T0 + 5_000, 1)
    assert found.jumps == 0
    for jump in (3_600_000, -7_200_000):
        clock.wall += jump
        found.look(T0 + 5_000, 1)
    assert found.jumps == 2
    assert np.isnan(found.committed(np.array([1]))).all(), "nobody knows when, by one clock, that was"


def test_a_thing_is_aged_by_the_first_look_that_saw_it() -> None:
    clock = HandClock()
    found = LogClock("live", clock)
    for newest, sequence in ((T0, 10), (T0 + 900, 10), (T0 + 2_000, 14), (T0 + 2_000, 20)):
        found.look(newest, sequence)
        clock.sleep(1)
    events = found.reached(np.array([T0 - 5, T0, T0 + 1, T0 + 900, T0 + 1_500, T0 + 9_000]))
    expected = [np.nan, np.nan, T0 + 1_000, T0 + 1_000, T0 + 2_000, np.nan]
    assert np.array_equal(events, expected, equal_nan=True), "what the first look found was there before"
    assert np.array_equal(
        found.committed(np.array([10, 11, 14, 15, 21])), [np.nan, T0 + 2_000, T0 + 2_000, T0 + 3_000, np.nan], equal_nan=True
    )


def test_an_earlier_time_of_a_replay_lies_between_two_looks() -> None:
    clock = HandClock()
    found = LogClock("log", clock)
    for newest in (1_000_000, 2_000_000):
        found.look(newest, 0)
        clock.sleep(2)
    assert found.at(T0 + 500) == 1_250_000
    assert found.at(T0 - 1) is None and found.at(T0 + 10_000) is None and found.at(None) is None
    live = LogClock("live", clock)
    live.look(None, 0)
    assert live.at(T0 - 10**6) == T0 - 10**6


def test_a_state_made_anew_starts_over() -> None:
    clock = HandClock()
    found = LogClock("live", clock)
    for sequence in (5, 9, 2, 4):
        found.look(T0, sequence)
        clock.sleep(1)
    assert np.array_equal(found.committed(np.array([2, 3, 9])), [np.nan, T0 + 3_000, np.nan], equal_nan=True)
