"""Sessions: how watches split into them, which interactions belong, quality, labels, and their bytes (SEMANTICS.md §5, §6)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import msgspec
import orjson

from streaming.events import DISLIKE, FOLLOW, KIND_NAMES, LIKE
from streaming.semantics import SessionConfig
from streaming.state import EFFECTIVE, Event


class SessionItem(msgspec.Struct, array_like=True, gc=False):
    """One watch of a session and the types of the interactions that it drew."""

    item_id: str
    ts: int
    watch_ms: int
    duration_ms: int
    interactions: list[str]
    effective: bool


class Session(msgspec.Struct, array_like=True, gc=False):
    """A final session; times in epoch ms; `history` is H(start), oldest first.

    `positives` holds the user's positive events (ts, item id) with start ≤ ts < end, what H(t) of later windows needs (§7);
    it is kept for high-quality sessions only.
    """

    session_id: str
    user_id: str
    request_id: str | None
    start: int
    end: int
    items: list[SessionItem]
    history: list[str]
    watched: int
    total_watch_ms: int
    interactions: int
    high_quality: bool
    swt: float
    vtr: float
    wtr: int
    ltr: int
    positives: list[tuple[int, str]]


class OpenSession:
    """Watches that form a session so far, in session order; `start` and `end` are the times of the first and last, ms."""

    __slots__ = ("_item_ids", "end", "request_id", "session_id", "start", "watches")

    def __init__(self, session_id: str, request_id: str | None, watches: list[Event]) -> None:
        self.session_id = session_id
        self.request_id = request_id
        self.watches = watches
        self.start = watches[0].ts
        self.end = watches[-1].ts
        self._item_ids: set[str] | None = None

    @property
    def item_ids(self) -> set[str]:
        """The items watched."""
        if self._item_ids is None:
            self._item_ids = {event.item_id for event in self.watches}
        return self._item_ids


def watch_order(event: Event) -> tuple[int, str, str]:
    """Order of watches within a user; code points sort as their UTF-8 bytes do."""
    return event.ts, event.item_id, event.event_id or ""


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace(":", "%3A") if "%" in text or ":" in text else text


def session_id(user_id: str, start: int, request_id: str | None) -> str:
    """The deterministic name of a session (§5)."""
    name = f"{_escape(user_id)}:{start}"
    return name if request_id is None else f"{name}:{_escape(request_id)}"


def split(user_id: str, watches: Sequence[Event], config: SessionConfig) -> list[OpenSession]:
    """Watches in `watch_order` → the sessions that they form, by start within each request."""
    groups: dict[str | None, Sequence[Event]] = {None: watches}
    if config.by == "request":
        by_request: dict[str | None, list[Event]] = {}
        for event in watches:
            by_request.setdefault(event.request_id, []).append(event)
        groups = dict(by_request)
    gap, longest, most = config.gap_ms, config.max_ms, config.max_items
    if config.by == "gap" and watches and len(watches) <= most and watches[-1].ts - watches[0].ts <= min(gap, longest):
        return [OpenSession(session_id(user_id, watches[0].ts, None), None, list(watches))]
    sessions = []
    for request_id, group in groups.items():
        part: list[Event] = []
        start = last = 0
        for event in group:
            ts = event.ts
            if part and (ts > last + gap or ts > start + longest or (len(part) >= most and ts > last)):
                sessions.append(OpenSession(session_id(user_id, start, request_id), request_id, part))
                part = []
            if not part:
                start = ts
            part.append(event)
            last = ts
        if part:
            sessions.append(OpenSession(session_id(user_id, start, request_id), request_id, part))
    return sessions


def owner(interaction: Event, sessions: Iterable[OpenSession], feedback_ms: int) -> OpenSession | None:
    """The one session that an interaction belongs to, among those not yet written (§5)."""
    best, best_key = None, None
    for session in sessions:
        if interaction.item_id in session.item_ids and session.start <= interaction.ts <= session.end + feedback_ms:
            own = session.request_id is not None and session.request_id == interaction.request_id
            key = (not own, session.start, session.session_id)
            if best_key is None or key < best_key:
                best, best_key = session, key
    return best


def build(
    session: OpenSession,
    user_id: str,
    interactions: list[Event],
    history: list[str],
    positives: list[tuple[int, str]],
    config: SessionConfig,
) -> Session:
    """An open session and what belongs to it → the final session with quality and labels (§6).

    `positives` may hold any positive events of the user; those from `start` until before `end` are kept.
    """
    items = [
        SessionItem(e.item_id, e.ts, e.watch_ms, e.duration_ms, [], e.flags & EFFECTIVE != 0) for e in session.watches
    ]
    watched = sum([item.effective for item in items])
    total = sum([item.watch_ms for item in items])
    positive = wtr = ltr = 0
    if interactions:
        places: dict[str, list[SessionItem]] = {}
        for item in items:
            places.setdefault(item.item_id, []).append(item)
        for event in sorted(interactions, key=lambda e: (e.ts, KIND_NAMES[e.kind], e.event_id or "")):
            positive += event.kind != DISLIKE
            wtr |= event.kind == FOLLOW
            ltr |= event.kind == LIKE
            watches = places[event.item_id]
            place = bisect_right(watches, event.ts, key=lambda item: item.ts)
            watches[max(place - 1, 0)].interactions.append(KIND_NAMES[event.kind])
    start, end = session.start, session.end
    high_quality = (
        watched >= config.min_watched and total >= config.min_total_watch_ms and positive >= config.min_interactions
    )
    return Session(
        session_id=session.session_id,
        user_id=user_id,
        request_id=session.request_id,
        start=start,
        end=end,
        items=items,
        history=history,
        watched=watched,
        total_watch_ms=total,
        interactions=positive,
        high_quality=high_quality,
        swt=min(1.0, total / config.swt_cap_ms),
        vtr=watched / len(items),
        wtr=int(wtr),
        ltr=int(ltr),
        positives=sorted(p for p in positives if start <= p[0] < end) if high_quality else [],
    )


def session_json(session: Session) -> bytes:
    """The line of `onerec sessions --json` (§9), without a line feed."""
    return orjson.dumps(
        {
            "session_id": session.session_id,
            "user_id": session.user_id,
            "request_id": session.request_id,
            "start": session.start,
            "end": session.end,
            "items": [
                {
                    "item_id": item.item_id,
                    "ts": item.ts,
                    "watch_ms": item.watch_ms,
                    "duration_ms": item.duration_ms,
                    "interactions": item.interactions,
                }
                for item in session.items
            ],
            "history": session.history,
            "watched": session.watched,
            "total_watch_ms": session.total_watch_ms,
            "interactions": session.interactions,
            "high_quality": session.high_quality,
            "labels": {"swt": session.swt, "vtr": session.vtr, "wtr": session.wtr, "ltr": session.ltr},
        }
    )


_VERSION = 1
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Session)


def encode_session(session: Session) -> bytes:
    """The versioned value of column family `sessions`: version, high-quality flag, msgpack."""
    return bytes((_VERSION, session.high_quality)) + _encoder.encode(session)


def decode_session(value: bytes) -> Session:
    """Inverse of `encode_session`."""
    return _decoder.decode(memoryview(value)[2:])
