"""Worlds as files: JSON lines (SEMANTICS.md §1), plain, gzip or zstd by suffix; same world, same bytes."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import orjson
import zstandard

from onerec.errors import Failure, UserError
from simulator.behaviour import TYPES, Behaviour, Columns
from simulator.world import CATEGORIES, TOPICS_PER_CATEGORY, World

CHUNK = 20_000


class Written(NamedTuple):
    """What a simulation wrote."""

    events: int
    sessions: int
    items: int
    bytes: int


def item_lines(
    world: World, *, embeddings: bool = True, when: Callable[[int], int] = lambda upload_ms: upload_ms
) -> Iterator[bytes]:
    """One `item` event a line, by upload time; `when` maps that to the `ts` written."""
    tags = [[category, f"{category}-{topic + 1}"] for category in CATEGORIES for topic in range(TOPICS_PER_CATEGORY)]
    rounded = world.embeddings.round(4)
    for item in range(world.config.items):
        record = {
            "type": "item",
            "item_id": f"v{item}",
            "ts": when(int(world.upload_ms[item])),
            "duration_ms": int(world.duration_ms[item]),
            "tags": tags[int(world.topic[item])],
            "author_id": f"a{int(world.author[item])}",
        }
        if embeddings:
            record["embedding"] = rounded[item].tolist()
        yield orjson.dumps(record) + b"\n"


def event_lines(columns: Columns) -> bytes:
    """The rows of a block as lines, in their order."""
    lines = []
    rows = zip(*(columns[name].tolist() for name in ("type", "user", "item", "ts", "watch_ms", "duration_ms", "session",
                                                     "page", "event")), strict=True)
    for kind, user, item, ts, watch_ms, duration_ms, session, page, event in rows:
        event_id = "null" if event < 0 else f'"w{event}"'
        request = f'"request_id":"r{session}-{page}"}}\n'
        if kind == 0:
            lines.append(f'{{"type":"watch","event_id":{event_id},"user_id":"u{user}","item_id":"v{item}","ts":{ts},'
                         f'"watch_ms":{watch_ms},"duration_ms":{duration_ms},{request}')
        else:
            lines.append(f'{{"type":"{TYPES[kind]}","event_id":{event_id},"user_id":"u{user}","item_id":"v{item}",'
                         f'"ts":{ts},{request}')
    return "".join(lines).encode()


@contextlib.contextmanager
def open_output(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears whole or not at all, compressed as its suffix says (`.gz`, `.zst`).

    Raises UserError where it cannot be created, Failure where writing it fails (a full disk).
    """
    part = path.with_name(f".{path.name}.part")
    try:
        raw = open(part, "wb")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name a file in a folder that exists and that you may "
                        "write to") from None
    try:
        with raw, _compressed(raw, path.suffix) as stream:
            yield stream
        os.replace(part, path)
    except OSError as error:
        raise Failure(f"writing {path} failed: {error.strerror}; nothing was left there, so free some space or name "
                      "another folder, and run the same command again") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _compressed(raw: IO[bytes], suffix: str) -> Iterator[IO[bytes]]:
    """The stream itself, or a compressor into it without times or names, so that equal content is equal bytes."""
    if suffix == ".gz":
        with gzip.GzipFile(filename="", mode="wb", compresslevel=3, fileobj=raw, mtime=0) as packed:
            yield cast(IO[bytes], packed)
    elif suffix in (".zst", ".zstd"):
        with zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False) as writer:
            yield cast(IO[bytes], writer)
    else:
        yield raw


def block_lines(columns: Columns, items: list[tuple[int, bytes]]) -> Iterator[bytes]:
    """A block's events in chunks of lines, with `items` (time, line) put in before what arrives after them."""
    cuts = np.searchsorted(columns["arrival"], [ts for ts, _ in items], side="left").tolist()
    begin = 0
    for cut, line in [*zip(cuts, (line for _, line in items), strict=True), (len(columns["arrival"]), b"")]:
        while begin < cut:
            end = min(begin + CHUNK, cut)
            yield event_lines({name: column[begin:end] for name, column in columns.items()})
            begin = end
        yield line


def write_world(world: World, events: Path, items: Path, *, embeddings: bool = True, inline: bool = False,
                progress: Callable[[float, int], None] = lambda _done, _events: None) -> Written:
    """Write both files; `progress(share done, events so far)` is called for every three simulated hours.

    With `inline` the uploads of the log's own days are `item` events among the others, at their time, and the items file
    holds what existed before; else it holds them all.
    """
    if events.absolute() == items.absolute():
        raise UserError(f"{events}: events and items need two files; give --items-out another name")
    first = world.config.start_ms
    lines = item_lines(world, embeddings=embeddings)
    uploads = deque(zip(world.upload_ms.tolist(), lines, strict=True))
    with open_output(items) as stream:
        while uploads and (not inline or uploads[0][0] < first):
            stream.write(uploads.popleft()[1])
    behaviour = Behaviour(world)
    last = first + world.config.days * 86_400_000
    with open_output(events) as stream:
        for end, columns in behaviour.blocks():
            due = []
            while uploads and (uploads[0][0] < end or end == last):
                due.append(uploads.popleft())
            for chunk in block_lines(columns, due):
                stream.write(chunk)
            progress((end - first) / (last - first), behaviour.events)
    size = events.stat().st_size + items.stat().st_size
    return Written(behaviour.events, behaviour.sessions, world.config.items, size)


def items_path(events: Path) -> Path:
    """Where the items of `events` go by default: `world.jsonl.gz` → `world.items.jsonl.gz`."""
    stem, dot, suffixes = events.name.partition(".")
    return events.with_name(f"{stem}.items{dot}{suffixes}")
