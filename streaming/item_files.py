"""Catalogue files: `item` JSON lines, CSV, Parquet, KuaiRand's videos (SEMANTICS.md §1)."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from onerec.errors import UserError
from streaming.events import BLANK, MIN_TS, Line, Rejected, Row, item_from_mapping, parse_object, utf8_length
from streaming.formats import detect, source_name
from streaming.items import ItemRecord
from streaming.sources import Batch, JsonLines, Position, Source
from streaming.streams import first_line, open_stream
from streaming.tables import Csv, Parquet, Table

BATCH: Final = 5_000
BEIJING: Final = datetime.timezone(datetime.timedelta(hours=8))


def read_items(path: str, refused: list[tuple[int, str]], dimension: int | None) -> Iterator[list[ItemRecord]]:
    """Entries of a file in batches; lines that are none are put into `refused` as (line number, what is wrong).

    `dimension` is the length of embeddings already in the catalogue. Raises UserError where the file is unusable as a whole,
    or an embedding has another length, before anything of that batch is given.
    """
    batch: list[ItemRecord] = []
    count = 0
    for number, item in _numbered(open_items(path, Position())):
        if isinstance(item, Rejected):
            refused.append((number, item.reason))
            continue
        if item.embedding is not None:
            if dimension is None:
                dimension = len(item.embedding)
            if len(item.embedding) != dimension:
                raise UserError(
                    f"{path} line {number}: the embedding of item {item.item_id!r} has {len(item.embedding)} values, "
                    f"the catalogue's have {dimension}; give all items vectors of one length"
                )
        batch.append(item)
        count += 1
        if len(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
    if not count:
        reason = f"; the first refused line is {refused[0][0]}: {refused[0][1]}" if refused else ""
        raise UserError(f"{path} holds no catalogue entry{reason}")


class ItemLines(Source):
    """A catalogue of JSON lines as rows of one entry each."""

    def __init__(self, source: JsonLines) -> None:
        super().__init__(source.name, source.stream, source.start)
        self._source = source

    def batches(self, max_ts: Callable[[], int]) -> Iterator[Batch]:
        """Blocks of lines; blank ones have no entry."""
        for batch in self._source.batches(max_ts):
            yield batch._replace(records=[raw if isinstance(raw, Row) else _line(raw) for raw in batch.records])


class ItemTable(Source):
    """A catalogue of named columns, KuaiRand's videos among them, as rows of one entry each."""

    def __init__(self, table: Table, videos: bool) -> None:
        super().__init__(table.name, table.stream, table.start)
        self._table = table
        self._entry = _video if videos else _row

    def batches(self, max_ts: Callable[[], int]) -> Iterator[Batch]:
        """Batches of 5,000 rows."""
        number = 0
        records: list[Row] = []
        for raw, values in self._table.rows():
            number += 1
            if number <= self.start.records:
                continue
            records.append(Row(raw, [Rejected("bad_columns") if values is None else _entry(self._entry(values))]))
            if len(records) >= BATCH:
                yield Batch(number + 1 - len(records), records, self.stream.consumed)
                records = []
        if records:
            yield Batch(number + 1 - len(records), records, self.stream.consumed)


def open_items(path: str, start: Position) -> Source:
    """The entries of a catalogue file after `start`. Raises UserError where it cannot be opened or has no column for the id."""
    stream = open_stream(path)
    kind = detect(path, first_line(stream))
    name = source_name(path)
    if kind in ("jsonl", "seeds"):
        return ItemLines(JsonLines(name, stream, start))
    table = (Parquet if kind == "parquet" else Csv)(name, stream, start, {})
    columns = set(table.columns())
    videos = {"video_id", "author_id", "video_duration", "tag"} <= columns
    if not videos and "item_id" not in columns:
        raise UserError(f"{path}: no column item_id; the columns are {', '.join(table.columns())}")
    return ItemTable(table, videos)


def _numbered(source: Source) -> Iterator[tuple[int, ItemRecord | Rejected]]:
    for batch in source.batches(lambda: 0):
        for number, row in enumerate(batch.records, batch.first):
            if isinstance(row, Row):
                for entry in row.events:
                    if not isinstance(entry, Line):
                        yield number, entry


def _line(raw: bytes) -> Row:
    if not raw.strip(BLANK):
        return Row(raw, [], len(raw) + 1)
    fields = parse_object(raw)
    return Row(raw, [fields if isinstance(fields, Rejected) else _entry(fields)], len(raw) + 1)


def _entry(fields: Mapping[str, Any]) -> ItemRecord | Rejected:
    """Checks id and time, then the rest as for an `item` event; an entry without `ts` counts as known from the start."""
    item_id, ts = fields.get("item_id"), fields.get("ts", MIN_TS)
    if fields.get("type", "item") != "item":
        return Rejected("bad_type")
    if not isinstance(item_id, str) or not 0 < utf8_length(item_id) <= 256:
        return Rejected("bad_item_id")
    if type(ts) is not int or ts < MIN_TS:
        return Rejected("bad_ts")
    return item_from_mapping({**fields, "ts": ts})


def _row(values: Mapping[str, Any]) -> dict[str, Any]:
    tags = values.get("tags")
    fields = {
        "item_id": _text(values["item_id"]),
        "duration_ms": _number(values.get("duration_ms")),
        "tags": [t for t in tags.replace("|", ",").split(",") if t] if isinstance(tags, str) else _texts(tags),
        "author_id": _text(values.get("author_id")),
        "embedding": values.get("embedding"),
    }
    if values.get("ts") not in (None, ""):
        fields["ts"] = _number(values["ts"])
    return fields


def _video(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row of KuaiRand's videos. Its statistics are averages over the whole month and would leak the future: left out."""
    fields = {
        "item_id": _text(values["video_id"]),
        "duration_ms": _number(values["video_duration"]),
        "tags": [t for t in (_text(values["tag"]) or "").split(",") if t and t != "unknown"],
        "author_id": _text(values["author_id"]),
    }
    day = _text(values.get("upload_dt"))
    if day:
        try:
            at = datetime.datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=BEIJING)
        except ValueError:
            return {**fields, "ts": day}
        fields["ts"] = int(at.timestamp() * 1000)
    return fields


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _texts(value: Any) -> list[str] | None:
    return [str(v) for v in value] if isinstance(value, list) else value


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return int(float(value)) if value else None
        except (ValueError, OverflowError):
            return value
    return int(value) if isinstance(value, float) and value == value and abs(value) < 1e18 else value
