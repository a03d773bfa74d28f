"""`onerec evaluate`: what a run's newest checkpoint is worth on sessions that it has not learnt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onerec.console import JsonOption, RunOption, StateOption, err, out, print_json
from onerec.errors import UserError

if TYPE_CHECKING:
    from simulator.world import World
    from trainer.evaluation import Evaluation
    from trainer.judge import Judgement

ROWS = {
    "hr@5": "next item: hit rate (= recall) @5",
    "hr@10": "next item: hit rate (= recall) @10",
    "ndcg@5": "next item: NDCG@5",
    "ndcg@10": "next item: NDCG@10",
    "session_hit": "session: any of its items",
    "session_recall": "session: share of its items",
    "session_ndcg": "session: NDCG",
    "legal": "legal, OneRec without the trie",
    "coverage": "share of the catalogue shown",
    "diversity": "diversity within a session",
    "new_items": "items younger than 24 h",
}
"""Rows of the table: names of `trainer.judge.Judgement.line` in words."""
KINDS = {"reward": "reward model", "true_reward": "true reward"}
SESSIONS = {"mean": "mean of the sessions", "max": "highest", "first": "session shown"}
LEARNT = "the checkpoint has learnt these sessions, as the log holds no others: the figures say what it remembers, not more"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(evaluate)


def evaluate(
    state: StateOption,
    run: RunOption,
    cases: Annotated[int, typer.Option(min=1, help="The newest sessions that are not learnt, so many at most.")] = 200,
    width: Annotated[int, typer.Option(min=1, help="Sessions generated a case.")] = 32,
    world: Annotated[
        str | None,
        typer.Option(
            help="The simulated world of the log, for true rewards: `users=1000,items=2000,days=7,seed=0`, as given to "
            "`onerec simulate` (what is left out has its default), or a JSON file of the same.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures to this file.", show_default=False)] = None,
    json: JsonOption = False,
) -> None:
    """Judge a run's newest checkpoint beside popularity and co-visitation, on sessions of the log that it has not learnt.

    Next item by full ranking, whole sessions, rewards of the sessions generated (by the run's own reward model; of a
    simulated world the true ones), legality, coverage, diversity, new items.

    Examples:

        onerec evaluate --state state --run run --cases 500

        onerec evaluate --state state --run run --world users=2000,items=3000,seed=1 --plot evaluation.png
    """
    if plot is not None and not plot.resolve().parent.is_dir():
        raise UserError(f"--plot {plot}: the folder {plot.resolve().parent} does not exist; make it first")
    known = None if world is None else _world(world)
    from trainer.evaluation import evaluate_run

    found = evaluate_run(state, run, cases=cases, width=width, world=known)
    if plot is not None:
        _draw(found, plot)
    if json:
        for judged in found.judged:
            print_json(
                {
                    "method": judged.name, **judged.judgement.line(), "seconds": round(judged.seconds, 3),
                    "learnt": found.learnt, "step": found.checkpoint.step,
                }
            )
        return
    _print(found)
    if found.learnt:
        err.print(f"note: {LEARNT}", style="yellow", highlight=False)


def _world(text: str) -> World:
    """The world of `--world`; raises UserError for what `onerec simulate` would not take."""
    import msgspec

    from simulator.world import World, WorldConfig

    known = [field.name for field in msgspec.structs.fields(WorldConfig)]
    try:
        if text.endswith(".json"):
            given: dict[str, Any] = msgspec.json.decode(Path(text).read_bytes(), type=dict[str, Any])
        else:
            given = dict(part.partition("=")[::2] for part in text.split(",") if part)
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise msgspec.ValidationError(f"unknown name {unknown[0]!r}")
        return World(msgspec.convert(given, WorldConfig, strict=False))
    except OSError as error:
        raise UserError(f"--world {text}: {error.strerror}; name a JSON file that exists") from None
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        names = ", ".join(known)
        raise UserError(f"--world {text}: {error}; write name=value,name=value with names among {names}") from None


def _rewards(judgement: Judgement, kind: str) -> dict[str, float]:
    told = judgement.reward if kind == "reward" else judgement.true_reward
    return {
        f"{KINDS[kind]}: {target}, {SESSIONS[name]}": value
        for target, of in (told or {}).items()
        for name, value in of.items()
    }


def _print(found: Evaluation) -> None:
    from rich.table import Table

    judgements = [judged.judgement for judged in found.judged]
    table = Table(
        title=f"{judgements[0].cases:,} sessions, checkpoint of step {found.checkpoint.step:,}", title_justify="left"
    )
    table.add_column("")
    for judged in found.judged:
        table.add_column(judged.name, justify="right")
    lines = [judgement.line() for judgement in judgements]
    for name, text in ROWS.items():
        text += f" (by {judgements[0].diversity_by})" if name == "diversity" else ""
        table.add_row(text, *(f"{line[name]:.4f}" for line in lines))
    for kind in KINDS:
        rewards = [_rewards(judgement, kind) for judgement in judgements]
        if rewards[0]:
            table.add_section()
        for name in rewards[0]:
            table.add_row(name, *(f"{told[name]:.4f}" for told in rewards))
    table.add_section()
    table.add_row("seconds", *(f"{judged.seconds:.1f}" for judged in found.judged))
    out.print(table)


def _draw(found: Evaluation, path: Path) -> None:
    """Bars of every metric by recommender, rewards beside them, to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [dict(ROWS)]
    lines = [dict(judged.judgement.line()) for judged in found.judged]
    for kind in KINDS:
        rewards = [_rewards(judged.judgement, kind) for judged in found.judged]
        if rewards[0]:
            panels.append({name: name for name in rewards[0]})
            for line, told in zip(lines, rewards, strict=True):
                line.update(told)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(8 * len(panels), 5.5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for place, (judged, line) in enumerate(zip(found.judged, lines, strict=True)):
            heights = [row + 0.25 * (place - 1) for row in range(len(panel))]
            axis.barh(heights, [line[name] for name in panel], height=0.23, label=judged.name)
        axis.set_yticks(range(len(panel)), list(panel.values()))
        axis.invert_yaxis()
    axes[0][0].legend()
    learnt = " (sessions that it has learnt)" if found.learnt else ""
    figure.suptitle(f"{found.judged[0].judgement.cases:,} sessions{learnt}, checkpoint of step {found.checkpoint.step:,}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
