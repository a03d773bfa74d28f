"""`onerec simulate` as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson
import pytest


def simulate(*words: str | Path) -> subprocess.CompletedProcess[bytes]:
    """The command with a small world."""
    small = ["--users", "30", "--items", "40", "--days", "1"]
    return subprocess.run([sys.executable, "-m", "onerec.cli", "simulate", *small, *map(str, words)], capture_output=True)


def test_report_counts_what_was_written(tmp_path: Path) -> None:
    events = tmp_path / "w.jsonl"
    report = orjson.loads(simulate("--out", events, "--json", "--seed", "3").stdout)
    assert report["events"] == len(events.read_bytes().splitlines())
    assert report["items"] == len(Path(report["items_out"]).read_bytes().splitlines()) == 40
    assert report["bytes"] == events.stat().st_size + Path(report["items_out"]).stat().st_size


def test_items_go_where_they_are_wanted_and_without_vectors_if_so(tmp_path: Path) -> None:
    items = tmp_path / "catalogue.jsonl"
    assert simulate("--out", tmp_path / "w.jsonl", "--items-out", items, "--no-embeddings").returncode == 0
    records = [orjson.loads(line) for line in items.read_bytes().splitlines()]
    assert records
    assert not any("embedding" in record for record in records)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "no/such/folder/w.jsonl"], b"No such file"),
        (["--out", "w.jsonl", "--items-out", "w.jsonl"], b"--items-out"),
        (["--out", "w.jsonl", "--late-share", "2"], b"--late-share"),
        (["--out", "w.jsonl", "--start-ms", "1700000000"], b"--start-ms"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    result = simulate(*words)
    assert result.returncode == 2
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_failure_with_the_remedy(tmp_path: Path) -> None:
    code = (
        "import builtins, sys\nimport simulator.log as log\nfrom onerec.cli import main\n"
        "log.open = lambda path, mode: builtins.open('/dev/full', mode, 0)\n"
        f"sys.argv = ['onerec', 'simulate', '--users', '5', '--out', {str(tmp_path / 'w.jsonl')!r}]\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert result.returncode == 1
    assert b"No space left" in result.stderr
    assert list(tmp_path.iterdir()) == []
