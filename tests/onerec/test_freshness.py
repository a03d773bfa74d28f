"""Ages of the chain: exact where there is data, absent where there is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onerec.freshness import STAGES, Watermarks, chain, format_age, to_json

MARKS = st.none() | st.integers(631_152_000_000, 4_000_000_000_000)


def test_nothing_known_is_no_data_never_zero() -> None:
    found = chain(Watermarks(), wall_ms=1_700_000_000_000)
    assert to_json(found) == dict.fromkeys([*STAGES, "event_to_served_ms"])
    assert {format_age(stage.age_ms) for stage in found.stages} == {"no data"}


def test_ages_are_against_log_time_and_wall_clock() -> None:
    marks = Watermarks(event=10_000, history=9_700, session=7_000, trained=6_000, exported=5_000, served=4_000)
    report = to_json(chain(marks, wall_ms=1_000_000))
    assert [report[name]["age_ms"] for name in STAGES] == [0, 300, 3_000, 4_000, 5_000, 6_000]
    assert report["served"]["wall_age_ms"] == 996_000
    assert report["event_to_served_ms"] == 6_000


def test_without_a_log_the_served_watermark_is_told_but_has_no_age() -> None:
    report = to_json(chain(Watermarks(served=4_000), wall_ms=10_000))
    assert report["served"] == {"watermark_ms": 4_000, "age_ms": None, "wall_age_ms": 6_000}
    assert report["event_to_served_ms"] is None


@given(st.fixed_dictionaries({name: MARKS for name in STAGES}), st.integers(0, 10**12), st.integers(-(10**9), 10**9))
def test_log_time_ages_do_not_depend_on_the_clock(marks: dict[str, int | None], wall: int, jump: int) -> None:
    before, after = chain(Watermarks(**marks), wall), chain(Watermarks(**marks), wall + jump)
    assert before.event_to_served_ms == after.event_to_served_ms
    for one, other in zip(before.stages, after.stages, strict=True):
        assert one.age_ms == other.age_ms
        assert (one.watermark_ms is None) == (one.wall_age_ms is None)


@given(st.fixed_dictionaries({name: MARKS for name in STAGES}))
def test_a_stage_is_null_exactly_where_it_has_no_watermark(marks: dict[str, int | None]) -> None:
    report = to_json(chain(Watermarks(**marks), 0))
    assert {name for name in STAGES if report[name] is None} == {name for name in STAGES if marks[name] is None}
    known = marks["event"] is not None and marks["served"] is not None
    assert (report["event_to_served_ms"] is not None) == known


@pytest.mark.parametrize(
    ("age", "text"),
    [
        (None, "no data"), (0, "0 ms"), (999, "999 ms"), (1_000, "1.0 s"), (59_949, "59.9 s"), (59_999, "1 min 00 s"),
        (61_000, "1 min 01 s"), (3_600_000, "1 h 00 min"), (90_000_000, "1 d 01 h"), (-1_500, "-1.5 s"),
    ],
)
def test_ages_for_people(age: int | None, text: str) -> None:
    assert format_age(age) == text
