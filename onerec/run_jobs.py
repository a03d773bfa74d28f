"""The children of `onerec run`: which commands, with what settings, in which order, and at what priority."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from exporter.server import Ports
from onerec.kafka_jobs import kafka_jobs, sampler_jobs
from onerec.supervisor import Job
from simulator.live import LiveConfig, read_written, scaled_settings
from streaming.kafka.settings import KafkaConfig
from trainer.config import TrainConfig

SESSIONS_FOR_CATALOGUE: Final = 500
"""Sessions that must be there before semantic IDs are fitted, unless the replay ends with fewer."""
LOOK_SECONDS: Final = 1.0
GOOD_SESSIONS_PER_EVENT: Final = 0.035
"""Measured on simulated worlds: high-quality sessions for each event."""
SCORED_PER_SECOND: Final = 1.0
"""Test-then-train at live pace: a search for each scored session is a third of the trainer's work at its usual share."""
LINGER_MS: Final = 100
"""At live pace transactions are what Kafka's cores are spent on; each hand-off waits twice as long as usual for its batch."""
PUBLISHER_LEAD: Final = 0.8
"""Checkpoints set the pace. A publisher with the same period would let each wait, by as much as they are out of phase."""
TRAINER_NICE: Final = 5
"""The trainer gives way to what users wait for: events on their way into histories, and answers."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a run consists of. `ports` None: a Triton that is there already, at `address`; `live`: a world at live pace.

    `shared`: options that all children get; `kafka`: the cluster, where events go through one.
    """

    files: tuple[Path, ...]
    items: Path | None
    format: str
    speed: float | None
    simulate: bool
    live: LiveConfig | None
    state: Path
    run_dir: Path
    repository: Path
    preset: str
    ports: Ports | None
    address: str
    publish_every: float
    shared: tuple[str, ...]
    kafka: KafkaConfig | None
    own_broker: bool
    workers: int
    pairs: bool
    dashboard_port: int | None
    done: Callable[[str], bool]

    @property
    def world(self) -> Path:
        """The simulated world's events."""
        return self.run_dir / "world" / ("live.jsonl" if self.live else "events.jsonl.gz")

    @property
    def metrics(self) -> Path:
        """Where each child writes the address of its metrics."""
        return self.run_dir / "metrics"


def options_of(settings: Mapping[str, object]) -> list[str]:
    """Settings as `--set` options."""
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def live_settings(live: LiveConfig, preset: str, kafka: bool) -> dict[str, object]:
    """What all children must know of a world at live pace, and what lets one machine keep up with it."""
    found: dict[str, object] = {**scaled_settings(live.factor), "freshness.clock": "live"}
    found["train.score_share"] = round(
        min(TrainConfig().score_share, SCORED_PER_SECOND / (live.rate * GOOD_SESSIONS_PER_EVENT)), 3)
    if preset == "tiny":
        # Two threads of so small a model wait for each other: 134 sessions/s instead of 156, for a sixth more processor time.
        found["train.threads"] = 1
    if kafka:
        found["kafka.linger_ms"] = LINGER_MS
    return found


def throttled(question: Callable[[], bool], seconds: float = LOOK_SECONDS) -> Callable[[], bool]:
    """The question, asked at most once in `seconds`; false in between."""
    asked = [-seconds]

    def look() -> bool:
        if time.monotonic() - asked[0] < seconds:
            return False
        asked[0] = time.monotonic()
        return question()

    return look


def has_sessions(state: Path) -> bool:
    """Whether the state holds enough sessions to fit a catalogue on."""
    from onerec.errors import OneRecError
    from streaming.store import Reader

    try:
        with Reader(state) as reader:
            return reader.last_sequence() >= SESSIONS_FOR_CATALOGUE
    except OneRecError:
        return False


def command(*parts: str | Path) -> tuple[str, ...]:
    """An `onerec` command as a child runs it."""
    return (sys.executable, "-m", "onerec.cli", *map(str, parts))


