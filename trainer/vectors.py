"""Item vectors that the user gives: `.npy` with ids, Parquet, JSON lines, CSV; or text through an optional encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from onerec.errors import UserError

MAX_DIMENSION = 65_536
"""A longer "embedding" is a mistaken column, not a vector."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VectorTable:
    """Vectors by item: `vectors` float32 [N, d], row i for `item_ids[i]`; ids are distinct, all values finite."""

    item_ids: list[str]
    vectors: NDArray[np.float32]


def load_vectors(path: Path) -> VectorTable:
    """Vectors of a file, by the end of its name.

    `.npy` [N, d] with the ids beside it in `NAME.ids.txt`, one a line; `.parquet` with `item_id` and `embedding`;
    else JSON lines `{"item_id": …, "embedding": […]}`. Raises UserError naming file, row, item and remedy.
    """
    if not path.is_file():
        raise UserError(f"vectors {path}: no such file; give --vectors an .npy, .parquet or .jsonl file")
    if path.suffix == ".npy":
        return _from_npy(path)
    if path.suffix == ".parquet":
        frame = read_parquet(path, ["item_id", "embedding"])
        rows = zip(frame["item_id"].to_list(), frame["embedding"].to_list(), strict=True)
        return _from_rows(path, "row", ((number, *row) for number, row in enumerate(rows, 1)))
    return _from_rows(path, "line", _json_rows(path))


def encode_text(
    path: Path, column: str, *, model: str, encoder: Callable[[list[str]], NDArray[np.float32]] | None = None
) -> VectorTable:
    """Vectors of the texts in `column` of a table (Parquet, CSV or JSON lines with `item_id`).

    `encoder` maps texts to float32 [n, d]; None means the sentence-transformers model of the name `model`.
    Raises UserError where the optional extra is missing, the model cannot be had, or the column is not there.
    """
    item_ids, texts = _texts(path, column)
    if encoder is None:
        encoder = _sentence_encoder(model)
    vectors = np.asarray(encoder(texts), np.float32)
    return _from_rows(path, "row", ((number, item, vector) for number, (item, vector)
                                    in enumerate(zip(item_ids, vectors, strict=True), 1)))


def check_vector(value: Any, dimension: int | None, place: str) -> NDArray[np.float32]:
    """One vector as float32 [d].

    Raises UserError, which begins with `place`, for anything that is not a list of `dimension` finite numbers.
    """
    if value is None:
        raise UserError(f"{place} has no vector; add its embedding or take the item out of the file")
    try:
        with np.errstate(over="ignore"):
            vector = np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{place}: the embedding is not a list of numbers; write it as [0.1, -0.2, …]") from None
    if vector.ndim != 1 or not 1 <= len(vector) <= MAX_DIMENSION:
        raise UserError(f"{place}: the embedding has shape {list(vector.shape)}; it must be one list of numbers")
    if dimension is not None and len(vector) != dimension:
        raise UserError(f"{place}: the embedding has {len(vector)} numbers, those before it have {dimension}; "
                        "all vectors of a catalogue need one dimension")
    if not np.isfinite(vector).all():
        where = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise UserError(f"{place}: embedding[{where}] is {vector[where]}; mend it or take it out")
    return vector


def read_parquet(path: Path, columns: Sequence[str]) -> Any:
    """A polars frame of the named columns; UserError if the file is broken or lacks one."""
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise UserError(f"{path}: column `{missing[0]}` is missing; it has {', '.join(frame.columns)}")
    return frame


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that is not blank; UserError names a line that is no JSON object."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON: {error}; mend or delete the line") from None
            if not isinstance(value, dict):
                raise UserError(f"{path} line {number} is no JSON object; write one item a line")
            yield number, value


