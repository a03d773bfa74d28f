"""Sources of records with a position to go on from, and JSON lines among them (SEMANTICS.md §1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from onerec.errors import UserError
from streaming.events import BLANK, MAX_LINE_BYTES, Line, Rejected, Row, parse_object
from streaming.items import ItemRecord
from streaming.rows import events_of
from streaming.streams import Tracked

BLOCK: Final = 16 << 20
KEPT_OF_A_LONG_LINE: Final = 16 << 20


class Position(msgspec.Struct, frozen=True):
    """How far a source is applied: records and bytes (decompressed); `head` tells the source from another of its name."""

    records: int = 0
    bytes: int = 0
    head: str = ""
    head_bytes: int = 0


class Batch(NamedTuple):
    """Consecutive records, the number of the first (from 1), and the bytes of the source up to their end.

    Without records: the source is at its end for now, and grows.
    """

    first: int
    records: Sequence[bytes | Row]
    bytes_after: int


class Source:
    """A named sequence of records, given from `start` on; what was applied before is skipped.

    Raises UserError where the beginning is not the one that was applied under this name.
    """

    def __init__(self, name: str, stream: Tracked, start: Position) -> None:
        self.name = name
        self.stream = stream
        self.start = start
        stream.look(lambda head: len(head) >= start.head_bytes)
        if start.head_bytes and stream.head(start.head_bytes) != (start.head, start.head_bytes):
            raise UserError(
                f"{name} is not the file that was replayed under this name before: its beginning differs. "
                "Give the new file a name of its own, or --state another folder (for Kafka, another kafka.prefix)"
            )

    def batches(self, max_ts: Callable[[], int]) -> Iterator[Batch]:
        """The records after `start`. `max_ts` gives the newest event time allowed at the moment."""
        raise NotImplementedError

    def position(self, records: int, consumed: int) -> Position:
        """The position after so many records and bytes."""
        head, length = self.stream.head(consumed)
        return Position(records, consumed, head, length)


class JsonLines(Source):
    """One JSON object a line; with `mapping` its keys are renamed to fields first; with `follow` there is no last one."""

    def __init__(
        self, name: str, stream: Tracked, start: Position, mapping: Mapping[str, str] | None = None, *, follow: bool = False
    ) -> None:
        super().__init__(name, stream, start)
        self._follow = follow
        self._mapping = dict(mapping or {})

    def batches(self, max_ts: Callable[[], int]) -> Iterator[Batch]:
        """Blocks of whole lines, as large as one read gives; none in them where a followed file ends for now."""
        skip, number, offset = self.start.bytes, self.start.records, self.start.bytes
        while skip:
            data = self.stream.read_some(min(skip, BLOCK))
            if not data:
                raise UserError(
                    f"{self.name} is shorter than what was applied of it ({self.start.bytes:,} bytes); "
                    "give the whole file under this name, or --state another folder (for Kafka, another kafka.prefix)"
                )
            skip -= len(data)
        carry, checked = b"", skip == 0 and offset > 0
        while True:
            data = self.stream.read_some(BLOCK)
            if not checked and len(carry) + len(data) >= 3:
                checked = True
                if (carry + data).startswith(b"\xef\xbb\xbf"):
                    data, carry = (carry + data)[3:], b""
                    offset += 3
            if not data and self._follow:
                yield Batch(number + 1, [], offset)
                continue
            if not data:
                break
            end = data.rfind(b"\n")
            if end < 0:
                carry += data
                if len(carry) > MAX_LINE_BYTES:
                    row, used, carry = self._long_line(carry)
                    number += 1
                    offset += used
                    yield Batch(number, [row], offset)
                continue
            block = carry + data[:end] if carry else data[:end]
            carry = data[end + 1 :]
            lines = block.split(b"\n")
            offset += len(block) + 1
            yield Batch(number + 1, self._records(lines, max_ts), offset)
            number += len(lines)
        if carry:
            yield Batch(number + 1, self._records([carry], max_ts), offset + len(carry))

    def _records(self, lines: list[bytes], max_ts: Callable[[], int]) -> Sequence[bytes | Row]:
        if not self._mapping:
            return lines
        newest = max_ts()
        records: list[Row] = []
        for raw in lines:
            if not raw.strip(BLANK):
                records.append(Row(raw, [], len(raw) + 1))
                continue
            fields = parse_object(raw)
            events: list[Line | ItemRecord | Rejected] = (
                [fields] if isinstance(fields, Rejected) else list(events_of(fields, self._mapping, newest, renamed=True))
            )
            records.append(Row(raw, events, len(raw) + 1))
        return records

    def _long_line(self, begun: bytes) -> tuple[Row, int, bytes]:
        """Reads to the end of an over-long line: its Row (at most 16 MiB kept), its length with line feed, and what follows."""
        kept, length = bytearray(begun), len(begun)
        while True:
            data = self.stream.read_some(BLOCK)
            end = data.find(b"\n")
            part = data if end < 0 else data[:end]
            length += len(part)
            kept += part[: max(0, KEPT_OF_A_LONG_LINE - len(kept))]
            if end >= 0 or not data:
                feed = 1 if end >= 0 else 0
                row = Row(bytes(kept), [Rejected("too_long")], length + feed)
                return row, length + feed, data[end + 1 :] if end >= 0 else b""
