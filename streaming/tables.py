"""CSV and Parquet as sources of rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import orjson

from onerec.errors import UserError
from streaming.events import BLANK, MAX_LINE_BYTES, Line, Rejected, Row
from streaming.items import ItemRecord
from streaming.rows import FIELDS, INTERACTIONS, events_of
from streaming.sources import BLOCK, Batch, Position, Source
from streaming.streams import Tracked

BATCH_ROWS: Final = 8_192
PARQUET_ROWS: Final = 262_144


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
        records: list[Row] = []
        for raw, values in self.rows():
            number += 1
            if number <= self.start.records:
                continue
            if values is None:
                events: list[Line | ItemRecord | Rejected] = [Rejected("bad_columns")]
            else:
                events = list(events_of(values, mapping, max_ts()))
            records.append(Row(raw, events))
            if len(records) >= BATCH_ROWS:
                yield Batch(number + 1 - len(records), records, self.stream.consumed)
                records = []
        if records:
            yield Batch(number + 1 - len(records), records, self.stream.consumed)


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
            if not raw.strip(BLANK):
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
