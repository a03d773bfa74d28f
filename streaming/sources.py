"""Files as sources of records: JSON lines, CSV, Parquet, KuaiRand; plain, gzip, zstd, standard input (SEMANTICS.md §1, §8)."""

from __future__ import annotations

import csv
import datetime
import gzip
import hashlib
import io
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import msgspec
import orjson
import zstandard

from onerec.errors import Failure, UserError
from streaming.events import KINDS, MAX_LINE_BYTES, Line, Rejected, Row, decode_mapping, parse_object
from streaming.items import ItemRecord

BLOCK: Final = 8 << 20
KEPT_OF_A_LONG_LINE: Final = 16 << 20
HEAD_BYTES: Final = 64 << 10
BATCH_ROWS: Final = 8_192
PARQUET_ROWS: Final = 262_144
INTERACTIONS: Final = tuple(name for name in KINDS if name not in ("watch", "item"))
KUAIRAND: Final = {
    "user_id": "user_id", "video_id": "item_id", "time_ms": "ts", "play_time_ms": "watch_ms", "duration_ms": "duration_ms",
    "is_like": "like", "is_follow": "follow", "is_forward": "share", "is_comment": "comment", "is_hate": "dislike",
}
"""Columns of a KuaiRand log → fields, in the order of §8."""
FIELDS: Final = ("type", "event_id", "user_id", "item_id", "ts", "watch_ms", "duration_ms", "request_id")
ITEM_FIELDS: Final = ("item_id", "ts", "duration_ms", "tags", "author_id", "embedding")
FORMATS: Final = ("auto", "jsonl", "csv", "parquet", "kuairand")


class Position(msgspec.Struct, frozen=True):
    """How far a source is applied: records and bytes (decompressed); `head` tells the source from another of its name."""

    records: int = 0
    bytes: int = 0
    head: str = ""
    head_bytes: int = 0


class Batch(NamedTuple):
    """Consecutive records as (number, line or Row), numbers from 1, and the bytes of the source up to their end."""

    records: list[tuple[int, bytes | Row]]
    bytes_after: int


class Seed(msgspec.Struct, frozen=True):
    """One user's earlier positives (ts, item id), oldest first (§8)."""

    user_id: str
    positives: list[tuple[int, str]]


class _ZstdReader:
    """zstd frames one after another. The library's own stream reader ends silently where the last frame is cut off."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fed = False
        self._ready = b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end; EOFError where a frame is cut off."""
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._fed = zstandard.ZstdDecompressor().decompressobj(), False
            data = data or self._raw.read1(1 << 20)  # type: ignore[attr-defined]
            if not data:
                if self._fed:
                    raise EOFError
                return b""
            self._fed = True
            self._ready = self._frame.decompress(data)
        part, self._ready = self._ready[:size], self._ready[size:]
        return part


