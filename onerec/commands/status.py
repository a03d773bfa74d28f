"""`onerec status`: how old the knowledge is that users are served from, stage by stage."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from onerec.console import JsonOption, RepositoryOption, RunOption, StateOption, err, out
from onerec.console import print_json as print_json_line


def status(
    state: StateOption,
    run_dir: RunOption,
    repository: RepositoryOption,
    server: Annotated[str, typer.Option(help="Triton's gRPC address.")] = "127.0.0.1:8001",
    json: JsonOption = False,
) -> None:
    """How old the knowledge is that users are served from, stage by stage.

    *event*: the newest event in the state. *history*: histories are complete up to there. *session*: the end of the
    newest session. *trained*, *exported*, *served*: what the newest checkpoint, the newest version in the repository, and
    the version with which Triton answers have learnt up to.

    Ages are against log time (the newest event), and so mean the same in a replay; "age now" is against the wall clock.
    A part that cannot be asked has "no data".

    Example: `onerec status --state .demo/state --run .demo/run --repository .demo/repository`
    """
    from rich.table import Table

    from onerec.freshness import chain, format_age, format_time, to_json
    from onerec.probe import probe

    found = probe(state, run_dir, repository, server)
    ages = chain(found.watermarks, int(time.time() * 1000))
    for fault in found.faults:
        err.print(f"onerec: {fault}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if json:
        print_json_line(to_json(ages))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "event time (UTC)", "age in log time", "age now", ""):
        table.add_column(name, justify="right" if name.startswith("age") else "left", no_wrap=True)
    notes = {"trained": ("step", found.step), "exported": ("version", found.exported_version),
             "served": ("version", found.served_version)}
    for stage in ages.stages:
        noun, number = notes.get(stage.name, ("", None))
        when = format_time(stage.watermark_ms)
        table.add_row(stage.name, when, format_age(stage.age_ms), format_age(stage.wall_age_ms),
                      "" if number is None else f"{noun} {number}")
    out.print(table)
    out.print(f"event → served: {format_age(ages.event_to_served_ms)}", style="bold", highlight=False)


def register(app: typer.Typer) -> None:
    """Add `status`."""
    app.command()(status)
