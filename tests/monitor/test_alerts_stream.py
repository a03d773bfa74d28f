"""A real Prometheus over a real stream: broken lines, users that change, and a stream that dies; each alert clears again."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_helpers import Program, Prometheus, free_port, onerec

from onerec.closing import Closing

TICK_SECONDS = 0.1
USUAL_MS = (2_000, 8_000, 20_000, 40_000)
SETTINGS = [
    "session.gap_ms=400", "stream.max_out_of_orderness_ms=200", "freshness.clock=live", "freshness.objective_s=3",
    "monitor.reference_sessions=60", "monitor.window_sessions=20", "monitor.every_s=0.5",
]  # fmt: skip


class World(Closing):
    """Writes a session of three watches ten times a second, until it is closed; `watch_ms` is how long users watch."""

    def __init__(self, log: Path) -> None:
        self.watch_ms: tuple[int, ...] = USUAL_MS
        self._log = log
        log.touch()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live)
        self._thread.start()

    def write(self, *lines: str) -> None:
        """At the end of the log."""
        with self._lock, self._log.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def _live(self) -> None:
        for turn in itertools.count():
            if self._ended.wait(TICK_SECONDS):
                return
            now = time.time_ns() // 1_000_000
            self.write(*(json.dumps({
                "type": "watch", "user_id": f"u{turn % 100}", "item_id": f"v{(turn + place) % 50}", "ts": now - 2 + place,
                "watch_ms": self.watch_ms[turn % len(self.watch_ms)], "duration_ms": 60_000,
            }) for place in range(3)))

    def close(self) -> None:
        """The end of the world."""
        self._ended.set()
        self._thread.join()


class System:
    """`onerec replay` of the world as it lives, `onerec monitor`, and a Prometheus that looks at both."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._port = str(free_port())
        self._settings = [word for setting in SETTINGS for word in ("--set", setting)]
        self.world = stack.enter_context(World(folder / "world.jsonl"))
        self.replay = self.start_replay()
        looking = str(free_port())
        stack.enter_context(onerec(
            folder, "monitor", "monitor", "--state", folder / "state", "--run", folder / "run", "--repository",
            folder / "repository", "--server", "127.0.0.1:9", "--metrics-port", looking, *self._settings,
        ))
        targets = {"replay": f"127.0.0.1:{self._port}", "monitor": f"127.0.0.1:{looking}"}
        self.prometheus = stack.enter_context(Prometheus(folder / "prometheus", targets))

    def start_replay(self) -> Program:
        """The same command goes on from where the state stands."""
        return self._stack.enter_context(onerec(
            self._folder, "replay", "replay", self._folder / "world.jsonl", "--live", "--follow", "--state",
            self._folder / "state", "--metrics-port", self._port, *self._settings,
        ))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with ExitStack() as stack:
        found = System(tmp_path_factory.mktemp("stream"), stack)
        # Nothing below is to be what fires before its fault.
        found.prometheus.wait_for_value('min(up) + 0 * max(onerec_drift_psi{feature="watch_time"})', 1)
        yield found


@pytest.mark.slow
def test_broken_lines_raise_dead_letters(system: System) -> None:
    prometheus = system.prometheus
    assert "OneRecDeadLetters" not in prometheus.firing()
    system.world.write("{", "no json", '{"type":"watch"}')
    assert "of the lines are refused" in prometheus.wait_for("OneRecDeadLetters")
    prometheus.wait_for_end("OneRecDeadLetters")


@pytest.mark.slow
def test_users_that_watch_otherwise_are_drift(system: System) -> None:
    prometheus = system.prometheus
    assert "OneRecDrift" not in prometheus.firing()
    system.world.watch_ms = (600,)
    assert "watch_time has drifted" in prometheus.wait_for("OneRecDrift")
    system.world.watch_ms = USUAL_MS
    prometheus.wait_for_end("OneRecDrift")


@pytest.mark.slow
def test_a_stream_that_is_killed_is_down_and_lags_until_it_is_back(system: System) -> None:
    prometheus = system.prometheus
    assert not {"OneRecProcessDown", "OneRecLagRising"} & prometheus.firing().keys()
    system.replay.send(signal.SIGKILL)
    assert prometheus.wait_for("OneRecProcessDown") == "1 of replay is down"
    assert "histories fell behind by" in prometheus.wait_for("OneRecLagRising")
    system.start_replay()
    prometheus.wait_for_end("OneRecProcessDown")
    prometheus.wait_for_end("OneRecLagRising")
