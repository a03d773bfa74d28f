"""Refused lines: what they were, and applying them again once they are mended (SEMANTICS.md §1)."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping
from typing import Any

from streaming.changes import DeadLetter
from streaming.events import Row, parse_object
from streaming.rows import events_of
from streaming.store import Reader, Store


def letters(reader: Reader | Store, reason: str | None = None) -> Iterator[dict[str, Any]]:
    """Dead letters in order of refusal: number, source, reason, line; bytes that are no UTF-8 also as `base64`."""
    for number, letter in reader.dead_letters():
        if reason is None or letter.reason == reason:
            entry = {
                "number": number,
                "source": str(letter.position),
                "reason": letter.reason,
                "line": letter.raw.decode(errors="replace"),
            }
            try:
                letter.raw.decode()
            except UnicodeDecodeError:
                entry["base64"] = base64.b64encode(letter.raw).decode()
            yield entry


def redriven(
    store: Store, *, reason: str | None = None, mapping: Mapping[str, str] | None = None, now_ms: int | None = None
) -> dict[str, int]:
    """Applies dead letters again in one commit; those still invalid stay. `mapping` renames keys of JSON objects.

    What was refused at its time mostly comes late now: it enters histories and no session (§3).
    """
    core = store.core()
    now = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    max_ts = now + store.semantics().stream.future_ms
    tried: list[tuple[int, DeadLetter]] = [
        (number, letter) for number, letter in store.dead_letters() if reason is None or letter.reason == reason
    ]
    records: list[tuple[int, bytes | Row]] = []
    for number, letter in tried:
        fields = parse_object(letter.raw) if mapping else None
        if mapping and isinstance(fields, dict):
            records.append((number, Row(letter.raw, list(events_of(fields, mapping, max_ts, renamed=True)))))
        else:
            records.append((number, letter.raw))
    before = core.counters.dead_letters
    changes = core.apply(records, now)
    refused = {letter.position for letter in changes.dead_letters}
    mended = [number for number, _ in tried if number not in refused]
    core.counters.dead_letters = before - len(mended)
    changes.dead_letters = []
    store.commit(core, changes, {}, mended)
    store.sync()
    return {"redriven": len(mended), "refused": len(refused)}


