"""`onerec simulate`: a small world of users and videos, written as a log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from onerec.console import JsonOption, err, out, print_json
from onerec.errors import UserError

LIVE_OPTIONS = ("target", "users", "seed", "live", "rate", "hours", "json")
"""Options that `--live` takes."""


def simulate(
    context: typer.Context,
    target: Annotated[Path, typer.Option("--out", help="Events, JSON lines; .gz and .zst compress.")],
    users: Annotated[int | None, typer.Option(help="Number of users; default 1,000, with --live 10 for each event a second.",
                                              show_default=False)] = None,
    items: Annotated[int, typer.Option(help="Videos at the end; half of them exist on the first day.")] = 2_000,
    days: Annotated[int, typer.Option(help="Length of the log.")] = 7,
    seed: Annotated[int, typer.Option(help="Same seed and options, same bytes.")] = 0,
    items_out: Annotated[
        Path | None,
        typer.Option("--items-out", help="Catalogue entries; default `NAME.items.SUFFIX` beside --out.",
                     show_default=False),
    ] = None,
    start_ms: Annotated[int, typer.Option(help="First midnight, epoch ms.")] = 1_704_067_200_000,
    drift: Annotated[float, typer.Option(help="How far tastes move in a day; 0 keeps them.")] = 0.08,
    late_share: Annotated[float, typer.Option(help="Share of events that arrive 10 to 60 minutes late.")] = 0.001,
    duplicate_share: Annotated[float, typer.Option(help="Share of events that arrive twice.")] = 0.003,
    progress_share: Annotated[float, typer.Option(help="Share of watches that also report half-way.")] = 0.02,
    embeddings: Annotated[bool, typer.Option(help="Write the items' noisy vectors.")] = True,
    inline_items: Annotated[
        bool, typer.Option("--inline-items", help="New uploads as `item` events in the log, at their time.")
    ] = False,
    live: Annotated[bool, typer.Option("--live", help="At live pace: written ahead of the clock, until stopped.")] = False,
    rate: Annotated[float, typer.Option(help="With --live: events a second.")] = 1_000.0,
    hours: Annotated[float, typer.Option(help="With --live: how long the world lasts.")] = 24.0,
    json: JsonOption = False,
) -> None:
    """Write the log of a small world: tastes that drift, uploads every day, watches and interactions.

    Tags tell an item's category and topic; its embedding is a noisy view of its latent vector.
    What a session is truly worth there is `simulator.world.World.true_reward`.

    With --live the world's days pass so much faster that its users give --rate events a second; events have the time at
    which they are due, and `onerec replay --live --follow` lets them out then. Stop or kill it: the same command goes on.

    Examples:

        onerec simulate --out world.jsonl.gz --users 2000 --items 3000 --days 7 --seed 1

        onerec simulate --live --rate 100 --out live.jsonl
    """
    if live:
        _live(context, target, rate, users, hours, seed, json)
        return
    users = 1_000 if users is None else users
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from simulator.log import items_path, write_world
    from simulator.world import World, WorldConfig

    config = WorldConfig(users=users, items=items, days=days, seed=seed, start_ms=start_ms, drift=drift,
                         late_share=late_share, duplicate_share=duplicate_share, progress_share=progress_share)
    catalogue = items_out or items_path(target)
    began = time.perf_counter()
    columns = (TextColumn("simulate"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[events]:,} events"),
               TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=1.0, events=0)
        written = write_world(World(config), target, catalogue, embeddings=embeddings, inline=inline_items,
                              progress=lambda done, events: bar.update(task, completed=done, events=events))
    seconds = time.perf_counter() - began
    report = {**written._asdict(), "users": users, "days": days, "seed": seed, "out": str(target),
              "items_out": str(catalogue), "seconds": round(seconds, 3),
              "events_per_second": round(written.events / seconds)}
    if json:
        print_json(report)
        return
    out.print(f"{written.events:,} events, {users:,} users, {written.sessions:,} sessions, {days} days → {target}")
    out.print(f"{written.items:,} items → {catalogue}")
    speed = f"{written.events / seconds:,.0f} events/s"
    out.print(f"{seconds:.1f} s, {speed}, {written.bytes / 1e6:.1f} MB", highlight=False)


def _live(context: typer.Context, target: Path, rate: float, users: int | None, hours: float, seed: int, json: bool) -> None:
    """The world at live pace, until it ends or is stopped."""
    from onerec.signals import stopping
    from simulator.live import LiveWorld, live_config

    for name in context.params:
        given = context.get_parameter_source(name)
        if name not in LIVE_OPTIONS and given is not None and given.name == "COMMANDLINE":
            raise UserError(f"simulate --live: --{name.replace('_', '-')} is for a log written at once; leave one of them out")
    if target.suffix in (".gz", ".zst", ".zstd"):
        raise UserError(f"simulate --live: {target} would be compressed, and a file that grows cannot be; name a plain .jsonl")
    if not 0 < hours <= 10_000:
        raise UserError(f"simulate --live: --hours {hours:g}: give a number above 0")
    config = live_config(rate, users, hours=hours, seed=seed)
    if not json:
        err.print(f"{config.rate:,.0f} events/s of {config.users:,} users, days pass {config.factor} times faster; "
                  f"{target} is written a minute ahead until stopped", highlight=False, soft_wrap=True)
    with stopping() as stop:
        world = LiveWorld(target, config, wall_ms=lambda: time.time_ns() // 1_000_000, sleep=time.sleep,
                          stopped=lambda: bool(stop))
        events = world.run()
    report = {"events": events, "bytes": world.written.bytes, "began_ms": world.written.began_ms,
              "factor": config.factor, "out": str(target)}
    if json:
        print_json(report)
    else:
        out.print(f"{events:,} events → {target}; the same command goes on from there", highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add `simulate`."""
    app.command()(simulate)
