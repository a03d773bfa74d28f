"""KuaiRand's histories before the log (SEMANTICS.md §8)."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from streaming.events import BLANK, Rejected, Row, parse_object
from streaming.rows import text
from streaming.sources import JsonLines, Source


class Seed(msgspec.Struct, frozen=True):
    """One user's earlier positives (ts, item id), oldest first (§8)."""

    user_id: str
    positives: list[tuple[int, str]]


class Seeds(Source):
    """KuaiRand's histories before the log: one user a line (§8)."""

    def seeds(self) -> Iterator[tuple[int, bytes, Seed | Rejected]]:
        """(line number, bytes, seed or the reason of its refusal) after `start`."""
        source = JsonLines(self.name, self.stream, self.start)
        for batch in source.batches(lambda: 0):
            for number, raw in enumerate(batch.records, batch.first):
                if isinstance(raw, Row):
                    yield number, raw.raw, Rejected("too_long")
                elif raw.strip(BLANK):
                    yield number, raw, _seed(raw)


def _seed(raw: bytes) -> Seed | Rejected:
    fields = parse_object(raw)
    if isinstance(fields, Rejected):
        return fields
    user, last = text(fields.get("user_id")), fields.get("last_time_ms")
    if not isinstance(user, str):
        return Rejected("bad_user_id")
    if type(last) is not int:
        return Rejected("bad_ts")
    items: list[str] = []
    for name in ("long_watch_seq", "like_seq"):
        values = fields.get(name) or []
        if not isinstance(values, list):
            return Rejected("bad_item_id")
        items += [text(value) for value in values]
    if not all(isinstance(item, str) for item in items):
        return Rejected("bad_item_id")
    return Seed(user, [(last - (len(items) - 1 - i), item) for i, item in enumerate(items)])
