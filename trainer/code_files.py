"""Semantic IDs made elsewhere: JSON, JSON lines, CSV or Parquet, of any number of levels and codes."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onerec.errors import UserError
from trainer.vectors import check_item_id, json_lines, read_parquet

MAX_CODE = 1 << 24
"""A larger code is a mistake: a model has an embedding for each."""
EXPECTED = '{"item": [3, 17, 5], …}, lines of {"item_id": …, "codes": […]}, or columns item_id and codes (or c1, c2, …)'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CodeTable:
    """`codes_NL` int32 [N, L], row i of `item_ids[i]`; the order of the file, which orders the items of one tuple."""

    item_ids: list[str]
    codes_NL: NDArray[np.int32]


def load_codes(path: Path, limit: int | None) -> CodeTable:
    """Semantic IDs of a file; codes must be below `limit` where one is given.

    Raises UserError naming file, line or row, item and remedy: bad JSON, other lengths, negative codes, repeats.
    """
    if not path.is_file():
        raise UserError(f"codes {path}: no such file; give --codes-file {EXPECTED}")
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    elif path.suffix == ".csv":
        rows = _csv_rows(path)
    elif path.suffix == ".json":
        rows = _json_rows(path)
    else:
        rows = _line_rows(path)
    places: dict[str, str] = {}
    codes: list[list[int]] = []
    for place, item, value in rows:
        where = f"codes {path} {place}"
        item_id = check_item_id(item, where)
        if item_id in places:
            raise UserError(f"{where}: item {item_id!r} stands in {places[item_id]} too; keep one of them")
        codes.append(_checked(value, len(codes[0]) if codes else None, limit, f"{where}, item {item_id!r}"))
        places[item_id] = place
    if not codes:
        raise UserError(f"codes {path} is empty; write {EXPECTED}")
    return CodeTable(item_ids=list(places), codes_NL=np.array(codes, np.int32))


def _checked(value: Any, levels: int | None, limit: int | None, where: str) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(code) is int for code in value):
        raise UserError(f"{where}: codes are {value!r:.60}; write a list of whole numbers, one a level")
    if levels is not None and len(value) != levels:
        raise UserError(f"{where}: {len(value)} codes, the items before it have {levels}; all need the same number")
    top = MAX_CODE if limit is None else limit
    for code in value:
        if not 0 <= code < top:
            raise UserError(f"{where}: code {code} is outside 0…{top - 1}; number codes from 0"
                            + ("" if limit is None else ", or raise catalogue.codes"))
    return value


def _json_rows(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """One object for all items; its entries have no line numbers, so they are counted."""
    try:
        pairs = _ordered_pairs(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        place = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"codes {path}{place} is not JSON: {error}; write {EXPECTED}") from None
    for number, (item, value) in enumerate(pairs, 1):
        yield f"entry {number}", item, value


def _ordered_pairs(data: bytes) -> list[tuple[str, Any]]:
    """The object's pairs with repeated keys kept, so that an item named twice is seen."""
    value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=list)
    if not isinstance(value, list) or not all(isinstance(pair, tuple) for pair in value):
        raise json.JSONDecodeError("one object of items is expected", "", 0)
    return value


def _line_rows(path: Path) -> Iterator[tuple[str, Any, Any]]:
    for number, value in json_lines(path):
        if "item_id" not in value or "codes" not in value:
            raise UserError(f"codes {path} line {number} has no item_id or no codes; write {EXPECTED}")
        yield f"line {number}", value["item_id"], value["codes"]


def _csv_rows(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """`item_id,c1,c2,…`, or `item_id,codes` with the codes apart by spaces, commas, or in brackets."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            if "item_id" not in header or len(header) < 2:
                raise UserError(f"codes {path} line 1: columns {', '.join(header) or '(none)'}; write {EXPECTED}")
            item_column = header.index("item_id")
            for row in reader:
                if not row:
                    continue
                place = f"line {reader.line_num}"
                if len(row) != len(header):
                    raise UserError(f"codes {path} {place}: {len(row)} fields, the header has {len(header)}; mend it")
                cells = [cell for column, cell in enumerate(row) if column != item_column]
                texts = cells[0].strip("[] ").replace(",", " ").split() if "codes" in header else cells
                try:
                    yield place, row[item_column], [int(text) for text in texts]
                except ValueError:
                    shown = " ".join(texts)
                    raise UserError(f"codes {path} {place}, item {row[item_column]!r}: codes are {shown!r:.60}; "
                                    "write whole numbers") from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"codes {path} line {reader.line_num + 1} is not readable CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any, Any]]:
    frame = read_parquet(path, ["item_id"])
    others = [column for column in frame.columns if column != "item_id"]
    for number, row in enumerate(frame.iter_rows(named=True), 1):
        yield f"row {number}", row["item_id"], row["codes"] if "codes" in row else [row[column] for column in others]
