"""`onerec run`: the embedded online-learning system in one command."""

from __future__ import annotations

import signal
import socket
import time
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
from onerec.kafka_jobs import answers

if TYPE_CHECKING:
    from onerec.freshness import Chain
    from onerec.probe import Findings
    from simulator.live import LiveConfig

STATUS_SECONDS = 5.0


def _status_line(found: Findings, chain: Chain) -> str:
    """One line: log time, step, versions, headline."""
    from onerec.freshness import format_age, format_time

    parts = [
        f"log time {format_time(found.watermarks.event)}" if found.watermarks.event is not None else "log time: no data",
        f"step {found.step}" if found.step is not None else "step: no data",
        f"version {found.exported_version}" if found.exported_version is not None else "version: no data",
        f"event → served {format_age(chain.event_to_served_ms)}",
    ]
    if found.served_version is not None:
        parts.append(f"(version {found.served_version} answers)")
    return " · ".join(parts)


def _check(*, simulate: bool, files: bool, positive: dict[str, float | None], rate: float | None, users: int | None,
           speed: float | None, bootstrap: str | None, kafka: bool) -> None:
    """Refuses options that make no sense together."""
    if simulate == files:
        raise UserError("run: name event files, or give --simulate, one of the two")
    if any(value is not None and not value > 0 for value in positive.values()):
        raise UserError(f"run: {', '.join(positive)} must be greater than 0")
    if rate is not None and not simulate:
        raise UserError("run: --rate is the pace of a simulated world; give --simulate too, or --speed for files")
    if rate is not None and speed is not None:
        raise UserError("run: --rate and --speed are two paces; give one of them")
    if users is not None and rate is None:
        raise UserError("run: --users belongs to --rate; give that too, or leave it out")
    if bootstrap and not kafka:
        raise UserError("run: --bootstrap names a Kafka; give --kafka too, or leave it out")


def _live_world(rate: float, users: int | None, run_dir: Path) -> LiveConfig:
    """The world at live pace. UserError where the one in RUN is another."""
    from simulator.live import live_config, read_written

    live = live_config(rate, users)
    found = read_written(run_dir / "world" / "live.jsonl")
    if found is not None and found.config != live:
        raise UserError(
            f"run: {run_dir / 'world'} holds a world of {found.config.rate:,.0f} events/s and {found.config.users:,} users; "
            f"give --rate {found.config.wanted_rate:g} --users {found.config.users}, or new folders"
        )
    return live


def _forget_addresses(run_dir: Path) -> None:
    """Removes the metrics' addresses that killed parts have left: their ports may be somebody else's by now."""
    for path in (run_dir / "metrics").glob("*.address"):
        path.unlink(missing_ok=True)


