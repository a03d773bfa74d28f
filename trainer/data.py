"""Batches from the session log: a batch is a function of the log position, and of the journal where a clock had a say.

Shapes: B windows, T history items, m target items, L levels; of the reward model's sessions W windows a row.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from onerec.errors import UserError
from streaming.events import FOLLOW, KIND_NAMES, LIKE
from streaming.sessions import Session, SessionItem
from streaming.windows import windows
from trainer.checkpoint import Cursor
from trainer.journal import Entry

POLL_SECONDS = 0.05
ROW_WINDOWS = 4
"""Windows in a row of the reward model's batch: a longer session is several rows with the same history."""


class SessionLog(Protocol):
    """What the trainer needs of `streaming.store.Reader`."""

    def refresh(self) -> None:
        """Catch up with the writer."""

    def sessions(self, after: int = 0) -> Iterator[tuple[int, Session]]:
        """(sequence, session) in commit order, sequence > after, as of the last refresh."""

    def watermark(self) -> int | None:
        """Watermark of the stream, ms."""


class BatchJournal(Protocol):
    """What a batch reader needs of `trainer.journal.Journal`."""

    def entry(self, step: int) -> Entry | None:
        """What is written of batch `step`."""

    def covers(self, step: int) -> bool:
        """Whether batch `step` was closed in an earlier life."""

    def append(self, entry: Entry) -> None:
        """Keep an entry for good."""


class Items(Protocol):
    """What batches need of the catalogue at one moment; rows are in order of arrival and never move."""

    @property
    def item_codes(self) -> np.ndarray:
        """Codes, int32 [N, L]."""

    @property
    def index(self) -> dict[str, int]:
        """Row of each item id."""


class Example(NamedTuple):
    """One window: rows of the catalogue for history and target, unknown items left out.

    `fresh`: never learnt before in this run. `scored`: may be scored: fresh and not completed backwards, since the
    items of a window that was (SEMANTICS.md §7) are the targets of the window before it too.
    """

    session_id: str
    ts: int
    history: np.ndarray  # int32 [h]
    targets: np.ndarray  # int32 [1..m]
    fresh: bool
    scored: bool


class Judged(NamedTuple):
    """A session, good or not, as the reward model learns it: m known items a window, the last window shorter.

    The history is H(start) for every window, as it is when a session is generated; `windows` is int32 [W, m], -1 behind
    the last item; `labels` fp32 [W, 4] are those of SEMANTICS.md §6 over the window's own items: swt, vtr, wtr, ltr;
    `item_labels` fp32 [W, m, 4] those of each item, as if it were a window and the cap the m-th part.
    """

    session_id: str
    ts: int
    history: np.ndarray  # int32 [h]
    windows: np.ndarray
    labels: np.ndarray
    item_labels: np.ndarray
    fresh: bool


class Batch(NamedTuple):
    """The windows of whole consecutive sessions, up to `last`; `cursor` is where the next batch begins.

    They differ where a pass over the backlog ends: `cursor` is then at the beginning of the next pass. `examples` are of
    the high-quality sessions, `judged` are all of them. `event_ms`: times in ms of the watches of its sessions that are
    learnt for the first time, by either model.
    """

    examples: list[Example]
    judged: list[Judged]
    last: Cursor
    cursor: Cursor
    counts: Mapping[str, int]
    event_ms: Sequence[int] = ()


class Arrays(NamedTuple):
    """A batch as the model reads it: right-padded, oldest first."""

    history: np.ndarray  # int64 [B, T, L], T the longest of the batch, at least 1
    history_mask: np.ndarray  # bool [B, T]
    targets: np.ndarray  # int64 [B, m, L]
    target_mask: np.ndarray  # bool [B, m]


def known_rows(items: list[str], index: dict[str, int], known: int) -> np.ndarray:
    """Rows `[k]` of those `items` that are among the first `known` rows of the catalogue."""
    rows = [index.get(item_id, known) for item_id in items]
    return np.array([row for row in rows if row < known], dtype=np.int32)


