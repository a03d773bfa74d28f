"""`--live` and `--follow`: lines go out when the clock gets to their time, and a file that grows has no end."""

from __future__ import annotations

import gzip
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import typer
from typer.testing import CliRunner

from onerec.commands.stream import register
from onerec.errors import UserError
from streaming.cursors import LIVE_SECONDS, Clock
from streaming.dead_letters import letters
from streaming.replay import Replay
from streaming.semantics import Semantics, SessionConfig, StreamConfig
from streaming.sessions import session_json
from streaming.store import Reader, Store

T0 = 1_790_000_000_000
SEMANTICS = Semantics(session=SessionConfig(gap_ms=3_000), stream=StreamConfig(max_out_of_orderness_ms=500))


class Stopped(Exception):
    """What SIGTERM would be."""


class World:
    """A wall clock that moves when somebody sleeps; `at` are things that happen at a time, and `end` stops everything."""

    def __init__(self, end: float, at: dict[float, Callable[[], object]] | None = None) -> None:
        self.ms = float(T0)
        self._end = T0 + 1000 * end
        self._at = dict(sorted((T0 + 1000 * when, act) for when, act in (at or {}).items()))

    def sleep(self, seconds: float) -> None:
        self.ms += 1000 * seconds
        while self._at and next(iter(self._at)) <= self.ms:
            self._at.pop(next(iter(self._at)))()
        if self.ms >= self._end:
            raise Stopped

    def clock(self) -> Clock:
        return Clock(wall_ms=lambda: int(self.ms), monotonic=lambda: self.ms / 1000, sleep=self.sleep)


def watch(user: str, item: str, ts: int, **more: object) -> dict:
    return {"type": "watch", "user_id": user, "item_id": item, "ts": ts, "watch_ms": 9_000, "duration_ms": 10_000, **more}


def log(events: int = 400, seed: int = 3) -> list[dict]:
    """Ten seconds of events by their arrival; some late by seconds, some twice."""
    rng = random.Random(seed)
    found = [watch(f"u{rng.randrange(9)}", f"i{rng.randrange(30)}", T0 + rng.randrange(10_000)) for _ in range(events)]
    found.sort(key=lambda event: event["ts"])
    for place in range(20, len(found), 40):
        found.insert(place, {**found[place - 10], "item_id": "late"})
        found.insert(place, found[place - 1])
    return found


def lines(events: list[dict]) -> bytes:
    return b"".join(orjson.dumps(event) + b"\n" for event in events)


def live(state: Path, path: Path, world: World, *, follow: bool = False, paced: bool = True) -> list[tuple[float, int]]:
    """Runs until the log or the world ends; each commit's time and the events applied by then."""
    steps: list[tuple[float, int]] = []
    with Store(state, SEMANTICS) as store:
        job = Replay(store, [str(path)], live=paced, follow=follow, flush=False, clock=world.clock(),
                     on_step=lambda step: steps.append((world.ms, step.counters.events)))
        try:
            job.run()
        except Stopped:
            pass
    return steps


def answers(state: Path) -> tuple[bytes, bytes, str]:
    with Reader(state) as reader:
        sessions = b"\n".join(session_json(session) for _, session in reader.sessions())
        return sessions, b"\n".join(orjson.dumps(user) for user in reader.users()), str(reader.counters())


def test_each_commit_holds_what_is_due_by_then_and_all_of_it(tmp_path: Path) -> None:
    events = log()
    path = tmp_path / "live.jsonl"
    path.write_bytes(lines(events))
    steps = live(tmp_path / "s", path, World(60))
    due = list(itertools.accumulate((event["ts"] for event in events), max))
    assert steps[-1][1] == len(events)
    for when, applied in steps:
        assert applied == sum(ts <= when for ts in due)
    times = [when for when, _ in steps]
    assert all(0.99 * 1000 * LIVE_SECONDS <= later - earlier for earlier, later in itertools.pairwise(times))
    # Nobody waits for his history longer than a tick after his event was due.
    for ts in due:
        assert min(when for when in times if when >= ts) - ts <= 1000 * LIVE_SECONDS + 1


