"""The pure heart of the stream: records in, changes out (SEMANTICS.md §1-6). No file, no Kafka, no RocksDB in here.

A session becomes final when the watermark passes its end by more than the gap. Instead of looking at every user after every
event, a user's due sessions are written (1) before the user's next event is applied, with the watermark before it, and (2) at
the end of the batch, through a heap of due times. Nothing else can change what a user's session holds, so this gives the same
sessions as event by event; and since ends below a watermark all come before ends above it, sorting a batch by (`end`, id) gives
the same commit order at any batch size.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import msgspec

from streaming.changes import Changes, Counters, DeadLetter
from streaming.events import (
    BLANK,
    DEEP_LINE,
    DISLIKE,
    KINDS,
    LIKE,
    MAX_DEPTH,
    MAX_LINE_BYTES,
    WATCH,
    FastLine,
    Line,
    Rejected,
    Row,
    decode,
    fast_decode,
)
from streaming.items import ItemRecord
from streaming.semantics import Semantics
from streaming.sessions import OpenSession, Session, build, owner, split, watch_order
from streaming.state import (
    ALIVE,
    EFFECTIVE,
    KNOWN,
    LATE,
    NEVER,
    OPEN,
    PENDING,
    POSITIVE,
    RECENT,
    Event,
    encode_base,
    encode_live,
    merge_positives,
)
from streaming.user import User

NO_TIME: Final = -(1 << 62)
FLUSH_SESSIONS: Final = 20_000

Loader = Callable[[str], tuple[bytes | None, bytes | None] | None]


class Core:
    """The stateful rules of one stream (one partition).

    `load(user_id)` gives the stored (live, base) bytes of a user, None for one never seen. `due` are (due time, user id) of
    stored users with open sessions. `max_users` bounds the users kept decoded in memory between batches.
    """

    def __init__(
        self,
        semantics: Semantics,
        load: Loader | None = None,
        *,
        counters: Counters | None = None,
        watermark: int | None = None,
        dimension: int | None = None,
        due: Iterable[tuple[int, str]] = (),
        max_users: int = 32_768,
    ) -> None:
        self.semantics = semantics
        self.counters = counters or Counters()
        self.dimension = dimension
        self._load = load or (lambda user_id: None)
        self._wm = NO_TIME if watermark is None else watermark
        self._users: dict[str, User] = {}
        self._touched: dict[str, User] = {}
        self._due: list[tuple[int, str]] = list(due)
        heapq.heapify(self._due)
        self._open_users = len(self._due)
        self._late_used = 0
        self._max_users = max_users
        self._final: list[Session] = []
        self._sealed: list[Session] = []
        self._dead: list[DeadLetter] = []
        self._items: list[ItemRecord] = []
        self._by_request = semantics.session.by == "request"
        self._effective_ms = semantics.watch.effective_ms
        self._dedup_ms = semantics.stream.dedup_horizon_ms
        self._max_open = semantics.stream.max_open_events
        self._gap_ms = semantics.session.gap_ms
        self._length = semantics.history.length

    @property
    def watermark(self) -> int | None:
        """Newest event time minus the out-of-orderness, ms; None before the first valid event (§3)."""
        return None if self._wm == NO_TIME else self._wm

    def history(self, user_id: str) -> list[str] | None:
        """H(∞) of a user, oldest first; None for a user never seen (§4)."""
        user = self._find(user_id)
        if user is None or not user.seen:
            return None
        return list(merge_positives(user.compacted().copy(), user.positives(), self._length))

    def seed(self, user_id: str, positives: list[tuple[int, str]]) -> None:
        """Puts (pseudo-time, item id) into a history before any event of the user (§8); no event is counted."""
        user = self._find(user_id)
        if user is None:
            user = self._users[user_id] = User()
        # As recent events, not into the base: a seed may lie after the start of a session to come.
        user.recent += [
            Event(LIKE, item_id, ts, 0, 0, None, None, ts, RECENT | POSITIVE | LATE) for ts, item_id in positives
        ]
        user.base_dirty = user.base_bytes is None
        self._touched[user_id] = user

    def seeded(self) -> Changes:
        """The changes made by `seed` since the last call."""
        return self._collect()

    def apply(self, records: Iterable[tuple[Any, bytes | Row]], now_ms: int | None = None) -> Changes:
        """Applies a batch in order and returns all that it changed: `feed`, then `changes`."""
        self.feed(records, now_ms)
        return self.changes()

    def changes(self) -> Changes:
        """All that was changed since the last call, with the sessions that the watermark has made final."""
        self._settle(self._wm)
        return self._collect()

    def advance(self, ts: int) -> None:
        """A time marker: moves the watermark like an event of `ts`, and does nothing else (§3)."""
        self._wm = max(self._wm, ts - self.semantics.stream.max_out_of_orderness_ms)

    def feed(self, records: Iterable[tuple[Any, bytes | Row]], now_ms: int | None = None) -> None:
        """Applies records in order; `changes` then tells what they changed.

        `records` are (position, JSON line or Row); `now_ms` is the append time of their log records (§1), by default
        the wall clock. Never raises for bad input: it becomes a dead letter.
        """
        now = int(time.time() * 1000) if now_ms is None else now_ms
        max_ts = now + self.semantics.stream.future_ms
        ooo = self.semantics.stream.max_out_of_orderness_ms
        kinds, parse, event = KINDS, fast_decode, self._event
        dead, items = self._dead, self._items
        refused = len(dead)
        results: list[Line | ItemRecord | Rejected]
        count = 0
        wm = self._wm
        for position, raw in records:
            if isinstance(raw, bytes):
                try:
                    if len(raw) > DEEP_LINE and (raw.count(b"[") + raw.count(b"{") > MAX_DEPTH or len(raw) > MAX_LINE_BYTES):
                        raise ValueError
                    if not raw.isascii():
                        raw.decode()
                    line = parse(raw)
                    kind = kinds[line.type]
                    ts = line.ts
                    if ts > max_ts or (kind == WATCH and (line.watch_ms < 0 or line.duration_ms < 0)):
                        raise ValueError
                except (ValueError, RecursionError, msgspec.MsgspecError):
                    if not raw.strip(BLANK):
                        continue
                    results, source = [decode(raw, max_ts)], raw
                else:
                    reason = event(kind, line, wm)
                    if reason is None:
                        count += 1
                        if ts - ooo > wm:
                            self._wm = wm = ts - ooo
                    else:
                        dead.append(DeadLetter(position, raw, reason))
                    continue
            else:
                results, source = raw.events, raw.raw
            for result in results:
                if isinstance(result, Line):
                    reason = event(kinds[result.type], result, wm)
                    if reason is None:
                        count += 1
                        if result.ts - ooo > wm:
                            self._wm = wm = result.ts - ooo
                        continue
                elif isinstance(result, ItemRecord):
                    if result.embedding is not None:
                        if self.dimension is None:
                            self.dimension = len(result.embedding)
                        elif len(result.embedding) != self.dimension:
                            dead.append(DeadLetter(position, source, "bad_embedding"))
                            continue
                    items.append(result)
                    continue
                else:
                    reason = result.reason
                dead.append(DeadLetter(position, source, reason))
        self.counters.events += count
        self.counters.dead_letters += len(dead) - refused

    def flush(self, max_sessions: int = FLUSH_SESSIONS) -> Iterator[Changes]:
        """Makes all open sessions final as if the watermark were infinite; it stays (§5). Commit each part before the next."""
        while self._due:
            limit = heapq.nsmallest(max_sessions, self._due)[-1][0] + 1
            self._settle(limit)
            changes = self._collect()
            if changes.users or changes.sessions:
                yield changes

    def _find(self, user_id: str) -> User | None:
        user = self._users.get(user_id)
        if user is None:
            stored = self._load(user_id)
            if stored is None:
                return None
            user = self._users[user_id] = User.load(*stored)
        return user

    def _event(self, kind: int, line: Line | FastLine, wm: int) -> str | None:
        """Applies one valid event with the watermark before it; the reason if state refuses it."""
        user_id, ts, item_id, event_id = line.user_id, line.ts, line.item_id, line.event_id
        user = self._users.get(user_id)
        if user is None:
            user = self._find(user_id)
            if user is None:
                user = self._users[user_id] = User()
        if user.due < wm:
            self._finalize(user_id, user, wm)
        self._touched[user_id] = user
        if kind == WATCH:
            watch_ms, duration_ms, least = line.watch_ms, line.duration_ms, self._effective_ms
            effective = watch_ms >= least or 0 < duration_ms <= least and watch_ms >= duration_ms
        else:
            watch_ms = duration_ms = 0
            effective = kind != DISLIKE
        key = (kind, item_id, ts) if event_id is None else (kind, event_id)
        known_from = wm - self._dedup_ms
        old = user.known.get(key)
        if old is not None and old.known_ts >= known_from:
            if old.item_id != item_id:
                return "identity_conflict"
            self._merge(user_id, user, old, line, effective, wm)
            self.counters.duplicates += 1
            return None
        opened = user.open
        if ts < wm:
            self.counters.late += 1
            self._late_used += effective
            flags = LATE | KNOWN if ts >= known_from else LATE
        else:
            if len(opened) + len(user.pending) > self._max_open:
                user.drop_stale(wm)
                if len(opened) + len(user.pending) > self._max_open:
                    return "user_overflow"
            flags = KNOWN | OPEN if kind == WATCH else KNOWN | PENDING
        if effective:
            flags |= EFFECTIVE | POSITIVE | RECENT
        if not user.seen:
            user.seen = user.base_dirty = True
            self.counters.users += 1
        if flags & ALIVE:
            new = Event(kind, item_id, ts, watch_ms, duration_ms, event_id, line.request_id, ts, flags)
            if effective:
                user.recent.append(new)
            if flags & KNOWN:
                if old is not None:
                    old.flags &= ~KNOWN
                    del user.known[key]
                user.known[key] = new
            if flags & OPEN:
                if opened and ts <= opened[-1].ts:
                    user.sorted = False
                opened.append(new)
                if ts + self._gap_ms < user.due:
                    self._expect(user_id, user, ts)
            elif flags & PENDING:
                user.pending.append(new)
        return None

    def _merge(self, user_id: str, user: User, old: Event, line: Line | FastLine, effective: bool, wm: int) -> None:
        """A repeat of a known event (§2)."""
        late = line.ts < wm
        if effective and not old.flags & POSITIVE:
            old.flags |= POSITIVE | RECENT
            user.recent.append(old)
        if late or old.flags & LATE:
            return
        if line.ts > old.known_ts:
            old.known_ts = line.ts
        if old.kind == WATCH and not old.flags & OPEN:
            old.ts = min(old.ts, line.ts)
            return
        if effective:
            old.flags |= EFFECTIVE
        if old.kind == WATCH:
            old.watch_ms = max(old.watch_ms, line.watch_ms)
            old.duration_ms = max(old.duration_ms, line.duration_ms)
        request_id = line.request_id
        if request_id is not None and (old.request_id is None or request_id < old.request_id):
            if self._by_request and old.flags & OPEN:
                # The watch changes its session, and either may be final at once, after all that became final before.
                self._settle(wm)
                self._seal()
                self._expect(user_id, user, old.ts)
            old.request_id = request_id
        if line.ts < old.ts:
            old.ts = line.ts
            if old.kind == WATCH:
                user.sorted = False
                self._expect(user_id, user, line.ts)

    def _expect(self, user_id: str, user: User, ts: int) -> None:
        """A watch at `ts` may end a session: it can be due from then on."""
        due = ts + self._gap_ms
        if due < user.due:
            self._open_users += user.due == NEVER
            user.due = due
            heapq.heappush(self._due, (due, user_id))

    def _seal(self) -> None:
        """What is final by now comes before whatever becomes final later in this batch."""
        self._final.sort(key=lambda s: (s.end, s.session_id))
        self._sealed += self._final
        self._final = []

    def _finalize(self, user_id: str, user: User, limit: int) -> None:
        """Writes the user's sessions whose end + gap lies below `limit`, in the order (end, id)."""
        config, n = self.semantics.session, self._length
        if not user.sorted:
            user.open.sort(key=watch_order)
            user.sorted = True
        sessions = split(user_id, user.open, config)
        gap = config.gap_ms
        due = [s for s in sessions if s.end + gap < limit]
        waiting = [s for s in sessions if s.end + gap >= limit] if len(due) < len(sessions) else []
        if len(due) > 1:
            due.sort(key=lambda s: (s.end, s.session_id))
        if due:
            recent = user.positives()
            unwritten: list[OpenSession] = sessions
            for session in due:
                mine: list[Event] = []
                if user.pending:
                    mine = [e for e in user.pending if owner(e, unwritten, config.feedback_ms) is session]
                    for e in mine:
                        e.flags &= ~PENDING
                    user.pending = [e for e in user.pending if e.flags & PENDING]
                for e in session.watches:
                    e.flags &= ~OPEN
                start = session.start
                base, earlier = user.compacted(), [p for p in recent if p[0] < start]
                history = list(merge_positives(base.copy(), earlier, n) if earlier else base)
                final = build(session, user_id, mine, history, recent, config)
                self.counters.sessions += 1
                self.counters.high_quality += final.high_quality
                self._final.append(final)
                unwritten = [s for s in unwritten if s is not session]
            user.open = [e for e in user.open if e.flags & OPEN] if waiting else []
        self._open_users -= user.due != NEVER
        user.due = NEVER
        if waiting:
            self._open_users += 1
            user.due = min([s.end + gap for s in waiting])
            heapq.heappush(self._due, (user.due, user_id))
        if due:
            user.compact(self._wm, self._dedup_ms, self._length)

    def _settle(self, limit: int) -> None:
        """Writes every user's sessions that are due below `limit`."""
        heap, users = self._due, self._users
        while heap and heap[0][0] < limit:
            due, user_id = heapq.heappop(heap)
            user = users.get(user_id) or self._find(user_id)
            if user is None or user.due != due:
                continue
            self._finalize(user_id, user, limit)
            self._touched[user_id] = user

    def _collect(self) -> Changes:
        """Values of all touched users, and sessions in commit order; the cache is cut to its bound."""
        changed: dict[str, tuple[bytes | None, bytes | None]] = {}
        users = self._users
        for user_id, user in self._touched.items():
            if len(user.known) + len(user.recent) > user.purge_at:
                user.compact(self._wm, self._dedup_ms, self._length)
            base = None
            if user.base_dirty:
                base = user.base_bytes = encode_base(user.seen, user.compacted())
                user.base_dirty = False
            user.base = None
            live = user.live()
            changed[user_id] = (encode_live(user.due, live) if live else None, base)
            users[user_id] = users.pop(user_id)
        self._touched = {}
        if len(users) > self._max_users:
            for user_id in list(users)[: len(users) - self._max_users]:
                del users[user_id]
        self._seal()
        sessions, self._sealed = self._sealed, []
        dead, self._dead = self._dead, []
        items, self._items = self._items, []
        late_used, self._late_used = self._late_used, 0
        return Changes(changed, sessions, dead, items, late_used, self._open_users)
