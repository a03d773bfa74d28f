"""`onerec replay`, `sessions`, `histories`, `history`, `dead-letters`: files into the state, and what the state holds."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from onerec.config import load_config
from onerec.console import ConfigOption, JsonOption, MetricsPortOption, SetOption, StateOption, err, out, print_json
from onerec.errors import UserError
from onerec.signals import interruptible

if TYPE_CHECKING:
    from streaming.replay import Step
    from streaming.store import Reader

FilesArgument = Annotated[
    list[str], typer.Argument(help="Event logs; - for standard input; .gz and .zst are read as they are.", show_default=False)
]
FormatOption = Annotated[str, typer.Option("--format", help="auto, jsonl, csv, parquet or kuairand.")]
MapOption = Annotated[
    list[str] | None,
    typer.Option("--map", help="column=field: what a column of yours is called here; may be repeated.", show_default=False),
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Print at most so many.", show_default=False)]


def when(ms: int | None) -> str:
    """Epoch milliseconds as UTC text; "no data" for None."""
    if ms is None:
        return "no data"
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def replay(
    files: FilesArgument,
    state: StateOption,
    items: Annotated[
        list[str] | None,
        typer.Option("--items", help="Catalogue: `item` JSON lines, CSV, Parquet, or KuaiRand's videos.", show_default=False),
    ] = None,
    format: FormatOption = "auto",
    map: MapOption = None,
    speed: Annotated[
        float | None,
        typer.Option("--speed", help="Seconds of the log a second; without it as fast as it goes.", show_default=False),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Hold each line back until the clock has reached its time.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for more at a file's end: JSON lines that grow.")] = False,
    flush: Annotated[bool, typer.Option(help="Make all open sessions final at the end.")] = True,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="At most so many records a commit.", show_default=False)
    ] = None,
    metrics_port: MetricsPortOption = None,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Replay event logs into a state: histories and sessions in RocksDB.

    Several files are merged by event time. Stop it whenever you like, or kill it: the same command goes on from where the
    state stands, and nothing is lost or counted twice.

    Examples:

        onerec replay events.jsonl.gz --items items.jsonl.gz --state state

        onerec replay log.csv --map uid=user_id --map vid=item_id --map time=ts --map played=watch_ms --state state

        zstdcat live.jsonl.zst | onerec replay - --state state --no-flush

        onerec replay live.jsonl --live --follow --state state
    """
    from onerec.monitor.of_stream import ReplayMetrics
    from onerec.monitor.opening import linger, open_metrics
    from streaming.formats import FORMATS
    from streaming.replay import Replay
    from streaming.rocks import database_path
    from streaming.rows import parse_mapping
    from streaming.store import Store

    if format not in FORMATS:
        raise UserError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    if speed is not None and not speed > 0:
        raise UserError(f"--speed {speed}: give a number above 0, such as 60 for a minute of the log a second")
    if speed is not None and live:
        raise UserError("--speed and --live are two paces; give one of them")
    settings = load_config(config, set)
    mapping = parse_mapping(map)
    stopped = "stopped; all commits so far are stored, the same command goes on from there"
    progress = Progress(
        TextColumn("replay"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[reached]}"), TimeElapsedColumn(), TimeRemainingColumn(),
        console=err, transient=json, disable=not err.is_terminal,
    )
    began = time.monotonic()
    with open_metrics("replay", settings, metrics_port) as metrics:
        with interruptible(stopped), Store(state, settings.semantics) as store:
            measured = ReplayMetrics(metrics, settings, database_path(state), store.counters(), began)
            if items:
                _put_items(store, items)
            with progress:
                task = progress.add_task("replay", total=1.0, rate="", reached="")
                first: list[int] = []

                def show(step: Step) -> None:
                    measured(step)
                    first.append(step.counters.events) if not first else None
                    elapsed = progress.tasks[0].elapsed or 0.0
                    rate = (step.counters.events - first[0]) / elapsed if elapsed > 0 else 0.0
                    progress.update(
                        task, completed=step.fraction, total=None if step.fraction is None else 1.0,
                        rate=f"{rate:,.0f} events/s", reached=f"to {when(step.watermark)}",
                    )

                job = Replay(
                    store, files, wanted=format, mapping=mapping, speed=speed, live=live, follow=follow, flush=flush,
                    on_step=show, on_ready=measured.ready, max_batch=batch,
                )
                summary = job.run()
        if json:
            print_json(summary)
        else:
            _print_summary(summary, state)
        linger(metrics, settings)


