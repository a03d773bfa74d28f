"""What the monitor sees, drawn for a terminal: the chain as a timeline, replicas, and what else operators look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from onerec.freshness import chain, format_age, format_time
from onerec.monitor.settings import MonitorConfig
from onerec.monitor.watch import Snapshot

BAR_CELLS = 30
BAR_LEAST_MS, BAR_MOST_MS = 100, 86_400_000
GOOD, LOOK, BAD, DIM = "green", "yellow", "bold red", "dim"
NO_DATA = Text("no data", style=DIM)


class Extras(msgspec.Struct, frozen=True, kw_only=True):
    """What the monitor itself does not look at: RUN/metrics.jsonl as curves, lags by source; None: not known."""

    curves: Mapping[str, Any] | None = None
    lags: Mapping[str, Any] | None = None


def bar(age_ms: int | None, objective_ms: float) -> Text:
    """An age as a bar, 100 ms to a day on a scale of equal ratios; green up to half the objective, red beyond it."""
    if age_ms is None:
        return Text("")
    share = math.log(max(age_ms, BAR_LEAST_MS) / BAR_LEAST_MS) / math.log(BAR_MOST_MS / BAR_LEAST_MS)
    style = GOOD if age_ms <= objective_ms / 2 else LOOK if age_ms <= objective_ms else BAD
    return Text("━" * max(1, round(min(share, 1.0) * BAR_CELLS)), style=style)


def _age(age_ms: int | None, style: str = "") -> Text:
    return NO_DATA if age_ms is None else Text(format_age(age_ms), style=style)


def _headline(age_ms: int | None, objective_ms: float) -> Text:
    if age_ms is None:
        return Text("event → served: no data", style="bold")
    late = age_ms > objective_ms
    promise = f"  {'over' if late else 'within'} the objective of {format_age(round(objective_ms))}"
    styles = (BAD, BAD) if late else (f"bold {GOOD}", DIM)
    return Text.assemble(("event → served: ", "bold"), (format_age(age_ms), styles[0]), (promise, styles[1]))


def _clock(seen: Snapshot) -> str:
    if seen.log_clock_ms is None:
        return "log clock: no data"
    if seen.live:
        text = f"{format_time(seen.log_clock_ms)} UTC, live"
    else:
        pace = "" if seen.factor is None else f", {seen.factor:,.0f} s of log a second"
        text = f"{format_time(seen.log_clock_ms)} UTC by the log{pace}"
    return text + (f", the wall clock jumped {seen.clock_jumps} times" if seen.clock_jumps else "")


def _timeline(seen: Snapshot, objective_ms: float) -> Table:
    # By the log's clock, which in live time is the wall clock: the newest event has an age then, too.
    now = seen.log_clock_ms
    notes = {
        "trained": None if seen.checkpoint.step is None else f"step {seen.checkpoint.step}",
        "exported": None if seen.manifest is None else f"version {seen.manifest.version}",
        "served": "version " + ", ".join(map(str, seen.versions)) if seen.versions else None,
    }
    table = Table(box=None, pad_edge=False, expand=False)
    for name in ("stage", "event time (UTC)", "age", "", ""):
        table.add_column(name, justify="right" if name == "age" else "left", no_wrap=True)
    for stage in chain(seen.watermarks, seen.wall_ms).stages:
        age = None if stage.watermark_ms is None or now is None else now - stage.watermark_ms
        when = NO_DATA if stage.watermark_ms is None else Text(format_time(stage.watermark_ms))
        table.add_row(stage.name, when, _age(age), bar(age, objective_ms), Text(notes.get(stage.name) or "", style=DIM))
    return table


def _replicas(seen: Snapshot, asked: Sequence[str]) -> Table:
    answers = {answer.replica: answer for answer in seen.answers}
    mixed, now = len(seen.versions) > 1, seen.log_clock_ms
    table = Table(box=None, pad_edge=False)
    for name in ("replica", "version", "learnt", "histories", "answer", ""):
        table.add_column(name, justify="left" if name in ("replica", "") else "right")
    for name in asked:
        answer = answers.get(name)
        if answer is None or not answer.up:
            said = Text("not asked yet", style=DIM) if answer is None else Text(answer.fault or "does not answer", style=BAD)
            table.add_row(Text(name), NO_DATA, NO_DATA, NO_DATA, NO_DATA, said)
            continue
        ages = [
            None if mark is None or now is None else now - mark for mark in (answer.watermark_ms, answer.history_watermark_ms)
        ]
        version = Text(str(answer.version), style=LOOK if mixed else "")
        said = Text(answer.fault, style=LOOK) if answer.fault else Text("mixed versions" if mixed else "", style=LOOK)
        table.add_row(Text(name), version, _age(ages[0]), _age(ages[1]), f"{answer.seconds * 1000:.0f} ms", said)
    return table


def _release(seen: Snapshot) -> Text:
    release = seen.release
    if release is None or not (release.versions or release.held):
        return NO_DATA
    parts: list[tuple[str, str]] = []
    if release.hold is not None:
        since = format_time(release.hold.at_ms)
        parts.append((f"on hold since {since}: {release.hold.reason}; lift it with onerec promote", BAD))
    if release.failed:
        parts.append((f"version {release.held[0].version} was held back: {release.held[0].reason}", BAD))
    if not parts:
        parts.append(("open", GOOD))
    if release.weights_at_ms is not None:
        parts.append((f"newest weights {format_age(seen.wall_ms - release.weights_at_ms)} ago", DIM))
    return Text("; ").join(Text(text, style=style) for text, style in parts)


def _training(curves: Mapping[str, Any] | None) -> tuple[Text, Text]:
    """Newest losses, newest hit rates."""
    if not curves:
        return NO_DATA, NO_DATA

    def newest(series: Mapping[str, Sequence[float | None]], form: str) -> Text:
        last = {name: next((value for value in reversed(values) if value is not None), None) for name, values in series.items()}
        known = [f"{name} {value:{form}}" for name, value in last.items() if value is not None]
        return Text(" · ".join(known)) if known else NO_DATA

    losses = newest(curves["losses"]["series"], ".3f")
    if curves["skipped"]:
        losses = Text.assemble(losses, (f" · {curves['skipped']} steps skipped", LOOK))
    return losses, newest(curves["hit_rate"]["series"], ".1%")


def _lag(lags: Mapping[str, Any] | None) -> Text:
    if not lags:
        return NO_DATA
    parts = []
    for entry in lags["sources"]:
        told = [format_age(round(entry["seconds"] * 1000))] if entry["seconds"] is not None else []
        told += [f"{entry['records']:,.0f} records"] if entry["records"] is not None else []
        parts.append(f"{entry['source']} {', '.join(told)}")
    return Text(" · ".join(parts))


def _counts(seen: Snapshot) -> Text:
    counters = seen.state.counters
    if counters is None:
        return NO_DATA
    whole = counters.events + counters.dead_letters
    share = counters.dead_letters / whole if whole else 0.0
    dead = Text(f"{counters.dead_letters:,} dead letters ({share:.2%})", style=LOOK if share > 0.001 else "")
    return Text(" · ").join((
        Text(f"{counters.events:,} events"), dead, Text(f"{counters.duplicates:,} duplicates"), Text(f"{counters.late:,} late"),
        Text(f"{counters.sessions:,} sessions, {counters.high_quality:,} of high quality"),
    ))  # fmt: skip


def _drift(seen: Snapshot, limits: MonitorConfig) -> Text:
    if seen.drift is None:
        return NO_DATA
    parts = []
    for name, index in seen.drift.indices().items():
        if index is not None:
            style = BAD if index >= limits.psi_act else LOOK if index >= limits.psi_look else ""
            parts.append(Text(f"{name.replace('_', ' ')} {index:.3f}", style=style))
    if seen.drift.unseen is not None:
        parts.append(Text(f"{seen.drift.unseen:.1%} of watches are of items unseen in the reference"))
    return Text(" · ").join(parts)


def _size(size: int | None) -> Text:
    return NO_DATA if size is None else Text(f"{size / 1e6:,.1f} MB")


def screen(
    seen: Snapshot, asked: Sequence[str], extras: Extras, *, objective_s: float, limits: MonitorConfig
) -> RenderableType:
    """The whole picture; in a replay the objective is as much longer as the log runs faster than time."""
    objective_ms = objective_s * 1000 * max(1.0, seen.factor or 1.0)
    served, now = seen.answered_ms, seen.log_clock_ms
    losses, hits = _training(extras.curves)
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style=DIM, no_wrap=True)
    facts.add_column()
    checkpoint = seen.checkpoint.created_ms
    for name, value in (
        ("gate", _release(seen)), ("loss", losses), ("hit rate", hits), ("lag", _lag(extras.lags)), ("log", _counts(seen)),
        ("drift", _drift(seen, limits)), ("checkpoint", _age(None if checkpoint is None else seen.wall_ms - checkpoint)),
        ("state", _size(seen.state_bytes)),
    ):  # fmt: skip
        facts.add_row(name, value)
    faults = [Text(fault, style=LOOK) for fault in seen.faults]
    return Group(
        _headline(None if served is None or now is None else now - served, objective_ms),
        Text(_clock(seen), style=DIM),
        Text(),
        _timeline(seen, objective_ms),
        Rule(style=DIM),
        _replicas(seen, asked),
        Rule(style=DIM),
        facts,
        *faults,
    )