def session_examples(
    session: Session, index: dict[str, int], known: int, *, m: int, n: int, fresh: bool, counts: Counter[str]
) -> list[Example]:
    """The windows of a session that have a known target item; what is left out is counted in `counts`."""
    found = []
    all_windows = windows(session, m, n)
    for place, window in enumerate(all_windows):
        overlaps = place > 0 and place == len(all_windows) - 1 and len(session.items) % m > 0
        history = known_rows(window.history, index, known)
        targets = known_rows(window.items, index, known)
        counts["unknown_history"] += len(window.history) - len(history)
        counts["unknown_targets"] += len(window.items) - len(targets)
        if not len(targets):
            counts["empty_windows"] += 1
            continue
        found.append(Example(session.session_id, window.ts, history, targets, fresh, fresh and not overlaps))
    counts["windows"] += len(found)
    return found


def judge_session(
    session: Session, index: dict[str, int], known: int, *, m: int, n: int, swt_cap_ms: int, fresh: bool
) -> Judged | None:
    """A session for the reward model; None where no item of it is known."""
    items = [(row, item) for item in session.items if (row := index.get(item.item_id, known)) < known]
    if not items:
        return None
    groups = [items[place : place + m] for place in range(0, len(items), m)]
    windows = np.full((len(groups), m), -1, np.int32)
    labels = np.zeros((len(groups), 4), np.float32)
    item_labels = np.zeros((len(groups), m, 4), np.float32)
    for place, group in enumerate(groups):
        windows[place, : len(group)] = [row for row, _ in group]
        labels[place] = _labels([item for _, item in group], swt_cap_ms)
        item_labels[place, : len(group)] = [_labels([item], swt_cap_ms / m) for _, item in group]
    history = known_rows(session.history, index, known)[-n:]
    return Judged(session.session_id, session.start, history, windows, labels, item_labels, fresh)


def _labels(items: Sequence[SessionItem], swt_cap_ms: float) -> tuple[float, float, bool, bool]:
    """swt, vtr, wtr, ltr of some watched items (SEMANTICS.md §6)."""
    return (
        min(1.0, sum(item.watch_ms for item in items) / swt_cap_ms),
        sum(item.effective for item in items) / len(items),
        any(KIND_NAMES[FOLLOW] in item.interactions for item in items),
        any(KIND_NAMES[LIKE] in item.interactions for item in items),
    )


