"""A real Prometheus over a real stream: broken lines, users that change, and a stream that dies; each alert clears again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from living_world import USUAL_MS, World
from prometheus_helpers import Program, Prometheus, free_port, onerec

REFERENCE_SESSIONS = 60
SETTINGS = [
    "session.gap_ms=400", "stream.max_out_of_orderness_ms=200", "freshness.clock=live", "freshness.objective_s=3",
    f"monitor.reference_sessions={REFERENCE_SESSIONS}", "monitor.window_sessions=20", "monitor.every_s=0.5",
]  # fmt: skip


class System:
    """`onerec replay` of the world as it lives, `onerec monitor`, and a Prometheus that looks at both."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._port = str(free_port())
        self._settings = [word for setting in SETTINGS for word in ("--set", setting)]
        self.world = stack.enter_context(World(folder / "world.jsonl", past=REFERENCE_SESSIONS))
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
    prometheus.wait_for_end("OneRecDeadLetters")
    system.world.broken = True
    assert "of the lines are refused" in prometheus.wait_for("OneRecDeadLetters")
    system.world.broken = False
    prometheus.wait_for_end("OneRecDeadLetters")


@pytest.mark.slow
def test_users_that_watch_otherwise_are_drift(system: System) -> None:
    prometheus = system.prometheus
    prometheus.wait_for_end("OneRecDrift")
    system.world.watch_ms = (600,)
    assert "watch_time has drifted" in prometheus.wait_for("OneRecDrift")
    system.world.watch_ms = USUAL_MS
    prometheus.wait_for_end("OneRecDrift")


@pytest.mark.slow
def test_a_stream_that_is_killed_is_down_and_lags_until_it_is_back(system: System) -> None:
    prometheus = system.prometheus
    for alert in ("OneRecProcessDown", "OneRecLagRising"):
        prometheus.wait_for_end(alert)
    system.replay.send(signal.SIGKILL)
    assert prometheus.wait_for("OneRecProcessDown") == "1 of replay is down"
    assert "histories falls behind by" in prometheus.wait_for("OneRecLagRising")
    system.start_replay()
    prometheus.wait_for_end("OneRecProcessDown")
    prometheus.wait_for_end("OneRecLagRising")