class Tracked(io.RawIOBase):
    """A byte stream that knows how much was read of it, keeps a hash of its beginning, and names itself in errors."""

    def __init__(self, name: str, inner: Any, raw: IO[bytes], size: int | None) -> None:
        self.name = name
        self.size = size
        self._inner = inner
        self._raw = raw
        self._head = bytearray()
        self._ahead = b""
        self.consumed = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what is there, up to the buffer's length."""
        data = self.read_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read_some(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end. Raises UserError where the file is damaged or truncated."""
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
        else:
            data = self._read(size)
        self.consumed += len(data)
        return data

    def look(self, until: Callable[[bytes], bool]) -> bytes:
        """The first bytes (at most about 64 KiB), left in place: as many as `until` asks for, or all there are."""
        while len(self._head) < HEAD_BYTES and not until(bytes(self._head)):
            data = self._read(HEAD_BYTES)
            if not data:
                break
            self._ahead += data
        return bytes(self._head)

    def _read(self, size: int) -> bytes:
        try:
            data: bytes = self._inner.read1(size) if hasattr(self._inner, "read1") else self._inner.read(size)
        except EOFError:
            raise self._damaged("the compressed data ends too early") from None
        except (zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise self._damaged(str(error)) from None
        except OSError as error:
            raise Failure(f"{self.name}: cannot be read: {error}") from None
        if len(self._head) < HEAD_BYTES:
            self._head += data[: HEAD_BYTES - len(self._head)]
        return data

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.name}: damaged or truncated after {self.consumed:,} bytes ({what}); what came before it is in the state. "
            "Give the whole file under the same name and run the same command again"
        )

    def head(self, consumed: int) -> tuple[str, int]:
        """Hash of the first min(64 KiB, `consumed`) bytes, and their number."""
        part = bytes(self._head[:consumed])
        return hashlib.sha256(part).hexdigest(), len(part)

    def fraction(self) -> float | None:
        """How much of the file on disk has been read, 0 to 1; None for standard input."""
        return self._raw.tell() / self.size if self.size else None


def open_stream(path: str) -> Tracked:
    """A file, or standard input for `-`, decompressed if it is gzip or zstd. Raises UserError if it cannot be opened."""
    if path == "-":
        raw: IO[bytes] = sys.stdin.buffer
        size = None
    else:
        try:
            raw = open(path, "rb")  # noqa: SIM115 - lives as long as the source
            size = os.fstat(raw.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a file that can be read, or - for standard input") from None
    buffered: Any = raw
    magic = buffered.peek(4)[:4]
    if size == 0 or not magic:
        raise UserError(f"{path} is empty: no events to replay")
    if magic[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16; convert it first, for example with: iconv -f UTF-16 -t UTF-8")
    inner: Any = buffered
    if magic[:2] == b"\x1f\x8b":
        inner = gzip.GzipFile(fileobj=buffered)
    elif magic == b"\x28\xb5\x2f\xfd":
        inner = _ZstdReader(buffered)
    return Tracked(path, inner, buffered, size)


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
                "Give the new file a name of its own, or --state another folder"
            )

    def batches(self, max_ts: Callable[[], int]) -> Iterator[Batch]:
        """The records after `start`. `max_ts` gives the newest event time allowed at the moment."""
        raise NotImplementedError

    def position(self, records: int, consumed: int) -> Position:
        """The position after so many records and bytes."""
        head, length = self.stream.head(consumed)
        return Position(records, consumed, head, length)


class JsonLines(Source):
    """One JSON object a line; with `mapping` its keys are renamed to fields first."""

    def __init__(self, name: str, stream: Tracked, start: Position, mapping: Mapping[str, str] | None = None) -> None:
        super().__init__(name, stream, start)
        self._mapping = dict(mapping or {})

    def batches(self, max_ts: Callable[[], int]) -> Iterator[Batch]:
        """Blocks of whole lines, as large as one read gives."""
        skip, number, offset = self.start.bytes, self.start.records, self.start.bytes
        while skip:
            data = self.stream.read_some(min(skip, BLOCK))
            if not data:
                raise UserError(
                    f"{self.name} is shorter than what was applied of it ({self.start.bytes:,} bytes); "
                    "give the whole file under this name, or --state another folder"
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
            if not data:
                break
            end = data.rfind(b"\n")
            if end < 0:
                carry += data
                if len(carry) > MAX_LINE_BYTES:
                    row, used, carry = self._long_line(carry)
                    number += 1
                    offset += used
                    yield Batch([(number, row)], offset)
                continue
            block = carry + data[:end] if carry else data[:end]
            carry = data[end + 1 :]
            lines = block.split(b"\n")
            offset += len(block) + 1
            yield Batch(self._records(lines, number, max_ts), offset)
            number += len(lines)
        if carry:
            yield Batch(self._records([carry], number, max_ts), offset + len(carry))

    def _records(self, lines: list[bytes], number: int, max_ts: Callable[[], int]) -> list[tuple[int, bytes | Row]]:
        if not self._mapping:
            return list(enumerate(lines, number + 1))
        newest = max_ts()
        records: list[tuple[int, bytes | Row]] = []
        for raw in lines:
            number += 1
            if not raw.strip(b" \t\r"):
                records.append((number, Row(raw, [], len(raw) + 1)))
                continue
            fields = parse_object(raw)
            events: list[Line | ItemRecord | Rejected] = (
                [fields] if isinstance(fields, Rejected) else list(events_of(fields, self._mapping, newest, renamed=True))
            )
            records.append((number, Row(raw, events, len(raw) + 1)))
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


def _integer(value: Any) -> Any:
    """Text that is a plain integer → int; anything else as it is, for the rules to refuse."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value) else value


def _true(value: Any) -> bool:
    """Whether a flag column is set."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "0.0", "false", "no", "n")
    return bool(value)


def _text(value: Any) -> Any:
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
        fields["user_id"] = _text(fields.get("user_id"))
    if not renamed or not isinstance(fields.get("item_id", ""), str):
        fields["item_id"] = _text(fields.get("item_id"))
    if not renamed:
        for name in ("event_id", "request_id"):
            fields[name] = _text(fields.get(name))
        fields["ts"] = _milliseconds(fields.get("ts"))
        for name in ("watch_ms", "duration_ms"):
            fields[name] = _integer(fields.get(name))
    if fields.get("duration_ms") in (None, ""):
        fields["duration_ms"] = 0
    if not fields.get("type"):
        fields["type"] = "watch"
    first = decode_mapping(fields, max_ts)
    yield first
    if isinstance(first, Line):
        for column, field in mapping.items():
            if field in INTERACTIONS and _true(values.get(column)):
                yield Line(field, first.user_id, first.item_id, first.ts, request_id=first.request_id)


class Table(Source):
    """Rows with named columns: CSV or Parquet. Positions count rows."""

    def __init__(self, name: str, stream: Tracked, start: Position, mapping: Mapping[str, str]) -> None:
        super().__init__(name, stream, start)
        self._mapping = mapping

    def rows(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """(original bytes, values by column; None for a row that cannot be read)."""
        raise NotImplementedError

    def columns(self) -> list[str]:
        """Names of the columns."""
        raise NotImplementedError

    def checked_mapping(self) -> dict[str, str]:
        """Column → field, own names kept. Raises UserError naming missing columns and how to map them."""
        columns = self.columns()
        mapping = {column: column for column in columns if column in FIELDS or column in INTERACTIONS}
        taken = set(self._mapping.values())
        mapping = {column: field for column, field in mapping.items() if field not in taken}
        for column, field in self._mapping.items():
            if column not in columns:
                raise UserError(f"{self.name}: --map names the column {column!r}; there are: {', '.join(columns)}")
            mapping[column] = field
        present = set(mapping.values())
        needed = {"user_id", "item_id", "ts"} | (set() if "type" in present else {"watch_ms"})
        if missing := sorted(needed - present):
            raise UserError(
                f"{self.name}: no column for {', '.join(missing)}; the columns are {', '.join(columns)}. "
                f"Say which is which, for example --map {columns[0]}={missing[0]}"
            )
        return mapping

    def batches(self, max_ts: Callable[[], int]) -> Iterator[Batch]:
        """Batches of 8,192 rows."""
        mapping = self.checked_mapping()
        number = 0
        records: list[tuple[int, bytes | Row]] = []
        for raw, values in self.rows():
            number += 1
            if number <= self.start.records:
                continue
            if values is None:
                events: list[Line | ItemRecord | Rejected] = [Rejected("bad_columns")]
            else:
                events = list(events_of(values, mapping, max_ts()))
            records.append((number, Row(raw, events)))
            if len(records) >= BATCH_ROWS:
                yield Batch(records, self.stream.consumed)
                records = []
        if records:
            yield Batch(records, self.stream.consumed)


class Csv(Table):
    """CSV with a header line, UTF-8."""

    def __init__(self, name: str, stream: Tracked, start: Position, mapping: Mapping[str, str]) -> None:
        super().__init__(name, stream, start, mapping)
        self._pending: list[str] = []
        csv.field_size_limit(MAX_LINE_BYTES)
        text = io.TextIOWrapper(io.BufferedReader(stream, BLOCK), "utf-8-sig", errors="surrogateescape", newline="")
        self._reader = csv.reader(self._lines(text), strict=True)
        try:
            self._header = next(self._reader, [])
        except csv.Error as error:
            raise UserError(f"{name}: the first line is no CSV header ({error}); give --format") from None
        self._pending.clear()

    def _lines(self, text: Iterable[str]) -> Iterator[str]:
        for line in text:
            self._pending.append(line)
            yield line

    def columns(self) -> list[str]:
        """Names in the header."""
        return self._header

    def rows(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Rows after the header; blank lines are skipped."""
        width = len(self._header)
        while True:
            try:
                values = next(self._reader)
            except StopIteration:
                return
            except csv.Error:
                values = [""]
            raw = "".join(self._pending).encode(errors="surrogateescape").rstrip(b"\r\n")
            self._pending.clear()
            if not raw.strip(b" \t\r"):
                continue
            yield raw, dict(zip(self._header, values, strict=True)) if len(values) == width else None


class Parquet(Table):
    """A Parquet file, read a slice of rows at a time, so that a large one needs little memory."""

    def __init__(self, name: str, stream: Tracked, start: Position, mapping: Mapping[str, str]) -> None:
        import polars

        super().__init__(name, stream, start, mapping)
        if name == "-":
            raise UserError("standard input cannot be Parquet, which is read from its end; give the file's name")
        self._table = polars.scan_parquet(name)
        try:
            self._columns = self._table.collect_schema().names()
        except (polars.exceptions.PolarsError, OSError) as error:
            raise UserError(f"{name} is no whole Parquet file: {error}") from None

    def columns(self) -> list[str]:
        """Top-level columns."""
        return self._columns

    def rows(self) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Rows as Python values; their bytes are the row as JSON."""
        offset = 0
        while len(part := self._table.slice(offset, PARQUET_ROWS).collect()):
            for row in part.iter_rows(named=True):
                yield orjson.dumps(row, default=str), row
            offset += len(part)


class Seeds(Source):
    """KuaiRand's histories before the log: one user a line (§8)."""

    def seeds(self) -> Iterator[tuple[int, bytes, Seed | Rejected]]:
        """(line number, bytes, seed or the reason of its refusal) after `start`."""
        source = JsonLines(self.name, self.stream, self.start)
        for batch in source.batches(lambda: 0):
            for number, raw in batch.records:
                if isinstance(raw, Row):
                    yield number, raw.raw, Rejected("too_long")
                elif raw.strip(b" \t\r"):
                    yield number, raw, _seed(raw)


def _seed(raw: bytes) -> Seed | Rejected:
    fields = parse_object(raw)
    if isinstance(fields, Rejected):
        return fields
    user, last = _text(fields.get("user_id")), fields.get("last_time_ms")
    if not isinstance(user, str):
        return Rejected("bad_user_id")
    if type(last) is not int:
        return Rejected("bad_ts")
    items: list[str] = []
    for name in ("long_watch_seq", "like_seq"):
        values = fields.get(name) or []
        if not isinstance(values, list):
            return Rejected("bad_item_id")
        items += [_text(value) for value in values]
    if not all(isinstance(item, str) for item in items):
        return Rejected("bad_item_id")
    return Seed(user, [(last - (len(items) - 1 - i), item) for i, item in enumerate(items)])


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


def detect(path: str, head: bytes) -> str:
    """The format of a file from its name and first bytes: jsonl, csv, parquet, kuairand, or seeds."""
    if head.startswith(b"PAR1"):
        return "parquet"
    line = head.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].strip()
    if line.startswith(b"{"):
        return "seeds" if b'"long_watch_seq"' in line and b'"last_time_ms"' in line else "jsonl"
    names = line.decode(errors="replace").split(",")
    if {"user_id", "video_id", "time_ms", "play_time_ms"} <= set(names):
        return "kuairand"
    name = path.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".csv"):
        return "csv"
    return "jsonl"


