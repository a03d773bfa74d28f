"""The stream core and the reference behind one call, so that a test runs on either and compares both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from reference import Reference

from streaming.changes import Changes, Counters
from streaming.core import Core
from streaming.replay import Clock, Replay
from streaming.semantics import HistoryConfig, Semantics, SessionConfig, StreamConfig, WatchConfig
from streaming.sessions import Session, session_json
from streaming.state import NEVER, decode_due
from streaming.store import Reader, Store
from streaming.windows import windows

FLUSH = None
"""Stands among the lines for the end of a replay with `--flush`."""

T0 = 1_700_000_000_000
"""Event times of the tests count from here, ms."""

NOW = T0 + 10**9
"""The wall clock of the tests, ms."""

Seeds = Sequence[tuple[str, str, int]]


@dataclass
class Outcome:
    """All that the semantics decide."""

    sessions: list[bytes]
    histories: list[bytes]
    counters: dict[str, int | None]
    dead_letters: list[tuple[bytes, str]]
    windows: list[tuple[list[str], list[str], int]] = field(default_factory=list)

    @property
    def decoded(self) -> list[dict]:
        return [orjson.loads(line) for line in self.sessions]

    @property
    def history(self) -> dict[str, list[str]]:
        return {(row := orjson.loads(line))["user_id"]: row["items"] for line in self.histories}


def by_reference(semantics: Semantics, lines: Iterable[bytes | None], *, now_ms: int = NOW, seeds: Seeds = ()) -> Outcome:
    reference = Reference(semantics, now_ms, seeds)
    for line in lines:
        if line is FLUSH:
            reference.flush()
        else:
            reference.line(line)
    found = [
        (window.items, window.history, window.ts)
        for session, targets in zip(reference.sessions, reference.windows, strict=True)
        if orjson.loads(session)["high_quality"]
        for window in targets
    ]
    return Outcome(reference.sessions, reference.histories(), reference.counters(), reference.dead_letters, found)


def by_core(
    semantics: Semantics,
    lines: Iterable[bytes | None],
    *,
    now_ms: int = NOW,
    seeds: Seeds = (),
    batches: Sequence[int] = (1000,),
    reopen: bool = False,
    max_users: int = 32_768,
) -> Outcome:
    """The core over the lines in batches of the given sizes, taken in turn.

    `reopen` makes a new core from the stored bytes after every batch, as after a restart; `max_users` as the core's.
    """
    stored: dict[str, tuple[bytes | None, bytes | None]] = {}
    sessions: list[Session] = []
    dead_letters: list[tuple[bytes, str]] = []
    core = Core(semantics, stored.get, max_users=max_users)

    def commit(changes: Changes) -> None:
        nonlocal core
        for user_id, (live, base) in changes.users.items():
            stored[user_id] = (live, base if base is not None else stored.get(user_id, (None, None))[1])
        sessions.extend(changes.sessions)
        dead_letters.extend((raw, reason) for _, raw, reason in changes.dead_letters)

    def restart() -> None:
        nonlocal core
        due = [(decode_due(live), user_id) for user_id, (live, _) in stored.items() if live]
        core = Core(
            semantics,
            stored.get,
            counters=core.counters,
            watermark=core.watermark,
            dimension=core.dimension,
            due=[entry for entry in due if entry[0] != NEVER],
            max_users=max_users,
        )

    if seeds:
        positives: dict[str, list[tuple[int, str]]] = {}
        for user_id, item_id, ts in seeds:
            positives.setdefault(user_id, []).append((ts, item_id))
        for user_id, found in positives.items():
            core.seed(user_id, found)
        commit(core.seeded())
    batch: list[tuple[int, bytes]] = []
    turn = 0

    def apply() -> None:
        nonlocal batch, turn
        commit(core.apply(batch, now_ms))
        batch = []
        turn += 1
        if reopen:
            restart()

    for position, line in enumerate(lines):
        if line is FLUSH:
            apply()
            for changes in core.flush():
                commit(changes)
            if reopen:
                restart()
            continue
        batch.append((position, line))
        if len(batch) >= batches[turn % len(batches)]:
            apply()
    apply()

    histories = []
    for user_id in sorted(stored, key=lambda user_id: user_id.encode()):
        items = core.history(user_id)
        if items is not None:
            histories.append(orjson.dumps({"user_id": user_id, "items": items}))
    return outcome(semantics, sessions, histories, core.counters, core.watermark, dead_letters)


def by_replay(semantics: Semantics, files: Sequence[Path], state: Path, *, batch: int | None = None) -> Outcome:
    """The files through replay and store."""
    with Store(state, semantics) as store:
        Replay(store, [str(path) for path in files], clock=Clock(wall_ms=lambda: NOW), max_batch=batch).run()
    with Reader(state) as reader:
        return outcome(
            semantics,
            [session for _, session in reader.sessions()],
            [orjson.dumps({"user_id": user_id, "items": items}) for user_id, items in reader.users()],
            reader.counters(),
            reader.watermark(),
            [(letter.raw, letter.reason) for _, letter in reader.dead_letters()],
        )


def outcome(
    semantics: Semantics,
    sessions: list[Session],
    histories: list[bytes],
    counters: Counters,
    watermark: int | None,
    dead_letters: list[tuple[bytes, str]],
) -> Outcome:
    names = ("events", "duplicates", "late", "dead_letters", "users", "sessions", "high_quality")
    m, n = semantics.session.target_items, semantics.history.length
    targets = [
        (window.items, window.history, window.ts)
        for session in sessions
        if session.high_quality
        for window in windows(session, m, n)
    ]
    return Outcome(
        [session_json(session) for session in sessions],
        histories,
        {name: getattr(counters, name) for name in names} | {"watermark": watermark},
        dead_letters,
        targets,
    )


def event(type_: str, user_id: str, item_id: str, at: int, **more: object) -> bytes:
    """A line of §1; `at` counts from T0, ms."""
    return orjson.dumps({"type": type_, "user_id": user_id, "item_id": item_id, "ts": T0 + at, **more})


def watch(user_id: str, item_id: str, at: int, watch_ms: int = 10_000, duration_ms: int = 20_000, **more: object) -> bytes:
    """A watch, effective by default."""
    return event("watch", user_id, item_id, at, watch_ms=watch_ms, duration_ms=duration_ms, **more)


def semantics(**values: object) -> Semantics:
    """The defaults with some values changed, named as in §10 without their section (`length` as `history.length`)."""
    sections: dict[str, dict[str, object]] = {"watch": {}, "history": {}, "session": {}, "stream": {}}
    configs = {"watch": WatchConfig, "history": HistoryConfig, "session": SessionConfig, "stream": StreamConfig}
    for name, value in values.items():
        section = next(key for key, config in configs.items() if name in config.__struct_fields__)
        sections[section][name] = value
    return Semantics(**{key: configs[key](**fields) for key, fields in sections.items()})
