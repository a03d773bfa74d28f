"""Schema, decoding and validation of events; every refusal has a reason code (SEMANTICS.md §1)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
import orjson
from msgspec import Meta

from streaming.items import ItemRecord

MIN_TS: Final = 631_152_000_000
MAX_DURATION_MS: Final = 604_800_000
MAX_LINE_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 128
MAX_ID_BYTES: Final = 256
BLANK: Final = b" \t\r"

WATCH: Final = 0
DISLIKE: Final = 6
KINDS: Final[dict[str, int]] = {
    "watch": WATCH, "like": 1, "follow": 2, "share": 3, "collect": 4, "comment": 5, "dislike": DISLIKE, "item": 7,
}
KIND_NAMES: Final = tuple(KINDS)
LIKE: Final = KINDS["like"]
FOLLOW: Final = KINDS["follow"]
ITEM: Final = KINDS["item"]

REASONS: Final[dict[str, str]] = {
    "too_long": "the line is longer than 1 MiB",
    "too_deep": "JSON nested deeper than 128",
    "not_json": "not one JSON object in UTF-8",
    "bad_type": "`type` is none of " + ", ".join(KIND_NAMES),
    "bad_user_id": "`user_id` is not a string of 1 to 256 bytes",
    "bad_item_id": "`item_id` is not a string of 1 to 256 bytes",
    "bad_event_id": "`event_id` is neither absent, null nor a string of 1 to 256 bytes",
    "bad_request_id": "`request_id` is neither absent, null nor a string of 1 to 256 bytes",
    "bad_ts": "`ts` is not an integer of epoch milliseconds from 1990 on",
    "future_ts": "`ts` lies further ahead of the clock than stream.max_future_ms",
    "bad_watch_ms": "`watch_ms` is not an integer from 0 to 604800000",
    "bad_duration_ms": "`duration_ms` is not an integer from 0 to 604800000",
    "bad_schema": "not readable by the schema that the message names",
    "bad_columns": "the row has more or fewer columns than the header, or is no CSV",
    "identity_conflict": "the same event_id came before with another item_id",
    "user_overflow": "the user has more than stream.max_open_events events in open sessions",
    "bad_embedding": "`embedding` is not a list of finite numbers of the catalogue's dimension",
    "bad_item": "`tags` is not a list of strings, or `author_id` not a string",
}
"""Reason code of a dead letter → what is wrong."""


class Line(msgspec.Struct, gc=False):
    """One event as its line gives it; -1 and "" stand for what is absent."""

    type: str = ""
    user_id: str = ""
    item_id: str = ""
    ts: int = -1
    watch_ms: int = -1
    duration_ms: int = -1
    event_id: str | None = None
    request_id: str | None = None


class Rejected(msgspec.Struct, frozen=True):
    """Why a line is no valid event."""

    reason: str


class Row(msgspec.Struct, gc=False):
    """A record already decoded: its original bytes, the events that it stands for, and its size in the source's bytes."""

    raw: bytes
    events: list[Line | ItemRecord | Rejected]
    size: int = 0


