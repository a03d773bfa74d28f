"""Rows with named columns as events: anybody's columns by a mapping, KuaiRand's by §8 (SEMANTICS.md)."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from onerec.errors import UserError
from streaming.events import KINDS, Line, Rejected, decode_mapping
from streaming.items import ItemRecord

INTERACTIONS: Final = tuple(name for name in KINDS if name not in ("watch", "item"))
KUAIRAND: Final = {
    "user_id": "user_id", "video_id": "item_id", "time_ms": "ts", "play_time_ms": "watch_ms", "duration_ms": "duration_ms",
    "is_like": "like", "is_follow": "follow", "is_forward": "share", "is_comment": "comment", "is_hate": "dislike",
}
"""Columns of a KuaiRand log → fields, in the order of §8."""
FIELDS: Final = ("type", "event_id", "user_id", "item_id", "ts", "watch_ms", "duration_ms", "request_id")


def parse_mapping(pairs: list[str] | None) -> dict[str, str]:
    """`--map column=field` options. Raises UserError naming the fields there are."""
    mapping = {}
    for pair in pairs or []:
        column, equals, field = pair.rpartition("=")
        if not equals or not column or field not in (*FIELDS, *INTERACTIONS):
            raise UserError(
                f"--map {pair!r}: write it as column=field, with one of the fields {', '.join((*FIELDS, *INTERACTIONS))}"
            )
        mapping[column] = field
    return mapping


def _integer(value: Any) -> Any:
    """Text that is a plain integer → int; anything else as it is, for the rules to refuse."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value) else value


def _true(value: Any) -> bool:
    """Whether a flag column is set."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "0.0", "false", "no", "n")
    return bool(value)


def text(value: Any) -> Any:
    """Ids may come as numbers from typed columns; they are text here. Empty is absent."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return str(value)
    return None if value == "" else value


def _milliseconds(value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
        return (aware - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(milliseconds=1)
    return _integer(value)


def events_of(
    values: Mapping[str, Any], mapping: Mapping[str, str], max_ts: int, *, renamed: bool = False
) -> Iterator[Line | ItemRecord | Rejected]:
    """One row of named values → its event, then one interaction for each flag that is set (§8).

    With `renamed` (JSON objects) values keep their JSON types, and keys that are not mapped keep their names.
    """
    fields: dict[str, Any] = dict(values) if renamed else {}
    for column, field in mapping.items():
        if column in values and field not in INTERACTIONS:
            fields[field] = values[column]
    if not renamed or not isinstance(fields.get("user_id", ""), str):
        fields["user_id"] = text(fields.get("user_id"))
    if not renamed or not isinstance(fields.get("item_id", ""), str):
        fields["item_id"] = text(fields.get("item_id"))
    if not renamed:
        for name in ("event_id", "request_id"):
            fields[name] = text(fields.get(name))
        fields["ts"] = _milliseconds(fields.get("ts"))
        for name in ("watch_ms", "duration_ms"):
            fields[name] = _integer(fields.get(name))
    if fields.get("duration_ms") in (None, ""):
        fields["duration_ms"] = 0
    if not fields.get("type"):
        fields["type"] = "watch"
    yield decode_mapping(fields, max_ts)
    for column, field in mapping.items():
        if field in INTERACTIONS and _true(values.get(column)):
            yield decode_mapping({**fields, "type": field, "event_id": None}, max_ts)
