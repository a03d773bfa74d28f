"""Drift of a simulated world: none within a day of it, plain once its topics of the day and its uploads have moved on."""

from __future__ import annotations

from pathlib import Path

import pytest

from onerec.config import load_config
from onerec.monitor.drift import Codes, Drift, Drifted
from simulator.log import write_world
from simulator.world import World, WorldConfig
from streaming.replay import Replay
from streaming.store import Reader, Store
from trainer.items import build_catalogue

REFERENCE, WINDOW = 700, 400


class Until:
    """A log as it was when it had so many sessions."""

    def __init__(self, reader: Reader, last: int) -> None:
        self._reader, self._last = reader, last

    def last_sequence(self) -> int:
        return self._last

    def sessions(self, after: int = 0):
        for sequence, session in self._reader.sessions(after=after):
            if sequence > self._last:
                return
            yield sequence, session


def look(reader: Reader, state: Path, last: int) -> Drifted:
    drift = Drift(None, reference_sessions=REFERENCE, window_sessions=WINDOW, code_of=Codes(state, lambda: 0.0))
    assert drift.look(Until(reader, REFERENCE)) is None
    found = drift.look(Until(reader, last))
    assert found is not None
    return found


@pytest.mark.slow
def test_a_world_shows_drift_after_days_and_none_within_one(tmp_path: Path) -> None:
    config = load_config(None, ["catalogue.codes=32"])
    world = World(WorldConfig(users=900, items=1_000, days=4, seed=6, daily_rhythm=False))
    write_world(world, tmp_path / "log.jsonl", tmp_path / "items.jsonl")
    state = tmp_path / "state"
    with Store(state, config.semantics) as store:
        Replay(store, [str(tmp_path / "items.jsonl"), str(tmp_path / "log.jsonl")]).run()
    with Reader(state) as reader:
        build_catalogue(state, reader, config)
        same, moved = look(reader, state, REFERENCE + WINDOW), look(reader, state, reader.last_sequence())
    for name, index in same.indices().items():
        assert index is not None and index < 0.1, name
    assert moved.codes is not None and moved.codes > 0.25
    assert moved.watch_time is not None and moved.watch_time < 0.1, "how long users watch did not change"
    assert same.unseen is not None and moved.unseen is not None and moved.unseen > same.unseen + 0.2
