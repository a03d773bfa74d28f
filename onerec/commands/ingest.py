"""`onerec ingest`: raw topics into validated, packed `events`."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onerec.config import load_config
from onerec.console import (
    BootstrapOption,
    ConfigOption,
    JsonOption,
    MetricsPortOption,
    SetOption,
    err,
    out,
    print_json,
)
from onerec.garbage import calm

if TYPE_CHECKING:
    from streaming.kafka.lane import Counts

STATUS_SECONDS = 5.0


def ingest(
    bootstrap: BootstrapOption = None,
    until_end: Annotated[
        bool, typer.Option("--until-end", help="Stop once all partitions have passed an end marker and nothing is left.")
    ] = False,
    metrics_port: MetricsPortOption = None,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Check raw events from Kafka and put them in order for the stream.

    Reads the topics watch, interactions and items; writes events, dead-letters and catalogue, every line exactly once. It keeps
    no state: run as many as there are partitions, stop or kill them whenever you like. SIGTERM ends it cleanly.

    Examples:

        onerec ingest --bootstrap 127.0.0.1:9092

        onerec produce log.jsonl.gz --end && onerec ingest --until-end --json
    """
    from onerec.monitor.of_kafka import IngestMetrics
    from onerec.monitor.opening import linger, open_metrics
    from streaming.kafka.ingest import Ingest

    settings = load_config(config, set, bootstrap)
    calm()
    began = time.monotonic()
    shown: list[float] = [began, 0, 0]
    with open_metrics("ingest", settings, metrics_port) as metrics:
        measured = IngestMetrics(metrics)
        received: list[int] = []
        with err.status("ingest: waiting for partitions") as live:

            def show(counts: Counts, partitions: int) -> None:
                measured(job, counts, partitions)
                now = time.monotonic()
                if err.is_terminal or (not json and (now - shown[0] >= STATUS_SECONDS or partitions != shown[2])):
                    rate = (counts.events - shown[1]) / max(0.001, now - shown[0])
                    text = (
                        f"ingest: {counts.events:,} events, {rate:,.0f} a second, {counts.dead_letters:,} dead letters, "
                        f"{counts.rerouted:,} rerouted, {counts.items:,} items, {partitions} partition{'s' * (partitions != 1)}"
                    )
                    shown[:] = [now, counts.events, partitions]
                    if err.is_terminal:
                        live.update(text)
                    else:
                        err.print(text, highlight=False, soft_wrap=True)

            job = Ingest(settings, on_status=show)

            def stop(number: int, frame: FrameType | None) -> None:
                received.append(number)
                job.stop()

            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            counts = job.run(until_end=until_end)
            measured(job, counts, 0)
        seconds = time.monotonic() - began
        summary: dict[str, Any] = {
            "events": counts.events,
            "dead_letters": counts.dead_letters,
            "rerouted": counts.rerouted,
            "items": counts.items,
            "markers": counts.markers,
            "empty": counts.empty,
            "seconds": round(seconds, 3),
            "events_per_second": round(counts.events / seconds, 1) if seconds > 0 else 0.0,
        }
        if json:
            print_json(summary)
        else:
            out.print(
                f"ingest: {counts.events:,} events, {counts.dead_letters:,} dead letters, {counts.rerouted:,} rerouted, "
                f"{counts.items:,} items, {counts.markers:,} time markers in {seconds:,.1f} s", highlight=False, soft_wrap=True,
            )
        if not received:
            linger(metrics, settings)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(ingest)
