"""The chain as the page shows it: the age of what each stage knows, what each hand-off adds, and the headline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from onerec.monitor.ages import log_clock
from onerec.monitor.settings import ClockMode

STAGES: Final = ("event", "history", "session", "trained", "exported", "loaded", "answered")


def chain(
    marks: Mapping[str, int | None], answered: Sequence[int | None], wall_ms: int, *, mode: ClockMode, objective_s: float
) -> dict[str, Any]:
    """Stages with their event time and age in ms by the log's clock; `answered` are the watermarks of replicas that answer.

    The headline is the age of what the replica that knows least answers from. A stage without a mark has no age: None,
    never 0; a negative age stays negative, since it tells of a clock that is wrong. Without any event there is no log
    clock in a replay, and so no age.
    """
    newest = marks.get("event")
    clock = log_clock(newest, wall_ms, mode)
    known = [mark for mark in answered if mark is not None]
    all_marks = {**marks, "answered": min(known) if known and len(known) == len(answered) else None}
    stages: list[dict[str, Any]] = []
    before: int | None = None
    for name in STAGES:
        mark = all_marks.get(name)
        age = None if mark is None or clock is None else clock - mark
        stages.append({"name": name, "watermark_ms": mark, "age_ms": age,
                       "added_ms": None if age is None or before is None else age - before})
        before = before if age is None else age
    headline = stages[-1]["age_ms"]
    within = None if headline is None else headline <= objective_s * 1000
    return {
        "stages": stages,
        "clock_ms": clock,
        "wall_ms": wall_ms,
        "mode": None if clock is None else "live" if clock == wall_ms else "log",
        "objective_ms": objective_s * 1000,
        "headline_ms": headline,
        "within": within,
    }
