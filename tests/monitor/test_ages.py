"""Ages counted in blocks are those that one would count one by one."""

from __future__ import annotations

import bisect
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onerec.monitor.ages import LIVE_MS, Ages, log_clock
from onerec.monitor.families import AGE_BUCKETS

NOW = 1_700_000_000_000

# Bounds themselves, their neighbours, and anything between a day ahead and a week back.
_at_bounds = st.sampled_from([int(bound * 1000) + off for bound in AGE_BUCKETS for off in (-1, 0, 1)])
_ages_ms = st.lists(st.one_of(_at_bounds, st.integers(-86_400_000, 7 * 86_400_000)), max_size=60)


def buckets(ages: Ages, label: str) -> tuple[dict[float, float], float, float] | None:
    """({bound: cumulative count}, count, sum) of a series; None where it is absent."""
    found: dict[float, float] = {}
    count = total = None
    for family in ages.collect():
        for sample in family.samples:
            if sample.labels.get("stage") != label:
                continue
            if sample.name.endswith("_bucket"):
                found[float(sample.labels["le"])] = sample.value
            elif sample.name.endswith("_count"):
                count = sample.value
            elif sample.name.endswith("_sum"):
                total = sample.value
    return None if count is None or total is None else (found, count, total)


@given(st.lists(_ages_ms, max_size=4))
def test_blocks_count_as_one_by_one(blocks: list[list[int]]) -> None:
    ages = Ages()
    for block in blocks:
        ages.observe("history", NOW, [NOW - age for age in block])
    seconds = [age / 1000 for block in blocks for age in block if age >= 0]
    negative = sum(age < 0 for block in blocks for age in block)
    assert ages.negative.get("history", 0) == negative
    found = buckets(ages, "history")
    if not any(blocks):
        assert found is None
        return
    assert found is not None
    bounds, count, total = found
    assert list(bounds) == [*AGE_BUCKETS, math.inf]
    assert all(bounds[bound] == sum(age <= bound for age in seconds) for bound in bounds)
    assert count == len(seconds)
    assert total == pytest.approx(sum(seconds))


@given(st.lists(st.integers(0, 2 * 86_400_000), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(ages_ms: list[int], share: float) -> None:
    ages = Ages()
    ages.observe("history", NOW, [NOW - age for age in ages_ms])
    true = sorted(ages_ms)[max(0, math.ceil(share * len(ages_ms) - 1e-9) - 1)] / 1000
    place = bisect.bisect_left(AGE_BUCKETS, true)
    found = ages.quantile("history", share)
    assert found is not None
    if place == len(AGE_BUCKETS):
        assert found == AGE_BUCKETS[-1]
    else:
        assert (AGE_BUCKETS[place - 1] if place else 0.0) <= found <= AGE_BUCKETS[place]


def test_without_a_clock_or_an_event_there_is_no_series() -> None:
    ages = Ages()
    ages.observe("history", None, [NOW])
    ages.observe("session", NOW, [])
    assert buckets(ages, "history") is None and buckets(ages, "session") is None
    assert ages.quantile("history", 0.5) is None
    assert ages.negative == {}


def test_events_ahead_of_the_clock_are_counted_apart() -> None:
    ages = Ages()
    ages.observe("history", NOW, [NOW + 5_000, NOW - 1_000])
    assert ages.negative == {"history": 1}
    found = buckets(ages, "history")
    assert found is not None and found[1:] == (1, 1.0)


@pytest.mark.parametrize(
    ("newest", "mode", "clock"),
    [
        (None, "auto", None),
        (None, "log", None),
        (None, "live", NOW),
        (NOW - 1_000, "live", NOW),
        (NOW - 1_000, "log", NOW - 1_000),
        (NOW - LIVE_MS, "auto", NOW),
        (NOW + LIVE_MS, "auto", NOW),
        (NOW - LIVE_MS - 1, "auto", NOW - LIVE_MS - 1),
    ],
)
def test_the_log_clock_is_the_wall_clock_only_in_live_time(newest: int | None, mode: str, clock: int | None) -> None:
    assert log_clock(newest, NOW, mode) == clock  # type: ignore[arg-type]
