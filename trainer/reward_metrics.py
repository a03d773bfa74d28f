"""How good the reward model's predictions were before it learnt the answer: AUC, calibration and lift a tower.

Labels may be soft: swt and vtr lie between 0 and 1. AUC is then that of a coin that shows 1 with the label's
probability: each window counts as a positive with weight y and as a negative with weight 1 - y, as in the cross-entropy
that the model is trained with (eq. 7). It needs no threshold, and is the usual AUC for labels 0 and 1; but even the
labels themselves would not reach 1 as predictions, so the rank correlation (Spearman) stands beside it.

Shapes: n windows; the last axis of four is `TARGETS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from onerec.errors import Failure, UserError
from trainer.reward_weights import TARGETS

Floats = NDArray[np.floating]
CALIBRATION_BINS = 10
TIME_BINS = 8
COLOURS = {"swt": "tab:red", "vtr": "tab:blue", "wtr": "tab:green", "ltr": "tab:orange"}
NAMES = {"swt": "watch time (swt)", "vtr": "effective views (vtr)", "wtr": "follow (wtr)", "ltr": "like (ltr)"}


class TowerMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One tower over some windows; None where the labels decide nothing (all alike), or there is no window.

    `ece`: expected calibration error over bins of equally many windows. `lift`: mean label of the tenth with the highest
    predictions, over that of all.
    """

    windows: int
    base_rate: float | None
    mean_prediction: float | None
    auc: float | None
    correlation: float | None
    ece: float | None
    lift: float | None


class TimeBin(msgspec.Struct, frozen=True, kw_only=True):
    """Windows that follow each other in event time, from `begin` to `end`, ms, both included."""

    begin: int
    end: int
    windows: int
    towers: dict[str, TowerMetrics]


def soft_auc(predictions: Floats, labels: Floats) -> float | None:
    """AUC of `predictions` [n] for labels [n] in [0, 1], see the module's head; None where there is but one kind."""
    if not len(labels) or labels.sum() <= 0 or (1 - labels).sum() <= 0:
        return None
    kinds = np.repeat([1, 0], len(labels))
    weights = np.concatenate([labels, 1 - labels])
    return float(roc_auc_score(kinds, np.tile(predictions, 2), sample_weight=weights))


def calibration(predictions: Floats, labels: Floats, bins: int = CALIBRATION_BINS) -> NDArray[np.float64]:
    """The reliability curve [b, 3]: mean prediction, mean label and number of windows of groups by rising prediction.

    Groups are equally large, so that no point of the curve rests on a handful of windows; a rare target's
    predictions all lie in one corner, and groups of equal width would hold next to nothing elsewhere.
    """
    order = np.argsort(predictions, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    rows = [(predictions[group].mean(dtype=float), labels[group].mean(dtype=float), len(group)) for group in groups]
    return np.array(rows, np.float64).reshape(-1, 3)


def lift(predictions: Floats, labels: Floats, share: float = 0.1) -> float | None:
    """Mean label of the `share` of windows with the highest predictions over the mean of all; None without any label."""
    base = labels.mean(dtype=float) if len(labels) else 0.0
    if base <= 0:
        return None
    best = np.argsort(-predictions, kind="stable")[: max(1, round(share * len(labels)))]
    return float(labels[best].mean(dtype=float) / base)


def tower_metrics(predictions: Floats, labels: Floats) -> TowerMetrics:
    """All figures of one tower, `predictions` and `labels` [n]."""
    if not len(labels):
        return TowerMetrics(
            windows=0, base_rate=None, mean_prediction=None, auc=None, correlation=None, ece=None, lift=None
        )
    curve = calibration(predictions, labels)
    varied = len(np.unique(predictions)) > 1 and len(np.unique(labels)) > 1
    return TowerMetrics(
        windows=len(labels),
        base_rate=float(labels.mean(dtype=float)),
        mean_prediction=float(predictions.mean(dtype=float)),
        auc=soft_auc(predictions, labels),
        correlation=float(spearmanr(predictions, labels)[0]) if varied else None,
        ece=float(np.average(np.abs(curve[:, 0] - curve[:, 1]), weights=curve[:, 2])),
        lift=lift(predictions, labels),
    )


def towers(rows: NDArray[np.void]) -> dict[str, TowerMetrics]:
    """Figures of every tower over `rows` of `trainer.reward_log.PREDICTION`."""
    return {
        target: tower_metrics(rows["prediction"][:, place], rows["label"][:, place])
        for place, target in enumerate(TARGETS)
    }


def finite(rows: NDArray[np.void]) -> NDArray[np.void]:
    """The rows whose predictions are numbers; a model that diverged writes others, which no figure can hold."""
    kept: NDArray[np.void] = rows[np.isfinite(rows["prediction"]).all(1)]
    return kept


def by_time(rows: NDArray[np.void], count: int = TIME_BINS) -> list[TimeBin]:
    """The rows in event-time order, in at most `count` groups of about equally many windows."""
    ordered = rows[np.argsort(rows["ts"], kind="stable")]
    return [
        TimeBin(begin=int(group["ts"][0]), end=int(group["ts"][-1]), windows=len(group), towers=towers(group))
        for group in np.array_split(ordered, count)
        if len(group)
    ]


def draw(rows: NDArray[np.void], path: Path, *, bins: Sequence[TimeBin] | None = None, title: str = "") -> None:
    """A picture (the suffix names its kind): a reliability plot a tower, below them AUC against event time.

    Raises UserError without a row, Failure where the disk refuses.
    """
    if not len(rows):
        raise UserError(f"{path} not drawn: there is no prediction yet")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic([list(TARGETS), ["auc"] * len(TARGETS)], figsize=(12, 6.5))
    for place, target in enumerate(TARGETS):
        axis = axes[target]
        curve = calibration(rows["prediction"][:, place], rows["label"][:, place])
        limit = 1.05 * max(curve[:, :2].max(), 1e-3)
        axis.plot([0, limit], [0, limit], color="black", linewidth=0.8, linestyle=":")
        axis.plot(curve[:, 0], curve[:, 1], marker="o", markersize=4, color=COLOURS[target])
        axis.set(title=NAMES[target], xlim=(0, limit), ylim=(0, limit), xlabel="predicted")
    axes[TARGETS[0]].set_ylabel("observed, mean of a tenth")
    over_time: Any = axes["auc"]
    groups = list(by_time(rows) if bins is None else bins)
    times = [datetime.fromtimestamp(group.end / 1000, UTC) for group in groups]
    for target in TARGETS:
        points = [(time, group.towers[target].auc) for time, group in zip(times, groups, strict=True)]
        known = [(time, value) for time, value in points if value is not None]
        over_time.plot([time for time, _ in known], [value for _, value in known], marker="o", markersize=4,
                       label=NAMES[target], color=COLOURS[target])
    over_time.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    over_time.set(title="AUC by event time (UTC); 0.5 is chance")
    over_time.legend(frameon=False, ncols=4)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title or f"Predicted before it is learnt: {len(rows):,} windows")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise Failure(f"--plot {path} cannot be written: {error}; name a writable .png, .svg or .pdf") from error
    finally:
        pyplot.close(figure)
