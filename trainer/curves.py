"""Curves of a run over event time, beside the baselines that learnt from the same sessions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from onerec.errors import Failure, UserError
from trainer.evaluate import Line, bins, mean_loss, means

POINTS = 16
PANELS = (("hit@10", "next item: hit rate@10"), ("ndcg@10", "next item: NDCG@10"),
          ("session_recall", "session: share of its items generated"))
COLOURS = {"onerec": "tab:red", "popularity": "tab:gray", "covisitation": "tab:blue"}


def draw(lines: Sequence[Line], path: Path, *, mark: int | None = None, title: str = "") -> None:
    """Write a picture (the suffix names its kind): loss, then hit rate and NDCG by event time, all before learning.

    mark: an event time in ms to draw a line at. Raises UserError without any line, Failure where the disk refuses.
    """
    if not lines:
        raise UserError(f"{path} not drawn: the run has learnt nothing yet")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = [line for line in lines if line.scored]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    fresh = [line for line in lines if line.round == 0 or line.scored]
    groups = bins(fresh, POINTS) if first else [[line] for line in fresh]
    losses = [(_time(group), mean_loss(group)) for group in groups]
    axes[0, 0].plot([time for time, _ in losses], [loss for _, loss in losses], color=COLOURS["onerec"])
    axes[0, 0].set_title("test-then-train loss, nats a code")
    for axis, (metric, name) in zip(axes.flat[1:], PANELS, strict=True):
        curves: dict[str, list[tuple[datetime, float]]] = {}
        for group in bins(first, POINTS) if first else []:
            for recommender, values in means(group)[1].items():
                curves.setdefault(recommender, []).append((_time(group), values[metric]))
        for recommender, points in curves.items():
            axis.plot([time for time, _ in points], [value for _, value in points], label=recommender,
                      color=COLOURS.get(recommender))
        axis.set_title(name)
        axis.set_ylim(bottom=0)
        if curves:
            axis.legend(frameon=False)
    for axis in axes.flat:
        if mark is not None:
            axis.axvline(datetime.fromtimestamp(mark / 1000, UTC), color="black", linewidth=0.8, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", rotation=30)
    figure.suptitle(title or "Scored before it is learnt, by event time (UTC)")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise Failure(f"--plot {path} cannot be written: {error}; name a writable .png, .svg or .pdf") from error
    finally:
        pyplot.close(figure)


def _time(group: Sequence[Line]) -> datetime:
    return datetime.fromtimestamp(max(line.ts for line in group) / 1000, UTC)
