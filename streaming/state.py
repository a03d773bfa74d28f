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


Base = dict[str, int]
"""Compacted history: item → time of its newest positive event, ms, oldest first."""


_encode = msgspec.msgpack.Encoder().encode
_decode_events = msgspec.msgpack.Decoder(list[Event]).decode
_decode_base = msgspec.msgpack.Decoder(dict[str, int]).decode
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
    """Puts further positive events (ts, item id) into `base` and returns it: each item at its newest, the newest `n`."""
    if not positives:
        return base
    last_item = next(reversed(base), None)
    last = (base[last_item], last_item) if last_item is not None else (0, "")
    ordered = True
    positives.sort()
    for ts, item_id in positives:
        before = base.get(item_id)
        if before is not None:
            if before >= ts:
                continue
            del base[item_id]
        base[item_id] = ts
        if ordered and (ts, item_id) < last:
            ordered = False
    if not ordered:
        by_time = sorted((ts, item_id) for item_id, ts in base.items())
        base.clear()
        base.update((item_id, ts) for ts, item_id in by_time)
    if len(base) > n:
        for item_id in list(base)[: len(base) - n]:
            del base[item_id]
    return base


def history_of(live: bytes | None, base: bytes | None, n: int) -> list[str]:
    """H(∞) from the stored bytes of a user, oldest first (§4)."""
    positives = [(e.ts, e.item_id) for e in decode_live(live)[1] if e.flags & RECENT] if live else []
    return list(merge_positives(decode_base(base) if base else {}, positives, n))
