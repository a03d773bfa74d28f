"""Bytes of the topics that are ours: packed events with time markers, sessions, changelog entries, progress.

`events`: JSON lines of one partition's users, parted by line feeds, in order of application; header `n` numbers the messages
of a partition without a hole, so that one lost on the way is seen. A time marker, or the end marker, is a message of its own.
`sessions`: the JSON of SEMANTICS.md §9 and `position`; header `more` holds what training windows need and §9 does not show.
`histories`: the pairs of column family `users` ("b" + user id, "l" + user id), and under "p" the progress they belong to.
`progress`: "partition:<p>" → the same progress; "settings" → the semantic values of the whole log; "produce:<source>" → how far
a file has been produced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec
import orjson

from onerec.errors import Failure
from streaming.changes import Counters
from streaming.semantics import Semantics
from streaming.sessions import Session, SessionItem, session_json

END: Final = b'{"type":"end"}'
"""Marker after which every open session is final, as if the watermark were infinite; the watermark stays (§5)."""
_TIME: Final = b'{"type":"time","ts":'
NUMBER_HEADER: Final = "n"
MORE_HEADER: Final = "more"
PROGRESS_KEY: Final = b"p"
NOTHING: Final = b"\x00"
"""Value of a changelog entry that was removed. Never a tombstone: compaction forgets those after a day, and a disk that was
away for longer would keep the old value for good."""
SETTINGS_KEY: Final = b"settings"
VERSION: Final = 1

Headers = list[tuple[str, bytes]]


def time_marker(ts: int) -> bytes:
    """The message that moves a quiet partition's watermark like an event of `ts` (§3)."""
    return b"%s%d}" % (_TIME, ts)


def marker_time(value: bytes) -> int | None:
    """The time of a time marker, ms; None for any other message."""
    if not value.startswith(_TIME):
        return None
    try:
        return int(value[len(_TIME) : -1])
    except ValueError:
        return None


def pack(lines: Sequence[bytes]) -> bytes:
    """JSON lines → one message."""
    return b"\n".join(lines)


def unpack(value: bytes) -> list[bytes]:
    """One message → its JSON lines; blank ones are the reader's to skip (§1)."""
    return value.split(b"\n")


class Chunk(NamedTuple):
    """One message of `events`: offset, time of its log record in ms, bytes, and its number (None: of another producer)."""

    offset: int
    timestamp: int
    value: bytes
    number: int | None


class Progress(msgspec.Struct, kw_only=True):
    """What a partition of the stream has come to, in the transaction that brought it there.

    `offset` is the next of `events` to read, `number` the next message number, `sessions` how many the partition has made
    (the sequence of the last), `ended` whether the last message applied was an end marker.
    """

    partition: int
    offset: int = 0
    number: int | None = None
    watermark: int | None = None
    sessions: int = 0
    ended: bool = False
    counters: Counters = msgspec.field(default_factory=Counters)
    version: int = VERSION


def decode_progress(value: bytes, place: str) -> Progress:
    """Inverse of `msgspec.json.encode`. Raises Failure for a value of another version, naming `place`."""
    try:
        found = msgspec.json.decode(value, type=Progress)
    except msgspec.MsgspecError as error:
        raise Failure(f"{place}: no progress record of onerec ({error}); is the topic used by another program?") from None
    if found.version != VERSION:
        raise Failure(
            f"{place}: progress of format {found.version}, this version reads {VERSION}; run the version that wrote it, "
            "or replay the raw topics into topics of a new kafka.prefix"
        )
    return found


def partition_key(partition: int) -> bytes:
    """Key in `progress`."""
    return b"partition:%d" % partition


def encode_settings(semantics: Semantics, partitions: int) -> bytes:
    """The record `settings` of `progress`: what every worker of one log has to agree on."""
    return msgspec.json.encode({"version": VERSION, "partitions": partitions, "semantics": semantics})


class _More(msgspec.Struct, array_like=True):
    effective: list[bool]
    positives: list[tuple[int, str]]


_encode_more = msgspec.msgpack.Encoder().encode
_decode_more = msgspec.msgpack.Decoder(_More).decode


def session_message(session: Session, partition: int, sequence: int) -> tuple[bytes, Headers]:
    """Value and headers in `sessions`; `position` is [partition, sequence], 1, 2, 3 … within the partition."""
    value = b'%s,"position":[%d,%d]}' % (session_json(session)[:-1], partition, sequence)
    more = _More([item.effective for item in session.items], session.positives)
    return value, [(MORE_HEADER, _encode_more(more))]


def decode_session_message(value: bytes, headers: Sequence[tuple[str, Any]] | None) -> tuple[Session, int, int]:
    """Value and headers → (session, partition, sequence).

    Raises ValueError where it is no session of ours. Without the header, an item counts as effective if it was watched at all.
    """
    try:
        fields = orjson.loads(value)
        more = next((content for name, content in headers or () if name == MORE_HEADER), None)
        extra = _decode_more(more) if more else _More([], [])
        partition, sequence = fields["position"]
        labels = fields["labels"]
        flags = extra.effective or [item["watch_ms"] > 0 for item in fields["items"]]
        items = [
            SessionItem(item["item_id"], item["ts"], item["watch_ms"], item["duration_ms"], item["interactions"], flag)
            for item, flag in zip(fields["items"], flags, strict=True)
        ]
        session = Session(
            fields["session_id"], fields["user_id"], fields["request_id"], fields["start"], fields["end"], items,
            fields["history"], fields["watched"], fields["total_watch_ms"], fields["interactions"], fields["high_quality"],
            labels["swt"], labels["vtr"], labels["wtr"], labels["ltr"], extra.positives,
        )
    except (KeyError, TypeError, msgspec.MsgspecError) as error:
        raise ValueError(f"not a session of onerec: {error!r}") from None
    return session, int(partition), int(sequence)
