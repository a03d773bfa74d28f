"""`onerec sampler`: preference pairs beside the trainer, from its own sessions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from onerec.config import load_config
from onerec.console import ConfigOption, JsonOption, RunOption, SetOption, StateOption, err, out, print_json
from onerec.signals import stopping

if TYPE_CHECKING:
    from trainer.sampler_stats import Stats

STATUS_SECONDS = 5.0


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(sampler)


def sampler(
    state: StateOption,
    run: RunOption,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as sessions and snapshots arrive, until stopped.")] = False,
    queue: Annotated[int, typer.Option(min=1, help="Pairs that may be unread, and sampled sessions that may wait.")] = 256,
    threads: Annotated[int, typer.Option(min=1, help="CPU cores for the search.")] = 1,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Make preference pairs for a run: sampled sessions, each answered by the newest snapshot, best and worst by reward.

    A share `preference.ratio` of the sessions, once the trainer has learnt them, is answered with `preference.responses`
    sessions from the run's newest checkpoint; its reward model picks winner and loser. They go to RUN/pairs, where
    `onerec train` finds them. Stop it or kill it whenever you like; it goes on from the last pair.

    Example: `onerec sampler --state state --run run --follow`
    """
    configuration = load_config(config, settings)

    from trainer.sampler import sample

    with stopping("stopping after this batch") as stop:
        stats = sample(
            state,
            run,
            configuration,
            queue=queue,
            follow=follow,
            threads=threads,
            stopped=lambda: bool(stop),
            say=lambda text: err.print(text, highlight=False, markup=False, soft_wrap=True),
            progress=reporter(quiet=json),
        )
    if json:
        print_json(msgspec.to_builtins(stats))
    else:
        out.print(summary(stats), highlight=False, soft_wrap=True)


def reporter(*, quiet: bool) -> Callable[[Stats], None]:
    """Says now and then where the sampler stands, once something has changed."""
    told_at, told_records = time.monotonic(), -1

    def tell(stats: Stats) -> None:
        nonlocal told_at, told_records
        now = time.monotonic()
        if quiet or stats.records == told_records or now - told_at < STATUS_SECONDS:
            return
        told_at, told_records = now, stats.records
        err.print(summary(stats), highlight=False, soft_wrap=True)

    return tell


def summary(stats: Stats) -> str:
    """One line: pairs, drops, rates, what waits, snapshot, staleness, share of the compute."""
    drops = ", ".join(f"{count:,} {reason}" for reason, count in sorted(stats.drops.items()))
    parts = [
        f"{stats.pairs:,} pairs" + (f", dropped {drops}" if drops else ""),
        f"{stats.pairs_per_second:.2f} pairs/s, {stats.sessions_per_second:.0f} sessions/s generated",
        f"{stats.waiting:,} sessions wait, {stats.unread:,} pairs unread",
    ]
    if stats.snapshot_version is not None:
        parts.append(f"snapshot {stats.snapshot_version} (step {stats.snapshot_step:,})")
    if stats.versions_behind_mean is not None:
        parts.append(f"{stats.versions_behind_mean:.1f} versions behind when taken, at most {stats.versions_behind_max}")
    if stats.compute_share is not None:
        parts.append(f"{stats.compute_share:.0%} of the trainer's CPU time")
    return "; ".join(parts)
