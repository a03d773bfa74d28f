"""`onerec run`: the embedded online-learning system in one command."""

from __future__ import annotations

import datetime
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from onerec.console import (
    BootstrapOption,
    ConfigOption,
    RepositoryOption,
    RunOption,
    SetOption,
    StateOption,
    err,
)
from onerec.errors import UserError
from onerec.kafka_jobs import answers, kafka_jobs, sampler_jobs

if TYPE_CHECKING:
    from exporter.server import Ports
    from onerec.freshness import Chain
    from onerec.probe import Findings
    from onerec.supervisor import Job
    from streaming.kafka.settings import KafkaConfig

SESSIONS_FOR_CATALOGUE = 500
"""Sessions that must be there before semantic IDs are fitted, unless the replay ends with fewer."""
STATUS_SECONDS = 5.0
LOOK_SECONDS = 1.0


def _throttled(question: Callable[[], bool], seconds: float = LOOK_SECONDS) -> Callable[[], bool]:
    """The question, asked at most once in `seconds`; false in between."""
    asked = [-seconds]

    def look() -> bool:
        if time.monotonic() - asked[0] < seconds:
            return False
        asked[0] = time.monotonic()
        return question()

    return look


def _has_sessions(state: Path) -> bool:
    """Whether the state holds enough sessions to fit a catalogue on."""
    from onerec.errors import OneRecError
    from streaming.store import Reader

    try:
        with Reader(state) as reader:
            return reader.last_sequence() >= SESSIONS_FOR_CATALOGUE
    except OneRecError:
        return False


class _News:
    """Whether there is anything to publish: a newer checkpoint, or items that the last version could not know."""

    def __init__(self, state: Path, run_dir: Path, repository: Path) -> None:
        self._state, self._run_dir, self._repository = state, run_dir, repository
        self._asked: tuple[int, int] | None = None
        self._published: tuple[int, int] | None = None
        self._version_then: int | None = None

    def __call__(self) -> bool:
        from onerec.probe import exported_mark, exported_step, trained_mark
        from streaming.store import Reader

        step = trained_mark(self._run_dir).number
        if step is None:
            return False
        with Reader(self._state) as reader:
            now = step, reader.progress().item_sequence
        version = exported_mark(self._repository).number
        if self._published is None and exported_step(self._repository) == step:
            self._published = now
        # A publish that failed left the version as it was: there is still something to publish.
        if self._asked is not None and version != self._version_then:
            self._published = self._asked
        if now == self._published:
            return False
        self._asked, self._version_then = now, version
        return True


def _utc(ms: int) -> str:
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _status_line(found: Findings, chain: Chain) -> str:
    """One line: log time, step, versions, headline."""
    from onerec.freshness import format_age

    marks = found.watermarks
    parts = [
        f"log time {_utc(marks.event)}" if marks.event is not None else "log time: no data",
        f"step {found.step}" if found.step is not None else "step: no data",
        f"version {found.exported_version}" if found.exported_version is not None else "version: no data",
        f"event → served {format_age(chain.event_to_served_ms)}",
    ]
    if found.served_version is not None:
        parts.append(f"(version {found.served_version} answers)")
    return " · ".join(parts)


