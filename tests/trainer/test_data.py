"""Batches are a function of the log position; what a clock decided is replayed from the journal."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onerec.errors import UserError
from streaming.sessions import Session, SessionItem
from trainer.checkpoint import Cursor
from trainer.data import Batch, BatchReader, Example, to_arrays
from trainer.journal import Entry, Journal


def session(number: int, items: list[str], *, good: bool = True, history: tuple[str, ...] = ()) -> Session:
    start = number * 1000
    watched = [SessionItem(item, start + i, 9000, 9000, [], True) for i, item in enumerate(items)]
    end = start + max(0, len(items) - 1)
    positives = [(w.ts, w.item_id) for w in watched[:-1]]
    return Session(f"u:{number}", "u", None, start, end, watched, list(history), len(items), 0, 0, good, 0.0, 1.0, 0, 0,
                   positives)


class Log:
    """A session log in memory; what is added shows after a refresh, as through a secondary reader."""

    def __init__(self, sessions: list[Session]) -> None:
        self.written = list(sessions)
        self.seen = list(sessions)
        self.stream_watermark: int | None = 10_000_000

    def refresh(self) -> None:
        self.seen = list(self.written)

    def sessions(self, after: int = 0) -> Iterator[tuple[int, Session]]:
        yield from ((i, s) for i, s in enumerate(self.seen, 1) if i > after)

    def watermark(self) -> int | None:
        return self.stream_watermark


class Rows:
    """A catalogue of the items named by numbers below `count`."""

    def __init__(self, count: int) -> None:
        self.index = {str(i): i for i in range(count)}
        self.item_codes = np.stack([np.arange(count), np.arange(count) % 3], axis=1).astype(np.int32)


def reader(log: Log, journal: Journal, items: Rows, **fields: object) -> BatchReader:
    content = dict(
        cursor=Cursor(), known=len(items.index), m=2, n=4, batch_windows=4, idle_seconds=1.0, gap_ms=100,
    )
    refresh = fields.pop("refresh_items", lambda: items)
    return BatchReader(log, journal, refresh, **(content | fields))  # type: ignore[arg-type]


def drain(batches: BatchReader, step: int = 1) -> list[Batch]:
    found = []
    while (batch := batches.next(step)) is not None:
        found.append(batch)
        step += 1
    return found


def content(batches: list[Batch]) -> list[tuple[Cursor, list[tuple[str, int, list[int], list[int], bool]]]]:
    return [
        (b.cursor, [(e.session_id, e.ts, e.history.tolist(), e.targets.tolist(), e.scored) for e in b.examples])
        for b in batches
    ]


def test_windows_codes_and_masks_by_hand(tmp_path: Path) -> None:
    log = Log([session(1, ["1", "2", "9", "3", "4"], history=("5", "99", "6"))])
    [batch] = drain(reader(log, Journal(tmp_path / "j"), Rows(7)))
    # windows of 2: (1,2), (9,3), and backwards (3,4); 9 and 99 are unknown
    assert [e.targets.tolist() for e in batch.examples] == [[1, 2], [3], [3, 4]]
    assert [e.scored for e in batch.examples] == [True, True, False]
    assert batch.examples[0].history.tolist() == [5, 6]
    assert batch.examples[2].history.tolist() == [6, 1, 2]
    assert batch.counts["unknown_targets"] == 1 and batch.counts["sessions"] == 1
    arrays = to_arrays(batch.examples, Rows(7).item_codes, m=2)
    assert arrays.history.shape == (3, 3, 2) and arrays.targets.shape == (3, 2, 2)
    assert arrays.target_mask.tolist() == [[True, True], [True, False], [True, True]]
    assert arrays.history[0].tolist() == [[5, 2], [6, 0], [0, 0]]
    assert arrays.history_mask[0].tolist() == [True, True, False]


def test_no_history_at_all_still_has_one_masked_place() -> None:
    example = Example("u:1", 0, np.array([], np.int32), np.array([1], np.int32), True, True)
    arrays = to_arrays([example], Rows(3).item_codes, m=2)
    assert arrays.history.shape == (1, 1, 2) and not arrays.history_mask.any()


def test_only_high_quality_sessions_and_no_window_without_a_known_item(tmp_path: Path) -> None:
    log = Log([session(1, ["1"], good=False), session(2, ["77", "78"]), session(3, ["2"])])
    [batch] = drain(reader(log, Journal(tmp_path / "j"), Rows(7)))
    assert [e.session_id for e in batch.examples] == ["u:3"]
    assert batch.counts["empty_windows"] == 1 and batch.counts["sessions"] == 2


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    cut=st.integers(0, 20),
    size=st.integers(1, 6),
    good=st.integers(0, 2**12 - 1),
)
def test_a_reader_started_at_any_cursor_gives_the_same_later_batches(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], cut: int, size: int, good: int
) -> None:
    log = Log([session(i + 1, [str(j) for j in range(n)], good=bool(good >> i & 1)) for i, n in enumerate(lengths)])
    folder = tmp_path_factory.mktemp("j")
    whole = drain(reader(log, Journal(folder / "a"), Rows(9), batch_windows=size))
    cut = min(cut, len(whole))
    cursor = whole[cut - 1].cursor if cut else Cursor()
    rest = drain(reader(log, Journal(folder / "a"), Rows(9), batch_windows=size, cursor=cursor), cut + 1)
    assert content(rest) == content(whole[cut:])
    names = [e.session_id for b in whole for e in b.examples]
    assert list(dict.fromkeys(names)) == [s.session_id for s in log.seen if s.high_quality]
    for batch in whole[:-1]:
        last = batch.examples[-1].session_id
        assert len(batch.examples) >= size > sum(e.session_id != last for e in batch.examples)


class Clock:
    """Time that passes only when somebody sleeps; `script` says what happens to the log at which time."""

    def __init__(self, script: dict[float, object]) -> None:
        self.now = 0.0
        self.script = dict(script)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [when for when in self.script if when <= self.now]:
            self.script.pop(when)()  # type: ignore[operator]


def test_an_idle_log_closes_a_batch_and_the_journal_repeats_it(tmp_path: Path) -> None:
    sessions = [session(i, [str(i)]) for i in range(1, 8)]
    log = Log(sessions[:2])
    clock = Clock({
        0.5: lambda: log.written.append(sessions[2]),
        3.0: lambda: log.written.extend(sessions[3:]),
    })
    live = reader(log, Journal(tmp_path / "j"), Rows(9), follow=True, clock=clock, sleep=clock.sleep,
                  stopped=lambda: clock.now > 9)
    batches = drain(live)
    assert [b.cursor.sequence for b in batches] == [3, 7]
    assert 1.0 <= clock.now
    # a replay of the whole log closes the first batch at the same place although more is there
    again = drain(reader(Log(sessions), Journal(tmp_path / "j"), Rows(9), batch_windows=4))
    assert content(again) == content(batches)
    other = drain(reader(Log(sessions), Journal(tmp_path / "fresh"), Rows(9), batch_windows=4))
    assert [b.cursor.sequence for b in other] == [4, 7]


def test_items_that_arrive_are_known_from_a_journaled_place_on(tmp_path: Path) -> None:
    sessions = [session(i, [str(i), "8"], history=("7",)) for i in range(1, 7)]
    log = Log(sessions[:3])
    held = [Rows(8)]

    def more() -> None:
        held[0] = Rows(9)
        log.written.extend(sessions[3:])

    clock = Clock({2.0: more})
    live = reader(log, Journal(tmp_path / "j"), Rows(8), follow=True, clock=clock, sleep=clock.sleep,
                  stopped=lambda: clock.now > 9, refresh_items=lambda: held[0])
    batches = drain(live)
    assert [e.targets.tolist() for b in batches for e in b.examples] == [[1], [2], [3], [4, 8], [5, 8], [6, 8]]
    again = reader(Log(sessions), Journal(tmp_path / "j"), Rows(9), known=8)
    assert content(drain(again)) == content(batches)
    # from a checkpoint in the middle, too
    middle = reader(Log(sessions), Journal(tmp_path / "j"), Rows(9), known=8, cursor=batches[0].cursor)
    assert content(drain(middle, 2)) == content(batches[1:])


def test_items_that_arrive_before_a_batch_has_any_window(tmp_path: Path) -> None:
    sessions = [session(1, ["8"]), session(2, ["8"]), session(3, ["1"])]
    log = Log(sessions[:1])
    held = [Rows(8)]

    def more() -> None:
        held[0] = Rows(9)
        log.written.extend(sessions[1:])

    clock = Clock({2.0: more})
    live = reader(log, Journal(tmp_path / "j"), Rows(8), follow=True, clock=clock, sleep=clock.sleep,
                  stopped=lambda: clock.now > 9, refresh_items=lambda: held[0])
    batches = drain(live)
    assert [e.session_id for b in batches for e in b.examples] == ["u:2", "u:3"]
    assert content(drain(reader(Log(sessions), Journal(tmp_path / "j"), Rows(9), known=8))) == content(batches)


def test_passes_over_the_backlog_come_first_and_only_the_first_is_scored(tmp_path: Path) -> None:
    log = Log([session(i, [str(i)]) for i in range(1, 8)])
    batches = drain(reader(log, Journal(tmp_path / "j"), Rows(9), backlog=5, rounds=3, batch_windows=4))
    assert [[e.session_id[2:] for e in b.examples] for b in batches] == [
        list("1234"), list("5"), list("1234"), list("5"), list("1234"), list("567"),
    ]
    assert [[e.scored for e in b.examples] for b in batches[2:]] == [
        [False] * 4, [False], [False] * 4, [False, True, True]
    ]
    assert sum(b.counts["sessions"] for b in batches) == 7
    assert [(b.last.round, b.last.sequence) for b in batches] == [(0, 4), (0, 5), (1, 4), (1, 5), (2, 4), (2, 7)]
    for cut in range(len(batches)):
        cursor = batches[cut].cursor
        rest = reader(log, Journal(tmp_path / "j"), Rows(9), backlog=5, rounds=3, batch_windows=4, cursor=cursor)
        assert content(drain(rest, cut + 2)) == content(batches[cut + 1 :])


def test_a_state_that_lost_sessions_is_refused(tmp_path: Path) -> None:
    sessions = [session(i, [str(i)]) for i in range(1, 7)]
    assert len(drain(reader(Log(sessions), Journal(tmp_path / "j"), Rows(9)))) == 2
    with pytest.raises(UserError, match="session 5"):
        drain(reader(Log(sessions[:5]), Journal(tmp_path / "j"), Rows(9)))


def test_a_catalogue_that_lost_items_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "j").append(Entry(step=1, items=9))
    with pytest.raises(UserError, match="8 items"):
        drain(reader(Log([session(1, ["1"])]), Journal(tmp_path / "j"), Rows(8)))


def test_the_watermark_is_what_is_complete_and_learnt(tmp_path: Path) -> None:
    log = Log([session(i, [str(i)]) for i in range(1, 7)])
    log.stream_watermark = 6_250
    batches = reader(log, Journal(tmp_path / "j"), Rows(9), watermark=None)
    assert batches.next(1) is not None
    assert batches.watermark() == 4_000  # behind the log: the end of the newest session learnt
    assert batches.next(2) is not None and batches.next(3) is None
    assert batches.watermark() == 6_150  # at its end: what ended before watermark - gap would be there
    log.stream_watermark = 6_010
    flushed = reader(log, Journal(tmp_path / "k"), Rows(9), watermark=None)
    drain(flushed)
    assert flushed.watermark() == 6_000
    log.stream_watermark = 5_700
    early = reader(log, Journal(tmp_path / "l"), Rows(9), watermark=None)
    drain(early)
    assert early.watermark() == 5_700  # never beyond what the stream calls complete


def test_a_stop_while_waiting_claims_nothing_unlearnt(tmp_path: Path) -> None:
    log = Log([session(1, ["1"])])
    log.stream_watermark = 1_050
    clock = Clock({})
    live = reader(log, Journal(tmp_path / "j"), Rows(9), follow=True, clock=clock, sleep=clock.sleep,
                  stopped=lambda: True)
    assert live.next(1) is None
    assert live.watermark() is None


def test_a_line_cut_by_a_kill_is_dropped_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path).append(Entry(step=1, end=3))
    with path.open("ab") as file:
        file.write(b'{"step":2,"en')
    journal = Journal(path)
    assert journal.entry(1) == Entry(step=1, end=3) and journal.entry(2) is None
    journal.append(Entry(step=2, items=5))
    assert Journal(path).entry(2) == Entry(step=2, items=5)
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    with pytest.raises(UserError, match="line 1"):
        Journal(path)
