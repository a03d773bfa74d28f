"""Curves that stay small however long a run: sums over cells of one width, which doubles when there are too many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.evaluate import Line

Cell = dict[str, float]
CELLS = 240
POINTS = 48
LEAST_SCORED = 100
MINUTE_MS = 60_000
RECOMMENDERS = ("onerec", "popularity", "covisitation")


class Curve:
    """Sums by place: `add(place, values)` into the cell `place // width`; at most `cells` of them."""

    def __init__(self, width: int, cells: int = CELLS) -> None:
        self.width = width
        self._limit = cells
        self._cells: dict[int, Cell] = {}

    def add(self, place: int, values: Mapping[str, float]) -> None:
        """Adds every value into the cell of `place`."""
        _into(self._cells.setdefault(place // self.width, {}), values)
        while len(self._cells) > self._limit:
            self.width *= 2
            merged: dict[int, Cell] = {}
            for key, cell in self._cells.items():
                _into(merged.setdefault(key // 2, {}), cell)
            self._cells = merged

    def cells(self) -> list[tuple[int, Cell]]:
        """(beginning of the cell, its sums) in order."""
        return [(key * self.width, self._cells[key]) for key in sorted(self._cells)]


def _into(total: Cell, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        total[name] = total.get(name, 0.0) + value


def ratio(cell: Cell, above: str, below: str) -> float | None:
    """A cell's sum over another; None where the other is missing or 0: nothing was counted there."""
    return cell.get(above, 0.0) / cell[below] if cell.get(below) else None


class TrainingCurves:
    """The lines of RUN/metrics.jsonl as curves: hit rates by event time, losses by step."""

    def __init__(self, cells: int = CELLS) -> None:
        self._hits = Curve(MINUTE_MS, cells)
        self._losses = Curve(1, cells)
        self._totals: Cell = {}
        self._last: Line | None = None

    def add(self, line: Line) -> None:
        """One batch more."""
        self._last = line
        values: Cell = {"steps": 1, "skipped": float(not line.applied), "preference_steps": float(line.preference is not None)}
        if line.loss is not None:
            values |= {"ntp": line.loss * line.codes, "codes": line.codes}
        if line.preference is not None and line.preference.loss is not None:
            values |= {"preference": line.preference.loss * line.preference.pairs, "pairs": line.preference.pairs}
        if line.reward_loss is not None:
            values |= {"reward": line.reward_loss * line.sessions, "judged": line.sessions}
        self._losses.add(line.step, values)
        _into(self._totals, {"sessions": line.sessions, "scored": line.scored, **values})
        if line.scored:
            hits = {name: line.scores[name]["hit@10"] for name in RECOMMENDERS if "hit@10" in line.scores.get(name, {})}
            self._hits.add(line.ts, {"scored": line.scored, **hits})

    def to_json(self) -> dict[str, Any] | None:
        """Curves as columns; None before the first line."""
        last = self._last
        if last is None:
            return None
        hits, steps = self._scored(), self._losses.cells()
        present = [name for name in RECOMMENDERS if any(name in cell for _, cell in hits)]
        losses = {"ntp": "codes", "preference": "pairs", "reward": "judged"}
        return {
            "hit_rate": {
                "ts": [place for place, _ in hits],
                "scored": [int(cell["scored"]) for _, cell in hits],
                "series": {name: [ratio(cell, name, "scored") for _, cell in hits] for name in present},
            },
            "losses": {
                "step": [place for place, _ in steps],
                "series": {name: [ratio(cell, name, count) for _, cell in steps] for name, count in losses.items()},
            },
            "steps": int(self._totals["steps"]),
            "skipped": int(self._totals["skipped"]),
            "preference_steps": int(self._totals["preference_steps"]),
            "sessions": int(self._totals["sessions"]),
            "scored": int(self._totals["scored"]),
            "newest": {"step": last.step, "ts": last.ts, "gradient": last.gradient, "expert_load": last.expert_load,
                       "applied": last.applied},
        }

    def _scored(self) -> list[tuple[int, Cell]]:
        """Cells of hits put together until each has enough windows: single minutes of a small log say nothing.

        A group that is still short at the end joins the one before.
        """
        enough = max(LEAST_SCORED, self._totals["scored"] / POINTS)
        groups: list[tuple[int, Cell]] = []
        for place, cell in self._hits.cells():
            if groups and groups[-1][1]["scored"] < enough:
                _into(groups[-1][1], cell)
            else:
                groups.append((place, dict(cell)))
        if len(groups) > 1 and groups[-1][1]["scored"] < enough:
            _, short = groups.pop()
            _into(groups[-1][1], short)
        return groups
