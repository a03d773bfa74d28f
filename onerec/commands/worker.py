"""`onerec stream`: a worker of the stateful stream on Kafka."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.live import Live
from rich.table import Table

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

if TYPE_CHECKING:
    from streaming.kafka.engine import Engine

STATUS_SECONDS = 5.0


def stream(
    state: StateOption,
    bootstrap: BootstrapOption = None,
    engine: Annotated[
        Literal["faust", "group"],
        typer.Option("--engine", help="Who reads from Kafka: Faust, or a plain consumer group, which pauses no other worker."),
    ] = "faust",
    standby: Annotated[
        bool, typer.Option("--standby", help="Keep copies of the other workers' partitions, to take them over faster.")
    ] = False,
    until_end: Annotated[
        bool, typer.Option("--until-end", help="Leave once an end marker has come in every partition and all is read.")
    ] = False,
    metrics_port: MetricsPortOption = None,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Work on the stream: topic `events` into `sessions` and `histories`, each event once whatever fails.

    Start as many as there is work for, up to one a partition; they share the partitions among them. STATE is a cache: what
    is missing there is read from the topic `histories`. A worker that is stuck leaves with an error: run it under a supervisor.

    Examples:

        onerec stream --state worker-1 --bootstrap 127.0.0.1:9092

        onerec stream --state worker-2 --engine group --standby
    """
    from onerec.monitor.of_stream import WorkerMetrics
    from onerec.monitor.opening import linger, open_metrics
    from streaming.kafka.worker import stopped_by_signals, work
    from streaming.rocks import database_path

    settings = load_config(config, set, bootstrap)
    calm()
    stop = threading.Event()
    show, live = _shown(json)
    with open_metrics("stream", settings, metrics_port) as metrics:
        measured = WorkerMetrics(metrics, settings, database_path(state))

        def seen(engine: Engine) -> None:
            measured.seen(engine)
            show(engine)

        with stopped_by_signals(stop) as received, live:
            summary = work(
                state, settings.semantics, settings.kafka, engine=engine, standby=standby, until_end=until_end, show=seen,
                on_commit=measured.committed, stop=stop,
            )
        measured.ended()
        if json:
            print_json(summary)
        else:
            partitions = summary.pop("partitions")
            table = Table(show_header=False, box=None)
            for key, value in summary.items():
                table.add_row(key.replace("_", " "), f"{value:,}")
            table.add_row("partitions", _spans([int(partition) for partition in partitions]))
            out.print(table)
        if not received:
            linger(metrics, settings)
    if received and received[0] != 15:
        raise typer.Exit(130)


def _spans(numbers: list[int]) -> str:
    """0, 1, 2, 5 → "0-2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans) or "none"


def _shown(json: bool) -> tuple[Callable[[Engine], None], Live]:
    """What shows the engine: a live table on a terminal, a line every five seconds elsewhere, nothing with --json."""
    live = Live(console=err, transient=True, auto_refresh=False)
    pace = _Pace()
    last = [time.monotonic()]

    def show(engine: Engine) -> None:
        rate = pace(engine.events)
        if json:
            return
        if err.is_terminal:
            live.update(_table(engine, rate), refresh=True)
        elif time.monotonic() - last[0] >= STATUS_SECONDS:
            last[0] = time.monotonic()
            sys.stderr.write(_line(engine, rate) + "\n")
            sys.stderr.flush()

    return show, live


class _Pace:
    """Events a second over the last few calls."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = [(time.monotonic(), 0)]

    def __call__(self, events: int) -> float:
        self._seen = [*self._seen[-5:], (time.monotonic(), events)]
        (began, before), (now, after) = self._seen[0], self._seen[-1]
        return (after - before) / (now - began) if now > began else 0.0


def _line(engine: Engine, rate: float) -> str:
    from onerec.commands.stream import when

    found = engine.status()
    by_state = {name: [each.partition for each in found if each.state == name] for name in ("idle", "opening", "fenced")}
    lags = [each.lag for each in found]
    watermarks = [each.watermark for each in found if each.watermark is not None]
    parts = [
        f"stream: partitions {_spans([each.partition for each in found])}",
        f"{engine.events:,} events",
        f"{rate:,.0f} events/s",
        "lag unknown" if None in lags else f"lag {sum(lag or 0 for lag in lags):,}",
        f"log time {when(min(watermarks, default=None))}",
        *(f"{name} {_spans(numbers)}" for name, numbers in by_state.items() if numbers),
        *([f"no answer from Kafka for {silent:.0f} s"] if (silent := engine.silent_seconds()) else []),
    ]
    return " · ".join(parts)


def _table(engine: Engine, rate: float) -> Table:
    from onerec.commands.stream import when

    silent = engine.silent_seconds()
    said = f", no answer from Kafka for {silent:.0f} s" if silent else ""
    table = Table(title=f"{engine.events:,} events, {rate:,.0f} events/s{said}", title_justify="left", box=None)
    for name in ("partition", "state", "lag", "watermark (UTC)"):
        table.add_column(name)
    for each in engine.status():
        state = f"idle {each.idle_seconds:,.0f} s" if each.state == "idle" else each.state
        table.add_row(
            str(each.partition), state, "?" if each.lag is None else f"{each.lag:,}", when(each.watermark)
        )
    return table


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(stream)
