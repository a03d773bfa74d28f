"""`onerec train`: learn the session log, once or without end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from onerec.config import explicit_settings, load_config
from onerec.console import (
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
from onerec.errors import UserError
from onerec.signals import stopping

if TYPE_CHECKING:
    from trainer.loop import Progress, Result

METRIC_NAMES = {
    "hit@1": "next item: hit rate@1",
    "hit@5": "next item: hit rate@5",
    "hit@10": "next item: hit rate@10",
    "ndcg@5": "next item: NDCG@5",
    "ndcg@10": "next item: NDCG@10",
    "session_hit": "session: any of its items",
    "session_recall": "session: share of its items",
    "session_ndcg": "session: NDCG",
    "best_recall": "best beam: share of its items",
}
"""Rows of the summary: the metrics of `trainer.evaluate` in words."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(train)


def train(
    state: StateOption,
    run: RunOption,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as sessions arrive, until stopped.")] = False,
    preset: Annotated[
        str | None, typer.Option(help="Size of the model: tiny, small, 0.1B, 1B (as `--set train.preset=`).")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw loss, hit rate and NDCG by event time to this file.")] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    metrics_port: MetricsPortOption = None,
    json: JsonOption = False,
) -> None:
    """Learn to write sessions: next-token prediction on the log's high-quality sessions.

    Each session is scored before it is learnt, so the figures are of data never seen; popularity and last-item
    co-visitation are scored and updated beside it. A run resumes by itself: stop it with Ctrl-C, SIGTERM or kill -9 and
    start the same command again; the weights become the same as without the stop.

    Example: `onerec train --state state --run run --preset small --plot curve.png`
    """
    began = time.monotonic()
    asked = [*(settings or []), *([f'train.preset="{preset}"'] if preset else [])]
    configuration = load_config(config, asked)
    if plot is not None and not plot.resolve().parent.is_dir():
        raise UserError(f"--plot {plot}: the folder {plot.resolve().parent} does not exist; make it first")

    from onerec.monitor.clock import StateClock
    from onerec.monitor.of_train import TrainMetrics
    from onerec.monitor.opening import linger, open_metrics
    from trainer.evaluate import means, read_metrics
    from trainer.loop import METRICS_FILE
    from trainer.loop import train as learn
    from trainer.parallel import follow as follow_leader
    from trainer.ranks import Ranks

    said = "stopping after this batch; a checkpoint is written"
    with ExitStack() as kept:
        with Ranks.from_environment() as ranks, stopping(said if ranks.leads else None) as stop:
            if not ranks.leads:
                follow_leader(state, run, ranks)
                return
            metrics = kept.enter_context(open_metrics("train", configuration, metrics_port))
            clock = kept.enter_context(StateClock(state, configuration.freshness.clock))
            watch = TrainMetrics(metrics, clock.now_ms)
            with _reporting(quiet=json) as report:

                def progress(progress: Progress) -> None:
                    report(progress)
                    watch.step(progress)

                result = learn(
                    state,
                    run,
                    configuration,
                    follow=follow,
                    explicit=[
                        f"{section}.{key}" for section, keys in explicit_settings(config, asked).items() for key in keys
                    ],
                    stopped=lambda: bool(stop),
                    say=lambda text: err.print(text, highlight=False),
                    progress=progress,
                    saved=watch.saved,
                    ready=lambda: watch.ready(time.monotonic() - began),
                    ranks=ranks,
                )
        lines = read_metrics(run / METRICS_FILE)
        if plot is not None:
            from trainer.curves import draw

            draw(lines, plot)
        scored, scores = means(lines)
        if json:
            print_json({**msgspec.to_builtins(result), "scored_windows": scored, "scores": scores})
        else:
            _print_summary(result, scored, scores)
        if not stop:
            linger(metrics, configuration)


@contextmanager
def _reporting(*, quiet: bool) -> Iterator[Any]:
    """A progress line on standard error; one plain line now and then where that is no terminal."""
    if quiet or not err.is_terminal:
        seen = {"sessions": 0}

        def plain(progress: Progress) -> None:
            if not quiet and progress.sessions >= 2 * seen["sessions"]:
                seen["sessions"] = progress.sessions
                err.print(_state_line(progress), highlight=False)

        yield plain
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(BarColumn(bar_width=24), TextColumn("{task.description}"), TimeRemainingColumn(), console=err) as bar:
        task = bar.add_task("reading the log", total=None)

        def live(progress: Progress) -> None:
            bar.update(
                task, description=_state_line(progress), completed=progress.sessions, total=progress.log_sessions
            )

        yield live


def _state_line(progress: Progress) -> str:
    line = progress.line
    loss = "not finite, step skipped" if line.loss is None else f"{line.loss:.3f}"
    return (
        f"session {progress.sessions:,} of {progress.log_sessions:,}  loss {loss}  "
        f"{progress.sessions_per_second:.0f} sessions/s  learnt up to {_time(progress.watermark)}"
    )


def _time(milliseconds: int | None) -> str:
    from datetime import UTC, datetime

    if milliseconds is None:
        return "no data"
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _print_summary(result: Result, scored: int, scores: dict[str, dict[str, float]]) -> None:
    from rich.table import Table

    out.print(
        f"{result.sessions:,} sessions, {result.windows:,} windows in {result.steps:,} steps"
        f"{f' ({result.skipped_steps} skipped: not finite)' if result.skipped_steps else ''}; "
        f"this time {result.new_sessions:,} in {result.seconds:.1f} s ({result.sessions_per_second:.0f}/s)",
        highlight=False,
    )
    out.print(f"learnt up to {_time(result.watermark)}; codebook {result.codebook_version}", highlight=False)
    if result.unknown_targets or result.unknown_history:
        out.print(
            f"left out, not in the catalogue: {result.unknown_targets:,} target and {result.unknown_history:,} history "
            "items",
            highlight=False,
        )
    if result.judged_windows:
        out.print(
            f"reward model: {result.judged_windows:,} windows of all sessions predicted, then learnt (onerec reward shows how "
            "well)",
            highlight=False,
        )
    pairs = result.pairs
    if any(msgspec.to_builtins(pairs).values()):
        out.print(
            f"preference pairs: {pairs.learnt:,} learnt; passed over: {pairs.dropped:,} dropped by the sampler, "
            f"{pairs.stale:,} too old, {pairs.early:,} before the seed model, {pairs.other_codebook:,} of another codebook",
            highlight=False,
        )
    if scores:
        table = Table(title=f"Before learning them: means over {scored:,} windows", title_justify="left")
        table.add_column("")
        for name in scores:
            table.add_column(name, justify="right")
        for metric, text in METRIC_NAMES.items():
            table.add_row(
                text, *(f"{values[metric]:.4f}" if metric in values else "–" for values in scores.values())
            )
        out.print(table)
    out.print(f"checkpoint {result.checkpoint or 'none yet'}", highlight=False)
