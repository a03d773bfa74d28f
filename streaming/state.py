"""What is known of one user: live events, compacted history, and the bytes of both (SEMANTICS.md §2-4).

`live` holds every event that can still change something: watches of open sessions, interactions that may join one, events
whose identity is known, positives not yet compacted. `base` is the history below the time that no query reaches any more:
each item once, the newest n. A late or repeated event can only add to it, so dropping the rest loses nothing.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

OPEN: Final = 1
"""Watch of a session not yet written."""
PENDING: Final = 2
"""Interaction that may still belong to a session."""
RECENT: Final = 4
"""Positive event not yet in `base`."""
KNOWN: Final = 8
"""Its identity stands in the table of repeats."""
EFFECTIVE: Final = 16
"""Effective by the reports that count for sessions."""
POSITIVE: Final = 32
"""Positive for the history, late reports included."""
LATE: Final = 64
"""Late at its first arrival."""
ALIVE: Final = OPEN | PENDING | RECENT | KNOWN

NEVER: Final = (1 << 63) - 1
VERSION: Final = 1


class Event(msgspec.Struct, array_like=True, gc=False):
    """One event of a user, its reports merged. `known_ts` is what its identity's life is reckoned from (§2)."""

    kind: int
    item_id: str
    ts: int
    watch_ms: int
    duration_ms: int
    event_id: str | None
    request_id: str | None
    known_ts: int
    flags: int


class Base(msgspec.Struct, array_like=True, gc=False):
    """Compacted history: items oldest first and the time of each, ms."""

    items: list[str]
    times: list[int]


_encode = msgspec.msgpack.Encoder().encode
_decode_events = msgspec.msgpack.Decoder(list[Event]).decode
_decode_base = msgspec.msgpack.Decoder(Base).decode
_HEADER = struct.Struct(">BQ")


def encode_live(due: int, events: list[Event]) -> bytes:
    """Version, the time whose passing makes a session final (big-endian), events in msgpack."""
    return _HEADER.pack(VERSION, due) + _encode(events)


def decode_due(value: bytes) -> int:
    """The header's time alone, for the scan at start."""
    return _HEADER.unpack_from(value)[1]


def decode_live(value: bytes) -> tuple[int, list[Event]]:
    """Inverse of `encode_live`."""
    return decode_due(value), _decode_events(memoryview(value)[_HEADER.size :])


def encode_base(seen: bool, base: Base) -> bytes:
    """Version, whether the user had a valid event (False: known from seeds only), msgpack."""
    return bytes((VERSION, seen)) + _encode(base)


def is_seen(value: bytes) -> bool:
    """The header's flag alone."""
    return value[1] == 1


def decode_base(value: bytes) -> Base:
    """The history in a value of `encode_base`."""
    return _decode_base(memoryview(value)[2:])


def merge_positives(base: Base, positives: list[tuple[int, str]], n: int) -> Base:
    """The history after further positive events (ts, item id): each item at its newest, the newest `n`, oldest first."""
    if not positives:
        return base
    newest = dict(zip(base.items, base.times, strict=True))
    last = (base.times[-1], base.items[-1]) if base.items else (0, "")
    ordered = True
    for ts, item_id in sorted(positives):
        before = newest.get(item_id)
        if before is not None:
            if before >= ts:
                continue
            del newest[item_id]
        newest[item_id] = ts
        if (ts, item_id) < last:
            ordered = False
    if not ordered:
        newest = {item_id: ts for ts, item_id in sorted((ts, item_id) for item_id, ts in newest.items())}
    items, times = list(newest), list(newest.values())
    return Base(items[-n:], times[-n:])


def history_of(live: bytes | None, base: bytes | None, n: int) -> list[str]:
    """H(∞) from the stored bytes of a user, oldest first (§4)."""
    compacted = decode_base(base) if base else Base([], [])
    positives = [(e.ts, e.item_id) for e in decode_live(live)[1] if e.flags & RECENT] if live else []
    return merge_positives(compacted, positives, n).items[-n:]