ShortId = Annotated[str, Meta(min_length=1, max_length=MAX_ID_BYTES // 4)]
Duration = Annotated[int, Meta(ge=0, le=MAX_DURATION_MS)]


class FastLine(msgspec.Struct, gc=False):
    """A Line as almost all lines are: every value in its usual range, so that one C call parses and validates."""

    type: Literal["watch", "like", "follow", "share", "collect", "comment", "dislike"]
    user_id: ShortId
    item_id: ShortId
    ts: Annotated[int, Meta(ge=MIN_TS)]
    watch_ms: Duration = -1
    duration_ms: Duration = -1
    event_id: ShortId | None = None
    request_id: ShortId | None = None


fast_decode = msgspec.json.Decoder(FastLine).decode
"""JSON line → FastLine. It refuses more than §1 does (a refused line goes to `decode`), and accepts more in three points only:
bad UTF-8 in what it skips, deep nesting there, and a watch without its durations; those are the caller's to check."""
DEEP_LINE: Final = 2 * MAX_DEPTH
"""A line of at most so many bytes cannot be nested deeper than allowed."""


def _is_id(value: Any) -> bool:
    if type(value) is not str or not value:
        return False
    if len(value) <= MAX_ID_BYTES // 4:
        return value.isascii() or utf8_length(value) > 0
    return 0 < utf8_length(value) <= MAX_ID_BYTES


def utf8_length(value: str) -> int:
    """Bytes of the string in UTF-8; 0 where it has none (a lone surrogate)."""
    try:
        return len(value.encode())
    except UnicodeEncodeError:
        return 0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int:
    # Python refuses to convert very long digit strings; anything that long is out of every range here.
    return int(text) if len(text) < 40 else (-1 if text.startswith("-") else 10**39)


def _too_deep(raw: bytes) -> bool:
    """Whether brackets outside strings nest deeper than 128."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return False
    depth, in_string, escaped = 0, False, False
    for byte in raw:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif byte in b"]}":
            depth -= 1
    return False


def parse_object(raw: bytes) -> dict[str, Any] | Rejected:
    """One line → the JSON object in it, exactly as RFC 8259 allows; repeated keys: the last."""
    if len(raw) > MAX_LINE_BYTES:
        return Rejected("too_long")
    if _too_deep(raw):
        return Rejected("too_deep")
    try:
        value = orjson.loads(raw)
        again = isinstance(value, dict) and isinstance(value.get("ts"), float)
    except orjson.JSONDecodeError:
        again = True
    if again:
        # orjson refuses two things that the grammar allows, escaped lone surrogates and numbers beyond doubles, and makes
        # floats of integers beyond 64 bits.
        try:
            value = json.loads(raw.decode(), parse_constant=_refuse_constant, parse_int=_integer)
        except (ValueError, RecursionError):
            return Rejected("not_json")
    return value if isinstance(value, dict) else Rejected("not_json")


def line_from_mapping(fields: Mapping[str, Any]) -> Line | Rejected:
    """Named values → a Line with the types that §1 asks; ranges are `validate`'s."""
    kind = fields.get("type")
    if type(kind) is not str or kind not in KINDS:
        return Rejected("bad_type")
    line = Line(type=kind)
    if kind != "item":
        if not _is_id(fields.get("user_id")):
            return Rejected("bad_user_id")
        line.user_id = fields["user_id"]
    if not _is_id(fields.get("item_id")):
        return Rejected("bad_item_id")
    line.item_id = fields["item_id"]
    if type(fields.get("ts")) is not int:
        return Rejected("bad_ts")
    line.ts = fields["ts"]
    if kind == "item":
        return line
    for name in ("event_id", "request_id"):
        value = fields.get(name)
        if value is not None:
            if not _is_id(value):
                return Rejected(f"bad_{name}")
            setattr(line, name, value)
    if kind == "watch":
        for name in ("watch_ms", "duration_ms"):
            value = fields.get(name)
            if type(value) is not int or not 0 <= value <= MAX_DURATION_MS:
                return Rejected(f"bad_{name}")
            setattr(line, name, value)
    return line


def validate(line: Line, max_ts: int) -> str | None:
    """The reason why a Line is invalid, or None; `max_ts` is the newest time allowed, in ms."""
    kind = KINDS.get(line.type)
    if kind is None:
        return "bad_type"
    if kind != ITEM and not _is_id(line.user_id):
        return "bad_user_id"
    if not _is_id(line.item_id):
        return "bad_item_id"
    if line.ts < MIN_TS:
        return "bad_ts"
    if line.ts > max_ts:
        return "future_ts"
    if kind == ITEM:
        return None
    if line.event_id is not None and not _is_id(line.event_id):
        return "bad_event_id"
    if line.request_id is not None and not _is_id(line.request_id):
        return "bad_request_id"
    if kind == WATCH:
        if not 0 <= line.watch_ms <= MAX_DURATION_MS:
            return "bad_watch_ms"
        if not 0 <= line.duration_ms <= MAX_DURATION_MS:
            return "bad_duration_ms"
    return None


def item_from_mapping(fields: Mapping[str, Any]) -> ItemRecord | Rejected:
    """An `item` event whose id and time are valid → its catalogue entry; the embedding's length is the core's to check."""
    duration = fields.get("duration_ms")
    tags, author, embedding = fields.get("tags"), fields.get("author_id"), fields.get("embedding")
    if tags is not None and not (type(tags) is list and all(type(t) is str and utf8_length(t) for t in tags)):
        return Rejected("bad_item")
    if author is not None and not (type(author) is str and utf8_length(author)):
        return Rejected("bad_item")
    if embedding is not None:
        if type(embedding) is not list or not embedding:
            return Rejected("bad_embedding")
        for x in embedding:
            if type(x) not in (int, float) or not math.isfinite(x) or abs(x) > 3.4028235e38:
                return Rejected("bad_embedding")
    return ItemRecord(
        item_id=fields["item_id"],
        ts=fields["ts"],
        duration_ms=duration if type(duration) is int and 0 <= duration <= MAX_DURATION_MS else None,
        tags=tags or [],
        author_id=author,
        embedding=[float(x) for x in embedding] if embedding is not None else None,
    )


def decode(raw: bytes, max_ts: int) -> Line | ItemRecord | Rejected:
    """One line of bytes → a valid event, a catalogue entry, or the reason of its refusal (§1)."""
    fields = parse_object(raw)
    if isinstance(fields, Rejected):
        return fields
    return decode_mapping(fields, max_ts)


def decode_mapping(fields: Mapping[str, Any], max_ts: int) -> Line | ItemRecord | Rejected:
    """Named values → a valid event, a catalogue entry, or the reason of its refusal (§1)."""
    line = line_from_mapping(fields)
    if isinstance(line, Rejected):
        return line
    reason = validate(line, max_ts)
    if reason is not None:
        return Rejected(reason)
    return item_from_mapping(fields) if line.type == "item" else line
