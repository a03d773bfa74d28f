"""The stream core against the reference, on worlds made to be nasty; and the promises of SEMANTICS.md §3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import kuairand_lines, kuairand_seeds, merge, split_lines
from worlds import FLUSH, NOW, T0, Outcome, by_core, by_reference, by_replay, event, semantics, watch

from streaming.semantics import Semantics

TYPES = ["like", "follow", "share", "collect", "comment", "dislike"]
IDS = ["a", "b", "é", "%:", "\uffff", "\U00010000"]
EXAMPLES = int(os.environ.get("ONEREC_EXAMPLES", "150"))
WORLDS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)

small_semantics = st.builds(
    semantics,
    by=st.sampled_from(["gap", "request"]),
    effective_ms=st.just(5),
    length=st.sampled_from([1, 2, 3, 256]),
    gap_ms=st.sampled_from([10, 30, 100, 30, 100, 3, 0]),
    max_ms=st.sampled_from([1000] * 5 + [25, 8, 0]),
    max_items=st.sampled_from([500] * 5 + [3, 2, 1]),
    feedback_delay_ms=st.sampled_from([None, None, 50, 10, 2, 0]),
    min_watched=st.sampled_from([0, 1, 2]),
    min_total_watch_ms=st.sampled_from([0, 10]),
    min_interactions=st.sampled_from([0, 0, 1]),
    swt_cap_ms=st.sampled_from([1, 7, 300]),
    target_items=st.sampled_from([1, 2, 3, 5]),
    max_out_of_orderness_ms=st.sampled_from([20, 5, 0]),
    max_future_ms=st.sampled_from([0, 3, 60_000]),
    dedup_horizon_ms=st.sampled_from([1000, 15, 4, 0]),
    max_open_events=st.sampled_from([10_000] * 9 + [4, 2, 1]),
)

request_ids = st.sampled_from([None, None, None, None, "r", "r", "q", "r:%"])
milliseconds = st.sampled_from([0, 1, 4, 5, 6, 7])


# Times of a world's events are taken from its own limits: `step` and `back` name one of them, with a small offset.
steps = st.tuples(
    st.sampled_from(["0"] * 30 + ["gap", "gap and lateness", "horizon"]),
    st.sampled_from([0] * 6 + [1, 1, 1, 2, 3, 5, 8]),
)
backs = st.sampled_from(["0"] * 6 + ["half"] * 4 + ["lateness", "late", "very late"])
valid_events = st.fixed_dictionaries(
    {
        "step": steps,
        "back": backs,
        "type": st.sampled_from(["watch"] * 9 + TYPES),
        "user_id": st.sampled_from(["a", "a", "b"]),
        "item_id": st.sampled_from(["a", "a", "a", "b", "b", *IDS]),
        "event_id": st.sampled_from([None] * 5 + ["x", "x", "x", "y", "é", "shared"]),
        "request_id": request_ids,
        "watch_ms": milliseconds,
        "duration_ms": milliseconds,
    }
)
repeats = st.fixed_dictionaries(
    {"step": steps, "back": backs, "of": st.integers(1, 12)},
    optional={
        "watch_ms": milliseconds,
        "duration_ms": milliseconds,
        "request_id": request_ids,
        "ts": st.just("now"),
        "item_id": st.sampled_from([None] * 4 + ["other"]),
    },
)


def valid_line(step: dict[str, Any], ts: int) -> bytes:
    fields = {name: step[name] for name in ("type", "user_id", "item_id", "event_id", "request_id")}
    if step["event_id"] not in (None, "shared"):
        fields["event_id"] += step["item_id"]  # only "shared" ones make conflicts
    if step["type"] == "watch":
        fields |= {"watch_ms": step["watch_ms"], "duration_ms": step["duration_ms"]}
    return orjson.dumps(fields | {"ts": ts})


def repeated_line(step: dict[str, Any], line: bytes, ts: int) -> bytes:
    """The line again, perhaps with other durations, another time, request or item."""
    fields = orjson.loads(line)
    changes = {name: step[name] for name in ("watch_ms", "duration_ms", "request_id", "item_id") if step.get(name)}
    if "ts" in step:
        changes["ts"] = ts
    return orjson.dumps(fields | {name: value for name, value in changes.items() if name in fields})


def build(config: Semantics, script: list[dict[str, Any] | bytes | None]) -> list[bytes | None]:
    """Lines in processing order from steps of a script; bytes and flushes stand for themselves."""
    lateness, gap = config.stream.max_out_of_orderness_ms, config.session.gap_ms
    forward = {"0": 0, "gap": gap, "gap and lateness": gap + lateness, "horizon": config.stream.dedup_horizon_ms}
    back = {"0": 0, "half": lateness // 2, "lateness": lateness, "late": lateness + 1, "very late": 2 * lateness + 9}
    lines: list[bytes | None] = []
    events: list[bytes] = []
    now = T0
    for step in script:
        if not isinstance(step, dict):
            lines.append(step)
            continue
        now += forward[step["step"][0]] + step["step"][1]
        ts = now - back[step["back"]]
        if "of" not in step:
            line = valid_line(step, ts)
        elif events:
            line = repeated_line(step, events[-min(step["of"], len(events))], ts)
        else:
            continue
        lines.append(line)
        events.append(line)
    return lines


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
odd_values = (
    json_values
    | st.sampled_from([True, False, 1.0, -1, 0, 604_800_000, 604_800_001, 1 << 63, 10**25, 10**400, "", "x" * 256])
    | st.sampled_from(["x" * 257, "\ud800", "\udc00\ud800", "\ud83d\ude00", "\x00", "€" * 85, "€" * 86, "é" * 33])
    | st.sampled_from([631_152_000_000, 631_151_999_999, NOW, NOW + 1, NOW + 3, NOW + 60_000, NOW + 60_001])
)
FIELDS = ["type", "user_id", "item_id", "event_id", "request_id", "ts", "watch_ms", "duration_ms", "other", "tags"]


@st.composite
def broken_lines(draw: st.DrawFn) -> bytes:
    """A line that is often invalid: odd values, fields away or repeated, bytes changed."""
    line = valid_line(draw(valid_events), T0)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(FIELDS))
        if draw(st.booleans()):
            fields = json.loads(line) if line.startswith(b"{") and is_json(line) else {}
            if draw(st.booleans()):
                fields.pop(name, None)
            else:
                fields[name] = draw(odd_values)
            line = json.dumps(fields, ensure_ascii=True).encode()
        else:
            line = line[:-1] + b',"%s":%s}' % (name.encode(), json.dumps(draw(odd_values)).encode())
    if draw(st.integers(0, 3)) == 0 and line:
        place = draw(st.integers(0, len(line)))
        cut = draw(st.integers(0, 2))
        junk = [
            b"",
            b"\xff",
            b'"',
            b"\\",
            b",",
            b"0",
            b"-",
            b".",
            b"[",
            b"}",
            b" ",
            b"\t",
            b"\r",
            b"\x01",
            b"e",
            b"\xc3",
        ]
        line = line[:place] + draw(st.sampled_from(junk)) + line[place + cut :]
    return line


def is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


numbers = st.lists(st.sampled_from([0, 1.5, -3e30, 1e308 * 10, True, None]) | st.integers(-5, 5), max_size=3)
item_lines = st.builds(
    lambda item_id, at, embedding, more: json.dumps(
        {"type": "item", "item_id": item_id, "ts": T0 + at, "embedding": embedding} | more
    ).encode(),
    st.sampled_from([*IDS, ""]),
    st.integers(-50, 500),
    st.none() | numbers | st.lists(st.integers(0, 3), min_size=2, max_size=2),
    st.sampled_from([{}, {"tags": ["1"]}, {"tags": [1]}, {"author_id": 5}, {"user_id": 5, "event_id": 5}]),
)
blank_lines = st.sampled_from([b"", b" ", b"\r", b"\t \r"])


troubles = broken_lines() | item_lines | blank_lines | st.just(FLUSH)
script_steps = st.sampled_from([valid_events] * 28 + [repeats] * 11 + [troubles]).flatmap(lambda kind: kind)
# Lists are short by themselves, and failures shrink towards the first alternative.
scripts = st.lists(script_steps, max_size=60) | st.integers(20, 50).flatmap(
    lambda size: st.lists(script_steps, min_size=size, max_size=60)
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Semantics, list[bytes | None]]:
    config = draw(small_semantics)
    return config, build(config, draw(scripts))


seeds_of_worlds = st.lists(
    st.tuples(st.sampled_from([*IDS[:3], "only seeds"]), st.sampled_from(IDS), st.integers(T0 - 40, T0 + 40)),
    max_size=6,
)


def assert_same(core: Outcome, reference: Outcome) -> None:
    assert core.dead_letters == reference.dead_letters
    assert core.sessions == reference.sessions
    assert core.histories == reference.histories
    assert core.counters == reference.counters
    assert core.windows == reference.windows


@WORLDS
@given(world=worlds(), batches=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_the_core_gives_what_the_reference_gives(world: tuple[Semantics, list[bytes | None]], batches: list[int]) -> None:
    assert_same(by_core(*world, batches=batches), by_reference(*world))


@WORLDS
@given(
    world=worlds(),
    batches=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seeds=seeds_of_worlds,
    reopen=st.booleans(),
    max_users=st.integers(0, 2),
)
def test_neither_restarts_nor_a_small_cache_nor_seeds_make_a_difference(
    world: tuple[Semantics, list[bytes | None]],
    batches: list[int],
    seeds: list[tuple[str, str, int]],
    reopen: bool,
    max_users: int,
) -> None:
    core = by_core(*world, batches=batches, seeds=seeds, reopen=reopen, max_users=max_users)
    assert_same(core, by_reference(*world, seeds=seeds))


@WORLDS
@given(world=worlds(), batches=st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_batch_sizes_change_nothing(world: tuple[Semantics, list[bytes | None]], batches: list[int]) -> None:
    assert by_core(*world, batches=batches) == by_core(*world)


@WORLDS
@given(lines=st.lists(broken_lines() | item_lines, max_size=8), now_ms=st.sampled_from([NOW, T0, T0 - 100]))
def test_broken_lines_get_the_same_reason(lines: list[bytes | None], now_ms: int) -> None:
    config = semantics()
    assert_same(by_core(config, lines, now_ms=now_ms), by_reference(config, lines, now_ms=now_ms))


@pytest.mark.slow
@settings(WORLDS, max_examples=max(1, EXAMPLES // 5))
@given(
    world=worlds(),
    sources=st.lists(st.integers(0, 2), min_size=1, max_size=70),
    ends=st.lists(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\n \r\n"]), min_size=1, max_size=5),
    marks=st.lists(st.booleans(), min_size=3, max_size=3),
    last_feed=st.booleans(),
    batch=st.none() | st.integers(1, 9),
)
def test_files_are_merged_by_event_time(
    world: tuple[Semantics, list[bytes | None]],
    sources: list[int],
    ends: list[bytes],
    marks: list[bool],
    last_feed: bool,
    batch: int | None,
) -> None:
    config, lines = world
    contents = [b"\xef\xbb\xbf" if mark else b"" for mark in marks]
    for position, line in enumerate(line for line in lines if line is not FLUSH):
        contents[sources[position % len(sources)]] += line + ends[position % len(ends)]
    contents = [content + b"\n" if last_feed or not content else content for content in contents]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.jsonl" for number in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        replayed = by_replay(config, files, Path(folder) / "state", batch=batch)
    merged = merge([split_lines(content) for content in contents], NOW, config)
    assert_same(replayed, by_reference(config, [*merged, FLUSH]))


# -- §3: arrival order ---------------------------------------------------------------------------------------------

LATENESS = 20


@st.composite
def ordered_worlds(draw: st.DrawFn) -> tuple[Semantics, list[bytes]]:
    """Semantics and events in order of time, for which §3 promises the same answer in every order within the lateness.

    Reports of an identity lie within the lateness; interactions carry the request of a watch of their item.
    """
    config = semantics(
        by=draw(st.sampled_from(["gap", "request"])),
        effective_ms=5,
        length=draw(st.sampled_from([2, 256])),
        gap_ms=draw(st.sampled_from([LATENESS, 30])),
        max_ms=draw(st.sampled_from([25, 40, 1000])),
        max_items=draw(st.sampled_from([1, 2, 3, 500])),
        feedback_delay_ms=draw(st.sampled_from([None, 0, 7])),
        min_watched=0,
        min_total_watch_ms=0,
        min_interactions=0,
        target_items=draw(st.sampled_from([1, 2])),
        max_out_of_orderness_ms=LATENESS,
        dedup_horizon_ms=draw(st.sampled_from([LATENESS, 1000])),
    )
    found: list[tuple[int, bytes]] = []
    at = 0
    for number in range(draw(st.integers(1, 12))):
        at += draw(st.sampled_from([0, 1, 5, 19, 20, 21, 31, 60]))
        user_id, item_id = draw(st.sampled_from(IDS[:2])), draw(st.sampled_from(IDS[:3]))
        request_id = draw(st.sampled_from([None, "r", "q"]))
        event_id = draw(st.sampled_from([None, f"e{number}"]))
        reports = [at] * draw(st.integers(1, 2))
        if event_id is not None:
            reports += [at + draw(st.integers(0, LATENESS)) for _ in range(draw(st.integers(0, 2)))]
        for ts in reports:
            more = {"event_id": event_id, "request_id": request_id}
            found.append((ts, watch(user_id, item_id, ts, draw(milliseconds), draw(milliseconds), **more)))
        if request_id is not None or config.session.by == "gap":
            for ts in draw(st.lists(st.integers(at, at + 35), max_size=2)):
                found.append((ts, event(draw(st.sampled_from(TYPES)), user_id, item_id, ts, request_id=request_id)))
    found.sort(key=lambda pair: pair[0])
    return config, [line for _, line in found]


@st.composite
def shuffled(draw: st.DrawFn, lines: list[bytes]) -> list[bytes]:
    """The lines in another order in which nothing is late and the reports of an identity arrive near each other."""
    rest = [(orjson.loads(line)["ts"], line) for line in lines]
    order: list[bytes] = []
    while rest:
        # Taking a line of time t makes late what is below t - LATENESS: only lines up to that above the oldest may go.
        oldest = min(ts for ts, _ in rest)
        allowed = [index for index, (ts, _) in enumerate(rest) if ts <= oldest + LATENESS]
        order.append(rest.pop(draw(st.sampled_from(allowed)))[1])
    return order


@WORLDS
@given(world=ordered_worlds(), data=st.data())
def test_arrival_order_within_the_lateness_changes_nothing(world: tuple[Semantics, list[bytes]], data: st.DataObject) -> None:
    config, lines = world
    other = data.draw(shuffled(lines))
    one, two = by_core(config, [*lines, FLUSH]), by_core(config, [*other, FLUSH], batches=[3])
    assert one.counters["late"] == two.counters["late"] == 0
    assert one == two


# -- a real log ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kuairand() -> tuple[Path, Path]:
    folder = os.environ.get("ONEREC_DATA")
    if not folder:
        pytest.skip("ONEREC_DATA does not name the folder of the KuaiRand log")
    return next(Path(folder).glob("events_*.csv.gz")), next(Path(folder).glob("history_before_*.jsonl.gz"))


KUAIRAND = semantics(gap_ms=12 * 3_600_000, min_watched=3, min_total_watch_ms=30_000, min_interactions=0)


@pytest.fixture(scope="module")
def kuairand_reference(kuairand: tuple[Path, Path]) -> Outcome:
    log, history = kuairand
    outcome = by_reference(KUAIRAND, [*kuairand_lines(log), FLUSH], seeds=list(kuairand_seeds(history)))
    assert outcome.counters["events"] == 157_613  # 154,071 rows and 3,542 flags
    return outcome


@pytest.mark.slow
def test_the_kuairand_log_gives_what_the_reference_gives(
    kuairand: tuple[Path, Path], kuairand_reference: Outcome, tmp_path: Path
) -> None:
    assert_same(by_replay(KUAIRAND, kuairand, tmp_path / "state"), kuairand_reference)


@pytest.mark.slow
def test_the_commands_print_the_kuairand_log_as_the_reference_does(
    kuairand: tuple[Path, Path], kuairand_reference: Outcome, tmp_path: Path
) -> None:
    state = ["--state", str(tmp_path / "state"), "--json"]
    values = ["gap_ms=43200000", "min_watched=3", "min_total_watch_ms=30000", "min_interactions=0"]
    config = [argument for value in values for argument in ("--set", f"session.{value}")]
    replayed = onerec("replay", *map(str, kuairand), "--format", "kuairand", *state, *config)
    summary = orjson.loads(replayed.splitlines()[-1])
    assert {name: summary[name] for name in kuairand_reference.counters} == kuairand_reference.counters
    assert onerec("sessions", *state, *config).splitlines() == kuairand_reference.sessions
    assert onerec("histories", *state, *config).splitlines() == kuairand_reference.histories


def onerec(*arguments: str) -> bytes:
    script = "import sys; from onerec.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.PIPE).stdout
