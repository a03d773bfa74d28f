"""A world at live pace: its times, its rate, and that a killed writer goes on with the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import typer
from typer.testing import CliRunner

from onerec.commands.simulate import register
from onerec.errors import UserError
from simulator.live import AHEAD_MS, LiveConfig, LiveWorld, live_config, read_written, scaled_settings
from simulator.world import DAY_MS
from streaming.semantics import SessionConfig, StreamConfig

NOON = 1_790_000_000_000
SMALL = LiveConfig(users=60, factor=400, hours=0.25, first_items=80, upload_seconds=5.0)


class Killed(Exception):
    """Stands for SIGKILL."""


class Clock:
    """A wall clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = NOON

    def wall_ms(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += int(1000 * seconds)


def write(folder: Path, clock: Clock, *, until: int | None = None, progress: Callable[[int], None] | None = None,
          config: LiveConfig = SMALL) -> LiveWorld:
    """Writes until the clock is past `until`, or the world's end."""
    folder.mkdir(exist_ok=True)
    world = LiveWorld(folder / "live.jsonl", config, wall_ms=clock.wall_ms, sleep=clock.sleep,
                      stopped=lambda: until is not None and clock.now > until)
    world.run(progress or (lambda events: None))
    return world


def records(folder: Path, name: str = "live.jsonl") -> list[dict]:
    return [orjson.loads(line) for line in (folder / name).read_bytes().splitlines()]


def test_events_lie_between_the_beginning_and_a_world_shortened_by_the_factor(tmp_path: Path) -> None:
    write(tmp_path, Clock())
    events = [record for record in records(tmp_path) if record["type"] != "item"]
    times = [event["ts"] for event in events]
    assert NOON <= min(times) < NOON + 10_000
    length = SMALL.world.days * DAY_MS / SMALL.factor
    assert NOON + 0.9 * length < max(times) < NOON + 1.1 * length
    assert abs(len(events) / (length / 1000) / SMALL.rate - 1) < 0.25
    assert max(event.get("watch_ms", 0) for event in events) > 20_000  # watch times are not shortened


def test_new_items_come_steadily_and_before_who_watches_them(tmp_path: Path) -> None:
    write(tmp_path, Clock())
    known = {record["item_id"]: record["ts"] for record in records(tmp_path, "live.items.jsonl")}
    assert len(known) == SMALL.first_items
    assert max(known.values()) <= NOON
    uploaded = []
    for record in records(tmp_path):
        if record["type"] == "item":
            known[record["item_id"]] = record["ts"]
            uploaded.append(record["ts"])
        else:
            assert known[record["item_id"]] <= record["ts"]
    assert len(uploaded) == SMALL.hours * 3600 / SMALL.upload_seconds
    assert uploaded == sorted(uploaded)
    assert max(b - a for a, b in zip(uploaded, uploaded[1:], strict=False)) < 10 * 1000 * SMALL.upload_seconds


def test_the_file_is_a_minute_ahead_of_the_clock_and_not_hours(tmp_path: Path) -> None:
    clock = Clock()
    ahead: list[int] = []

    def look(events: int) -> None:
        if clock.now > NOON:
            ahead.append(max(record["ts"] for record in records(tmp_path)) - clock.now)

    write(tmp_path, clock, until=NOON + 300_000, progress=look)
    block_ms = 3 * 3_600_000 // SMALL.factor
    assert len(ahead) > 3
    assert AHEAD_MS - 5_000 < min(ahead)
    assert max(ahead) < AHEAD_MS + 3 * block_ms


@pytest.mark.parametrize("blocks", [0, 1, 4])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_writer_goes_on_with_the_same_bytes(tmp_path: Path, blocks: int, torn: bool) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    write(whole, Clock(), until=NOON + 200_000)
    done = []

    def die(events: int) -> None:
        done.append(events)
        if len(done) > blocks:
            raise Killed

    clock = Clock()
    with pytest.raises(Killed):
        write(killed, clock, progress=die)
    if torn:
        # Half of the block after the last one noted had been written when the process died.
        stands = read_written(killed / "live.jsonl")
        assert stands is not None
        more = (whole / "live.jsonl").read_bytes()[stands.bytes :]
        with open(killed / "live.jsonl", "ab") as file:
            file.write(more[: min(5_000, len(more) // 2)])
    clock.now += 30_000
    write(killed, clock, until=NOON + 200_000)
    one, other = (whole / "live.jsonl").read_bytes(), (killed / "live.jsonl").read_bytes()
    shorter = min(len(one), len(other))
    assert shorter > 50_000
    assert one[:shorter] == other[:shorter]
    assert (whole / "live.items.jsonl").read_bytes() == (killed / "live.items.jsonl").read_bytes()


def test_a_world_begun_with_other_options_is_refused_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path, Clock(), until=NOON + 10_000)
    before = (tmp_path / "live.jsonl").read_bytes()
    with pytest.raises(UserError, match="other options"):
        write(tmp_path, Clock(), config=LiveConfig(users=61, factor=400))
    assert (tmp_path / "live.jsonl").read_bytes() == before


@pytest.mark.parametrize(("rate", "users"), [(1000, None), (50, None), (1000, 5_000), (3, 40)])
def test_rate_and_users_decide_how_fast_days_pass(rate: float, users: int | None) -> None:
    config = live_config(rate, users)
    assert config.rate == pytest.approx(rate, rel=0.01)
    scaled = scaled_settings(config.factor)
    assert scaled["session.gap_ms"] == pytest.approx(SessionConfig().gap_ms / config.factor, abs=1)
    assert scaled["stream.max_out_of_orderness_ms"] == pytest.approx(
        StreamConfig().max_out_of_orderness_ms / config.factor, abs=1)


@pytest.mark.parametrize(("rate", "users"), [(1000, 100), (1000, 10_000_000), (0, None), (-1, None)])
def test_a_world_that_cannot_keep_the_rate_is_refused_with_the_remedy(rate: float, users: int | None) -> None:
    with pytest.raises(UserError, match="--users|--rate"):
        live_config(rate, users)


def test_a_world_that_goes_on_keeps_only_the_tastes_it_needs(tmp_path: Path) -> None:
    world = write(tmp_path, Clock(), config=LiveConfig(users=20, factor=2_000, hours=0.2, first_items=20, upload_seconds=60))
    assert world.written.config.world.days > 10
    assert len(world._world._tastes) <= 3  # noqa: SLF001 - what stays in memory is the promise


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--days", "3"], "--days"), (["--inline-items"], "--inline-items"), (["--rate", "0"], "--rate")],
)
def test_options_of_a_log_written_at_once_are_refused(tmp_path: Path, words: list[str], said: str) -> None:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["--live", "--out", str(tmp_path / "w.jsonl"), *words])
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_at_once_and_stops_when_told(tmp_path: Path) -> None:
    events = tmp_path / "w.jsonl"
    command = [sys.executable, "-m", "onerec.cli", "simulate", "--live", "--rate", "20", "--out", str(events), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while not ((found := read_written(events)) and found.blocks) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    report = orjson.loads(output)
    assert report["bytes"] == events.stat().st_size > 0
    assert abs(report["began_ms"] - time.time() * 1000) < 60_000