def run(
    state: StateOption,
    run_dir: RunOption,
    repository: RepositoryOption,
    files: Annotated[list[Path] | None, typer.Argument(help="Event files, as for `onerec replay`.",
                                                       show_default=False)] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Replay a simulated world, made in RUN/world.")] = False,
    items: Annotated[Path | None, typer.Option(help="Catalogue entries, as for `onerec replay`.",
                                               show_default=False)] = None,
    format_: Annotated[str, typer.Option("--format", help="auto, jsonl, csv, parquet or kuairand.")] = "auto",
    speed: Annotated[float | None, typer.Option(help="Seconds of log a second; default: as fast as it goes.",
                                                show_default=False)] = None,
    publish_every: Annotated[float, typer.Option(help="Seconds between publishes.")] = 30.0,
    duration: Annotated[float | None, typer.Option(help="Stop after so many seconds; default: run until stopped.",
                                                   show_default=False)] = None,
    preset: Annotated[str, typer.Option(help="Model size, as for `onerec train`.")] = "tiny",
    server: Annotated[str | None, typer.Option(help="Publish to this Triton (gRPC, host:port) instead of starting one.",
                                               show_default=False)] = None,
    http_port: Annotated[int, typer.Option(help="Triton's HTTP port; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Triton's gRPC port; 0 takes a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Triton's metrics port; 0 takes a free one.")] = 8002,
    kafka: Annotated[bool, typer.Option("--kafka", help="Through Kafka; without --bootstrap, an own one in RUN.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="With --kafka: `onerec stream` processes.")] = 1,
    bootstrap: BootstrapOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Replay, learn, publish and serve at once, until Ctrl-C.

    Each part is a child process, a normal `onerec` command whose output is in RUN/logs. One that dies is restarted and
    that is said; at the end all are stopped, and the same command goes on from where they were. With --kafka the events go
    through a real Kafka: produce, ingest, stream, feed for the trainer, histories-replica for Triton. A sampler makes
    preference pairs for the trainer unless preference.ratio is 0, at a low priority.

    Examples:

        onerec run --simulate --speed 3600 --state state --run run --repository repository

        onerec run --simulate --kafka --workers 2 --speed 3600 --state state --run run --repository repository
    """
    from exporter.server import Ports, choose_ports
    from onerec.config import load_config
    from onerec.freshness import chain
    from onerec.probe import probe
    from onerec.supervisor import Supervisor

    if simulate == bool(files):
        raise UserError("run: name event files, or give --simulate, one of the two")
    if publish_every <= 0 or (duration is not None and duration <= 0) or (speed is not None and speed <= 0):
        raise UserError("run: --publish-every, --duration and --speed must be greater than 0")
    if bootstrap and not kafka:
        raise UserError("run: --bootstrap names a Kafka; give --kafka too, or leave it out")
    configuration = load_config(config, settings, bootstrap)
    cluster = configuration.kafka
    if kafka and not bootstrap and answers(cluster.bootstrap):
        raise UserError(
            f"run --kafka: somebody listens at {cluster.bootstrap} already; give --bootstrap {cluster.bootstrap} to use that "
            "broker, or --set kafka.bootstrap=127.0.0.1:PORT for the own one"
        )
    ports = None if server else choose_ports(Ports(http=http_port, grpc=grpc_port, metrics=metrics_port))
    address = f"{ports.host}:{ports.grpc}" if ports else str(server)
    for folder in (run_dir, repository):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; name a folder that can be written") from None

    shared = [*(["--config", str(config)] if config else []),
              *(part for setting in settings or [] for part in ("--set", setting))]
    replay = [*(["--speed", str(speed)] if speed else []), "--format", format_]
    supervisor: Supervisor
    jobs = _jobs(
        files=files or [], state=state, run_dir=run_dir, repository=repository, items=items, simulate=simulate,
        replay_options=replay, shared=shared, preset=preset, ports=ports, address=address, publish_every=publish_every,
        done=lambda name: supervisor.done(name),
        kafka=(cluster, bootstrap is None, workers) if kafka else None,
        pairs=configuration.preference.ratio > 0 and configuration.reward.train,
    )
    began = time.monotonic()

    def say(line: str) -> None:
        err.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, markup=False, soft_wrap=True)

    stopped: list[int] = []

    def ask_to_stop(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    http = f", HTTP {ports.host}:{ports.http}" if ports else ""
    say(f"Triton gRPC {address}{http}; logs in {run_dir / 'logs'}; Ctrl-C stops")
    next_status = began + STATUS_SECONDS
    with Supervisor(jobs, run_dir / "logs", say=say) as supervisor:
        while not stopped and (duration is None or time.monotonic() - began < duration):
            supervisor.step()
            if time.monotonic() >= next_status:
                serves = ports is None or "serve" in supervisor.pids()
                found = probe(state, run_dir, repository, address if serves else None)
                say(_status_line(found, chain(found.watermarks, int(time.time() * 1000))))
                next_status = time.monotonic() + STATUS_SECONDS
            time.sleep(0.1)
        say("stopping")
    say("stopped; the same command goes on from here")


def _jobs(*, files: list[Path], state: Path, run_dir: Path, repository: Path, items: Path | None, simulate: bool,
          replay_options: list[str], shared: list[str], preset: str, ports: Ports | None, address: str,
          publish_every: float, done: Callable[[str], bool], kafka: tuple[KafkaConfig, bool, int] | None,
          pairs: bool) -> list[Job]:
    """The children of `onerec run`, each with what it waits for."""
    from onerec.supervisor import Job

    def command(*parts: str | Path) -> tuple[str, ...]:
        return (sys.executable, "-m", "onerec.cli", *map(str, parts))

    jobs: list[Job] = []
    if simulate:
        world = run_dir / "world"
        world.mkdir(exist_ok=True)
        files, items = [world / "events.jsonl.gz"], world / "events.items.jsonl.gz"
        if not files[0].exists():
            jobs.append(Job(name="simulate", kind="once", command=command("simulate", "--inline-items", "--out", files[0])))
    inputs: list[str | Path] = [*files]
    if items:
        inputs += ["--items", items]
    catalogue = state / "catalogue"
    news = _News(state, run_dir, repository)
    histories = state

    def ready() -> bool:
        return files[0].exists() or not simulate

    if kafka is None:
        source = "replay"
        jobs.append(Job(name="replay", kind="once", ready=ready,
                        command=command("replay", *inputs, "--state", state, *replay_options, *shared)))
    else:
        source = "produce"
        cluster, own_broker, workers = kafka
        carriers, histories = kafka_jobs(
            command, inputs=inputs, ready=ready, done=done, bootstrap=cluster.bootstrap, own_broker=own_broker,
            workers=workers, partitions=cluster.partitions, state=state, run_dir=run_dir, options=replay_options, shared=shared,
        )
        jobs += carriers
    jobs += [
        Job(name="items", kind="once", retry_user_errors=True,
            ready=_throttled(lambda: catalogue.is_dir() or done(source) or _has_sessions(state)),
            command=command("items", "--state", state, *shared)),
        Job(name="train", ready=lambda: done("items"),
            command=command("train", "--state", state, "--run", run_dir, "--follow", "--preset", preset,
                            "--set", f"train.checkpoint_seconds={publish_every}", *shared)),
    ]
    if pairs:
        jobs += sampler_jobs(command, state=state, run_dir=run_dir, bootstrap=kafka[0].bootstrap if kafka else None,
                             shared=shared, trained=_throttled((run_dir / "checkpoints").is_dir))
    if ports:
        jobs.append(Job(name="serve", ready=histories.is_dir, command=command(
            "serve", "--repository", repository, "--state", histories, "--http-port", str(ports.http),
            "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics), *shared)))
    jobs.append(Job(name="publish", kind="periodic", every_s=publish_every, retry_user_errors=True,
                    ready=_throttled(news), command=command("publish", "--run", run_dir, "--repository", repository,
                                                            "--server", address, *shared)))
    return jobs


def register(app: typer.Typer) -> None:
    """Add `run`."""
    app.command()(run)
