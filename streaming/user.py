"""One user's state in memory, and its compaction (SEMANTICS.md §2, §4)."""

from __future__ import annotations

from typing import Any, Final, Self

from streaming.state import (
    KNOWN,
    NEVER,
    OPEN,
    PENDING,
    RECENT,
    Base,
    Event,
    decode_base,
    decode_live,
    is_seen,
    merge_positives,
)

PURGE_AT: Final = 48


def _identity(event: Event) -> tuple[Any, ...]:
    return (event.kind, event.item_id, event.ts) if event.event_id is None else (event.kind, event.event_id)


class User:
    """One user's state in memory; `due` is at most the time whose passing makes the first open session final.

    Every event that can still change something stands in `known` or, once its identity is forgotten, in `open`, `pending` or
    `recent` alone; its flags say in which.
    """

    __slots__ = ("base", "base_bytes", "base_dirty", "due", "known", "open", "pending", "purge_at", "recent", "seen", "sorted")

    def __init__(self) -> None:
        self.due = NEVER
        self.known: dict[tuple[Any, ...], Event] = {}
        self.open: list[Event] = []
        self.sorted = True
        self.pending: list[Event] = []
        self.recent: list[Event] = []
        self.purge_at = PURGE_AT
        self.base_bytes: bytes | None = None
        self.base: Base | None = None
        self.base_dirty = False
        self.seen = False

    @classmethod
    def load(cls, live: bytes | None, base: bytes | None) -> Self:
        """A user from its stored values."""
        user = cls()
        user.base_bytes = base
        user.seen = base is not None and is_seen(base)
        if live:
            user.due, events = decode_live(live)
            for e in events:
                flags = e.flags
                if flags & KNOWN:
                    user.known[_identity(e)] = e
                if flags & OPEN:
                    user.open.append(e)
                elif flags & PENDING:
                    user.pending.append(e)
                if flags & RECENT:
                    user.recent.append(e)
            user.sorted = False
            user.purge_at = max(PURGE_AT, 2 * len(events))
        return user

    def compacted(self) -> Base:
        """The compacted history, decoded when first needed."""
        if self.base is None:
            self.base = decode_base(self.base_bytes) if self.base_bytes else {}
        return self.base

    def live(self) -> list[Event]:
        """Every event that can still change something, each once."""
        events = list(self.known.values())
        events += [e for e in self.open if not e.flags & KNOWN]
        if self.pending:
            events += [e for e in self.pending if not e.flags & KNOWN]
        events += [e for e in self.recent if not e.flags & (KNOWN | OPEN | PENDING)]
        return events

    def positives(self) -> list[tuple[int, str]]:
        """(ts, item id) of the positive events that the base does not hold yet."""
        return [(e.ts, e.item_id) for e in self.recent]

    def drop_stale(self, wm: int) -> None:
        """Lets go of interactions that no open or coming session can hold any more."""
        first = min((e.ts for e in self.open), default=wm)
        kept = []
        for e in self.pending:
            if e.ts < wm and e.ts < first:
                e.flags &= ~PENDING
            else:
                kept.append(e)
        self.pending = kept

    def compact(self, wm: int, dedup_ms: int, n: int) -> None:
        """Moves settled positives into the base and forgets events that can change nothing at watermark `wm`."""
        if self.pending:
            self.drop_stale(wm)
        known, known_from = self.known, wm - dedup_ms
        # Identities are forgotten from the oldest on; one that stands behind a younger one waits, which changes no answer.
        expired = []
        for key, e in known.items():
            if e.known_ts >= known_from:
                break
            expired.append(key)
        if len(known) - len(expired) >= self.purge_at:
            expired = [key for key, e in known.items() if e.known_ts < known_from]
        for key in expired:
            known.pop(key).flags &= ~KNOWN
        # Below this time no history is asked for and no event's time can change any more.
        settled = min(wm, min([e.ts for e in self.open])) if self.open else wm
        moved: list[tuple[int, str]] = []
        recent: list[Event] = []
        for e in self.recent:
            if e.ts < settled:
                moved.append((e.ts, e.item_id))
                e.flags &= ~RECENT
            else:
                recent.append(e)
        self.recent = recent
        self.purge_at = max(PURGE_AT, 2 * (len(known) + len(recent)))
        if moved:
            self.base = merge_positives(self.compacted(), moved, n)
            self.base_dirty = True
