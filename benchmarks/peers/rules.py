"""What the peers compute for one event: a session by gap with its interactions, history and labels, as `onerec stream` does.

Less than the stream does, in the peers' favour: no repeats, nothing late, one topic in order of time, and a session is closed
by the user's own next event instead of by the watermark. On an ordered log without repeats the sessions are the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from streaming.events import DISLIKE, KINDS, WATCH, fast_decode
from streaming.semantics import Semantics
from streaming.sessions import OpenSession, build, session_id, session_json, watch_order
from streaming.state import EFFECTIVE, Base, Event, merge_positives

RECENT = 64
"""Positives of a user without open session that may stand outside the base."""
SEMANTICS = Semantics()


class User(msgspec.Struct, array_like=True):
    """The part of a user that nearly every event changes; the history up to then is a value of its own."""

    watches: list[Event] = []
    interactions: list[Event] = []
    recent: list[tuple[int, str]] = []


class Result(msgspec.Struct):
    """What an event changed beside the User itself."""

    session: bytes | None = None
    base: Base | None = None


def decode(raw: bytes) -> tuple[str, Event]:
    """One JSON line → user id and event, parsed and validated as the stream's fast path does. Raises for anything else."""
    line = fast_decode(raw)
    if line.type == "watch" and (line.watch_ms < 0 or line.duration_ms < 0):
        raise ValueError("a watch without its durations")
    least = SEMANTICS.watch.effective_ms
    kind = KINDS[line.type]
    watch_ms, duration_ms = line.watch_ms, line.duration_ms
    effective = kind != DISLIKE if kind != WATCH else (
        watch_ms >= least or 0 < duration_ms <= least and watch_ms >= duration_ms
    )
    return line.user_id, Event(
        kind, line.item_id, line.ts, watch_ms, duration_ms, line.event_id, line.request_id, line.ts, EFFECTIVE * effective
    )


def apply(user_id: str, user: User, event: Event, base: Callable[[], Base]) -> Result:
    """Applies one event to `user` in place; `base()` gives the stored history, asked for only where it is needed."""
    result = Result()
    config, watches = SEMANTICS.session, user.watches
    if watches and (
        event.ts > watches[-1].ts + config.gap_ms
        or event.kind == WATCH and (
            event.ts > watches[0].ts + config.max_ms or len(watches) >= config.max_items and event.ts > watches[-1].ts
        )
    ):
        result.session, result.base = _close(user_id, user, base())
        watches = user.watches
    if event.kind == WATCH:
        watches.append(event)
    elif watches:
        user.interactions.append(event)
    if event.flags & EFFECTIVE:
        user.recent.append((event.ts, event.item_id))
        if not watches and len(user.recent) > RECENT:
            result.base = merge_positives(result.base or base(), user.recent, SEMANTICS.history.length)
            user.recent = []
    return result


def _close(user_id: str, user: User, base: Base) -> tuple[bytes, Base]:
    length = SEMANTICS.history.length
    watches = sorted(user.watches, key=watch_order)
    start = watches[0].ts
    session = OpenSession(session_id(user_id, start, None), None, watches)
    mine = [e for e in user.interactions if e.item_id in session.item_ids]
    history = list(merge_positives(base.copy(), [p for p in user.recent if p[0] < start], length))
    final = session_json(build(session, user_id, mine, history, user.recent, SEMANTICS.session))
    base = merge_positives(base, user.recent, length)
    user.watches, user.interactions, user.recent = [], [], []
    return final, base
