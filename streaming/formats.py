"""Which kind of source a file is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from onerec.errors import UserError
from streaming.rows import KUAIRAND
from streaming.seeds import Seeds
from streaming.sources import JsonLines, Position, Source
from streaming.streams import first_line, open_stream
from streaming.tables import Csv, Parquet

FORMATS: Final = ("auto", "jsonl", "csv", "parquet", "kuairand")


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


def open_source(
    path: str, wanted: str, mapping: Mapping[str, str], start: Position, *, follow: bool = False
) -> Source:
    """The source for a file. `wanted` is one of FORMATS. Raises UserError if it cannot be opened or is of another format.

    With `follow` it never ends; only JSON lines can be followed.
    """
    stream = open_stream(path, follow=follow)
    found = detect(path, first_line(stream))
    name = source_name(path)
    kind = found if wanted in ("auto", "kuairand") else wanted
    if wanted == "kuairand" and kind not in ("kuairand", "seeds"):
        raise UserError(f"{path} is neither a KuaiRand log (user_id, video_id, time_ms, play_time_ms, …) nor its histories")
    if follow and kind != "jsonl":
        raise UserError(f"--follow {path}: only JSON lines can be followed, and this is {kind}; leave --follow out")
    if kind == "parquet":
        return Parquet(name, stream, start, mapping)
    if kind == "seeds":
        return Seeds(name, stream, start)
    if kind == "csv":
        return Csv(name, stream, start, mapping)
    if kind == "kuairand":
        return Csv(name, stream, start, {**KUAIRAND, **mapping})
    return JsonLines(name, stream, start, mapping, follow=follow)
