"""A short soak: every kind of kill at random moments, and the answers of `replay` at the end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import SHARES, deck
from patience import TooSlow

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_deck_holds_every_kind_of_kill() -> None:
    assert set(deck(len(SHARES) * 2, random.Random(1))) == set(SHARES)
    assert len(deck(200, random.Random(2))) == 200


def test_kills_of_every_kind_lose_and_double_nothing(kafka_tools: None, tmp_path: Path) -> None:
    words = "--kills 18 --minutes 0.9 --users 1000 --speed 40 --workers 2 --seed 11 --no-train".split()
    kept = ["--keep", tmp_path / "run", "--json", tmp_path / "report.json"]
    command = [sys.executable, "-m", "benchmarks.faults", *words, *kept]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    print(done.stderr)
    if "\npatience.TooSlow: " in done.stderr:
        raise TooSlow("the soak did not come to its end in time")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["faults"] == []
    assert done.returncode == 0 and report["lost"] == report["double"] == report["different"] == 0
    # On a slow machine the log ends before the last kills.
    assert 6 <= report["kills"] <= 18 and report["sessions"] > 1_000
