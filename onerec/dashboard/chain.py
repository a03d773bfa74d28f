"""The chain as the page shows it: the age of what each stage knows, what each hand-off adds, and the headline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

STAGES: Final = ("event", "history", "session", "trained", "exported", "loaded", "answered")


def chain(
    marks: Mapping[str, int | None], answered: Sequence[int | None], *, clock_ms: int | None, live: bool,
    factor: float | None, wall_ms: int, objective_s: float,
) -> dict[str, Any]:  # fmt: skip
    """Stages with their event time and age in ms by the log's clock; `answered` are the watermarks of replicas that answer.

    The headline is the age of what the replica that knows least answers from. A stage without a mark has no age: None,
    never 0; a negative age stays negative, since it tells of a clock that is wrong. `added_ms`: by how much a hand-off makes
    the oldest so far older. In a replay the objective is as many
    times longer as the log runs faster than time (`factor`, where known).
    """
    known = [mark for mark in answered if mark is not None]
    all_marks = {**marks, "answered": min(known) if known and len(known) == len(answered) else None}
    stages: list[dict[str, Any]] = []
    oldest: int | None = None
    for name in STAGES:
        mark = all_marks.get(name)
        age = None if mark is None or clock_ms is None else clock_ms - mark
        # Stages are not always in order: the newest session may end after what histories are complete to.
        added = None if age is None or oldest is None else max(0, age - oldest)
        stages.append({"name": name, "watermark_ms": mark, "age_ms": age, "added_ms": added})
        oldest = age if oldest is None or (age is not None and age > oldest) else oldest
    headline = stages[-1]["age_ms"]
    objective = objective_s * 1000 * max(1.0, factor or 1.0)
    return {
        "stages": stages,
        "clock_ms": clock_ms,
        "wall_ms": wall_ms,
        "mode": None if clock_ms is None else "live" if live else "log",
        "factor": factor,
        "objective_ms": objective,
        "headline_ms": headline,
        "within": None if headline is None else headline <= objective,
    }
