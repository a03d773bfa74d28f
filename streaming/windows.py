"""Training windows of a session and the history of each (SEMANTICS.md §7)."""

from __future__ import annotations

import msgspec

from streaming.sessions import Session


class Window(msgspec.Struct, frozen=True):
    """A target: up to m consecutive items, and H(`ts`) of the first of them, oldest first."""

    items: list[str]
    history: list[str]
    ts: int


def starts(length: int, m: int) -> list[int]:
    """Where the windows of a session of `length` items begin: every m-th, the short last one moved back to be full."""
    if length <= m:
        return [0] if length else []
    places = list(range(0, length - m + 1, m))
    if length % m:
        places.append(length - m)
    return places


def history_at(session: Session, ts: int, n: int) -> list[str]:
    """H(ts) for start ≤ ts ≤ end: what was positive inside the session moves to the end of H(start)."""
    newest: dict[str, int] = {}
    for when, item_id in session.positives:
        if when < ts:
            newest[item_id] = when
    if not newest:
        return session.history[-n:]
    kept = [item_id for item_id in session.history if item_id not in newest]
    kept += sorted(newest, key=lambda item_id: (newest[item_id], item_id))
    return kept[-n:]


def windows(session: Session, m: int, n: int) -> list[Window]:
    """The targets of a session, in order; `m` items each at most, histories of at most `n`."""
    found = []
    for place in starts(len(session.items), m):
        part = session.items[place : place + m]
        found.append(Window([item.item_id for item in part], history_at(session, part[0].ts, n), part[0].ts))
    return found