def source_name(path: str) -> str:
    """The name under which a source's position is kept: its absolute path, `-` for standard input."""
    return "-" if path == "-" else str(Path(path).resolve())


def open_source(path: str, wanted: str, mapping: Mapping[str, str], start: Position) -> Source:
    """The source for a file. `wanted` is one of FORMATS. Raises UserError if it cannot be opened or is of another format."""
    stream = open_stream(path)
    found = detect(path, first_line(stream))
    name = source_name(path)
    kind = found if wanted in ("auto", "kuairand") else wanted
    if wanted == "kuairand" and kind not in ("kuairand", "seeds"):
        raise UserError(f"{path} is neither a KuaiRand log (user_id, video_id, time_ms, play_time_ms, …) nor its histories")
    if kind == "parquet":
        return Parquet(name, stream, start, mapping)
    if kind == "seeds":
        return Seeds(name, stream, start)
    if kind == "csv":
        return Csv(name, stream, start, mapping)
    if kind == "kuairand":
        return Csv(name, stream, start, {**KUAIRAND, **mapping})
    return JsonLines(name, stream, start, mapping)


def first_line(stream: Tracked) -> bytes:
    """The stream's beginning with at least its first line, if that is not longer than 64 KiB."""
    return stream.look(lambda head: b"\n" in head)
