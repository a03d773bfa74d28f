"""`onerec simulate`: a small world of users and videos, written as a log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from onerec.console import JsonOption, err, out, print_json


def simulate(
    target: Annotated[Path, typer.Option("--out", help="Events, JSON lines; .gz and .zst compress.")],
    users: Annotated[int, typer.Option(help="Number of users.")] = 1_000,
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
    json: JsonOption = False,
) -> None:
    """Write the log of a small world: tastes that drift, uploads every day, watches and interactions.

    Tags tell an item's category and topic; its embedding is a noisy view of its latent vector.
    What a session is truly worth there is `simulator.world.World.true_reward`.

    Example: `onerec simulate --out world.jsonl.gz --users 2000 --items 3000 --days 7 --seed 1`
    """
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
    rate = f"{written.events / seconds:,.0f} events/s"
    out.print(f"{seconds:.1f} s, {rate}, {written.bytes / 1e6:.1f} MB", highlight=False)


def register(app: typer.Typer) -> None:
    """Add `simulate`."""
    app.command()(simulate)
