"""`onerec kafka up` and `onerec topics`: a broker for people without Docker, and the topics on any cluster."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from onerec.console import err, out
from onerec.errors import Failure

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


def register(app: typer.Typer) -> None:
    """Adds the commands of the broker."""
    app.add_typer(kafka, name="kafka")