def test_the_pace_changes_no_result(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    path.write_bytes(lines(log()))
    live(tmp_path / "paced", path, World(60))
    world = World(60)
    world.ms += 20_000
    live(tmp_path / "at-once", path, world, paced=False)
    assert answers(tmp_path / "paced") == answers(tmp_path / "at-once")


def test_a_backlog_goes_out_at_once(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    path.write_bytes(lines(log()))
    world = World(100)
    world.ms += 30_000
    steps = live(tmp_path / "s", path, world)
    assert [applied for _, applied in steps] == [len(log())]
    assert world.ms == T0 + 30_000


@pytest.mark.parametrize("paced", [True, False])
def test_a_file_that_grows_is_read_on_and_half_a_line_is_no_line(tmp_path: Path, paced: bool) -> None:
    events = log(60)
    whole = lines(events)
    path = tmp_path / "live.jsonl"
    first, middle = whole.index(b"\n") + 20, len(whole) // 2 + 7
    path.write_bytes(whole[:first])

    def grow(data: bytes) -> Callable[[], object]:
        def act() -> None:
            with open(path, "ab") as file:
                file.write(data)
        return act

    world = World(40, {11.0: grow(whole[first:middle]), 20.0: grow(whole[middle:])})
    if not paced:
        world.ms += 10_000
    steps = live(tmp_path / "s", path, world, follow=True, paced=paced)
    whole_lines = [whole[:first].count(b"\n"), whole[:middle].count(b"\n"), len(events)]
    assert [applied for _, applied in steps] == whole_lines
    with Reader(tmp_path / "s") as reader:
        assert reader.counters().dead_letters == 0
    assert world.ms >= T0 + 40_000  # no end but the one of the world


@pytest.mark.parametrize("stop", [0.35, 4.0, 8.2])
def test_stopped_and_begun_again_it_goes_on_where_it_was(tmp_path: Path, stop: float) -> None:
    path = tmp_path / "live.jsonl"
    path.write_bytes(lines(log()))
    live(tmp_path / "whole", path, World(60), follow=True)
    live(tmp_path / "parts", path, World(stop), follow=True)
    with Reader(tmp_path / "parts") as reader:
        assert 0 < reader.counters().events < len(log())
    world = World(60)
    world.ms += 1000 * stop + 2_000
    live(tmp_path / "parts", path, world, follow=True)
    assert answers(tmp_path / "whole") == answers(tmp_path / "parts")


def test_a_wrong_clock_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    wrong = watch("u1", "i1", T0 + 10**9)
    path.write_bytes(lines([watch("u1", "i1", T0 + 100), wrong]) + b"nonsense\n" + lines([watch("u1", "i2", T0 + 300)]))
    steps = live(tmp_path / "s", path, World(30))
    assert steps[-1][0] <= T0 + 300 + 1000 * LIVE_SECONDS
    assert steps[-1][1] == 2
    with Reader(tmp_path / "s") as reader:
        assert [letter["reason"] for letter in letters(reader)] == ["future_ts", "not_json"]


def test_a_catalogue_entry_waits_for_its_time_too(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    item = {"type": "item", "item_id": "new", "ts": T0 + 5_000, "duration_ms": 1_000}
    path.write_bytes(lines([watch("u1", "i1", T0 + 100), item, watch("u1", "new", T0 + 6_000)]))
    seen: list[tuple[float, int]] = []
    world = World(30)
    with Store(tmp_path / "s", SEMANTICS) as store:
        job = Replay(store, [str(path)], live=True, flush=False, clock=world.clock(),
                     on_step=lambda step: seen.append((world.ms - T0, store.progress().item_sequence)))
        job.run()
    assert [items for _, items in seen] == [0, 1, 1]
    assert 5_000 <= seen[1][0] <= 5_000 + 1000 * LIVE_SECONDS


def test_only_a_plain_file_of_json_lines_can_be_followed(tmp_path: Path) -> None:
    packed, table = tmp_path / "log.jsonl.gz", tmp_path / "log.csv"
    packed.write_bytes(gzip.compress(lines(log(5))))
    table.write_text("user_id,item_id\n")
    for path in (packed, table):
        with pytest.raises(UserError, match="--follow"):
            live(tmp_path / "s", path, World(1), follow=True)


def test_two_paces_are_refused(tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    words = ["replay", str(tmp_path / "x"), "--state", str(tmp_path / "s"), "--live", "--speed", "2"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UserError)
    assert "--speed and --live" in str(result.exception)
