"""`onerec status`: how old the knowledge is that users are served from, stage by stage; once, or until Ctrl-C."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onerec.commands.monitor import ServersOption, replicas
from onerec.config import load_config
from onerec.console import ConfigOption, JsonOption, RepositoryOption, RunOption, SetOption, StateOption, err, out
from onerec.console import print_json as print_json_line
from onerec.errors import OneRecError, UserError

if TYPE_CHECKING:
    from onerec.config import Config
    from onerec.monitor.screen import Extras

REFRESH_SECONDS = 1.0


def status(
    state: StateOption,
    run_dir: RunOption,
    repository: RepositoryOption,
    server: ServersOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again each second, with all that operators look at, until Ctrl-C.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """How old the knowledge is that users are served from, stage by stage.

    *event*: the newest event in the state. *history*: histories are complete up to there. *session*: the end of the
    newest session. *trained*, *exported*, *served*: what the newest checkpoint, the newest version in the repository, and
    the version with which Triton answers have learnt up to; with several servers, all of those that answer.

    Ages are against log time (the newest event), and so mean the same in a replay; "age now" is against the wall clock.
    A part that cannot be asked has "no data". With --watch ages are by the log's clock, as `onerec monitor` tells them.

    Examples:

        onerec status --state .demo/state --run .demo/run --repository .demo/repository

        onerec status --watch --state .demo/state --run .demo/run --repository .demo/repository
    """
    configuration = load_config(config, settings)
    if watch and json:
        raise UserError("status: --watch draws, --json prints one line; give one of the two")
    if watch:
        _watch(state, run_dir, repository, replicas(server), configuration)
    else:
        _once(state, run_dir, repository, server or replicas(None), json=json)


def _once(state: Path, run_dir: Path, repository: Path, servers: list[str], *, json: bool) -> None:
    from rich.table import Table

    from onerec.freshness import chain, format_age, format_time, to_json
    from onerec.probe import probe

    found = probe(state, run_dir, repository, *servers)
    ages = chain(found.watermarks, int(time.time() * 1000))
    for fault in found.faults:
        err.print(f"onerec: {fault}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if json:
        report: dict[str, Any] = to_json(ages)
        if len(servers) > 1:
            report["replicas"] = {name: {"version": mark.number, "watermark_ms": mark.watermark}
                                  for name, mark in found.answers.items()}
        print_json_line(report)
        return
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "event time (UTC)", "age in log time", "age now", ""):
        table.add_column(name, justify="right" if name.startswith("age") else "left", no_wrap=True)
    notes = {"trained": ("step", found.step), "exported": ("version", found.exported_version),
             "served": ("version", found.served_version)}
    for stage in ages.stages:
        noun, number = notes.get(stage.name, ("", None))
        table.add_row(stage.name, format_time(stage.watermark_ms), format_age(stage.age_ms), format_age(stage.wall_age_ms),
                      "" if number is None else f"{noun} {number}")
    out.print(table)
    if len(servers) > 1:
        for name, mark in found.answers.items():
            said = "does not answer" if mark.number is None else f"version {mark.number}, up to {format_time(mark.watermark)}"
            out.print(f"{name}: {said}", highlight=False, markup=False)
    out.print(f"event → served: {format_age(ages.event_to_served_ms)}", style="bold", highlight=False)


def _watch(state: Path, run_dir: Path, repository: Path, servers: list[str], config: Config) -> None:
    """Draws what the monitor sees each second; keeps no ledger, so that it may run beside `onerec monitor`."""
    from rich.live import Live

    from onerec.dashboard.runs import RunView
    from onerec.dashboard.scrape import LagView
    from onerec.monitor.drift import DRIFT_FILE, Codes, Drift
    from onerec.monitor.looks import RepositoryLook, RunLook, StateLook
    from onerec.monitor.prober import Prober, Replica
    from onerec.monitor.screen import screen
    from onerec.monitor.watch import Monitor
    from onerec.signals import stopping

    limits = config.monitor
    drift = None
    if (kept := run_dir / DRIFT_FILE).exists():
        drift = Drift(kept, reference_sessions=limits.reference_sessions, window_sessions=limits.window_sessions,
                      code_of=Codes(state, time.monotonic), write=False)
    monitor = Monitor(StateLook(state), RunLook(run_dir), RepositoryLook(repository), servers, mode=config.freshness.clock,
                      drift=drift)
    view, lags = RunView(run_dir), LagView(run_dir, None)
    with stopping() as stop, Live(console=out, auto_refresh=False, screen=out.is_terminal) as live:
        try:
            with Prober([Replica(name, monitor.users) for name in servers], monitor.answered, every_s=limits.every_s):
                while not stop:
                    seen = monitor.step()
                    live.update(screen(seen, servers, _extras(view, lags), objective_s=config.freshness.objective_s,
                                       limits=limits), refresh=True)
                    _pause(stop, REFRESH_SECONDS)
        finally:
            monitor.close()


def _pause(stop: list[int], seconds: float) -> None:
    """Sleeps, but ends soon after a signal, which Python lets the sleep outlast."""
    until = time.monotonic() + seconds
    while not stop and time.monotonic() < until:
        time.sleep(0.05)


def _extras(view: Any, lags: Any) -> Extras:
    """What the trainer's log and the processes' metrics tell; nothing of one that does not."""
    from onerec.monitor.screen import Extras

    def ask(question: Any) -> Any:
        try:
            return question()
        except (OneRecError, OSError, ValueError, KeyError, TypeError):
            return None

    return Extras(curves=ask(view.curves), lags=ask(lags.look))


def register(app: typer.Typer) -> None:
    """Add `status`."""
    app.command()(status)
