"""How old the knowledge is that users are served from: event → history → session → trained → exported → served.

Pure functions over watermarks in epoch milliseconds. "Log time" is the time of the newest event; ages against it mean
the same in live and in replayed time. Where a stage has no watermark there is no age: never 0.
"""

from __future__ import annotations

import datetime
from typing import Any

import msgspec

STAGES = ("event", "history", "session", "trained", "exported", "served")


class Watermarks(msgspec.Struct, frozen=True, kw_only=True):
    """Event time that each stage has reached, epoch ms; None: nothing there yet, or it could not be asked."""

    event: int | None = None
    history: int | None = None
    session: int | None = None
    trained: int | None = None
    exported: int | None = None
    served: int | None = None


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One stage: its watermark, and its ages in ms against log time and against the wall clock.

    An age below zero: the stage has learnt from later events than this log holds (another state, or a wrong clock).
    """

    name: str
    watermark_ms: int | None
    age_ms: int | None
    wall_age_ms: int | None


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """All stages in order, and the headline: newest event minus what is served from, in ms."""

    stages: tuple[Stage, ...]
    event_to_served_ms: int | None


def chain(watermarks: Watermarks, wall_ms: int) -> Chain:
    """Ages of every stage at the wall-clock time `wall_ms`."""
    newest = watermarks.event
    stages = []
    for name in STAGES:
        mark: int | None = getattr(watermarks, name)
        stages.append(
            Stage(
                name=name,
                watermark_ms=mark,
                age_ms=None if mark is None or newest is None else newest - mark,
                wall_age_ms=None if mark is None else wall_ms - mark,
            )
        )
    return Chain(stages=tuple(stages), event_to_served_ms=stages[-1].age_ms)


def to_json(found: Chain) -> dict[str, Any]:
    """For machines: each stage {watermark_ms, age_ms, wall_age_ms} or null, then `event_to_served_ms`."""
    report: dict[str, Any] = {
        stage.name: None
        if stage.watermark_ms is None
        else {"watermark_ms": stage.watermark_ms, "age_ms": stage.age_ms, "wall_age_ms": stage.wall_age_ms}
        for stage in found.stages
    }
    report["event_to_served_ms"] = found.event_to_served_ms
    return report


def format_time(ms: int | None) -> str:
    """Epoch milliseconds as a UTC date and time for people; `no data` for None."""
    if ms is None:
        return "no data"
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def format_age(age_ms: int | None) -> str:
    """An age for people: `no data`, `420 ms`, `3.2 s`, `5 min 12 s`, `7 h 04 min`, `3 d 02 h`; `-` where negative."""
    if age_ms is None:
        return "no data"
    sign, ms = ("-", -age_ms) if age_ms < 0 else ("", age_ms)
    seconds = ms // 1000
    if ms < 1_000:
        text = f"{ms} ms"
    elif seconds < 60:
        text = f"{ms / 1000:.1f} s" if ms < 59_950 else "1 min 00 s"
    elif seconds < 3_600:
        text = f"{seconds // 60} min {seconds % 60:02d} s"
    elif seconds < 86_400:
        text = f"{seconds // 3600} h {seconds // 60 % 60:02d} min"
    else:
        text = f"{seconds // 86_400} d {seconds // 3600 % 24:02d} h"
    return sign + text
