"""`onerec table`: every method of the paper's Table 1, compared."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onerec.console import JsonOption, err, out, print_json
from onerec.errors import Failure, UserError

if TYPE_CHECKING:
    from trainer.table import Line

WIDTH = 150
"""Characters of a table over several seeds; a terminal that is narrower folds it."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(table)


def table(
    quick: Annotated[bool, typer.Option("--quick", help="A small world and 32 sessions a case instead of 128.")] = False,
    seeds: Annotated[int, typer.Option(help="How many seeds: worlds, first weights and test cases.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    methods: Annotated[
        str | None, typer.Option(help="Only these, separated by commas; `list` says which there are.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of a KuaiRand log, instead of a simulated world; no true reward there.", show_default=False),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Keep lines, data and models here; the same command goes on there.", show_default=False),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the rewards by method to this file.", show_default=False)] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes at once, of one thread each; default: the cores.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train and judge every method of the paper's Table 1 on the same data, by modelled and by true reward.

    A simulated world is learnt up to its last day and tested there. One reward model a seed, learnt from all training
    sessions, judges all methods; the world's own truth stands beside it.

    Examples:

        onerec table --quick

        onerec table --quick --seeds 3 --methods onerec,onerec+ipa --out comparison --plot comparison.png
    """
    from trainer.methods import METHODS
    from trainer.table import FULL, QUICK, kuairand_comparison, run_table
    from trainer.table_view import KINDS, markdown, other_table, reward_table, summaries
    from trainer.table_view import plot as draw

    if methods == "list":
        for name, method in METHODS.items():
            out.print(f"{name:14} {method.name}: {method.group.lower()}", highlight=False)
        return
    if seeds < 1 or seed < 0 or (jobs is not None and jobs < 1):
        raise UserError("--seeds and --jobs must be 1 or more, --seed 0 or more")
    if plot is not None and not plot.resolve().parent.is_dir():
        raise UserError(f"--plot {plot}: the folder {plot.resolve().parent} does not exist; make it first")
    comparison = (QUICK if quick else FULL) if data is None else kuairand_comparison(data, quick=quick)
    chosen = list(METHODS) if methods is None else [name.strip().lower() for name in methods.split(",") if name.strip()]
    if not chosen:
        raise UserError(f"--methods names none; choose among {', '.join(METHODS)}")

    def heard(line: Line, fresh: bool) -> None:
        if json:
            print_json(line.values)
        else:
            err.print(f"{line.method}, seed {line.seed}: {_short(line)}{'' if fresh else ' (done before)'}", highlight=False)

    with tempfile.TemporaryDirectory(prefix="onerec-table-") if folder is None else nullcontext(str(folder)) as place:
        report = run_table(
            Path(place),
            comparison,
            methods=chosen,
            seeds=range(seed, seed + seeds),
            jobs=jobs or len(os.sched_getaffinity(0)),
            say=lambda text: None if json else err.print(f"  {text}", style="dim", highlight=False),
            progress=heard,
        )
        if folder is not None and report.lines:
            (folder / "table.md").write_text(markdown(report.lines), encoding="utf-8")
    if report.lines and plot is not None:
        draw(report.lines, plot)
    if report.lines and not json:
        found = summaries(report.lines)
        for shown in (*(reward_table(found, kind) for kind in KINDS), other_table(found)):
            if shown is not None:
                out.print()
                out.print(shown, width=None if out.is_terminal else WIDTH + 50 * (seeds > 1), crop=False, soft_wrap=False)
    if report.failures:
        # What failed for want of another says nothing that the other does not say.
        told = [f"{method}, seed {of}: {reason}" for method, of, reason in report.failures if not reason.startswith("needs ")]
        others = len(report.failures) - len(told)
        more = f"; and {others} that need what failed" if others else ""
        again = "the same command tries them again" if folder is not None else "with --out the others' lines are kept"
        raise Failure(f"{'; '.join(told)}{more}; {again}")


def _short(line: Line) -> str:
    """The figures that one looks at while the others run."""
    kind = "true_reward" if line.values["true_reward"] else "reward"
    swt = line.values[kind]["swt"]
    return (
        f"{kind.replace('_', ' ')} swt {swt['mean']:.4f} mean, {swt['max']:.4f} max; hr@10 {line.values['hr@10']:.4f}; "
        f"legal {line.values['legal']:.3f}; {line.values['seconds']:.0f} s"
    )
