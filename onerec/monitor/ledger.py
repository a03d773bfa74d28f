"""RUN/freshness.jsonl: one line for each version that a replica was first seen to answer with, and how old its news was.

Append-only and synced, so that after a restart no version is counted twice and counting goes on where it stood.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from onerec.errors import Failure
from onerec.files import sync_path

LEDGER_FILE = "freshness.jsonl"
KEEP_LINES = 10_000
"""Of a ledger twice as long the first line and the newest ones stay, when a monitor starts."""


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A version's first answer at a replica. What is not known is absent.

    `first_answered_ms` is wall-clock time, `log_clock_ms` that of the log. The version's news are the sessions
    (`sequence_from`, `sequence_to`] of the session log; `events` of their watches were aged, one session of `stride`, and
    `items` new items, those up to `item_sequence`. `age_s`: p50 and p95 by hand-off, in seconds.
    """

    version: int
    replica: str
    first_answered_ms: int
    log_clock_ms: int | None = None
    mode: Literal["live", "log"] | None = None
    factor: float | None = None
    watermark_ms: int | None = None
    step: int | None = None
    sequence_from: int | None = None
    sequence_to: int | None = None
    events: int | None = None
    stride: int | None = None
    age_s: dict[str, dict[str, float]] | None = None
    gate: dict[str, Any] | None = None
    items: int | None = None
    item_age_s: dict[str, float] | None = None
    item_sequence: int | None = None
    codebook_version: str | None = None


class Reached(msgspec.Struct, kw_only=True):
    """How far a replica's answers have been counted: the session log and the item log; None: not known."""

    sequence: int | None = None
    item_sequence: int | None = None


def quantiles(ages_s: ArrayLike) -> dict[str, float] | None:
    """p50 and p95 in seconds, to the millisecond; NaN and ages below zero are left out, None where nothing is left."""
    found = np.asarray(ages_s, np.float64)
    found = found[found >= 0]
    if not len(found):
        return None
    p50, p95 = np.quantile(found, (0.5, 0.95))
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3)}


class Ledger:
    """What has been counted; `path` None keeps it in memory only."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.lines: list[Line] = _read(path) if path is not None else []
        """What was read at the start and written since, oldest first."""
        self._seen: set[tuple[str, int, int | None]] = set()
        self._reached: dict[str, Reached] = {}
        if path is not None and len(self.lines) > 2 * KEEP_LINES:
            self._shorten(path)
        for line in self.lines:
            self._count(line)

    @property
    def began_ms(self) -> int | None:
        """The log's clock when the first version of all was first answered: what is older waited for no hand-off."""
        return self.lines[0].log_clock_ms if self.lines else None

    def knows(self, replica: str, version: int, watermark_ms: int | None) -> bool:
        """Whether this answer was seen before; a number that comes back with another watermark is another version."""
        return (replica, version, watermark_ms) in self._seen

    def reached(self, replica: str) -> Reached:
        """How far a replica has been counted."""
        return self._reached.get(replica, Reached())

    def append(self, line: Line) -> None:
        """Write a line and force it to the disk. Raises Failure where the disk refuses it; it counts all the same."""
        self.lines.append(line)
        self._count(line)
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                # A line that a crash tore must not swallow this one.
                size = file.seek(0, os.SEEK_END)
                torn = b""
                if size:
                    file.seek(-1, os.SEEK_END)
                    torn = b"" if file.read(1) == b"\n" else b"\n"
                file.write(torn + msgspec.json.encode(line) + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Failure(f"ledger {self._path}: {error.strerror}; free space or mend permissions") from None

    def _count(self, line: Line) -> None:
        self._seen.add((line.replica, line.version, line.watermark_ms))
        reached = self._reached.setdefault(line.replica, Reached())
        for name, value in (("sequence", line.sequence_to), ("item_sequence", line.item_sequence)):
            before = getattr(reached, name)
            if value is not None:
                setattr(reached, name, value if before is None else max(before, value))

    def _shorten(self, path: Path) -> None:
        self.lines = [self.lines[0], *self.lines[-KEEP_LINES:]]
        staging = path.with_suffix(".writing")
        staging.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in self.lines))
        sync_path(staging)
        staging.replace(path)
        sync_path(path.parent)


def _read(path: Path) -> list[Line]:
    """The lines of a ledger; those that are torn or damaged are left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(msgspec.json.decode(line, type=Line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return found
