"""Sections of the configuration that monitoring reads: [metrics], [freshness], [monitor], [publish], [gate]."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

ClockMode = Literal["auto", "live", "log"]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a process serves its metrics: no `port`, nowhere; 0, a free one. `--metrics-port` of a command wins.

    `folder`: each process writes PROCESS.address there while it serves; `name` says what PROCESS is where several are alike.
    `linger`: a job that has ended stays up until it was scraped or told to stop.
    """

    port: Port | None = None
    host: str = "127.0.0.1"
    folder: str = ""
    name: str = ""
    linger: bool = True


class FreshnessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`clock`: live = ages against the wall clock, log = against the newest event, auto = live while they are within an hour.

    `objective_s`: seconds from event to answer that the operator promises; dashboards and `onerec status` show it.
    """

    clock: ClockMode = "auto"
    objective_s: Seconds = 30.0


class MonitorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`every_s`: between two questions to each replica; one in ten seconds is for a whole answer, the others cost no search.

    Drift: the newest `window_sessions` against `reference_sessions`.

    `psi_look`, `psi_act`: from which a population stability index is worth a look, and from which it is an alert.
    """

    every_s: Seconds = 1.0
    reference_sessions: Count = 5_000
    window_sessions: Count = 1_000
    psi_look: float = 0.1
    psi_act: float = 0.25


class PublishConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of `onerec publish --follow`: seconds between versions, and between versions that only bring new items."""

    every_s: Seconds = 30.0
    items_every_s: Seconds = 4.0


class GateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a candidate must pass before users get it; `enabled` false: it is measured and published all the same.

    `worse`: by how much of the served version's loss per code on the newest `sessions` a candidate's may be higher.
    `legal`: how many answers are checked to hold known items only. `latency_ms`: of one answer, median, at most.
    """

    enabled: bool = True
    sessions: Count = 256
    worse: Share = 0.05
    legal: Count = 4
    latency_ms: Seconds = 1_000.0
