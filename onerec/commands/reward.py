"""`onerec reward`: how good the reward model of a run is, by what it predicted before it learnt."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from onerec.console import JsonOption, RunOption, out, print_json
from onerec.errors import UserError

if TYPE_CHECKING:
    from trainer.reward_metrics import TimeBin, TowerMetrics


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(reward)


def reward(
    run: RunOption,
    bins: Annotated[int, typer.Option(min=1, help="Groups of event time.")] = 8,
    plot: Annotated[
        Path | None, typer.Option(help="Draw reliability plots and AUC by event time to this file.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show AUC, calibration and lift of the reward model's four towers, in all and by event time.

    Every window is predicted before it is learnt, so the figures are of data never seen. AUC of the soft labels swt and
    vtr counts a window as a positive with the label's weight and as a negative with the rest.

    Example: `onerec reward --run run --plot reward.png`
    """
    if plot is not None and not plot.resolve().parent.is_dir():
        raise UserError(f"--plot {plot}: the folder {plot.resolve().parent} does not exist; make it first")

    from trainer.reward_log import REWARDS_FILE, read_rewards
    from trainer.reward_metrics import by_time, draw, finite, towers

    rows = read_rewards(run)
    if not len(rows):
        raise UserError(
            f"run {run} has no predictions of a reward model ({run / REWARDS_FILE}); train it with reward.train = true "
            "and a state that has sessions"
        )
    good = finite(rows)
    total, groups = towers(good), by_time(good, bins)
    if plot is not None:
        draw(good, plot, bins=groups)
    if json:
        print_json(
            {
                "windows": len(good),
                "not_finite": len(rows) - len(good),
                "towers": msgspec.to_builtins(total),
                "bins": msgspec.to_builtins(groups),
            }
        )
        return
    if len(good) < len(rows):
        out.print(f"left out: {len(rows) - len(good):,} windows whose prediction was not finite", highlight=False)
    _print_towers(total)
    _print_bins(groups)


def _print_towers(total: dict[str, TowerMetrics]) -> None:
    from rich.table import Table

    windows = max(metrics.windows for metrics in total.values())
    table = Table(title=f"Reward model, {windows:,} windows, each predicted before it was learnt", title_justify="left")
    table.add_column("")
    for name in total:
        table.add_column(name, justify="right")
    for field, text in (
        ("base_rate", "base rate"),
        ("mean_prediction", "mean prediction"),
        ("auc", "AUC"),
        ("correlation", "rank correlation"),
        ("ece", "calibration error (ECE)"),
        ("lift", "lift in the top decile"),
    ):
        table.add_row(text, *(_figure(getattr(metrics, field)) for metrics in total.values()))
    out.print(table)


def _print_bins(groups: list[TimeBin]) -> None:
    from rich.table import Table

    table = Table(title="By event time (UTC): AUC, and calibration error", title_justify="left")
    table.add_column("up to")
    table.add_column("windows", justify="right")
    for name in groups[0].towers if groups else ():
        table.add_column(name, justify="right")
    for group in groups:
        when = datetime.fromtimestamp(group.end / 1000, UTC).strftime("%m-%d %H:%M")
        figures = (f"{_figure(metrics.auc)} {_figure(metrics.ece)}" for metrics in group.towers.values())
        table.add_row(when, f"{group.windows:,}", *figures)
    out.print(table)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
