"""Dead letters in Kafka: which lines were refused where and why, and sending them again once mended (SEMANTICS.md §1)."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from onerec.errors import Failure
from streaming.events import Line, Rejected, decode, parse_object
from streaming.items import ItemRecord
from streaming.kafka.outbox import RAW, Outbox, wait_decided
from streaming.kafka.partitioning import partition_of
from streaming.kafka.producing import event_json
from streaming.kafka.progress import ProgressLog
from streaming.kafka.settings import KafkaConfig
from streaming.kafka.tail import Tail
from streaming.kafka.topics import require, topic_ids
from streaming.rows import events_of

TOPIC: Final = "dead-letters"
REDRIVEN: Final = "dead-letters"
"""The name in `progress`, beside the sources of `produce`, which are absolute paths or `-`."""
TRANSACTION_LINES: Final = 20_000
READ: Final = 5_000


class Redriven(msgspec.Struct):
    """Reason code → offset of `dead-letters` up to which letters of that reason were sent again, or put at the end anew."""

    offsets: dict[str, int] = {}


class Letter(NamedTuple):
    """One refused line; `source` is topic:partition:offset:line."""

    offset: int
    source: str
    reason: str
    raw: bytes


def entry(letter: Letter) -> dict[str, Any]:
    """What is shown of a letter: number, source, reason, line; bytes that are no UTF-8 also as `base64`."""
    shown = {
        "number": letter.offset, "source": letter.source, "reason": letter.reason, "line": letter.raw.decode(errors="replace"),
    }
    try:
        letter.raw.decode()
    except UnicodeDecodeError:
        shown["base64"] = base64.b64encode(letter.raw).decode()
    return shown


def letters(config: KafkaConfig, reason: str | None = None) -> Iterator[Letter]:
    """Letters that wait, in order of refusal, up to the end of the topic; `reason` only those of one code.

    Raises UserError where Kafka is not reached or the topic is missing.
    """
    require(config, (TOPIC, "progress"))
    yield from _waiting(config, _redriven(config), reason)


def _redriven(config: KafkaConfig) -> Redriven:
    wait_decided(config)
    with ProgressLog(config) as log:
        log.refresh()
        value = log.produced.get(REDRIVEN)
    try:
        return msgspec.json.decode(value, type=Redriven) if value else Redriven()
    except msgspec.MsgspecError as error:
        raise Failure(f"topic {config.named('progress')}: no record of redriven letters ({error})") from None


def _waiting(config: KafkaConfig, redriven: Redriven, reason: str | None) -> Iterator[Letter]:
    wait_decided(config, (TOPIC,))
    with Tail(config, TOPIC, topic_ids(config, [TOPIC])[TOPIC], {0: None}) as tail:
        end = tail.bounds(0).high
        while tail.offsets[0] < end:
            for message in tail.read(READ, 0.2):
                letter = _letter(message)
                if message.offset() >= end:
                    return
                if reason in (None, letter.reason) and letter.offset >= redriven.offsets.get(letter.reason, 0):
                    yield letter


def _letter(message: Any) -> Letter:
    headers = {name: (value or b"").decode(errors="replace") for name, value in message.headers() or ()}
    return Letter(message.offset(), headers.get("source", "?"), headers.get("reason", "?"), message.value() or b"")


def redrive(
    config: KafkaConfig, *, future_ms: int, reason: str | None = None, mapping: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Sends letters that are valid by now to the raw topics again, each once; those still invalid are put at the end anew.

    `mapping` renames keys of JSON objects; `future_ms` is how far a line may lie ahead of the clock. In one transaction with a
    record of how far it has come: killed and run again, it goes on from there. Raises as `Outbox` does.
    """
    max_ts = time.time_ns() // 1_000_000 + future_ms
    counts = {"redriven": 0, "refused": 0}
    with Outbox(config, "dead-letters", topics=(TOPIC,)) as outbox:
        done = _redriven(config)
        tried = [(letter, _mended(letter, mapping or {}, max_ts)) for letter in _waiting(config, done, reason)]
        if not any(mended for _, mended in tried):
            return {"redriven": 0, "refused": len(tried)}
        for letter, mended in tried:
            for topic, key, line in mended:
                outbox.put(topic, partition_of(key, config.partitions, config.partitioner), key, line)
            if not mended:
                outbox.put_apart(TOPIC, letter.raw, [("source", letter.source.encode()), ("reason", letter.reason.encode())])
            counts["redriven" if mended else "refused"] += 1
            done.offsets[letter.reason] = letter.offset + 1
            if outbox.lines >= TRANSACTION_LINES:
                outbox.commit({b"produce:" + REDRIVEN.encode(): msgspec.json.encode(done)})
        outbox.commit({b"produce:" + REDRIVEN.encode(): msgspec.json.encode(done)})
        outbox.settle()
    return counts


def _mended(letter: Letter, mapping: Mapping[str, str], max_ts: int) -> list[tuple[str, str, bytes]]:
    """(topic, key, line) of what a letter holds; empty where it is refused still."""
    fields = parse_object(letter.raw) if mapping else None
    if isinstance(fields, dict):
        events = list(events_of(fields, mapping, max_ts, renamed=True))
    else:
        events = [decode(letter.raw, max_ts)]
    origin = letter.source.partition(":")[0]
    found: list[tuple[str, str, bytes]] = []
    for event in events:
        if isinstance(event, Rejected):
            return []
        line = event_json(event) if mapping else letter.raw
        found.append((_topic(event, origin), event.user_id if isinstance(event, Line) else event.item_id, line))
    return found


def _topic(event: Line | ItemRecord, origin: str) -> str:
    """The raw topic that the line came from; by its type where it came from none, or was in one that it cannot stand in."""
    if isinstance(event, ItemRecord):
        return "items"
    if origin in RAW and origin != "items":
        return origin
    return "watch" if event.type == "watch" else "interactions"
