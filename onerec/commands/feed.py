"""`onerec feed`: Kafka's sessions into a trainer's log; `onerec histories-replica`: its histories onto a serving host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import msgspec
import typer

from onerec.commands.stream import when
from onerec.config import load_config
from onerec.console import (
    BootstrapOption,
    ConfigOption,
    JsonOption,
    MetricsPortOption,
    SetOption,
    StateOption,
    err,
    out,
    print_json,
)
from onerec.garbage import calm
from onerec.signals import stopping

STATUS_SECONDS = 5.0
LIVE_SECONDS = 0.25
SEEN_SECONDS = 1.0

UntilEndOption = Annotated[
    bool,
    typer.Option("--until-end", help="End once every partition was ended by `produce --end` and nothing is left to read."),
]


class Job(Protocol):
    """What these commands drive; `done` counts what it did, `refused` records left out among it."""

    done: Any

    def step(self) -> int:
        """Reads and writes what is there; how much that was."""

    def finished(self) -> bool:
        """Whether the log was ended, and all of it is stored."""

    def status(self) -> dict[str, Any]:
        """Where it stands."""

    def lags(self) -> dict[int, int]:
        """Records between what is stored and the topic's end, by partition."""


def _say(text: str) -> None:
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def drive(
    job: Job,
    stop: list[int],
    tell: Callable[[dict[str, Any]], str],
    *,
    seen: Callable[[Job], None],
    until_end: bool,
    json: bool,
) -> dict[str, Any]:
    """Steps until a signal, or the end where it is asked for; returns the summary. `seen` gets the job about every second."""
    begun = time.monotonic()
    told, looked = begun, 0.0
    records = 0
    live = err.status("reading") if err.is_terminal and not json else None
    try:
        if live is not None:
            live.start()
        while not stop:
            count = job.step()
            records += count
            now = time.monotonic()
            if not json and now - told >= (STATUS_SECONDS if live is None else LIVE_SECONDS):
                line = tell(job.status())
                live.update(line) if live is not None else _say(line)
                told = now
            if now - looked >= SEEN_SECONDS:
                seen(job)
                looked = now
            if until_end and not count and job.finished():
                break
    finally:
        if live is not None:
            live.stop()
    seen(job)
    seconds = time.monotonic() - begun
    return {
        **job.status(),
        "run": msgspec.to_builtins(job.done),
        "ended": job.finished(),
        "seconds": round(seconds, 3),
        "records_per_second": round(records / seconds) if seconds else 0,
    }


def feed(
    state: StateOption,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Which trainer this log is for, from 0.")] = 0,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="How many trainers share the partitions.")] = 1,
    until_end: UntilEndOption = False,
    skip_forgotten: Annotated[
        bool, typer.Option("--skip-forgotten", help="Go on without sessions that Kafka has deleted before they were read.")
    ] = False,
    bootstrap: BootstrapOption = None,
    metrics_port: MetricsPortOption = None,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Copy `sessions` and the catalogue from Kafka into a session log, for `onerec train --follow` on the same --state.

    The sessions of all partitions come in the order of their ends, each once; stop it or kill it whenever you like. Of several
    ranks each takes the partitions p with p % ranks = rank, into a folder of its own.

    Examples:

        onerec feed --state rank0 --bootstrap 127.0.0.1:9092

        onerec feed --state rank1 --rank 1 --ranks 4
    """
    from onerec.monitor.of_kafka import CopyMetrics
    from onerec.monitor.opening import linger, open_metrics
    from streaming.kafka.feeder import Feeder, Stopped

    settings = load_config(config, set, bootstrap)
    calm()

    def tell(status: dict[str, Any]) -> str:
        left = f", not waiting for partitions {status['left_out']}" if status["left_out"] else ""
        return (
            f"{status['sessions']:,} sessions, {status['items']:,} items, complete to {when(status['watermark'])}; "
            f"{lag(status)}{left}"
        )

    with open_metrics("feed", settings, metrics_port) as metrics:
        measured = CopyMetrics(metrics, "sessions", "session")
        try:
            with stopping() as stop, Feeder(
                settings.kafka, state, rank=rank, ranks=ranks, skip_forgotten=skip_forgotten, say=_say,
                stopped=lambda: bool(stop),
            ) as feeder:
                summary = drive(feeder, stop, tell, seen=measured, until_end=until_end, json=json)
        except Stopped as reason:
            return _say(str(reason))
        if json:
            print_json(summary)
        else:
            _tell_fed(summary, tell)
        if not stop:
            linger(metrics, settings)


def _tell_fed(summary: dict[str, Any], tell: Callable[[dict[str, Any]], str]) -> None:
    run = summary["run"]
    out.print(
        f"{run['sessions']:,} sessions and {run['items']:,} items in {summary['seconds']:.1f} s; {tell(summary)}",
        highlight=False, soft_wrap=True,
    )
    parts = [f"{run[name]:,} {text}" for name, text in (
        ("repeats", "repeats dropped"), ("refused", "records left out"), ("forgotten", "sessions forgotten by Kafka"),
    ) if run[name]]
    if parts:
        out.print(", ".join(parts), highlight=False)


def histories_replica(
    state: StateOption,
    until_end: UntilEndOption = False,
    bootstrap: BootstrapOption = None,
    metrics_port: MetricsPortOption = None,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Keep every user's history from Kafka in a local state, for `onerec serve --state` and `onerec histories`.

    Run one on each serving host. Stop it or kill it whenever you like; it goes on from where the state stands.

    Example:

        onerec histories-replica --state histories --bootstrap 127.0.0.1:9092
    """
    from onerec.monitor.of_kafka import CopyMetrics
    from onerec.monitor.opening import linger, open_metrics
    from streaming.kafka.feeder import Stopped
    from streaming.kafka.replica import Replica

    settings = load_config(config, set, bootstrap)
    calm()

    def tell(status: dict[str, Any]) -> str:
        return f"{status['users']:,} users, histories complete to {when(status['watermark'])}; {lag(status)}"

    with open_metrics("histories-replica", settings, metrics_port) as metrics:
        measured = CopyMetrics(metrics, "histories", "history")
        try:
            with stopping() as stop, Replica(settings.kafka, state, say=_say, stopped=lambda: bool(stop)) as replica:
                summary = drive(replica, stop, tell, seen=measured, until_end=until_end, json=json)
        except Stopped as reason:
            return _say(str(reason))
        if json:
            print_json(summary)
        else:
            _tell_copied(summary, tell)
        if not stop:
            linger(metrics, settings)


def _tell_copied(summary: dict[str, Any], tell: Callable[[dict[str, Any]], str]) -> None:
    out.print(
        f"{summary['run']['records']:,} records in {summary['seconds']:.1f} s "
        f"({summary['records_per_second']:,}/s); {tell(summary)}", highlight=False, soft_wrap=True,
    )
    if summary["run"]["refused"]:
        out.print(f"{summary['run']['refused']:,} records left out", highlight=False)


def lag(status: dict[str, Any]) -> str:
    """How far behind a topic a copy is, and how old records are when they are stored."""
    age = "" if status["lag_ms"] is None else f", {status['lag_ms'] / 1000:.1f} s"
    delay = "" if status["delay_p95_ms"] is None else f"; records are stored {status['delay_p95_ms'] / 1000:.2f} s old (p95)"
    return f"{status['lag_records']:,} records behind{age}{delay}"


def register(app: typer.Typer) -> None:
    """Adds the commands that keep local copies of topics."""
    app.command()(feed)
    app.command("histories-replica")(histories_replica)
