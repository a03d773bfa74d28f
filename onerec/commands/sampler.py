"""`onerec sampler`: preference pairs beside the trainer; `onerec pairs-replica`: those that went through Kafka, for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from onerec.commands.feed import drive, lag
from onerec.config import load_config
from onerec.console import (
    BootstrapOption,
    ConfigOption,
    JsonOption,
    MetricsPortOption,
    RunOption,
    SetOption,
    StateOption,
    err,
    out,
    print_json,
)
from onerec.garbage import calm
from onerec.signals import stopping

if TYPE_CHECKING:
    from trainer.sampler_stats import Stats

STATUS_SECONDS = 5.0


def register(app: typer.Typer) -> None:
    """Add both commands to `app`."""
    app.command()(sampler)
    app.command("pairs-replica")(pairs_replica)


def _say(text: str) -> None:
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def sampler(
    state: StateOption,
    run: RunOption,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as sessions and snapshots arrive, until stopped.")] = False,
    queue: Annotated[int, typer.Option(min=1, help="Pairs that may be unread, and sampled sessions that may wait.")] = 256,
    threads: Annotated[int, typer.Option(min=1, help="CPU cores for the search.")] = 1,
    kafka: Annotated[
        bool, typer.Option("--kafka", help="Sessions from Kafka and pairs into it, beside other samplers; follows.")
    ] = False,
    bootstrap: BootstrapOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    metrics_port: MetricsPortOption = None,
    json: JsonOption = False,
) -> None:
    """Make preference pairs for a run: sampled sessions, each answered by the newest snapshot, best and worst by reward.

    A share `preference.ratio` of the sessions, once the trainer has learnt them, is answered with `preference.responses`
    sessions from the run's newest checkpoint; its reward model picks winner and loser. They go to RUN/pairs, where
    `onerec train` finds them. Stop it or kill it whenever you like; it goes on from the last pair.

    With --kafka or --bootstrap the sessions come from the topic `sessions` and the pairs go to `preference-pairs`;
    `onerec pairs-replica` brings them to the trainer. --state is then the trainer's, for its catalogue.

    Examples:

        onerec sampler --state state --run run --follow

        onerec sampler --state rank0 --run run --bootstrap 127.0.0.1:9092
    """
    configuration = load_config(config, settings, bootstrap)
    kafka = kafka or bootstrap is not None

    from onerec.monitor.clock import StateClock
    from onerec.monitor.of_sampler import SamplerMetrics
    from onerec.monitor.opening import linger, open_metrics
    from trainer.checkpoint import newest_version
    from trainer.kafka_sampler import sample_from_kafka
    from trainer.sampler import sample

    report = reporter(quiet=json)
    with (
        open_metrics("sampler", configuration, metrics_port) as metrics,
        StateClock(state, configuration.freshness.clock) as clock,
    ):
        watch = SamplerMetrics(metrics, clock.now_ms, partial(newest_version, run))

        def progress(stats: Stats) -> None:
            report(stats)
            watch.progress(stats)

        with stopping("stopping after this batch") as stop:
            make = sample_from_kafka if kafka else partial(sample, follow=follow)
            stats = make(
                state,
                run,
                configuration,
                queue=queue,
                threads=threads,
                stopped=lambda: bool(stop),
                say=_say,
                progress=progress,
                wrote=watch.wrote,
            )
        if json:
            print_json(msgspec.to_builtins(stats))
        else:
            out.print(summary(stats), highlight=False, soft_wrap=True)
        if not stop:
            linger(metrics, configuration)


def pairs_replica(
    run: RunOption,
    until_end: Annotated[bool, typer.Option("--until-end", help="End once nothing is left to read.")] = False,
    bootstrap: BootstrapOption = None,
    metrics_port: MetricsPortOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Copy a run's preference pairs from Kafka into RUN/pairs, where its trainer finds them.

    Run one beside each trainer. Each session's pair comes once; stop it or kill it whenever you like.

    Example: `onerec pairs-replica --run run --bootstrap 127.0.0.1:9092`
    """
    from onerec.monitor.of_kafka import CopyMetrics
    from onerec.monitor.opening import linger, open_metrics
    from trainer.kafka_sampler import PairCopy

    configuration = load_config(config, settings, bootstrap)
    calm()

    def tell(status: dict[str, Any]) -> str:
        return f"{status['records']:,} records, {status['pairs']:,} pairs; {lag(status)}"

    with open_metrics("pairs-replica", configuration, metrics_port) as metrics:
        measured = CopyMetrics(metrics, "preference-pairs")
        with stopping() as stop, PairCopy(configuration.kafka, run, say=_say) as copy:
            result = drive(copy, stop, tell, seen=measured, until_end=until_end, json=json)
        if json:
            print_json(result)
        else:
            out.print(f"{result['run']['records']:,} records in {result['seconds']:.1f} s; {tell(result)}", highlight=False)
        if not stop:
            linger(metrics, configuration)


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
