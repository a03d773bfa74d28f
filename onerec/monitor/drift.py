"""Whether what users do still looks as it did: newest sessions against a reference window of the same log.

The population stability index of two distributions p and q over the same bins is

    PSI = Σ (p_i - q_i) · ln(p_i / q_i),    p_i = (n_i / N + ε) / (1 + ε · B),

with n_i of N observations in bin i of B, and ε = 1e-4: an empty bin counts as one in ten thousand, so that one observation
in a bin that was empty moves the index by little. It is 0 where shares are equal, and symmetric. From 0.1 it is worth a
look, from 0.25 something has changed. Two samples of one distribution differ, too: by about (B - 1)(1/N + 1/M).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from onerec.errors import Failure, OneRecError
from onerec.files import sync_path

DRIFT_FILE = "drift.json"
FORMAT = 1
EPSILON = 1e-4
WATCH_EDGES_MS = tuple(500 * 2**n for n in range(11))
"""Bins of the watch time: below 0.5 s, then each twice as long, up to 512 s and beyond."""
RARE_SHARE = 0.01
"""Codes with less of the reference are one bin together: each alone would be noise."""
CHUNK_SESSIONS = 2_000


def psi(p: ArrayLike, q: ArrayLike) -> float | None:
    """The index of two histograms of counts over the same bins; None where one has no observation."""
    first, second = np.asarray(p, np.float64), np.asarray(q, np.float64)
    if not first.sum() or not second.sum():
        return None
    a, b = ((counts / counts.sum() + EPSILON) / (1 + EPSILON * len(counts)) for counts in (first, second))
    return float(((a - b) * np.log(a / b)).sum())


def psi_of(p: Counter[str], q: Counter[str]) -> float | None:
    """The index of two counts by name."""
    names = sorted({*p, *q})
    return psi([p[name] for name in names], [q[name] for name in names])


def watch_bin(watch_ms: int) -> int:
    """The bin of a watch time."""
    return int(np.searchsorted(WATCH_EDGES_MS, watch_ms, side="right"))


class WatchLike(Protocol):
    """What is read of a watch (`streaming.sessions.SessionItem`)."""

    item_id: str
    watch_ms: int
    interactions: list[str]


class SessionLike(Protocol):
    """What is read of a session (`streaming.sessions.Session`)."""

    @property
    def items(self) -> Sequence[WatchLike]:
        """Its watches."""


class Window(msgspec.Struct, kw_only=True):
    """Counts over some sessions: watches by item and by bin of the watch time, events by kind."""

    sessions: int = 0
    items: Counter[str] = msgspec.field(default_factory=Counter)
    watches: Counter[str] = msgspec.field(default_factory=Counter)
    kinds: Counter[str] = msgspec.field(default_factory=Counter)

    def add(self, other: Window, sign: int = 1) -> None:
        """Counts of other sessions join, or with `sign` -1 leave."""
        self.sessions += sign * other.sessions
        for mine, theirs in ((self.items, other.items), (self.watches, other.watches), (self.kinds, other.kinds)):
            for name, count in theirs.items():
                left = mine[name] + sign * count
                if left:
                    mine[name] = left
                else:
                    del mine[name]

    @classmethod
    def of(cls, session: SessionLike) -> Window:
        """One session."""
        items = session.items
        kinds = Counter(kind for item in items for kind in item.interactions)
        kinds["watch"] = len(items)
        return cls(
            sessions=1,
            items=Counter(item.item_id for item in items),
            watches=Counter(str(watch_bin(item.watch_ms)) for item in items),
            kinds=kinds,
        )


class Reference(msgspec.Struct, kw_only=True):
    """RUN/drift.json: the sessions (`after`, `until`] that others are held against."""

    after: int
    until: int
    window: Window
    format: int = FORMAT


class Drifted(msgspec.Struct, frozen=True, kw_only=True):
    """How far the newest window strays: indices, None where there is nothing to compare; `unseen`: share of its watches
    whose items the reference has not; `sessions`: how many it holds, `until`: the newest one's sequence."""

    codes: float | None
    watch_time: float | None
    event_mix: float | None
    unseen: float | None
    sessions: int
    until: int

    def indices(self) -> dict[str, float | None]:
        """The three indices by name."""
        return {"codes": self.codes, "watch_time": self.watch_time, "event_mix": self.event_mix}


class SessionLog(Protocol):
    """Where sessions are read from (`streaming.store.Reader`)."""

    def last_sequence(self) -> int:
        """Sequence of the newest session."""

    def sessions(self, after: int = 0) -> Iterable[tuple[int, Any]]:
        """(sequence, session) from the first after `after` on."""


