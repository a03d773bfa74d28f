"""`onerec produce`: files into Kafka, each line exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
from onerec.errors import UserError
from onerec.garbage import calm
from onerec.signals import interruptible

if TYPE_CHECKING:
    from streaming.kafka.producing import Step


def produce(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Event logs; - for standard input; .gz and .zst are read as they are.", show_default=False),
    ] = None,
    items: Annotated[
        list[str] | None,
        typer.Option("--items", help="Catalogue: `item` JSON lines, CSV, Parquet, or KuaiRand's videos.", show_default=False),
    ] = None,
    bootstrap: BootstrapOption = None,
    speed: Annotated[
        float | None,
        typer.Option("--speed", help="Seconds of the log a second; without it as fast as it goes.", show_default=False),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Hold each line back until the clock has reached its time.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for more at a file's end: JSON lines that grow.")] = False,
    pack: Annotated[int, typer.Option("--pack", min=1, help="At most so many lines of a partition in one message.")] = 1,
    end: Annotated[
        bool, typer.Option("--end", help="End markers after the last line: all sessions become final once they are read.")
    ] = False,
    format: Annotated[str, typer.Option("--format", help="auto, jsonl, csv, parquet or kuairand.")] = "auto",
    map: Annotated[
        list[str] | None,
        typer.Option("--map", help="column=field: what a column of yours is called here; may be repeated.", show_default=False),
    ] = None,
    metrics_port: MetricsPortOption = None,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Replay event logs into Kafka: events by type into `watch` and `interactions`, catalogue entries into `items`.

    Several files are merged by event time. Stop it whenever you like, or kill it: the same command goes on from where the
    topics stand, and no line is lost or there twice. JSON lines go as they are, rows of tables as JSON lines; what is no
    valid event goes too, for `onerec ingest` to put among the dead letters.

    Examples:

        onerec produce events.jsonl.gz --items items.jsonl.gz --end

        onerec produce live.jsonl --speed 60 --bootstrap kafka1:9092,kafka2:9092

        onerec produce log.csv --map uid=user_id --map vid=item_id --map time=ts --map played=watch_ms --pack 200
    """
    from onerec.monitor.of_kafka import ProduceMetrics
    from onerec.monitor.opening import linger, open_metrics
    from streaming.formats import FORMATS
    from streaming.kafka.producing import Produce
    from streaming.rows import parse_mapping

    if not files and not items and not end:
        raise UserError("nothing to produce; name event logs, a catalogue with --items, or --end for end markers alone")
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    if speed is not None and not speed > 0:
        raise UserError(f"--speed {speed}: give a number above 0, such as 60 for a minute of the log a second")
    if speed is not None and live:
        raise UserError("--speed and --live are two paces; give one of them")
    if follow and end:
        raise UserError("--follow has no end, so that there is nothing to mark with --end; leave one of them out")
    settings = load_config(config, set, bootstrap)
    calm()
    mapping = parse_mapping(map)
    progress = Progress(
        TextColumn("produce"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=err, transient=json, disable=not err.is_terminal,
    )
    with open_metrics("produce", settings, metrics_port) as metrics:
        measured = ProduceMetrics(metrics)
        with interruptible("stopped; what is committed stays, the same command goes on from there"), progress:
            task = progress.add_task("produce", total=1.0, rate="")

            def show(step: Step) -> None:
                measured(step)
                elapsed = progress.tasks[0].elapsed or 0.0
                rate = step.counts.lines / elapsed if elapsed > 0 else 0.0
                progress.update(
                    task, completed=step.fraction, total=None if step.fraction is None else 1.0, rate=f"{rate:,.0f} lines/s"
                )

            job = Produce(
                settings.kafka, files or [], items=items or [], future_ms=settings.stream.future_ms, wanted=format,
                mapping=mapping, speed=speed, live=live, follow=follow, pack=pack, end=end, on_step=show,
            )
            summary = job.run()
        if json:
            print_json(summary)
        else:
            _tell(summary)
        linger(metrics, settings)


def _tell(summary: dict[str, Any]) -> None:
    out.print(
        f"{summary['lines']:,} lines: {summary['watch']:,} into watch, {summary['interactions']:,} into interactions, "
        f"{summary['items']:,} into items; {summary['seconds']:.1f} s, {summary['lines_per_second']:,.0f} lines/s",
        soft_wrap=True,
    )
    if summary["invalid"]:
        out.print(f"{summary['invalid']:,} of them are no valid events; `onerec ingest` puts them among the dead letters")


def register(app: typer.Typer) -> None:
    """Adds `produce`."""
    app.command()(produce)