def check_item_id(value: Any, place: str) -> str:
    """An item id as events write it, 1 to 256 bytes; numbers of a table column become their digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not 1 <= len(value.encode("utf-8", "surrogatepass")) <= 256:
        raise UserError(f"{place}: item_id is {value!r:.60}; it must be a text of 1 to 256 bytes")
    return value


def _from_npy(path: Path) -> VectorTable:
    ids_path = path.with_suffix(".ids.txt")
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"vectors {path}: not a readable .npy array: {error}") from None
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.number) or np.iscomplexobj(vectors):
        raise UserError(f"vectors {path}: {vectors.dtype} of shape {list(vectors.shape)}; give numbers [items, d]")
    try:
        item_ids = ids_path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"vectors {path}: cannot read {ids_path}; put the item ids there, one a line in UTF-8, "
                        "in the order of the rows") from None
    if len(item_ids) != len(vectors):
        missing = f"item {item_ids[len(vectors)]!r} has no vector; " if len(item_ids) > len(vectors) else ""
        raise UserError(f"vectors {path}: {len(vectors)} rows, but {ids_path} names {len(item_ids)} items; "
                        f"{missing}make them equal")
    rows = zip(item_ids, vectors, strict=True)
    return _from_rows(path, "row", ((number, *row) for number, row in enumerate(rows, 1)))


def _json_rows(path: Path) -> Iterator[tuple[int, Any, Any]]:
    for number, value in json_lines(path):
        if "item_id" not in value:
            raise UserError(f'{path} line {number} has no item_id; write {{"item_id": "…", "embedding": […]}}')
        yield number, value["item_id"], value.get("embedding")


def _from_rows(path: Path, unit: str, rows: Iterator[tuple[int, Any, Any]]) -> VectorTable:
    """Every row checked; the first fault ends it, naming file, row and item."""
    places: dict[str, int] = {}
    vectors: list[NDArray[np.float32]] = []
    for number, item, value in rows:
        item_id = check_item_id(item, f"vectors {path} {unit} {number}")
        if item_id in places:
            raise UserError(f"vectors {path} {unit} {number}: item {item_id!r} stands in {unit} {places[item_id]} too; "
                            "keep one of them")
        dimension = len(vectors[0]) if vectors else None
        vectors.append(check_vector(value, dimension, f"vectors {path} {unit} {number}, item {item_id!r}"))
        places[item_id] = number
    if not vectors:
        raise UserError(f"vectors {path} is empty; it must name at least one item and its vector")
    return VectorTable(item_ids=list(places), vectors=np.stack(vectors))


def _texts(path: Path, column: str) -> tuple[list[str], list[str]]:
    if not path.is_file():
        raise UserError(f"texts {path}: no such file; give --vectors the table that has the column {column!r}")
    if path.suffix in (".parquet", ".csv"):
        import polars as pl

        if path.suffix == ".parquet":
            frame = read_parquet(path, ["item_id", column])
        else:
            try:
                frame = pl.read_csv(path, infer_schema_length=0)
            except (OSError, pl.exceptions.PolarsError) as error:
                raise UserError(f"{path} is not readable CSV: {str(error).splitlines()[0]}") from None
        values: list[dict[str, Any]] = frame.to_dicts()
    else:
        values = [value for _, value in json_lines(path)]
    item_ids, texts = [], []
    for number, value in enumerate(values, 1):
        for name in ("item_id", column):
            if name not in value:
                raise UserError(f"texts {path} row {number} has no {name!r}; it has {', '.join(map(str, value))}")
        item_ids.append(check_item_id(value["item_id"], f"texts {path} row {number}"))
        texts.append(str(value[column] or ""))
    if not texts:
        raise UserError(f"texts {path} is empty; it must have rows with item_id and {column}")
    return item_ids, texts


def _sentence_encoder(model: str) -> Callable[[list[str]], NDArray[np.float32]]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("--text-column needs the text encoder, which is not installed: "
                        "pip install 'onerec-stream[text]'") from None
    try:
        encoder = SentenceTransformer(model)
    except (OSError, ValueError) as error:
        raise UserError(f"text encoder {model!r} cannot be loaded: {str(error).splitlines()[0]}; name a local folder "
                        "with --set catalogue.text_model=FOLDER, or go online once") from None
    return lambda texts: np.asarray(encoder.encode(texts, normalize_embeddings=True), np.float32)
