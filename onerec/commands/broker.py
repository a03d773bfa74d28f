"""`onerec kafka up` and `onerec topics`: a broker for people without Docker, and the topics on any cluster."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from onerec.config import load_config
from onerec.console import BootstrapOption, ConfigOption, JsonOption, SetOption, err, out, print_json
from onerec.errors import Failure, UserError

if TYPE_CHECKING:
    from streaming.kafka.topics import State

kafka = typer.Typer(no_args_is_help=True, help="A Kafka broker on this machine, without Docker.")


@kafka.callback()
def _kafka() -> None:
    """Keeps `up` a command of its own while it is the only one."""


@kafka.command()
def up(
    dir: Annotated[Path, typer.Option("--dir", help="Folder of its data; kept between runs.")] = Path("kafka"),
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 9092,
    heap: Annotated[str, typer.Option("--heap", help="Memory of the JVM, as for Java's -Xmx.")] = "512m",
) -> None:
    """Run a real Kafka broker of one node in the foreground, until Ctrl-C or SIGTERM.

    Needs Java 17; Maven fetches Kafka the first time. For trying things out, development and tests: one copy of the data,
    reached from this machine only, no passwords.

    Example:

        onerec kafka up --dir kafka --port 9092
    """
    from streaming.kafka.broker import Broker, jars

    broker = Broker(dir, port, heap=heap)
    with err.status("kafka: fetching the jars"):
        jars()
    arrived: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Under nohup it outlives its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda found, _: arrived.append(found))
    try:
        with err.status("kafka: starting"):
            broker.start(stopping=lambda: bool(arrived))
        if not arrived:
            out.print(f"kafka: ready at {broker.bootstrap}, data in {dir}", highlight=False, soft_wrap=True)
        while not arrived:
            if broker.wait(0.2):
                raise Failure(f"kafka ended by itself: {broker.fault()}; its log is {broker.log}")
    finally:
        broker.stop()


def topics(
    create: Annotated[
        bool, typer.Option("--create", help="Make missing topics and set wrong settings right; partitions stay as they are.")
    ] = False,
    bootstrap: BootstrapOption = None,
    partitions: Annotated[
        int | None,
        typer.Option("--partitions", min=1, help="Of each topic by user; default kafka.partitions.", show_default=False),
    ] = None,
    replication: Annotated[
        int | None, typer.Option("--replication", min=1, help="Copies; default kafka.replication.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    set: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Check the topics, and with --create make what is missing.

    Exit code 0 when all are right, 2 when one is missing or wrong. The number of partitions is fixed for the life of a log,
    because a user's state lives in its partition: to change it, set a new kafka.prefix and replay.

    Examples:

        onerec topics --create --partitions 8 --bootstrap 127.0.0.1:9092

        onerec topics --create --bootstrap a:9092,b:9092,c:9092 --partitions 64 --replication 3
    """
    from streaming.kafka.topics import create as make
    from streaming.kafka.topics import describe, told

    given = [*(set or [])]
    given += [f"kafka.partitions={partitions}"] if partitions is not None else []
    given += [f"kafka.replication={replication}"] if replication is not None else []
    cluster = load_config(config, given, bootstrap).kafka
    states = make(cluster) if create else describe(cluster)
    if json:
        print_json([
            {
                "topic": state.topic, "partitions": state.partitions, "expected_partitions": state.expected_partitions,
                "replication": state.replication, "settings": state.settings, "faults": state.faults,
            }
            for state in states
        ])
    else:
        _print_topics(states)
    if wrong := [state for state in states if state.faults]:
        raise UserError(f"{len(wrong)} of {len(states)} topics at {cluster.bootstrap} are not right: " + "; ".join(told(wrong)))


def _print_topics(states: list[State]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("topic", overflow="fold")
    for heading in ("partitions", "copies", "cleanup", "kept", "largest", "state"):
        table.add_column(heading, no_wrap=True)
    for state in states:
        retention = state.settings.get("retention.ms")
        days = "for good" if retention in (None, "-1") else f"{int(retention) / 86_400_000:g} days"
        largest = int(state.settings["max.message.bytes"]) / (1 << 20)
        table.add_row(
            state.topic, str(state.partitions or state.expected_partitions), str(state.replication or ""),
            state.settings["cleanup.policy"], days, f"{largest:g} MiB", "wrong" if state.faults else "right",
        )
    out.print(table)


def register(app: typer.Typer) -> None:
    """Adds the commands of the broker."""
    app.add_typer(kafka, name="kafka")
    app.command()(topics)
