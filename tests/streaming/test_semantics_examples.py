"""SEMANTICS.md §1-8 by examples with the values written out; each runs on the core and on the reference."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from reference import Reference, kuairand_lines, kuairand_seeds, merge, split_lines
from worlds import FLUSH, NOW, T0, Outcome, by_core, by_reference, event, semantics, watch

Play = Callable[..., Outcome]

MINUTE = 60_000
HOUR = 60 * MINUTE
DEFAULT = semantics()


@pytest.fixture(params=[by_core, by_reference], ids=["core", "reference"])
def play(request: pytest.FixtureRequest) -> Play:
    return request.param


def reasons(outcome: Outcome) -> list[str]:
    return [reason for _, reason in outcome.dead_letters]


def starts(outcome: Outcome) -> list[int]:
    return [session["start"] - T0 for session in outcome.decoded]


def items(outcome: Outcome) -> list[list[str]]:
    return [[item["item_id"] for item in session["items"]] for session in outcome.decoded]


GOOD = {"type": "watch", "user_id": "u", "item_id": "i", "ts": T0, "watch_ms": 10_000, "duration_ms": 20_000}


def changed(**fields: object) -> bytes:
    return json.dumps(GOOD | fields).encode()


# -- §1 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"x", "not_json"),
        (b"[]", "not_json"),
        (b"3", "not_json"),
        (b"null", "not_json"),
        (b'{"type":"watch"', "not_json"),
        (b'{"type":"watch"}}', "not_json"),
        (b"\xef\xbb\xbf" + changed(), "not_json"),
        (changed() + b"\x00", "not_json"),
        (changed() + b"\x0c", "not_json"),
        (changed(note="~").replace(b"~", b"\xff"), "not_json"),
        (changed(note="~").replace(b"~", b"\xed\xa0\x80"), "not_json"),
        (changed(note="~").replace(b"~", b"\xc0\x80"), "not_json"),
        (changed(note="~").replace(b"~", b"\t"), "not_json"),
        (changed(note="~").replace(b"~", b"\\q"), "not_json"),
        (changed(note="~").replace(b"~", b"\\u12"), "not_json"),
        (changed(note=float("nan")), "not_json"),
        (changed(note=float("inf")), "not_json"),
        (changed(note=-float("inf")), "not_json"),
        (changed(note=1).replace(b'"note": 1', b'"note": 01'), "not_json"),
        (changed(note=1).replace(b'"note": 1', b'"note": 1.'), "not_json"),
        (changed(note=1).replace(b'"note": 1', b'"note": +1'), "not_json"),
        (changed(note=1).replace(b'"note": 1', b'"note": 1,'), "not_json"),
        (changed(note=1).replace(b'"note": 1', b"note: 1"), "not_json"),
        (changed(note=[]).replace(b"[]", b"[" * 128 + b"]" * 128), "too_deep"),
        (changed(note=[]).replace(b"[]", b'{"a":' * 200 + b"1" + b"}" * 200), "too_deep"),
        (changed(note=[]).replace(b"[]", b"[" * 100_000 + b"]" * 100_000), "too_deep"),
        (changed(note="x" * (1 << 20)), "too_long"),
        (changed() + b" " * ((1 << 20) + 1 - len(changed())), "too_long"),
        (b"{" * ((1 << 20) + 1), "too_long"),
        (changed(type=None), "bad_type"),
        (changed(type="view"), "bad_type"),
        (changed(type="Watch"), "bad_type"),
        (changed(type=["watch"]), "bad_type"),
        (changed(type={"watch": 1}), "bad_type"),
        (changed(type="~").replace(b"~", b"\\ud800"), "bad_type"),
        (b'{"user_id":"u"}', "bad_type"),
        (changed(user_id=None), "bad_user_id"),
        (changed(user_id=""), "bad_user_id"),
        (changed(user_id=7), "bad_user_id"),
        (changed(user_id="x" * 257), "bad_user_id"),
        (changed(user_id="é" * 129), "bad_user_id"),
        (changed(user_id="~").replace(b"~", b"\\ud800"), "bad_user_id"),
        (changed(user_id="~").replace(b"~", b"\\udc00\\ud800"), "bad_user_id"),
        (changed(item_id=""), "bad_item_id"),
        (changed(item_id=["i"]), "bad_item_id"),
        (changed(item_id="€" * 86), "bad_item_id"),
        (changed(event_id=""), "bad_event_id"),
        (changed(event_id=5), "bad_event_id"),
        (changed(event_id=False), "bad_event_id"),
        (changed(event_id="x" * 257), "bad_event_id"),
        (changed(request_id=""), "bad_request_id"),
        (changed(request_id=0), "bad_request_id"),
        (changed(request_id="~").replace(b"~", b"a\\ud800b"), "bad_request_id"),
        (changed(ts=None), "bad_ts"),
        (changed(ts=True), "bad_ts"),
        (changed(ts=str(T0)), "bad_ts"),
        (changed(ts=float(T0)), "bad_ts"),
        (changed(ts=T0).replace(str(T0).encode(), b"17e11"), "bad_ts"),
        (changed(ts=631_151_999_999), "bad_ts"),
        (changed(ts=1_700_000_000), "bad_ts"),
        (changed(ts=-T0), "bad_ts"),
        (changed(ts=NOW + 60_001), "future_ts"),
        (changed(ts=1 << 63), "future_ts"),
        (changed(watch_ms=None), "bad_watch_ms"),
        (changed(watch_ms=-1), "bad_watch_ms"),
        (changed(watch_ms=604_800_001), "bad_watch_ms"),
        (changed(watch_ms=1.0), "bad_watch_ms"),
        (changed(watch_ms=True), "bad_watch_ms"),
        (changed(watch_ms="5"), "bad_watch_ms"),
        (changed(watch_ms=10**30), "bad_watch_ms"),
        (changed(watch_ms=5).replace(b'"watch_ms": 5', b'"x": 5'), "bad_watch_ms"),
        (changed(duration_ms=None), "bad_duration_ms"),
        (changed(duration_ms=-1), "bad_duration_ms"),
        (changed(duration_ms=604_800_001), "bad_duration_ms"),
        (changed(duration_ms=0.0), "bad_duration_ms"),
    ],
)
def test_invalid_lines_go_to_the_dead_letters_and_stop_nothing(play: Play, line: bytes, reason: str) -> None:
    outcome = play(DEFAULT, [watch("a", "i", 0), line, watch("a", "j", 1), FLUSH])
    assert outcome.dead_letters == [(line, reason)]
    assert outcome.counters["events"] == 2
    assert outcome.counters["dead_letters"] == 1
    assert items(outcome) == [["i", "j"]]


@pytest.mark.parametrize(
    "line",
    [
        changed(ts=631_152_000_000),
        changed(ts=NOW + 60_000),
        changed(watch_ms=0, duration_ms=0),
        changed(watch_ms=604_800_000, duration_ms=604_800_000),
        changed(user_id="x" * 256, item_id="é" * 128, event_id="€" * 85, request_id="\U0001f600" * 64),
        changed(user_id="\u0000", item_id=" "),
        changed(event_id=None, request_id=None),
        changed(note=[]).replace(b"[]", b"[" * 127 + b"]" * 127),
        changed(note="[" * 500 + '\\"' + "{" * 500),
        changed(note="~").replace(b"~", b"\\ud800"),
        changed(note="~").replace(b"~", b"\\udc00\\ud800"),
        changed(note=1).replace(b'"note": 1', b'"note": 1e999'),
        changed(note=1).replace(b'"note": 1', b'"note": ' + b"9" * 10_000),
        changed(watch_ms=1).replace(b'"watch_ms": 1', b'"watch_ms": -0'),
        changed(x=1).replace(b'"x": 1', b'"ts": "no", "ts": %d' % T0),
        b'{"ts":"no","type":5,"user_id":[],' + changed()[1:],
        b" \t" + changed() + b" \t\r",
        changed() + b" " * ((1 << 20) - len(changed())),
        changed(embedding=[None], tags=5, author_id=[], count={"a": [True, False, None]}),
        event("like", "u", "i", 0, watch_ms="x", duration_ms=-5),
        event("dislike", "u", "i", 0, watch_ms=None),
    ],
)
def test_valid_lines_are_events(play: Play, line: bytes) -> None:
    outcome = play(DEFAULT, [line])
    assert outcome.dead_letters == []
    assert outcome.counters["events"] == 1
    assert outcome.counters["users"] == 1


def test_of_repeated_keys_the_last_counts(play: Play) -> None:
    line = b'{"item_id":"first","watch_ms":1,' + changed(item_id="second")[1:]
    assert items(play(DEFAULT, [line, FLUSH])) == [["second"]]
    outcome = play(DEFAULT, [changed()[:-1] + b',"item_id":"third","watch_ms":null}'])
    assert reasons(outcome) == ["bad_watch_ms"]


def test_blank_lines_are_neither_events_nor_refused(play: Play) -> None:
    outcome = play(DEFAULT, [b"", b" ", b"\r", b" \t\r", watch("u", "i", 0), b"\t"])
    assert outcome.counters == {
        "events": 1,
        "duplicates": 0,
        "late": 0,
        "dead_letters": 0,
        "users": 1,
        "sessions": 0,
        "high_quality": 0,
        "watermark": T0 - 300_000,
    }


def test_a_byte_order_mark_is_skipped_at_the_start_of_a_file_only() -> None:
    assert split_lines(b"\xef\xbb\xbfone\r\n \r\n\n\xef\xbb\xbftwo") == [b"one\r", b"\xef\xbb\xbftwo"]


@pytest.mark.parametrize(("future", "lateness", "allowed"), [(60_000, 5_000, 5_000), (1_000, 5_000, 1_000), (9, 0, 0)])
def test_the_future_ends_at_the_smaller_of_max_future_and_out_of_orderness(
    play: Play, future: int, lateness: int, allowed: int
) -> None:
    config = semantics(max_future_ms=future, max_out_of_orderness_ms=lateness)
    outcome = play(config, [changed(ts=NOW + allowed), changed(ts=NOW + allowed + 1)])
    assert reasons(outcome) == ["future_ts"]
    assert outcome.counters["watermark"] == NOW + allowed - lateness


def item(item_id: object, **fields: object) -> bytes:
    return json.dumps({"type": "item", "item_id": item_id, "ts": T0} | fields).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (item(""), "bad_item_id"),
        (item(5), "bad_item_id"),
        (item("i", ts="x"), "bad_ts"),
        (item("i", ts=5), "bad_ts"),
        (item("i", ts=NOW + 60_001), "future_ts"),
        (item("i", embedding=[]), "bad_embedding"),
        (item("i", embedding="x"), "bad_embedding"),
        (item("i", embedding=[1.0, True]), "bad_embedding"),
        (item("i", embedding=[1.0, None]), "bad_embedding"),
        (item("i", embedding=[1.0, 2.0, 3.0]), "bad_embedding"),
        (item("i", embedding=[1.0]), "bad_embedding"),
        (item("i", embedding=[1, 2]).replace(b"2]", b"1e999]"), "bad_embedding"),
        (item("i", embedding=[1, float("nan")]), "not_json"),
    ],
)
def test_invalid_items_are_dead_letters(play: Play, line: bytes, reason: str) -> None:
    good = item("first", embedding=[1, -2.5], tags=["1"], author_id="a", duration_ms=5)
    outcome = play(DEFAULT, [good, line, item("plain"), item("null", embedding=None, duration_ms=None)])
    assert outcome.dead_letters == [(line, reason)]


def test_items_are_no_events(play: Play) -> None:
    outcome = play(DEFAULT, [item("i", ts=T0 + HOUR), watch("u", "i", 0), item("j", user_id="v"), FLUSH])
    assert outcome.counters["events"] == 1
    assert outcome.counters["users"] == 1
    assert outcome.counters["watermark"] == T0 - 300_000
    assert outcome.counters["late"] == 0


# -- §2 ------------------------------------------------------------------------------------------------------------


def test_without_event_id_type_item_and_time_are_the_identity(play: Play) -> None:
    lines = [watch("u", "i", 0), watch("u", "i", 0), watch("u", "i", 1), watch("u", "j", 0), watch("v", "i", 0)]
    outcome = play(DEFAULT, [*lines, event("like", "u", "i", 0), event("like", "u", "i", 0), FLUSH])
    assert outcome.counters["events"] == 7
    assert outcome.counters["duplicates"] == 2
    assert items(outcome) == [["i"], ["i", "j", "i"]]


def test_an_event_id_is_an_identity_within_user_and_type(play: Play) -> None:
    lines = [watch("u", "i", 0, event_id="e"), watch("u", "i", 0), watch("v", "i", 0, event_id="e")]
    lines += [event("like", "u", "i", 0, event_id="e"), event("share", "u", "j", 0, event_id="e")]
    assert play(DEFAULT, lines).counters["duplicates"] == 0


def test_repeats_merge_into_one_event_in_any_order(play: Play) -> None:
    reports = [
        watch("u", "i", 9_000, 5_000, 20_000, event_id="e", request_id="r2"),
        watch("u", "i", 4_000, 1_000, 30_000, event_id="e"),
        watch("u", "i", 6_000, 6_000, 6_000, event_id="e", request_id="r10"),
    ]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1]):
        outcome = play(semantics(by="request"), [*(reports[i] for i in order), FLUSH])
        assert outcome.counters["duplicates"] == 2
        assert outcome.counters["users"] == 1
        (session,) = outcome.decoded
        assert session["request_id"] == "r10"
        assert session["items"] == [
            {"item_id": "i", "ts": T0 + 4_000, "watch_ms": 6_000, "duration_ms": 30_000, "interactions": []}
        ]
        assert session["watched"] == 1  # by the report of 6,000 of 6,000 ms, though not by the merged durations
        assert outcome.history == {"u": ["i"]}


def test_a_repeat_with_another_item_is_a_conflict_and_changes_nothing(play: Play) -> None:
    conflict = watch("u", "j", HOUR, event_id="e")
    outcome = play(DEFAULT, [watch("u", "i", 0, event_id="e"), conflict, watch("u", "k", 0), FLUSH])
    assert outcome.dead_letters == [(conflict, "identity_conflict")]
    assert outcome.counters["events"] == 2
    assert outcome.counters["watermark"] == T0 - 300_000
    assert items(outcome) == [["i", "k"]]


def test_a_late_repeat_merges_its_effectiveness_into_the_history_alone(play: Play) -> None:
    lines = [watch("u", "i", 0, 1_000, event_id="e"), watch("u", "j", 301_000), watch("u", "i", 500, event_id="e")]
    outcome = play(DEFAULT, [*lines, FLUSH])
    (session,) = outcome.decoded
    assert session["items"][0]["watch_ms"] == 1_000
    assert session["watched"] == 1
    assert outcome.counters["duplicates"] == 1
    assert outcome.counters["late"] == 0
    assert outcome.history == {"u": ["i", "j"]}


def test_a_late_repeat_moves_no_time(play: Play) -> None:
    lines = [watch("u", "i", 10_000, event_id="e"), watch("u", "j", 5_000), watch("v", "x", 310_000)]
    outcome = play(DEFAULT, [*lines, watch("u", "i", 1_000, event_id="e"), FLUSH])
    assert outcome.history["u"] == ["j", "i"]
    assert items(outcome) == [["j", "i"], ["x"]]


def test_a_repeat_of_a_written_watch_merges_for_the_history_only(play: Play) -> None:
    config = semantics(gap_ms=1_000, max_out_of_orderness_ms=0)
    lines = [watch("u", "i", 0, 1_000, event_id="e"), watch("u", "j", 2_000, 1_000)]
    outcome = play(config, [*lines, watch("u", "i", 2_000, event_id="e"), watch("u", "k", 9_000), FLUSH])
    assert items(outcome) == [["i"], ["j"], ["k"]]
    assert [session["watched"] for session in outcome.decoded] == [0, 0, 1]
    assert outcome.history == {"u": ["i", "k"]}
    assert outcome.decoded[2]["history"] == ["i"]


def test_a_repeat_of_an_event_that_was_late_joins_no_session(play: Play) -> None:
    lines = [watch("u", "i", 400_000), watch("u", "j", 0, 1_000, event_id="e")]
    outcome = play(DEFAULT, [*lines, watch("u", "j", 390_000, event_id="e"), FLUSH])
    assert items(outcome) == [["i"]]
    assert outcome.counters["late"] == 1
    assert outcome.counters["duplicates"] == 1
    assert outcome.history == {"u": ["j", "i"]}  # at its own time


def test_an_identity_is_forgotten_when_the_horizon_has_passed(play: Play) -> None:
    config = semantics(dedup_horizon_ms=1_000, max_out_of_orderness_ms=0)
    first = watch("u", "i", 0, event_id="e")
    known = play(config, [first, watch("u", "j", 1_000), watch("u", "i", 1_000, event_id="e")])
    assert known.counters["duplicates"] == 1
    forgotten = play(config, [first, watch("u", "j", 1_001), watch("u", "other", 1_001, event_id="e"), FLUSH])
    assert forgotten.counters["duplicates"] == 0
    assert forgotten.dead_letters == []
    assert items(forgotten) == [["i", "j", "other"]]


def test_reports_in_time_prolong_the_identity_and_late_ones_do_not(play: Play) -> None:
    config = semantics(dedup_horizon_ms=1_000, max_out_of_orderness_ms=0)
    reports = [watch("u", "i", at, event_id="e") for at in (0, 900, 1_800)]
    assert play(config, [*reports, watch("u", "j", 2_800), watch("u", "i", 2_800, event_id="e")]).counters == {
        "events": 5,
        "duplicates": 3,
        "late": 0,
        "dead_letters": 0,
        "users": 1,
        "sessions": 0,
        "high_quality": 0,
        "watermark": T0 + 2_800,
    }
    late = [watch("u", "i", 0, event_id="e"), watch("u", "j", 900), watch("u", "i", 800, event_id="e")]
    outcome = play(config, [*late, watch("u", "k", 1_001), watch("u", "i", 1_001, event_id="e")])
    assert outcome.counters["duplicates"] == 1


def test_a_late_repeat_of_a_forgotten_identity_is_a_new_late_event(play: Play) -> None:
    config = semantics(dedup_horizon_ms=1_000, max_out_of_orderness_ms=0)
    outcome = play(config, [watch("u", "i", 0), watch("u", "j", 1_001), watch("u", "i", 0), FLUSH])
    assert outcome.counters["duplicates"] == 0
    assert outcome.counters["late"] == 1
    assert items(outcome) == [["i", "j"]]


def test_a_user_with_too_many_open_events_gets_no_more_in(play: Play) -> None:
    config = semantics(max_open_events=2, max_out_of_orderness_ms=1_000, gap_ms=10_000)
    lines = [watch("u", f"i{at}", at) for at in (0, 1, 2)]
    refused = [watch("u", "x", 3), event("like", "u", "i0", HOUR)]
    taken = [watch("u", "i0", 0, 99), watch("v", "x", 20_000), watch("u", "late", 2), watch("u", "y", 20_000)]
    outcome = play(config, [*lines, *refused, *taken, FLUSH])
    assert outcome.dead_letters == [(line, "user_overflow") for line in refused]
    assert outcome.counters["watermark"] == T0 + 19_000
    assert outcome.counters["duplicates"] == 1
    assert outcome.counters["late"] == 1
    assert items(outcome) == [["i0", "i1", "i2"], ["y"], ["x"]]


def test_interactions_count_among_the_open_events(play: Play) -> None:
    config = semantics(max_open_events=1)
    lines = [event("like", "u", "i", 0), event("share", "u", "i", 0), event("comment", "u", "i", 0)]
    assert reasons(play(config, lines)) == ["user_overflow"]


# -- §3 ------------------------------------------------------------------------------------------------------------


def test_the_watermark_trails_the_newest_valid_event(play: Play) -> None:
    assert play(DEFAULT, []).counters["watermark"] is None
    assert play(DEFAULT, [b"x"]).counters["watermark"] is None
    outcome = play(DEFAULT, [watch("u", "i", 5_000), event("like", "u", "i", 9_000), watch("u", "i", 0), b"x"])
    assert outcome.counters["watermark"] == T0 + 9_000 - 300_000


def test_an_event_below_the_watermark_is_late_and_one_on_it_is_not(play: Play) -> None:
    lines = [watch("u", "i", 300_001), watch("u", "late", 0), watch("u", "on", 1), event("like", "v", "late", 0)]
    outcome = play(DEFAULT, [*lines, watch("u", "late", 0), FLUSH])
    assert outcome.counters["late"] == 2
    assert outcome.counters["duplicates"] == 1
    assert outcome.counters["users"] == 2
    assert items(outcome) == [["on", "i"]]
    assert outcome.history == {"u": ["late", "on", "i"], "v": ["late"]}


def test_a_repeat_moves_the_watermark(play: Play) -> None:
    outcome = play(DEFAULT, [watch("u", "i", 0, event_id="e"), watch("u", "i", 400_000, event_id="e")])
    assert outcome.counters["watermark"] == T0 + 100_000


def test_several_sources_are_merged_by_event_time() -> None:
    a = [watch("u", "a0", 0), b"broken a", watch("u", "a5", 5), watch("u", "a2", 2)]
    b = [b"broken b", watch("u", "b0", 0), watch("u", "b4", 4), watch("u", "b6", 6)]
    assert list(merge([a, [], b], NOW, DEFAULT)) == [b[0], a[0], a[1], b[1], b[2], a[2], a[3], b[3]]


def test_a_backfill_of_two_files_makes_nothing_late() -> None:
    a, b = [watch("u", "i", day * 24 * HOUR) for day in range(3)], [watch("v", "i", 0), watch("v", "j", 60 * HOUR)]
    reference = Reference(DEFAULT, NOW)
    reference.feed(merge([a, b], NOW, DEFAULT))
    assert reference.counters()["late"] == 0


# -- §4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("watch_ms", "duration_ms", "effective"),
    [
        (7_000, 60_000, True),
        (6_999, 60_000, False),
        (6_999, 0, False),
        (7_000, 0, True),
        (3_000, 3_000, True),
        (2_999, 3_000, False),
        (7_000, 7_000, True),
        (6_999, 7_001, False),
        (0, 0, False),
        (0, 1, False),
        (1, 1, True),
    ],
)
def test_a_watch_is_effective_by_time_or_in_full(play: Play, watch_ms: int, duration_ms: int, effective: bool) -> None:
    outcome = play(DEFAULT, [watch("u", "i", 0, watch_ms, duration_ms), FLUSH])
    assert outcome.decoded[0]["watched"] == effective
    assert outcome.history == {"u": ["i"] if effective else []}


def test_a_dislike_is_not_positive_and_the_other_interactions_are(play: Play) -> None:
    types = ["like", "follow", "share", "collect", "comment", "dislike"]
    outcome = play(DEFAULT, [event(type_, "u", type_, at) for at, type_ in enumerate(types)])
    assert outcome.history == {"u": types[:-1]}


def test_a_history_holds_each_item_at_its_newest_and_the_newest_items(play: Play) -> None:
    lines = [watch("u", "a", 0), watch("u", "b", 10), watch("u", "é", 10), watch("u", "c", 20), watch("u", "a", 30)]
    assert play(DEFAULT, lines).history == {"u": ["b", "é", "c", "a"]}
    assert play(semantics(length=3), lines).history == {"u": ["é", "c", "a"]}
    assert play(semantics(length=1), lines).history == {"u": ["a"]}


def test_histories_list_users_in_the_order_of_their_bytes(play: Play) -> None:
    users = ["b", "a", "é", "10", "2", "\uffff", "\U00010000"]
    outcome = play(DEFAULT, [event("dislike", user, "i", 0) for user in users])
    assert list(outcome.history.items()) == [(u, []) for u in ["10", "2", "a", "b", "é", "\uffff", "\U00010000"]]
    assert outcome.histories[2] == b'{"user_id":"a","items":[]}'


# -- §5 ------------------------------------------------------------------------------------------------------------


def test_watches_are_ordered_by_time_item_and_event_id(play: Play) -> None:
    lines = [
        watch("u", "b", 5),
        watch("u", "a", 5, 2, event_id="z"),
        watch("u", "a", 5, 1, event_id="y"),
        watch("u", "a", 5, 0),
        watch("u", "c", 4),
    ]
    (session,) = play(DEFAULT, [*lines, FLUSH]).decoded
    found = [(item["item_id"], item["watch_ms"]) for item in session["items"]]
    assert found == [("c", 10_000), ("a", 0), ("a", 1), ("a", 2), ("b", 10_000)]


def test_a_session_ends_at_more_than_the_gap(play: Play) -> None:
    lines = [watch("u", "i", at) for at in (0, 30 * MINUTE, 60 * MINUTE + 1, 61 * MINUTE)]
    assert starts(play(DEFAULT, [*lines, FLUSH])) == [0, 60 * MINUTE + 1]


def test_a_session_ends_at_more_than_its_longest_time(play: Play) -> None:
    lines = [watch("u", f"{at}", at) for at in (0, 60, 100, 101, 150)]
    assert items(play(semantics(max_ms=100), [*lines, FLUSH])) == [["0", "60", "100"], ["101", "150"]]


def test_a_full_session_ends_at_a_greater_time_only(play: Play) -> None:
    lines = [watch("u", "a", 0), watch("u", "b", 1), watch("u", "c", 1), watch("u", "d", 2), watch("u", "e", 3)]
    assert items(play(semantics(max_items=2), [*lines, FLUSH])) == [["a", "b", "c"], ["d", "e"]]


def test_interactions_make_no_session(play: Play) -> None:
    outcome = play(DEFAULT, [event("like", "u", "i", 0), FLUSH])
    assert outcome.sessions == []
    assert outcome.counters["sessions"] == 0


def test_requests_are_cut_apart(play: Play) -> None:
    lines = [
        watch("u", "a", 0, request_id="r"),
        watch("u", "b", 1),
        watch("u", "c", 2, request_id="s"),
        watch("u", "d", 20 * MINUTE),
        watch("u", "e", 31 * MINUTE, request_id="r"),
    ]
    outcome = play(semantics(by="request"), [*lines, FLUSH])
    ids = [(session["session_id"], session["request_id"]) for session in outcome.decoded]
    assert ids == [
        (f"u:{T0}:r", "r"),
        (f"u:{T0 + 2}:s", "s"),
        (f"u:{T0 + 1}", None),
        (f"u:{T0 + 31 * MINUTE}:r", "r"),
    ]
    by_gap = play(DEFAULT, [*lines, FLUSH]).decoded
    assert [(session["session_id"], session["request_id"]) for session in by_gap] == [(f"u:{T0}", None)]


def test_session_ids_escape_colons_and_percent_signs(play: Play) -> None:
    outcome = play(semantics(by="request"), [watch("a:b%", "i", 0, request_id="%3A:"), FLUSH])
    assert outcome.decoded[0]["session_id"] == f"a%3Ab%25:{T0}:%253A%3A"


def test_a_session_is_final_when_the_watermark_is_greater_than_end_and_gap(play: Play) -> None:
    first = watch("u", "i", 0)
    assert play(DEFAULT, [first, watch("v", "x", 35 * MINUTE)]).sessions == []
    outcome = play(DEFAULT, [first, watch("v", "x", 35 * MINUTE + 1)])
    assert [session["session_id"] for session in outcome.decoded] == [f"u:{T0}"]
    assert outcome.counters["sessions"] == 1


def test_a_repeat_that_brings_a_request_can_make_a_session_final_at_once(play: Play) -> None:
    config = semantics(by="request", gap_ms=10, max_out_of_orderness_ms=0)
    lines = [watch("u", "i", 0, event_id="x"), watch("v", "i", 5), watch("u", "j", 8), watch("u", "k", 16)]
    outcome = play(config, [*lines, watch("u", "i", 16, event_id="x", request_id="r")])
    assert [session["session_id"] for session in outcome.decoded] == [f"v:{T0 + 5}", f"u:{T0}:r"]


def test_sessions_made_final_together_are_written_by_end_and_id(play: Play) -> None:
    lines = [watch("b", "i", 0), watch("a", "i", 0), watch("c", "i", 0), watch("c", "j", 1), watch("a:", "i", 0)]
    outcome = play(DEFAULT, [*lines, watch("z", "i", 2 * HOUR)])
    users = [session["user_id"] for session in outcome.decoded]
    assert users == ["a:", "a", "b", "c"]  # "a%3A:…" sorts before "a:…"


def test_a_flush_writes_what_is_open_and_leaves_the_watermark(play: Play) -> None:
    lines = [watch("u", "i", 0), watch("v", "i", 1)]
    outcome = play(DEFAULT, [*lines, FLUSH, FLUSH])
    assert len(outcome.sessions) == 2
    assert outcome.counters["watermark"] == T0 + 1 - 300_000
    more = play(DEFAULT, [*lines, FLUSH, watch("u", "j", 2), FLUSH])
    assert items(more) == [["i"], ["i"], ["j"]]
    assert more.decoded[2]["history"] == ["i"]
    assert more.counters["late"] == 0


def test_an_interaction_belongs_to_the_session_of_its_item_until_the_feedback_delay(play: Play) -> None:
    for at, expected in [(-1, 0), (0, 1), (1_500, 1), (2_001, 0)]:
        config = semantics(feedback_delay_ms=1_000)
        lines = [event("like", "u", "i", at), watch("u", "i", 0), watch("u", "j", 1_000)]
        (session,) = play(config, [*lines, event("follow", "u", "k", 500), FLUSH]).decoded
        assert session["interactions"] == expected, at
        assert session["labels"]["ltr"] == expected
        assert session["labels"]["wtr"] == 0


def test_the_feedback_delay_is_at_most_the_gap(play: Play) -> None:
    config = semantics(feedback_delay_ms=5_000, gap_ms=1_000)
    lines = [watch("u", "i", 0), event("like", "u", "i", 1_001), event("share", "u", "i", 1_000)]
    (session,) = play(config, [*lines, FLUSH]).decoded
    assert session["items"][0]["interactions"] == ["share"]


def test_an_interaction_of_several_sessions_goes_to_the_first(play: Play) -> None:
    lines = [watch("u", "i", 0), watch("u", "j", 1), watch("u", "i", 2), event("like", "u", "i", 3)]
    outcome = play(semantics(max_items=2), [*lines, FLUSH])
    assert [session["interactions"] for session in outcome.decoded] == [1, 0]


def test_an_interaction_prefers_its_own_request(play: Play) -> None:
    lines = [watch("u", "i", 0, request_id="a"), watch("u", "i", 0, request_id="b", event_id="e")]
    lines += [watch("u", "i", 1, request_id="c"), watch("u", "i", 2)]
    config = semantics(by="request")
    for request_id, owner in [("c", "c"), ("b", "b"), ("zz", "a"), (None, "a")]:
        outcome = play(config, [*lines, event("like", "u", "i", 3, request_id=request_id), FLUSH])
        liked = [session["request_id"] for session in outcome.decoded if session["interactions"]]
        assert liked == [owner]


def test_the_history_of_a_session_ends_before_its_start(play: Play) -> None:
    lines = [watch("u", "a", 0), watch("u", "b", 2 * HOUR), watch("u", "a", 2 * HOUR + 5), watch("u", "c", 5 * HOUR)]
    outcome = play(DEFAULT, [*lines, FLUSH])
    assert [session["history"] for session in outcome.decoded] == [[], ["a"], ["b", "a"]]


def test_a_late_event_counts_in_the_history_of_sessions_not_yet_final(play: Play) -> None:
    lines = [watch("u", "b", 2 * HOUR), watch("u", "late", 0), event("like", "u", "liked", HOUR)]
    (session,) = play(DEFAULT, [*lines, FLUSH]).decoded
    assert session["history"] == ["late", "liked"]


def test_a_written_session_is_never_changed(play: Play) -> None:
    lines = [watch("u", "b", 0), watch("u", "x", 2 * HOUR)]
    outcome = play(DEFAULT, [*lines, event("like", "u", "b", 1), watch("u", "a", -5), FLUSH])
    assert [(s["interactions"], s["history"]) for s in outcome.decoded] == [(0, []), (0, ["a", "b"])]
    assert outcome.counters["late"] == 2


# -- §6 ------------------------------------------------------------------------------------------------------------


def test_quality_needs_all_three_thresholds_and_zero_switches_one_off(play: Play) -> None:
    lines = [watch("u", f"i{at}", at, 12_000) for at in range(5)] + [event("like", "u", "i0", 5), FLUSH]
    for values, expected in [
        ({}, True),
        ({"min_watched": 6}, False),
        ({"min_total_watch_ms": 60_001}, False),
        ({"min_interactions": 2}, False),
        ({"min_watched": 0, "min_total_watch_ms": 0, "min_interactions": 0}, True),
    ]:
        outcome = play(semantics(**values), lines)
        assert outcome.decoded[0]["high_quality"] is expected, values
        assert outcome.counters["high_quality"] == expected
    (disliked,) = play(DEFAULT, [*lines[:5], event("dislike", "u", "i0", 5), FLUSH]).decoded
    assert (disliked["high_quality"], disliked["interactions"]) == (False, 0)


def test_labels_are_shares_and_flags(play: Play) -> None:
    lines = [watch("u", "a", 0, 90_000), watch("u", "b", 1, 0), watch("u", "c", 2, 8_000, 0)]
    (session,) = play(DEFAULT, [*lines, event("follow", "u", "b", 3), FLUSH]).decoded
    assert session["labels"] == {"swt": 98_000 / 300_000, "vtr": 2 / 3, "wtr": 1, "ltr": 0}
    assert session["total_watch_ms"] == 98_000


def test_a_session_prints_as_agreed(play: Play) -> None:
    lines = [
        watch("ü", "i", 0, 400_000),
        event("like", "ü", "i", 5),
        event("dislike", "ü", "i", 4),
        event("comment", "ü", "i", 5),
    ]
    (line,) = play(DEFAULT, [*lines, FLUSH]).sessions
    expected = (
        '{"session_id":"ü:1700000000000","user_id":"ü","request_id":null,"start":1700000000000,"end":1700000000000,'
        '"items":[{"item_id":"i","ts":1700000000000,"watch_ms":400000,"duration_ms":20000,'
        '"interactions":["dislike","comment","like"]}],"history":[],"watched":1,"total_watch_ms":400000,'
        '"interactions":2,"high_quality":false,"labels":{"swt":1.0,"vtr":1.0,"wtr":0,"ltr":1}}'
    )
    assert line == expected.encode()


def test_an_interaction_stands_at_the_last_watch_at_or_before_it_else_at_the_first(play: Play) -> None:
    lines = [
        watch("u", "other", 0),
        event("share", "u", "i", 5),
        watch("u", "i", 10),
        watch("u", "i", 20),
        watch("u", "i", 20, event_id="e"),
        event("like", "u", "i", 19),
        event("follow", "u", "i", 20),
        event("collect", "u", "i", 10, event_id="b"),
        event("collect", "u", "i", 10, event_id="a"),
        event("collect", "u", "i", 10),
    ]
    (session,) = play(DEFAULT, [*lines, FLUSH]).decoded
    found = [item["interactions"] for item in session["items"]]
    assert found == [[], ["share", "collect", "collect", "collect", "like"], [], ["follow"]]
    assert session["interactions"] == 6


# -- §7 ------------------------------------------------------------------------------------------------------------

OPEN_TO_ALL = {"min_watched": 0, "min_total_watch_ms": 0, "min_interactions": 0}


def test_windows_do_not_overlap_but_the_last_that_is_completed_backwards(play: Play) -> None:
    for count, expected in [
        (1, ["a"]),
        (2, ["ab"]),
        (3, ["abc"]),
        (4, ["abc", "bcd"]),
        (6, ["abc", "def"]),
        (8, ["abc", "def", "fgh"]),
    ]:
        lines = [watch("u", "abcdefgh"[at], at) for at in range(count)]
        outcome = play(semantics(target_items=3, **OPEN_TO_ALL), [*lines, FLUSH])
        assert ["".join(found) for found, _, _ in outcome.windows] == expected


def test_a_target_of_one_item_is_next_item_training(play: Play) -> None:
    lines = [watch("u", "old", -2 * HOUR), *(watch("u", "abc"[at], at) for at in range(3)), FLUSH]
    outcome = play(semantics(target_items=1, **OPEN_TO_ALL), lines)
    assert outcome.windows == [
        (["old"], [], T0 - 2 * HOUR),
        (["a"], ["old"], T0),
        (["b"], ["old", "a"], T0 + 1),
        (["c"], ["old", "a", "b"], T0 + 2),
    ]


def test_the_history_of_a_later_window_holds_what_was_positive_before_it(play: Play) -> None:
    config = semantics(target_items=2, length=3, **OPEN_TO_ALL)
    lines = [
        watch("u", "x", -3 * HOUR),
        watch("u", "y", -3 * HOUR + 1),
        watch("u", "a", 0),
        watch("u", "b", 1, 0),
        event("like", "u", "x", 1),
        watch("u", "c", 2),
        watch("u", "a", 3),
    ]
    outcome = play(config, [*lines, FLUSH])
    assert outcome.windows[1:] == [
        (["a", "b"], ["x", "y"], T0),
        (["c", "a"], ["y", "a", "x"], T0 + 2),
    ]


def test_only_sessions_of_high_quality_are_targets(play: Play) -> None:
    assert play(semantics(min_watched=2), [watch("u", "a", 0), FLUSH]).windows == []


# -- §8 ------------------------------------------------------------------------------------------------------------

SEEDS = [("u", "s1", T0 - 3), ("u", "s2", T0 - 2), ("u", "s1", T0 - 1), ("w", "s9", T0)]


def test_seeds_are_history_but_no_events(play: Play) -> None:
    outcome = play(DEFAULT, [watch("u", "a", 0), watch("v", "b", 0), FLUSH], seeds=SEEDS)
    assert outcome.history == {"u": ["s2", "s1", "a"], "v": ["b"]}
    assert outcome.counters["users"] == 2
    assert outcome.counters["events"] == 2
    assert [session["history"] for session in outcome.decoded] == [["s2", "s1"], []]


def test_seeds_obey_the_order_of_time_and_the_length(play: Play) -> None:
    outcome = play(semantics(length=2), [watch("u", "a", -3), watch("u", "s2", 3 * HOUR), FLUSH], seeds=SEEDS)
    assert outcome.history == {"u": ["s1", "s2"]}
    assert [session["history"] for session in outcome.decoded] == [[], ["s2", "s1"]]


def test_a_seed_after_the_start_of_a_session_is_not_in_its_history(play: Play) -> None:
    lines = [watch("u", "a", -2), watch("u", "b", 0), FLUSH]
    outcome = play(semantics(target_items=1, **OPEN_TO_ALL), lines, seeds=SEEDS)
    assert outcome.decoded[0]["history"] == ["s1"]
    assert [history for _, history, _ in outcome.windows] == [["s1"], ["a", "s2", "s1"]]


def test_kuairand_rows_become_a_watch_and_its_interactions(tmp_path: Path) -> None:
    names = "user_id,video_id,time_ms,is_like,is_follow,is_comment,is_forward,is_hate,play_time_ms,duration_ms"
    log, seeds = tmp_path / "log.csv.gz", tmp_path / "history.jsonl.gz"
    log.write_bytes(gzip.compress(f"{names}\n7,8,{T0},1,1,1,1,1,5,6\n7,9,{T0},0,0,0,0,0,0,0\n".encode()))
    rows = [json.loads(line) for line in kuairand_lines(log)]
    assert [row["type"] for row in rows] == ["watch", "like", "follow", "share", "comment", "dislike", "watch"]
    assert rows[0] == {"type": "watch", "user_id": "7", "item_id": "8", "ts": T0, "watch_ms": 5, "duration_ms": 6}
    row = {"user_id": 7, "last_time_ms": 100, "long_watch_seq": [1, 2], "like_seq": [1], "watch_seq": [5]}
    seeds.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert list(kuairand_seeds(seeds)) == [("7", "1", 98), ("7", "2", 99), ("7", "1", 100)]
