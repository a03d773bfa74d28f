"""A real Prometheus over a system that learns and serves by the wall clock: a trainer and a publisher that stop, a poisoned
checkpoint that the gate holds back, a rate at which steps overflow; each alert clears once the fault is gone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from living_world import World
from prometheus_helpers import ROOT, Program, Prometheus, free_port, onerec, wait_until

from exporter.server import find_installation
from onerec.errors import OneRecError, UserError
from streaming.store import Reader
from trainer.checkpoint import (
    checkpoint_folder,
    checkpoint_steps,
    load_checkpoint,
    load_optimizer,
    load_weights,
    save_checkpoint,
)

PAST_SESSIONS = 200
FIRST_ANSWER_SECONDS = 240.0
"""The first version is traced; later ones only bring weights."""
WITHOUT_DATA = {"Firing", "Clocks"}
"""Panels that are empty while all is well."""
SETTINGS = [
    "session.gap_ms=400", "session.min_watched=1", "session.min_total_watch_ms=0", "session.min_interactions=0",
    "session.target_items=3", "stream.max_out_of_orderness_ms=200", "freshness.clock=live", "freshness.objective_s=12",
    "monitor.every_s=0.5", "catalogue.codes=8", "catalogue.levels=2", "train.threads=1", "train.batch_windows=16",
    "train.checkpoint_seconds=2", "train.score_share=0", "train.idle_seconds=0.2", "preference.ratio=0", "reward.train=false",
    "beam.width=4", "publish.every_s=2", "gate.sessions=32",
]  # fmt: skip


def sessions(state: Path) -> int:
    """How many are final."""
    try:
        with Reader(state) as reader:
            return reader.last_sequence()
    except OneRecError:
        return 0


class System:
    """The processes of an online-learning system, each with a job in Prometheus, as in the compose file."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._settings = [word for setting in SETTINGS for word in ("--set", setting)]
        self.ports: dict[str, str] = {}
        stack.enter_context(World(folder / "log.jsonl", every_s=0.2, past=PAST_SESSIONS, watches=4))
        state, run = ("--state", folder / "state"), ("--run", folder / "run")
        repository = ("--repository", folder / "repository")
        self.start("replay", folder / "log.jsonl", "--live", "--follow", *state)
        wait_until(lambda: sessions(folder / "state") >= PAST_SESSIONS, lambda: "the past is replayed")
        self.once("items", *state, "--set", "catalogue.codes=8", "--set", "catalogue.levels=2")
        serving = str(free_port())
        self.server = ("--server", f"127.0.0.1:{serving}")
        stack.enter_context(onerec(folder, "serve", "serve", *repository, *state, "--http-port", "0", "--metrics-port", "0",
                                   "--grpc-port", serving))
        self.trainer = self.start("train", *state, *run, "--follow")
        self.publisher = self.start("publish", "--follow", *run, *repository, *self.server)
        self.start("monitor", *state, *run, *repository, *self.server)
        self.ports["overflow"] = str(free_port())
        targets = {name: f"127.0.0.1:{port}" for name, port in self.ports.items()}
        self.prometheus = stack.enter_context(Prometheus(folder / "prometheus", targets))

    def start(self, command: str, *words: str | Path, job: str = "") -> Program:
        """A long-running command with metrics, as a job of that name."""
        job = job or command
        port = self.ports.setdefault(job, str(free_port()))
        return self._stack.enter_context(
            onerec(self.folder, job, command, *self._settings, *words, "--metrics-port", port, small=True))

    def once(self, command: str, *words: str | Path) -> None:
        """A command to its end."""
        line = [sys.executable, "-m", "onerec.cli", command, *map(str, words)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def poison(self) -> None:
        """The newest checkpoint once more, as one of the next step with weights that were learnt by nobody."""
        run = self.folder / "run"
        newest = load_checkpoint(checkpoint_folder(run, checkpoint_steps(run)[-1]))
        weights = {name: -3 * value for name, value in load_weights(newest).items()}
        save_checkpoint(run, msgspec.structs.replace(newest, step=newest.step + 1), weights, load_optimizer(newest))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    try:
        find_installation()
    except UserError as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        found = System(tmp_path_factory.mktemp("learning"), stack)
        found.prometheus.wait_for_value("sum(onerec_freshness_seconds < bool 12)", 1, FIRST_ANSWER_SECONDS)
        yield found


@pytest.mark.slow
def test_the_board_of_freshness_shows_data(system: System) -> None:
    board = json.loads((ROOT / "serving_config" / "grafana" / "dashboards" / "freshness.json").read_text(encoding="utf-8"))
    asked = {target["expr"] for panel in board["panels"] if panel["title"] not in WITHOUT_DATA for target in panel["targets"]}
    assert len(asked) > 12
    wait_until(lambda: all(map(system.prometheus.query, asked)),
               lambda: f"data for {[each for each in asked if not system.prometheus.query(each)]}")


@pytest.mark.slow
def test_a_trainer_that_stops_makes_answers_old_and_its_poisoned_checkpoint_is_held_back(system: System) -> None:
    prometheus = system.prometheus
    for alert in ("OneRecNoNewVersion", "OneRecStale", "OneRecGateFailed"):
        prometheus.wait_for_end(alert)
    system.trainer.send(signal.SIGSTOP)
    assert "no new version for" in prometheus.wait_for("OneRecNoNewVersion")
    assert "answers from knowledge that is" in prometheus.wait_for("OneRecStale")
    system.poison()
    assert prometheus.wait_for("OneRecGateFailed") == "1 candidate is held back by the release gate"
    system.once("promote", "--repository", system.folder / "repository", *system.server, "--reason", "a test")
    prometheus.wait_for_end("OneRecGateFailed")
    system.trainer.send(signal.SIGCONT)
    prometheus.wait_for_end("OneRecStale")
    prometheus.wait_for_end("OneRecNoNewVersion")


@pytest.mark.slow
def test_with_a_publisher_that_stops_answers_fall_behind_what_is_trained(system: System) -> None:
    prometheus = system.prometheus
    prometheus.wait_for_end("OneRecServedBehindTrained")
    system.publisher.send(signal.SIGSTOP)
    assert "behind what is trained" in prometheus.wait_for("OneRecServedBehindTrained")
    system.publisher.send(signal.SIGCONT)
    prometheus.wait_for_end("OneRecServedBehindTrained")


@pytest.mark.slow
def test_a_rate_at_which_gradients_overflow_skips_steps(system: System) -> None:
    prometheus = system.prometheus
    prometheus.wait_for_end("OneRecSkippedSteps")
    other = system.start("train", "--state", system.folder / "state", "--run", system.folder / "overflow", "--follow",
                         "--set", "train.learning_rate=1e30", job="overflow")
    assert "steps of the trainer skipped" in prometheus.wait_for("OneRecSkippedSteps")
    other.close()
    prometheus.wait_for_end("OneRecSkippedSteps")
