"""The index is what its formula says, windows are counted right however they are read, and a real drift shows."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec.monitor.drift import (
    EPSILON,
    Codes,
    Drift,
    Drifted,
    Window,
    psi,
    psi_of,
    read_reference,
    watch_bin,
)
from trainer.catalogue_files import append_journal, folder_of

COUNTS = st.lists(st.integers(0, 10_000), min_size=2, max_size=40).filter(any)


class Watch(NamedTuple):
    item_id: str
    watch_ms: int = 4_000
    interactions: list[str] = []


class Session(NamedTuple):
    items: list[Watch]


class Log:
    """Sessions in memory, numbered from 1."""

    def __init__(self, sessions: list[Session]) -> None:
        self.all = sessions
        self.read = 0

    def last_sequence(self) -> int:
        return len(self.all)

    def sessions(self, after: int = 0):
        for number in range(after, len(self.all)):
            self.read += 1
            yield number + 1, self.all[number]


def log_of(seed: int, sessions: int, items: int = 30, liked: float = 0.2, longer: float = 1.0) -> list[Session]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(sessions):
        watches = [
            Watch(f"v{rng.integers(items)}", int(rng.lognormal(8.5, 1.0) * longer), ["like"] if rng.random() < liked else [])
            for _ in range(8)
        ]
        found.append(Session(watches))
    return found


def code_of(item_id: str) -> int | None:
    return int(item_id[1:]) % 10 if item_id.startswith("v") else None


def make(path: Path | None = None, reference: int = 400, window: int = 200) -> Drift:
    return Drift(path, reference_sessions=reference, window_sessions=window, code_of=code_of)


def test_a_case_worked_by_hand() -> None:
    """Shares 0.5, 0.5 against 0.8, 0.2: 0.3 · ln 1.6 + 0.3 · ln 2.5 = 0.3 · ln 4 but for the smoothing."""
    assert psi([50, 50], [80, 20]) == pytest.approx(0.3 * math.log(4), rel=1e-3)
    share = (1 + EPSILON) / (1 + 2 * EPSILON)
    empty = EPSILON / (1 + 2 * EPSILON)
    assert psi([10, 0], [0, 10]) == pytest.approx(2 * (share - empty) * math.log(share / empty))


@given(COUNTS, st.integers(1, 50))
def test_equal_shares_are_no_drift(counts: list[int], times: int) -> None:
    assert psi(counts, [count * times for count in counts]) == pytest.approx(0, abs=1e-12)


PAIRS = st.integers(2, 30).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 999), min_size=n, max_size=n).filter(any)] * 2)
)


@given(PAIRS)
def test_it_is_symmetric_and_never_negative(pair: tuple[list[int], list[int]]) -> None:
    there, back = psi(*pair), psi(*reversed(pair))
    assert there is not None and there == pytest.approx(back)
    assert there >= 0
    total = [np.array(counts) / sum(counts) for counts in pair]
    assert (there < 1e-12) == np.allclose(*total, atol=1e-7)


def test_nothing_to_compare_is_no_data() -> None:
    assert psi([0, 0], [1, 2]) is None
    assert psi_of(Counter(), Counter()) is None


@given(st.integers(0, 10**7))
def test_bins_of_the_watch_time_double(watch_ms: int) -> None:
    place = watch_bin(watch_ms)
    assert (watch_ms < 500) == (place == 0)
    assert watch_bin(2 * watch_ms) == (place if watch_ms < 250 else min(place + 1, 11))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=12))
def test_the_window_is_the_newest_sessions_however_they_come(steps: list[int]) -> None:
    everything = log_of(7, 60 + sum(steps))
    drift = make(reference=50, window=40)
    seen = None
    for length in np.cumsum([60, *steps]).tolist():
        seen = drift.look(Log(everything[:length]))
    seen = drift.look(Log(everything))
    if seen is None:
        assert len(everything) - 60 < 40, "the reference is that of the first look"
        return
    expected = Window()
    for session in everything[-40:]:
        expected.add(Window.of(session))
    assert drift._window == expected


def test_what_stays_as_it_was_shows_no_drift_and_what_changes_does(tmp_path: Path) -> None:
    usual = log_of(1, 2_000)
    drift = make(tmp_path / "drift.json", 1_000, 500)
    assert drift.look(Log(usual[:1_000])) is None, "the reference alone tells nothing"
    same = drift.look(Log(usual))
    assert same is not None and same.unseen == 0 and same.sessions == 500
    assert all(index is not None and index < 0.02 for index in same.indices().values())
    changed = log_of(2, 500, items=60, liked=0.8, longer=4.0)
    found = drift.look(Log([*usual, *changed]))
    assert found is not None and found.until == 2_500
    assert found.watch_time is not None and found.watch_time > 0.25
    assert found.event_mix is not None and found.event_mix > 0.25
    assert found.unseen == pytest.approx(0.5, abs=0.05)
    assert found.codes is not None and found.codes < 0.1, "codes are as common as before"
    narrowed = drift.look(Log([*usual, *changed, *log_of(3, 500, items=4)]))
    assert narrowed is not None and narrowed.codes is not None and narrowed.codes > 0.25


def test_the_reference_is_kept_and_is_that_of_the_first_look(tmp_path: Path) -> None:
    path = tmp_path / "run" / "drift.json"
    usual = log_of(1, 900)
    make(path).look(Log(usual[:300]))
    assert not path.exists(), "not full yet"
    drift = make(path)
    drift.look(Log(usual[:450]))
    kept = read_reference(path)
    assert kept is not None and (kept.after, kept.until, kept.window.sessions) == (50, 450, 400)
    again = make(path)
    assert again.reference == kept
    found, want = again.look(Log(usual)), drift.look(Log(usual))
    assert found == want and isinstance(found, Drifted)
    path.write_bytes(path.read_bytes()[:-20])
    assert read_reference(path) is None, "a damaged one is made anew"
    path.write_bytes(msgspec.json.encode({**msgspec.to_builtins(kept), "format": 99}))
    assert read_reference(path) is None


def test_a_look_reads_at_most_a_window_of_a_log_that_runs_ahead() -> None:
    drift = make(reference=50, window=40)
    drift.look(Log(log_of(1, 50)))
    log = Log(log_of(1, 5_000))
    assert drift.look(log) is not None
    assert log.read == 40
    drift.look(log)
    assert log.read == 40, "nothing new"


def test_a_state_made_anew_is_held_against_the_same_reference() -> None:
    drift = make(reference=50, window=40)
    drift.look(Log(log_of(1, 50)))
    assert drift.look(Log(log_of(1, 500))) is not None
    assert drift.look(Log(log_of(2, 30))) is None, "too few"
    found = drift.look(Log(log_of(2, 45)))
    assert found is not None and found.sessions == 40 and drift.reference is not None


def test_items_without_a_code_are_left_out_of_the_codes() -> None:
    drift = make(reference=50, window=40)
    plain = [Session([Watch(f"x{n}") for n in range(4)])] * 100
    drift.look(Log(plain[:50]))
    found = drift.look(Log(plain))
    assert found is not None and found.codes is None and found.watch_time == 0


def test_codes_of_new_items_come_with_the_catalogues_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Catalogue(NamedTuple):
        item_ids: list[str]
        item_codes: np.ndarray
        journal_offset: int

    loads: list[str] = []

    def load(state: Path, version: str) -> Catalogue:
        loads.append(version)
        return Catalogue(["v1", "v2"], np.array([[7, 0], [3, 1]], np.int32), 0)

    monkeypatch.setattr("trainer.items.load_catalogue", load)
    monkeypatch.setattr("trainer.catalogue_files.current_version", lambda state: "book")
    (folder_of(tmp_path) / "book").mkdir(parents=True)
    now = [0.0]
    codes = Codes(tmp_path, lambda: now[0])
    assert [codes("v1"), codes("v2"), codes("v3")] == [7, 3, None]
    entries = [{"item_id": "v3", "codes": [5, 0], "tags": []}, {"commit": "x", "items": 1, "sessions": 0}]
    append_journal(tmp_path, "book", entries, 0)
    assert codes("v3") is None, "it is not looked for at every item"
    now[0] += 31
    assert [codes("v3"), codes("v4"), codes("v1")] == [5, None, 7]
    assert loads == ["book"], "the whole is read once"


def test_without_a_catalogue_no_item_has_a_code(tmp_path: Path) -> None:
    now = [0.0]
    codes = Codes(tmp_path, lambda: now[0])
    assert codes("v1") is None
    (tmp_path / "catalogue").mkdir()
    (tmp_path / "catalogue" / "current").write_text("nonsense")
    now[0] += 60
    assert codes("v1") is None