def pad_histories(histories: Sequence[np.ndarray], item_codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the catalogue, each `[h]`, oldest first, as codes int64 [B, T, L] and mask bool [B, T]; T is at least 1."""
    longest = max(1, max(len(rows) for rows in histories))
    codes = np.zeros((len(histories), longest, item_codes.shape[1]), np.int64)
    mask = np.zeros((len(histories), longest), bool)
    for place, rows in enumerate(histories):
        codes[place, : len(rows)] = item_codes[rows]
        mask[place, : len(rows)] = True
    return codes, mask


class RewardArrays(NamedTuple):
    """Sessions as `trainer.reward.RewardBatch` reads them, in rows of at most `ROW_WINDOWS` windows."""

    history: np.ndarray  # int64 [B, T, L], right-padded, oldest first, T at least 1
    history_mask: np.ndarray  # bool [B, T]
    sessions: np.ndarray  # int64 [B, W, m, L]
    session_mask: np.ndarray  # bool [B, W, m]
    labels: np.ndarray  # fp32 [B, W, 4]
    item_labels: np.ndarray  # fp32 [B, W, m, 4]


def reward_arrays(judged: Sequence[Judged], item_codes: np.ndarray) -> RewardArrays:
    """Codes, masks and labels of `judged`; windows keep their order, row by row."""
    m = judged[0].windows.shape[1]
    rows = [
        (session, slice(place, place + ROW_WINDOWS))
        for session in judged
        for place in range(0, len(session.windows), ROW_WINDOWS)
    ]
    width = max(len(session.windows[part]) for session, part in rows)
    history, history_mask = pad_histories([session.history for session, _ in rows], item_codes)
    items = np.full((len(rows), width, m), -1, np.int32)
    labels = np.zeros((len(rows), width, 4), np.float32)
    item_labels = np.zeros((len(rows), width, m, 4), np.float32)
    for row, (session, part) in enumerate(rows):
        count = len(session.windows[part])
        items[row, :count] = session.windows[part]
        labels[row, :count] = session.labels[part]
        item_labels[row, :count] = session.item_labels[part]
    mask = items >= 0
    sessions = np.where(mask[..., None], item_codes[items.clip(min=0)], 0).astype(np.int64)
    return RewardArrays(history, history_mask, sessions, mask, labels, item_labels)


def to_arrays(examples: list[Example], item_codes: np.ndarray, *, m: int) -> Arrays:
    """Codes and masks of `examples`; the history is as long as the longest of them, at least 1."""
    levels = item_codes.shape[1]
    history, history_mask = pad_histories([example.history for example in examples], item_codes)
    targets = np.zeros((len(examples), m, levels), np.int64)
    target_mask = np.zeros((len(examples), m), bool)
    for row, example in enumerate(examples):
        targets[row, : len(example.targets)] = item_codes[example.targets]
        target_mask[row, : len(example.targets)] = True
    return Arrays(history, history_mask, targets, target_mask)


class BatchReader:
    """Reads batches of whole high-quality sessions, at least `batch_windows` windows each, from a cursor on.

    Whole sessions, so that each is scored before any part of it is learnt. A batch closes when it is full, when a pass
    over the backlog (the sessions up to sequence `backlog`, `rounds` times) ends, or when the log is read to its end
    and the batch's first window has waited `idle_seconds` (at once without `follow`). This last kind of boundary, and
    which items were known, are in the journal before the batch is returned; what it holds is done again as it stands.
    With `judge_history` > 0 a batch also carries all its sessions for the reward model, with that many items of history.
    """

    def __init__(
        self,
        log: SessionLog,
        journal: BatchJournal,
        refresh_items: Callable[[], Items],
        *,
        cursor: Cursor,
        known: int,
        m: int,
        n: int,
        batch_windows: int,
        idle_seconds: float,
        gap_ms: int,
        swt_cap_ms: int = 300_000,
        judge_history: int = 0,
        watermark: int | None = None,
        backlog: int = 0,
        rounds: int = 1,
        follow: bool = False,
        stopped: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.known = known
        self.items = refresh_items()
        self._log, self._journal, self._refresh_items = log, journal, refresh_items
        self._round, self._scanned = cursor.round, cursor.sequence
        self._m, self._n = m, n
        self._batch_windows, self._idle_seconds, self._gap_ms = batch_windows, idle_seconds, gap_ms
        self._swt_cap_ms, self._judge_history = swt_cap_ms, judge_history
        self._backlog, self._rounds, self._follow = backlog, rounds, follow
        self._stopped, self._clock, self._sleep = stopped, clock, sleep
        self._sessions: Iterator[tuple[int, Session]] | None = None
        self._exhausted = False
        self._items_stale = True
        self._newest_end: int | None = None
        self._watermark = watermark

    def next(self, step: int) -> Batch | None:
        """The batch of number `step`; None when there is nothing more, or a stop was asked for.

        Raises UserError where the journal names sessions or items that the state does not have.
        """
        entry = self._journal.entry(step) or Entry(step=step)
        covered = self._journal.covers(step)
        examples: list[Example] = []
        judged: list[Judged] = []
        event_ms: list[int] = []
        counts: Counter[str] = Counter()
        items: int | None = None
        begin = 0
        first_seen: float | None = None
        newest_end = self._newest_end
        last = Cursor(round=self._round, sequence=self._scanned)
        while True:
            if self._round < self._rounds - 1 and self._scanned >= self._backlog:
                self._round, self._scanned, self._sessions = self._round + 1, 0, None
                if examples:
                    break
            if entry.end is not None and self._scanned >= entry.end and examples:
                return Batch(examples, judged, last, last, dict(counts), event_ms)
            place = self._scanned
            session = self._read()
            if session is None:
                if covered:
                    raise UserError(
                        f"the state ends at session {place}, before what this run has learnt; "
                        "give the --state that it began with, or a new --run"
                    )
                waited = first_seen is not None and self._clock() - first_seen >= self._idle_seconds
                if examples and (waited or not self._follow):
                    self._journal.append(Entry(step=step, end=self._scanned, items=items, begin=begin))
                    return Batch(examples, judged, last, last, dict(counts), event_ms)
                if self._stopped() or not self._follow:
                    if examples:
                        self._newest_end, self._exhausted = newest_end, False
                    return None
                self._sleep(POLL_SECONDS)
                continue
            if entry.items is not None and self._scanned > entry.begin:
                self._know(entry.items)
            elif not covered and not examples and self._learn_of_items():
                # While the batch is empty, what was read before stays read as it was.
                items, begin = self.known, place
            last = Cursor(round=self._round, sequence=self._scanned)
            fresh = self._round == 0 or self._scanned > self._backlog
            learnt = False
            if self._judge_history:
                seen = judge_session(
                    session, self.items.index, self.known,
                    m=self._m, n=self._judge_history, swt_cap_ms=self._swt_cap_ms, fresh=fresh,
                )
                learnt = seen is not None
                judged += [seen] if seen is not None else []
            if session.high_quality:
                found = session_examples(
                    session, self.items.index, self.known, m=self._m, n=self._n, fresh=fresh, counts=counts
                )
                counts["sessions"] += fresh
                learnt = learnt or bool(found)
                examples += found
                first_seen = self._clock() if first_seen is None and found else first_seen
            if learnt and fresh:
                event_ms += [item.ts for item in session.items]
            if len(examples) >= self._batch_windows:
                break
        if items is not None:
            self._journal.append(Entry(step=step, items=items, begin=begin))
        return Batch(examples, judged, last, Cursor(round=self._round, sequence=self._scanned), dict(counts), event_ms)

    def watermark(self) -> int | None:
        """Event time in ms up to which every session that ended is learnt, given that all batches so far are.

        Sessions are committed in order of their end, so that is the end of the newest one read; when the log is read to
        its end, at least the stream's watermark less the gap, as a session that ended before that would be final. Never
        more than the stream's watermark.
        """
        stream = self._log.watermark()
        if stream is not None:
            reached = [self._newest_end] if self._newest_end is not None and not self._round_open() else []
            if self._exhausted and not self._round_open():
                reached.append(stream - self._gap_ms)
            if self._watermark is not None:
                reached.append(self._watermark)
            self._watermark = min(stream, max(reached)) if reached else None
        return self._watermark

    def _round_open(self) -> bool:
        """Whether the place in the log is older than what earlier passes have learnt."""
        return self._round > 0 and self._scanned < self._backlog

    def _read(self) -> Session | None:
        """The next session, after a refresh if need be; None at the end of the log."""
        if self._sessions is None:
            self._sessions = self._log.sessions(after=self._scanned)
        found = next(self._sessions, None)
        if found is None:
            self._log.refresh()
            self._items_stale = True
            self._sessions = self._log.sessions(after=self._scanned)
            found = next(self._sessions, None)
        self._exhausted = found is None
        if found is None:
            self._sessions = None
            return None
        self._scanned, session = found
        self._newest_end = session.end
        return session

    def _learn_of_items(self) -> bool:
        """Let all items of the snapshot be known; whether there are more than before."""
        if self._items_stale:
            self.items, self._items_stale = self._refresh_items(), False
        before, self.known = self.known, len(self.items.index)
        return self.known != before

    def _know(self, known: int) -> None:
        """Let the first `known` rows of the catalogue be known, as the journal says."""
        if known > len(self.items.index):
            self.items = self._refresh_items()
        if known > len(self.items.index):
            raise UserError(
                f"the catalogue has {len(self.items.index)} items, this run has learnt with {known}; "
                "give the --state that it began with, or a new --run"
            )
        self.known = known
