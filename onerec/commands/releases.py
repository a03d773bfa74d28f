"""`onerec promote`, `rollback` and `lineage`: a person's word on a version, and where a version comes from."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from onerec.console import JsonOption, RepositoryOption, out, print_json
from onerec.freshness import format_time

ServerOption = Annotated[
    str | None,
    typer.Option("--server", help="Triton's gRPC address, HOST:PORT; without it the next start serves the change.",
                 show_default=False),
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, in a few words; kept with the version.")]
VersionArgument = Annotated[int | None, typer.Argument(help="Number of a version; default: the newest one.",
                                                       show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(promote)
    app.command()(rollback)
    app.command()(lineage)


def promote(
    repository: RepositoryOption,
    reason: ReasonOption,
    version: Annotated[
        int | None,
        typer.Argument(help="A version that was held back or rolled back; default: lift the hold, else the newest held one.",
                       show_default=False),
    ] = None,
    server: ServerOption = None,
    json: JsonOption = False,
) -> None:
    """Serve a version that the release gate held back, or let publishing go on after a rollback.

    The version gets the next number, is loaded and asked like any other, and keeps the reason. Any promote lifts a hold.

    Example: `onerec promote 7 --repository repository --server 127.0.0.1:8001 --reason "the log was faulty, not the model"`
    """
    from exporter.override import promote as serve

    done = serve(repository, version, reason=reason, server=server)
    if json:
        print_json(msgspec.to_builtins(done))
        return
    if done.version is not None:
        where = f"answers at {server}" if server else "is the newest in place"
        out.print(f"version {done.candidate} is promoted; as version {done.version} it {where}", highlight=False)
    if done.lifted:
        out.print("publishing goes on", highlight=False)


def rollback(
    repository: RepositoryOption, reason: ReasonOption, server: ServerOption = None, json: JsonOption = False
) -> None:
    """Take the newest model back: the one before serves again, without a failed request.

    What is taken back is kept in REPOSITORY/.onerec/rejected with the reason, and its numbers are never used again. Nothing
    is published from then on until `onerec promote`.

    Example: `onerec rollback --repository repository --server 127.0.0.1:8001 --reason "answers are all the same"`
    """
    from exporter.override import rollback as go_back

    left, served = go_back(repository, reason=reason, server=server)
    if json:
        print_json({"left": left, "serving": served})
        return
    where = f"answers at {server}" if server else "is the newest in place"
    out.print(f"version {', '.join(map(str, left))} is taken back; version {served} {where}", highlight=False)
    out.print(f'nothing is published until: onerec promote --repository {repository} --reason "..."', highlight=False,
              markup=False, soft_wrap=True)


def lineage(
    repository: RepositoryOption,
    version: VersionArgument = None,
    server: Annotated[
        str | None,
        typer.Option("--server", help="Of the version that this Triton answers with now.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """What a version was made of: checkpoint, place in the log, codebook, configuration, code, and what the gate found.

    Example: `onerec lineage --repository repository --server 127.0.0.1:8001`
    """
    from exporter.lineage import answered
    from exporter.lineage import lineage as trace
    from onerec.errors import UserError

    if server is not None and version is not None:
        raise UserError("lineage: give a version or --server, one of the two")
    found = answered(repository, server)[1] if server else trace(repository, version)
    if json:
        print_json(found)
        return
    _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    gate = found.get("gate") or {}
    loss, served = gate.get("candidate"), gate.get("served")
    rows = [
        ("version", f"{found['version']} ({found['state']})"),
        ("made", _time(found.get("created_ms"))),
        ("before it", found.get("before")),
        ("checkpoint", f"step {found['step']}, {_time(found.get('checkpoint_created_ms'))}"),
        ("learnt up to", f"{_time(found.get('watermark'))}, session {_shown(found.get('sequence'))} of the log"),
        *((f"  {name}", _position(position)) for name, position in sorted((found.get("source") or {}).items())),
        ("items", f"{_shown(found.get('items'))}, up to record {_shown(found.get('item_sequence'))}"),
        ("codebook", found.get("codebook_version")),
        ("configuration", found.get("config_sha256")),
        ("trained by", found.get("code_version")),
        ("exported by", found.get("exported_by")),
        ("weights", found.get("weights_sha256")),
        ("gate", "no comparison" if loss is None else
         f"loss {loss:.4f} a code" + ("" if served is None else f", version {gate['served_version']}: {served:.4f}")
         + f"; {gate['sessions']} sessions, {gate['unseen']} learnt by neither; {gate['latency_ms']:.0f} ms an answer"),
        ("promoted", None if not found.get("reason") else f"from {found.get('promoted_from')}: {found['reason']}"),
    ]  # fmt: skip
    for name, value in rows:
        if name != "promoted" or value is not None:
            table.add_row(name, _shown(value))
    for event in found["history"]:
        table.add_row(event["event"], f"{_time(event['at_ms'])} {event.get('reason', '')}".rstrip())
    out.print(table, markup=False, highlight=False)


def _time(ms: int | None) -> str:
    return "no data" if ms is None else f"{format_time(ms)} UTC"


def _shown(value: object) -> str:
    return "no data" if value is None else str(value)


def _position(position: dict[str, Any]) -> str:
    """The numbers of a position; its digests say nothing to a reader."""
    return ", ".join(f"{key} {value}" for key, value in position.items() if isinstance(value, int))
