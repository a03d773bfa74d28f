"""A short soak: every kind of kill at random moments, and the answers of `replay` at the end."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from chaos import SHARES, deck

from benchmarks import faults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_deck_holds_every_kind_of_kill() -> None:
    assert set(deck(len(SHARES) * 2, random.Random(1))) == set(SHARES)
    assert len(deck(200, random.Random(2))) == 200


def test_kills_of_every_kind_lose_and_double_nothing(kafka_tools: None, tmp_path: Path) -> None:
    words = "--kills 24 --minutes 1.2 --users 1000 --speed 40 --workers 2 --seed 11 --no-train".split()
    code = faults.main([*words, "--keep", str(tmp_path / "run"), "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["faults"] == []
    assert code == 0 and report["lost"] == report["double"] == report["different"] == 0
    assert report["kills"] == 24 and report["sessions"] > 1_000