def _put_items(store: Any, paths: list[str]) -> None:
    from streaming.item_files import read_items

    for path in paths:
        refused: list[tuple[int, str]] = []
        count = changed = 0
        for batch in read_items(path, refused, store.progress().dimension):
            count += len(batch)
            changed += store.put_items(batch)
        err.print(f"items: {count:,} in {path}, {changed:,} new or changed")
        if refused:
            number, reason = refused[0]
            err.print(f"items: {len(refused):,} lines of {path} refused, first line {number}: {reason}", style="yellow")


def _print_summary(summary: dict[str, Any], state: Path) -> None:
    table = Table(show_header=False, box=None)
    for key, value in summary.items():
        if key == "watermark":
            table.add_row(key, f"{when(value)} UTC" if value is not None else "no data")
        else:
            table.add_row(key.replace("_", " "), f"{value:,}")
    out.print(table)
    if summary["dead_letters"]:
        out.print(f"Refused lines and why: onerec dead-letters --state {state}")


def _limited(rows: Iterator[Any], limit: int | None) -> Iterator[Any]:
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            return
        yield row


def sessions(
    state: StateOption,
    limit: LimitOption = None,
    good: Annotated[bool, typer.Option("--high-quality", help="Only those of high quality.")] = False,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Final sessions in commit order; with --json one line each."""
    from streaming.sessions import session_json

    with _open(state, config, set) as reader:
        found = (session for _, session in reader.sessions() if session.high_quality or not good)
        if json:
            for session in _limited(found, limit):
                sys.stdout.buffer.write(session_json(session) + b"\n")
            sys.stdout.buffer.flush()
            return
        counters = reader.counters()
        table = Table("session", "start (UTC)", "minutes", "watches", "watched", "interactions", "quality", "history")
        for session in _limited(found, limit or 20):
            table.add_row(
                session.session_id, when(session.start), f"{(session.end - session.start) / 60_000:.1f}",
                str(len(session.items)), str(session.watched), str(session.interactions),
                "high" if session.high_quality else "", str(len(session.history)),
            )
        out.print(table)
        out.print(f"{counters.sessions:,} sessions, {counters.high_quality:,} of high quality; --limit N or --json for more")


def histories(
    state: StateOption,
    limit: LimitOption = None,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Every user's history now, in byte order of the user; with --json one line each."""
    with _open(state, config, set) as reader:
        if json:
            for user_id, items in _limited(reader.users(), limit):
                sys.stdout.buffer.write(orjson.dumps({"user_id": user_id, "items": items}) + b"\n")
            sys.stdout.buffer.flush()
            return
        table = Table("user", "items", "newest")
        for user_id, items in _limited(reader.users(), limit or 20):
            table.add_row(user_id, str(len(items)), " ".join(items[-8:]))
        out.print(table)
        out.print(f"{reader.counters().users:,} users; --limit N or --json for more")


def history(
    user: Annotated[str, typer.Argument(help="User id.")],
    state: StateOption,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """One user's history now, oldest first."""
    with _open(state, config, set) as reader:
        items = reader.history(user)
        if items is None:
            raise UserError(f"user {user!r} has no event in {state}; `onerec histories --state {state}` lists the users")
        if json:
            print_json({"user_id": user, "items": items})
            return
        out.print(f"user {user}: {len(items)} items, oldest first, of at most {reader.semantics().history.length}")
        out.print(" ".join(items) or "nothing watched to effect or liked yet")


def dead_letters(
    state: Annotated[
        Path | None, typer.Option("--state", help="Folder of the stream's state, for those of `replay`.", show_default=False)
    ] = None,
    bootstrap: Annotated[
        str | None,
        typer.Option("--bootstrap", help="Kafka brokers, host:port[,host:port], for those in Kafka.", show_default=False),
    ] = None,
    redrive: Annotated[bool, typer.Option("--redrive", help="Apply them again: what is valid now goes in.")] = False,
    reason: Annotated[str | None, typer.Option("--reason", help="Only those of this code.", show_default=False)] = None,
    map: MapOption = None,
    limit: LimitOption = None,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """What was refused, where it stood and why; --redrive once it is mended.

    A refused line is kept with all its bytes. It can be mended by --map (keys that had other names), by time (an event ahead
    of the clock), by room (a user with too many open events), or by hand: print them with --json, mend, and replay (for Kafka,
    produce) the result as a file of its own. In Kafka, --redrive sends lines to the raw topics again, each once.

    Examples:

        onerec dead-letters --state state

        onerec dead-letters --bootstrap 127.0.0.1:9092 --redrive --map uid=user_id
    """
    from streaming.events import REASONS
    from streaming.rows import parse_mapping

    if (state is None) == (bootstrap is None):
        raise UserError("give either --state, for the refused lines of `replay`, or --bootstrap, for those in Kafka")
    if reason is not None and reason not in REASONS:
        raise UserError(f"--reason {reason}: the codes are {', '.join(REASONS)}")
    if state is None:
        from streaming.kafka import dead_letters as in_kafka

        settings = load_config(config, set, bootstrap)
        if redrive:
            future = settings.stream.future_ms
            result = in_kafka.redrive(settings.kafka, future_ms=future, reason=reason, mapping=parse_mapping(map))
            print_or_tell(result, json)
        else:
            _print_letters((in_kafka.entry(letter) for letter in in_kafka.letters(settings.kafka, reason)), limit, json)
        return
    from streaming.dead_letters import letters, redriven

    if redrive:
        from streaming.store import Store

        with _open(state, config, set) as reader:
            semantics = reader.semantics()
        with Store(state, semantics) as store:
            print_or_tell(redriven(store, reason=reason, mapping=parse_mapping(map)), json)
        return
    with _open(state, config, set) as reader:
        _print_letters(letters(reader, reason), limit, json)


def _print_letters(found: Iterator[dict[str, Any]], limit: int | None, json: bool) -> None:
    from streaming.events import REASONS

    if json:
        for line in _limited(found, limit):
            print_json(line)
        return
    table = Table("number", "source", "reason", "what is wrong", "line")
    counts: dict[str, int] = {}
    for number, line in enumerate(found):
        counts[line["reason"]] = counts.get(line["reason"], 0) + 1
        if number < (limit or 20):
            meaning = REASONS.get(line["reason"], "")
            table.add_row(str(line["number"]), line["source"], line["reason"], meaning, line["line"][:80])
    if not counts:
        out.print("no dead letters")
        return
    out.print(table)
    out.print(", ".join(f"{code}: {count:,}" for code, count in sorted(counts.items())))


def print_or_tell(result: dict[str, int], json: bool) -> None:
    """The outcome of a redrive."""
    if json:
        print_json(result)
    else:
        out.print(f"{result['redriven']:,} lines are in, {result['refused']:,} are refused still")


def _open(state: Path, config: Path | None, settings: list[str] | None) -> Reader:
    """A reader of the state; settings that were named must be the state's."""
    from onerec.config import explicit_settings
    from streaming.store import Reader, difference

    reader = Reader(state)
    try:
        if explicit_settings(config, settings):
            asked, stored = load_config(config, settings).semantics, reader.semantics()
            if asked != stored:
                raise UserError(
                    f"state {state} was built with other settings: {difference(stored, asked)}; leave them out to read it"
                )
    except BaseException:
        reader.close()
        raise
    return reader


def register(app: typer.Typer) -> None:
    """Adds the commands of the stream."""
    app.command()(replay)
    app.command()(sessions)
    app.command()(histories)
    app.command()(history)
    app.command("dead-letters")(dead_letters)
