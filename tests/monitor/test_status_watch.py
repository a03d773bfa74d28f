"""The picture in the terminal says what is known, says where nothing is, and shows hostile names as they are."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from watched import T0, Watched

from exporter.release import Held, Hold, ReleaseStatus
from onerec.monitor.drift import Drifted
from onerec.monitor.looks import CheckpointMarks, StateMarks
from onerec.monitor.prober import Answer
from onerec.monitor.screen import BAR_CELLS, Extras, bar, screen
from onerec.monitor.settings import MonitorConfig
from onerec.monitor.watch import Snapshot
from streaming.changes import Counters


def snapshot(**more: object) -> Snapshot:
    fields = {
        "wall_ms": T0, "log_clock_ms": None, "live": False, "factor": None, "clock_jumps": 0, "state": StateMarks(),
        "checkpoint": CheckpointMarks(), "manifest": None, "release": None, "answers": (), "state_bytes": None,
        "drift": None, "faults": (), **more,
    }  # fmt: skip
    return Snapshot(**fields)  # type: ignore[arg-type]


def answer(replica: str, version: int, watermark: int, **more: object) -> Answer:
    return Answer(replica=replica, at_ms=T0, up=True, seconds=0.012, version=version, watermark_ms=watermark, **more)  # type: ignore[arg-type]


def drawn(seen: Snapshot, extras: Extras | None = None, asked: tuple[str, ...] = ("a:1",), width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(screen(seen, asked, extras or Extras(), objective_s=30.0, limits=MonitorConfig()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return text


def line(text: str, beginning: str) -> str:
    return next(found for found in text.splitlines() if found.startswith(beginning + " "))


FULL = {
    "log_clock_ms": T0, "live": True, "factor": 1.0,
    "state": StateMarks(newest=T0 - 200, watermark=T0 - 700, session_end=T0 - 5_000, sequence=9,
                        counters=Counters(events=9_990, dead_letters=10, duplicates=3, late=2, sessions=9, high_quality=4)),
    "checkpoint": CheckpointMarks(step=70, watermark=T0 - 9_000, created_ms=T0 - 4_000),
}  # fmt: skip


def test_nothing_known_is_no_data_everywhere() -> None:
    text = drawn(snapshot(faults=("state s: there is none",)))
    assert "event → served: no data" in text and "log clock: no data" in text
    assert "not asked yet" in line(text, "a:1") and "state s: there is none" in text
    for stage in ("event ", "history", "session", "trained", "exported", "served", "gate", "loss", "hit rate", "lag", "drift"):
        assert "no data" in line(text, stage)
    assert "━" not in text and " 0 ms" not in text


def test_the_chain_is_drawn_with_its_ages() -> None:
    text = drawn(snapshot(**FULL, answers=(answer("a:1", 7, T0 - 12_000, history_watermark_ms=T0 - 900),)))
    assert "event → served: 12.0 s  within the objective of 30.0 s" in text
    assert "UTC, live" in text
    ages = {"event ": "200 ms", "history": "700 ms", "session": "5.0 s", "trained": "9.0 s", "served": "12.0 s"}
    for stage, age in ages.items():
        assert age in line(text, stage) and "━" in line(text, stage)
    assert "step 70" in line(text, "trained") and "version 7" in line(text, "served")
    replica = line(text, "a:1")
    for part in ("7", "12.0 s", "900 ms", "12 ms"):
        assert part in replica
    assert "10 dead letters (0.10%)" in line(text, "log") and "4 of high quality" in line(text, "log")
    assert "4.0 s" in line(text, "checkpoint")


def test_what_is_late_is_over_the_objective_and_in_a_replay_that_is_as_much_longer() -> None:
    late = snapshot(**FULL, answers=(answer("a:1", 7, T0 - 45_000),))
    assert "over the objective of 30.0 s" in drawn(late)
    replayed = snapshot(**{**FULL, "live": False, "factor": 100.0}, answers=(answer("a:1", 7, T0 - 45_000),))
    assert "within the objective of 50 min 00 s" in drawn(replayed)
    assert "by the log, 100 s of log a second" in drawn(replayed)


def test_replicas_that_differ_or_are_down_are_told_apart() -> None:
    down = Answer(replica="c:1", at_ms=T0, up=False, seconds=1.0, fault="deadline [bold]exceeded[/bold]")
    seen = snapshot(**FULL, answers=(answer("a:1", 7, T0 - 12_000), answer("b:1", 6, T0 - 20_000), down))
    text = drawn(seen, asked=("a:1", "b:1", "c:1"))
    assert "mixed versions" in line(text, "a:1") and "mixed versions" in line(text, "b:1")
    assert "deadline [bold]exceeded[/bold]" in line(text, "c:1"), "brackets are no markup"
    assert "version 6, 7" in line(text, "served") and "event → served: 20.0 s" in text, "all have learnt what the older has"
    untrained = Answer(replica="b:1", at_ms=T0, up=True, seconds=0.1, version=1)
    assert snapshot(answers=(answer("a:1", 7, T0), untrained)).answered_ms is None


def test_a_hold_a_gate_losses_lags_and_drift_are_said() -> None:
    release = ReleaseStatus(
        serving=7, hold=Hold(reason="<b>bad</b>", at_ms=T0, left=[8], serving=7),
        held=[Held(version=9, reason="worse", at_ms=T0)],
        failed=True, first=None, weights_at_ms=T0 - 60_000, manifest=None, versions=[],
    )  # fmt: skip
    curves = {
        "losses": {"series": {"ntp": [5.0, 4.25], "preference": [None, None], "reward": [1.5, None]}}, "skipped": 2,
        "hit_rate": {"series": {"onerec": [0.1, 0.125]}},
    }  # fmt: skip
    lags = {"sources": [
        {"source": "events", "seconds": 1.5, "records": 1_200.0}, {"source": "pairs", "seconds": None, "records": 3.0},
    ]}  # fmt: skip
    drift = Drifted(codes=0.3, watch_time=0.01, event_mix=None, unseen=0.25, sessions=1_000, until=9)
    text = drawn(snapshot(**FULL, release=release, drift=drift), Extras(curves=curves, lags=lags))
    assert "on hold since" in line(text, "gate") and "<b>bad</b>" in line(text, "gate")
    assert "version 9 was held back: worse" in text
    assert "ntp 4.250 · reward 1.500 · 2 steps skipped" in line(text, "loss")
    assert "onerec 12.5%" in line(text, "hit rate")
    assert "events 1.5 s, 1,200 records · pairs 3 records" in line(text, "lag")
    assert "codes 0.300 · watch time 0.010 · 25.0% of watches" in line(text, "drift")


def test_it_fits_a_narrow_terminal() -> None:
    drawn(snapshot(**FULL, answers=(answer("a:1", 7, T0 - 12_000),)), width=60)


@pytest.mark.parametrize(("age", "cells"), [(0, 1), (100, 1), (86_400_000, BAR_CELLS), (10**12, BAR_CELLS), (-5_000, 1)])
def test_bars_stay_within_their_cells(age: int, cells: int) -> None:
    assert len(bar(age, 30_000)) == cells
    assert not bar(None, 30_000)


def test_bars_of_equal_ratios_differ_equally() -> None:
    lengths = [len(bar(age, 30_000)) for age in (1_000, 10_000, 100_000, 1_000_000)]
    assert {after - before for before, after in zip(lengths, lengths[1:], strict=False)} <= {5, 6}


@pytest.mark.slow
def test_the_command_draws_until_it_is_stopped_with_every_part_missing_or_half_there(tmp_path: Path) -> None:
    half = Watched(tmp_path)
    half.watch("u1", 0)
    (tmp_path / "run" / "checkpoints" / "000000007").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "000000007" / "checkpoint.json").write_text("{")
    places = ["--state", "state", "--run", "run", "--repository", "none", "--server", "127.0.0.1:9", "--server", "127.0.0.1:10"]
    ours, theirs = pty.openpty()
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "140", "LINES": "50", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "onerec.cli", "status", "--watch", *places], cwd=tmp_path, stdout=theirs,
        stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    os.close(theirs)
    said = ""
    while said.count("event → served: no data") < 3:
        assert select.select([ours], [], [], 60)[0], f"nothing more is drawn after {said!r}"
        said += os.read(ours, 65536).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    while process.poll() is None and select.select([ours], [], [], 20)[0]:
        try:
            os.read(ours, 65536)
        except OSError:  # the terminal is gone with the process
            break
    assert process.stderr is not None
    assert (process.wait(20), process.stderr.read()) == (0, b"")
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    assert "2023-11-14" in line(text, "event ") and "does not answer" in line(text, "127.0.0.1:10")
    assert "run: Input data was truncated" in text
    assert not (tmp_path / "run" / "freshness.jsonl").exists() and not (tmp_path / "none").exists()
    half.close()


def test_json_and_watch_together_are_refused(tmp_path: Path) -> None:
    places = ["--state", "s", "--run", "r", "--repository", "m"]
    result = subprocess.run(
        [sys.executable, "-m", "onerec.cli", "status", "--watch", "--json", *places], cwd=tmp_path, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2 and "give one of the two" in result.stderr