def run_jobs(plan: Plan) -> list[Job]:
    """Every child, each with what it waits for."""
    shared = [*plan.shared, *options_of({"metrics.port": 0, "metrics.folder": plan.metrics, "metrics.linger": "false"})]
    jobs, histories = _carriers(plan, shared)
    folders: list[str | Path] = ["--state", plan.state, "--run", plan.run_dir]
    triton: list[str | Path] = ["--repository", plan.repository, "--server", plan.address]
    source = "produce" if plan.kafka else "replay"
    jobs += [
        Job(name="items", kind="once", retry_user_errors=True,
            ready=throttled(
                lambda: (plan.state / "catalogue").is_dir() or plan.done(source) or has_sessions(plan.state)),
            command=command("items", "--state", plan.state, *shared)),
        Job(name="train", ready=lambda: plan.done("items"), nice=TRAINER_NICE, command=command(
            "train", *folders, "--follow", "--preset", plan.preset,
            *options_of({"train.checkpoint_seconds": plan.publish_every}), *shared)),
    ]
    if plan.pairs:
        jobs += sampler_jobs(command, state=plan.state, run_dir=plan.run_dir,
                             bootstrap=plan.kafka.bootstrap if plan.kafka else None, shared=shared,
                             trained=throttled((plan.run_dir / "checkpoints").is_dir))
    if plan.ports:
        jobs.append(Job(name="serve", ready=histories.is_dir, command=command(
            "serve", "--repository", plan.repository, "--state", histories, "--http-port", str(plan.ports.http),
            "--grpc-port", str(plan.ports.grpc), "--metrics-port", str(plan.ports.metrics), *shared)))
    jobs += [
        # At once, so that all its libraries are loaded when the first checkpoint comes.
        Job(name="publish", ready=plan.state.is_dir, retry_user_errors=True, command=command(
            "publish", "--follow", "--run", plan.run_dir, *triton,
            *options_of({"publish.every_s": PUBLISHER_LEAD * plan.publish_every}), *shared)),
        Job(name="monitor", ready=plan.state.is_dir, retry_user_errors=True,
            command=command("monitor", *folders, *triton, *shared)),
    ]
    if plan.dashboard_port is not None:
        jobs.append(Job(name="dashboard", retry_user_errors=True, command=command(
            "dashboard", *folders, *triton, "--port", str(plan.dashboard_port), *shared)))
    return jobs


def _carriers(plan: Plan, shared: list[str]) -> tuple[list[Job], Path]:
    """What makes events and brings them into the state, and the folder of the histories that serving reads."""
    jobs: list[Job] = []
    files, items = list(plan.files), plan.items
    options = ["--format", plan.format]
    if plan.simulate:
        files, items = [plan.world], plan.world.with_name(plan.world.name.replace(".", ".items.", 1))
        plan.world.parent.mkdir(exist_ok=True)
    if plan.live:
        options += ["--live", "--follow"]
        jobs.append(Job(name="simulate", kind="once", command=command(
            "simulate", "--live", "--out", plan.world, "--rate", repr(plan.live.wanted_rate), "--users",
            str(plan.live.users))))
    elif plan.simulate and not plan.world.exists():
        jobs.append(Job(name="simulate", kind="once", command=command("simulate", "--inline-items", "--out", plan.world)))
    if plan.speed:
        options += ["--speed", str(plan.speed)]

    def ready() -> bool:
        if plan.live:
            found = read_written(plan.world)
            return found is not None and found.blocks > 0
        return not plan.simulate or plan.world.exists()

    inputs: list[str | Path] = [*files]
    if items:
        inputs += ["--items", items]
    if plan.kafka is None:
        jobs.append(Job(name="replay", kind="once", ready=throttled(ready, 0.2),
                        command=command("replay", *inputs, "--state", plan.state, *options, *shared)))
        return jobs, plan.state
    carriers, histories = kafka_jobs(
        command, inputs=inputs, ready=ready, done=plan.done, bootstrap=plan.kafka.bootstrap, own_broker=plan.own_broker,
        workers=plan.workers, partitions=plan.kafka.partitions, state=plan.state, run_dir=plan.run_dir, options=options,
        shared=shared, end=plan.live is None,
    )
    return jobs + carriers, histories