def _page_port(wanted: int) -> int:
    """The port wanted for the page, or a free one for 0. UserError where it is taken."""
    try:
        with socket.create_server(("127.0.0.1", wanted)) as found:
            return int(found.getsockname()[1])
    except OSError as error:
        raise UserError(f"--dashboard-port {wanted}: {error.strerror}; name another, or 0 for a free one") from None


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
    rate: Annotated[float | None, typer.Option(help="With --simulate: a world at live pace, so many events a second.",
                                               show_default=False)] = None,
    users: Annotated[int | None, typer.Option(help="With --rate: users of the world; default 10 for each event a second.",
                                              show_default=False)] = None,
    publish_every: Annotated[float, typer.Option(help="Seconds between publishes.")] = 30.0,
    duration: Annotated[float | None, typer.Option(help="Stop after so many seconds; default: run until stopped.",
                                                   show_default=False)] = None,
    preset: Annotated[str, typer.Option(help="Model size, as for `onerec train`.")] = "tiny",
    server: Annotated[str | None, typer.Option(help="Publish to this Triton (gRPC, host:port) instead of starting one.",
                                               show_default=False)] = None,
    http_port: Annotated[int, typer.Option(help="Triton's HTTP port; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Triton's gRPC port; 0 takes a free one.")] = 8001,
    triton_metrics_port: Annotated[int, typer.Option(help="Triton's metrics port; 0 takes a free one.")] = 8002,
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, show_default=False,
                            help="One page with the metrics of all parts; 0 takes a free port.")] = None,
    dashboard: Annotated[bool, typer.Option(help="The page of `onerec dashboard`, on --dashboard-port.")] = True,
    dashboard_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 0,
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

    With --simulate --rate the world is at live pace: an event's time is the clock's when it is let out, so that ages are ages
    by the wall clock. Its days pass faster than ours; session gap and lateness are as much shorter, which is said at the start.

    Examples:

        onerec run --simulate --rate 1000 --publish-every 10 --metrics-port 9100 --state state --run run --repository repository

        onerec run --simulate --speed 3600 --state state --run run --repository repository

        onerec run --simulate --kafka --workers 2 --speed 3600 --state state --run run --repository repository
    """
    from exporter.server import Ports, choose_ports
    from onerec.config import load_config
    from onerec.freshness import chain
    from onerec.monitor.federation import Federation
    from onerec.monitor.of_run import RunMetrics
    from onerec.probe import probe
    from onerec.run_jobs import Plan, live_settings, options_of, run_jobs
    from onerec.supervisor import Supervisor

    _check(simulate=simulate, files=bool(files), rate=rate, users=users, speed=speed, bootstrap=bootstrap, kafka=kafka,
           positive={"--publish-every": publish_every, "--duration": duration, "--speed": speed, "--rate": rate})
    live = _live_world(rate, users, run_dir) if rate is not None else None
    paced = live_settings(live, preset, kafka) if live else {}
    given = [*options_of(paced)[1::2], *(settings or [])]
    configuration = load_config(config, given, bootstrap)
    cluster = configuration.kafka
    if kafka and not bootstrap and answers(cluster.bootstrap):
        raise UserError(
            f"run --kafka: somebody listens at {cluster.bootstrap} already; give --bootstrap {cluster.bootstrap} to use that "
            "broker, or --set kafka.bootstrap=127.0.0.1:PORT for the own one"
        )
    ports = None if server else choose_ports(Ports(http=http_port, grpc=grpc_port, metrics=triton_metrics_port),
                                             metrics_option="triton-metrics")
    address = f"{ports.host}:{ports.grpc}" if ports else str(server)
    page_port = _page_port(dashboard_port) if dashboard else None
    own = RunMetrics()
    federation = None if metrics_port is None else Federation(
        run_dir / "metrics", metrics_port, host=configuration.metrics.host, own=own.page, done=own.done,
        triton=f"http://{ports.host}:{ports.metrics}/metrics" if ports else None)
    for folder in (run_dir, repository):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; name a folder that can be written") from None

    supervisor: Supervisor
    jobs = run_jobs(Plan(
        files=tuple(files or ()), items=items, format=format_, speed=speed, simulate=simulate, live=live, state=state,
        run_dir=run_dir, repository=repository, preset=preset, ports=ports, address=address, publish_every=publish_every,
        shared=(*(["--config", str(config)] if config else []), *(part for setting in given for part in ("--set", setting))),
        kafka=cluster if kafka else None, own_broker=bootstrap is None, workers=workers,
        pairs=configuration.preference.ratio > 0 and configuration.reward.train, dashboard_port=page_port,
        done=lambda name: supervisor.done(name),
    ))
    _forget_addresses(run_dir)
    began = time.monotonic()

    def say(line: str) -> None:
        err.print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, markup=False, soft_wrap=True)

    stopped: list[int] = []

    def ask_to_stop(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    if live:
        say(f"a world at live pace: {live.rate:,.0f} events/s of {live.users:,} users; its days pass {live.factor} times "
            f"faster, and so for all parts {', '.join(f'{name}={value}' for name, value in paced.items())}")
    http = f", HTTP {ports.host}:{ports.http}" if ports else ""
    say(f"Triton gRPC {address}{http}; logs in {run_dir / 'logs'}; Ctrl-C stops")
    if page_port is not None:
        say(f"dashboard http://127.0.0.1:{page_port}/")
    if federation:
        say(f"metrics of all parts http://{federation.address}/metrics")
    next_status = began + STATUS_SECONDS
    with Supervisor(jobs, run_dir / "logs", say=say) as supervisor, own.of(supervisor, federation):
        while not stopped and (duration is None or time.monotonic() - began < duration):
            supervisor.step()
            if time.monotonic() >= next_status:
                serves = ports is None or "serve" in supervisor.pids()
                found = probe(state, run_dir, repository, address if serves else None)
                say(_status_line(found, chain(found.watermarks, int(time.time() * 1000))))
                next_status = time.monotonic() + STATUS_SECONDS
            time.sleep(0.1)
        say("stopping")
    _forget_addresses(run_dir)
    say("stopped; the same command goes on from here")


def register(app: typer.Typer) -> None:
    """Add `run`."""
    app.command()(run)