class Drift:
    """The reference, kept in `path`, and the newest window, brought up to date as sessions come.

    Without a kept reference it is made of the newest `reference_sessions` there are at the first look, or as they come.
    `code_of` gives the level-1 code of an item, None for one without. With `path` None nothing is kept.
    """

    def __init__(
        self, path: Path | None, *, reference_sessions: int, window_sessions: int,
        code_of: Callable[[str], int | None] = lambda item_id: None, write: bool = True,
    ) -> None:  # fmt: skip
        self._path, self._write = path, write
        self._reference_sessions, self._window_sessions = reference_sessions, window_sessions
        self._code_of = code_of
        self.reference: Reference | None = read_reference(path) if path is not None else None
        self._making: Reference | None = None
        self._parts: deque[Window] = deque()
        self._window = Window()
        self._read: int | None = None

    def look(self, log: SessionLog) -> Drifted | None:
        """Take in what is new; None until reference and window are full. A call reads a bounded number of sessions.

        Raises Failure where the reference cannot be written.
        """
        last = log.last_sequence()
        if self._read is not None and last < self._read:
            self._forget()  # the state was made anew; the reference still tells what was usual
        if self.reference is None:
            self._make(log, last)
            return None
        after = self.reference.until if self.reference.until <= last else 0
        after = max(after if self._read is None else self._read, last - self._window_sessions)
        for sequence, session in log.sessions(after=after):
            if sequence > last:
                break
            self._push(Window.of(session))
        self._read = last
        return self._compare(last) if self._window.sessions >= self._window_sessions else None

    def _make(self, log: SessionLog, last: int) -> None:
        if self._making is None:
            after = max(0, last - self._reference_sessions)
            self._making = Reference(after=after, until=after, window=Window())
        making = self._making
        for count, (sequence, session) in enumerate(log.sessions(after=making.until), 1):
            making.window.add(Window.of(session))
            making.until = sequence
            if making.window.sessions >= self._reference_sessions:
                self.reference, self._making = making, None
                if self._path is not None and self._write:
                    write_reference(self._path, making)
                return
            if count >= CHUNK_SESSIONS:
                return

    def _push(self, part: Window) -> None:
        self._parts.append(part)
        self._window.add(part)
        if len(self._parts) > self._window_sessions:
            self._window.add(self._parts.popleft(), -1)

    def _forget(self) -> None:
        self._parts.clear()
        self._window, self._read, self._making = Window(), None, None

    def _compare(self, last: int) -> Drifted:
        assert self.reference is not None
        before, now = self.reference.window, self._window
        watches = now.items.total()
        unseen = sum(count for item_id, count in now.items.items() if item_id not in before.items)
        return Drifted(
            codes=self._codes(before, now),
            watch_time=psi_of(before.watches, now.watches),
            event_mix=psi_of(before.kinds, now.kinds),
            unseen=unseen / watches if watches else None,
            sessions=now.sessions,
            until=last,
        )

    def _codes(self, before: Window, now: Window) -> float | None:
        """Over the level-1 codes, the rare ones of the reference together; items without a code are left out."""
        first, second = self._by_code(before), self._by_code(now)
        least = RARE_SHARE * first.total()
        common = {code for code, count in first.items() if count >= least}
        return psi_of(*(_pooled(counts, common) for counts in (first, second)))

    def _by_code(self, window: Window) -> Counter[str]:
        found: Counter[str] = Counter()
        for item_id, count in window.items.items():
            if (code := self._code_of(item_id)) is not None:
                found[str(code)] += count
        return found


def _pooled(counts: Counter[str], common: set[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, count in counts.items():
        found[name if name in common else "rare"] += count
    return found


def _counter(kind: type, value: Any) -> Counter[str]:
    return Counter(msgspec.convert(value, dict[str, int]))


def read_reference(path: Path) -> Reference | None:
    """The kept reference; None where there is none, or one that is damaged or of another format: it is made anew."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Reference, dec_hook=_counter)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return found if found.format == FORMAT else None


def write_reference(path: Path, reference: Reference) -> None:
    """Write the reference whole or not at all. Raises Failure where the disk refuses it."""
    staging = path.with_suffix(".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_bytes(msgspec.json.encode(reference))
        sync_path(staging)
        staging.replace(path)
        sync_path(path.parent)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}; mend permissions or free space") from None


class Codes:
    """Level-1 codes of a state's catalogue; for an item unknown the journal is read on, at most every `every_s`."""

    def __init__(self, state: Path, monotonic: Callable[[], float], every_s: float = 30.0) -> None:
        self._state, self._monotonic, self._every_s = state, monotonic, every_s
        self._version: str | None = None
        self._offset = 0
        self._codes: dict[str, int] = {}
        self._due = float("-inf")

    def __call__(self, item_id: str) -> int | None:
        """The code of an item; None where it has none yet."""
        if item_id not in self._codes and self._monotonic() >= self._due:
            self._due = self._monotonic() + self._every_s
            try:
                self._read()
            except (OneRecError, OSError, ValueError, KeyError):
                return None  # there is no catalogue yet, or one is being built
        return self._codes.get(item_id)

    def _read(self) -> None:
        from trainer.catalogue_files import current_version, read_journal
        from trainer.items import load_catalogue

        version = current_version(self._state)
        if version is None:
            return
        if version != self._version:
            catalogue = load_catalogue(self._state, version)
            self._codes = dict(zip(catalogue.item_ids, catalogue.item_codes[:, 0].tolist(), strict=True))
            self._version, self._offset = version, catalogue.journal_offset
            return
        entries, self._offset = read_journal(self._state, version, self._offset)
        self._codes.update({entry["item_id"]: entry["codes"][0] for entry in entries if "codes" in entry})
