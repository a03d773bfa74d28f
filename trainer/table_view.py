"""The comparison as a person reads it: rich tables in the layout of the paper's Table 1, Markdown, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.judge import mean_and_deviation
from trainer.methods import METHODS
from trainer.reward_weights import TARGETS

if TYPE_CHECKING:
    from rich.table import Table

    from trainer.table import Line

KINDS = {"true_reward": "True reward", "reward": "Reward by the reward model"}
OTHERS = {
    "hr@5": "HR@5", "hr@10": "HR@10", "ndcg@5": "NDCG@5", "ndcg@10": "NDCG@10", "session_hit": "session hit",
    "session_ndcg": "session NDCG", "legal": "legal", "coverage": "coverage", "diversity": "diversity",
    "new_items": "new items", "seconds": "seconds",
}
"""Columns beside the rewards, in words."""
REFERENCE = "onerec"


class Summary(NamedTuple):
    """A method over its seeds; each value is (mean, sample deviation)."""

    method: str
    seeds: int
    values: dict[str, tuple[float, float]]


def flat(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by one name each: `reward.swt.mean`, `hr@10`."""
    found = {name: float(values[name]) for name in OTHERS}
    for kind in KINDS:
        for target, told in (values[kind] or {}).items():
            found |= {f"{kind}.{target}.{name}": value for name, value in told.items()}
    return found


def summaries(lines: Sequence[Line]) -> list[Summary]:
    """Every method that has a line, in the order of the table."""
    found = []
    for method in METHODS:
        mine = [flat(line.values) for line in lines if line.method == method]
        if mine:
            found.append(Summary(method, len(mine), mean_and_deviation(mine)))
    return found


def against_reference(lines: Sequence[Line], names: Sequence[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each method, mean and deviation over seeds of its difference to OneRec's line of the same seed."""
    reference = {line.seed: flat(line.values) for line in lines if line.method == REFERENCE}
    found = {}
    for method in METHODS:
        pairs = [
            {name: value - reference[line.seed][name] for name, value in flat(line.values).items() if name in names}
            for line in lines
            if line.method == method and line.seed in reference
        ]
        if pairs and method != REFERENCE:
            found[method] = mean_and_deviation(pairs)
    return found


def reward_table(found: Sequence[Summary], kind: str) -> Table | None:
    """Mean and max of the four rewards by method; None where nobody told this kind."""
    columns = [f"{kind}.{target}.{name}" for target in TARGETS for name in ("mean", "max")]
    if not any(columns[0] in row.values for row in found):
        return None
    heads = [f"{target} {name}" for target in TARGETS for name in ("mean", "max")]
    return _table(f"{KINDS[kind]}, over the sessions generated a case", heads, columns, found)


def other_table(found: Sequence[Summary]) -> Table:
    """Accuracy, legality, coverage, diversity, new items and seconds by method."""
    return _table("Next item, session, what is shown, time", list(OTHERS.values()), list(OTHERS), found)


def markdown(lines: Sequence[Line]) -> str:
    """All tables as Markdown, and the differences to OneRec paired by seed."""
    found = summaries(lines)
    parts = []
    for kind, title in KINDS.items():
        columns = [f"{kind}.{target}.{name}" for target in TARGETS for name in ("mean", "max")]
        if any(columns[0] in row.values for row in found):
            heads = [f"{target} {name}" for target in TARGETS for name in ("mean", "max")]
            parts.append(_markdown(title, heads, columns, found))
    parts.append(_markdown("Next item, session, what is shown, time", list(OTHERS.values()), list(OTHERS), found))
    told = [kind for kind in KINDS if any(f"{kind}.swt.mean" in row.values for row in found)]
    for kind in told[:1]:
        names = [f"{kind}.{target}.{name}" for target in ("swt", "ltr") for name in ("mean", "max", "first")]
        paired = against_reference(lines, names)
        seeds = len({line.seed for line in lines})
        rows = [Summary(method, seeds, values) for method, values in paired.items()]
        heads = [name.removeprefix(f"{kind}.").replace(".", " ") for name in names]
        parts.append(_markdown(f"{KINDS[kind]}: difference to OneRec of the same seed", heads, names, rows, signed=True))
    return "\n\n".join(parts) + "\n"


def plot(lines: Sequence[Line], path: Path) -> None:
    """Mean and max of the four rewards by method, true where there are any, with deviations, as a picture at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = summaries(lines)
    kind = "true_reward" if any("true_reward.swt.mean" in row.values for row in found) else "reward"
    figure, axes = pyplot.subplots(1, len(TARGETS), figsize=(14, 1.2 + 0.3 * len(found)), sharey=True)
    names = [METHODS[row.method].name for row in found]
    for axis, target in zip(axes, TARGETS, strict=True):
        for name, mark in (("mean", "o"), ("max", "^")):
            values = [row.values.get(f"{kind}.{target}.{name}", (float("nan"), 0.0)) for row in found]
            axis.errorbar(
                [mean for mean, _ in values], range(len(found)), xerr=[deviation for _, deviation in values], fmt=mark,
                capsize=2, label=name,
            )
        axis.set_title(target)
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    axes[0].set_yticks(range(len(found)), names)
    axes[0].legend()
    figure.suptitle(f"{KINDS[kind]}, mean ± deviation over {max((row.seeds for row in found), default=0)} seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _cell(value: tuple[float, float] | None, seeds: int, *, seconds: bool = False, signed: bool = False) -> str:
    if value is None:
        return "–"
    mean, deviation = value
    if seconds:
        return f"{mean:.0f}"
    told = f"{mean:+.4f}" if signed else f"{mean:.4f}"
    return f"{told}±{deviation:.4f}" if seeds > 1 else told


def _best(columns: Sequence[str], found: Sequence[Summary]) -> dict[str, float]:
    """The highest mean of each column that is better higher."""
    return {
        column: max(row.values[column][0] for row in found if column in row.values)
        for column in columns
        if column != "seconds" and any(column in row.values for row in found)
    }


def _cells(
    row: Summary, columns: Sequence[str], best: dict[str, float], strong: Callable[[str], str], *, signed: bool = False
) -> list[str]:
    cells = []
    for column in columns:
        value = row.values.get(column)
        text = _cell(value, row.seeds, seconds=column == "seconds", signed=signed)
        cells.append(strong(text) if value is not None and value[0] == best.get(column) else text)
    return cells


def _table(title: str, heads: Sequence[str], columns: Sequence[str], found: Sequence[Summary]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), show_edge=False, box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", min_width=6)
    best, group = _best(columns, found), ""
    for row in found:
        method = METHODS[row.method]
        if method.group != group:
            group = method.group
            table.add_section()
            table.add_row(f"[italic]{group}[/italic]")
        table.add_row(method.name, *_cells(row, columns, best, lambda text: f"[bold]{text}[/bold]"))
    return table


def _markdown(
    title: str, heads: Sequence[str], columns: Sequence[str], found: Sequence[Summary], *, signed: bool = False
) -> str:
    best = {} if signed else _best(columns, found)
    rows = [
        f"| {METHODS[row.method].name} | "
        + " | ".join(_cells(row, columns, best, lambda text: f"**{text}**", signed=signed)) + " |"
        for row in found
    ]
    return "\n".join([f"**{title}**", "", f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}", *rows])
