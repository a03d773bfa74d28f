"""The ledger is never torn for good, counts nothing twice, and goes on where it stood."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from onerec.errors import Failure
from onerec.monitor import ledger as module
from onerec.monitor.ledger import Ledger, Line, quantiles


def line(version: int, replica: str = "a:1", **more: object) -> Line:
    fields = {"first_answered_ms": version, "log_clock_ms": version * 1_000, "watermark_ms": version * 10, **more}
    return Line(version=version, replica=replica, **fields)  # type: ignore[arg-type]


def test_what_is_not_known_is_absent() -> None:
    assert msgspec.to_builtins(Line(version=1, replica="a:1", first_answered_ms=5)) == {
        "version": 1, "replica": "a:1", "first_answered_ms": 5,
    }  # fmt: skip
    assert msgspec.to_builtins(line(1, events=0))["events"] == 0


def test_after_a_restart_it_goes_on_where_it_stood(tmp_path: Path) -> None:
    path = tmp_path / "run" / "freshness.jsonl"
    before = Ledger(path)
    assert before.began_ms is None and before.reached("a:1").sequence is None
    for entry in (
        line(1, sequence_to=10, item_sequence=4), line(1, "b:1", sequence_to=10), line(3, sequence_to=40), line(2, "b:1"),
    ):  # fmt: skip
        before.append(entry)
    again = Ledger(path)
    assert again.lines == before.lines
    assert again.began_ms == 1_000
    assert [(again.reached(name).sequence, again.reached(name).item_sequence) for name in ("a:1", "b:1", "c:1")] == [
        (40, 4), (10, None), (None, None),
    ]  # fmt: skip
    assert again.knows("a:1", 3, 30) and again.knows("b:1", 2, 20)
    assert not again.knows("b:1", 3, 30)
    assert not again.knows("a:1", 3, 31), "the number came back in a repository made anew"


def test_a_version_taken_back_does_not_move_the_place_back(tmp_path: Path) -> None:
    found = Ledger(tmp_path / "freshness.jsonl")
    for version, reached in ((1, 10), (2, 30), (3, 20)):
        found.append(line(version, sequence_to=reached))
    assert found.reached("a:1").sequence == 30


def test_a_torn_line_is_left_out_and_swallows_none(tmp_path: Path) -> None:
    path = tmp_path / "freshness.jsonl"
    Ledger(path).append(line(1))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"version": 2, "repl' + b"\n\xff\n[]\n" + whole[:20])
    found = Ledger(path)
    assert [entry.version for entry in found.lines] == [1]
    found.append(line(3))
    assert [entry.version for entry in Ledger(path).lines] == [1, 3]


def test_a_disk_that_refuses_is_said_and_the_version_counts_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = Ledger(tmp_path / "file" / "freshness.jsonl")
    with pytest.raises(Failure, match="free space or mend permissions"):
        found.append(line(1))
    assert found.knows("a:1", 1, 10)


def test_a_long_one_keeps_its_beginning_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "freshness.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(line(version)) + b"\n" for version in range(1, 12)))
    monkeypatch.setattr(module, "KEEP_LINES", 5)
    assert [entry.version for entry in Ledger(path).lines] == [1, 7, 8, 9, 10, 11]
    assert [entry.version for entry in Ledger(path).lines] == [1, 7, 8, 9, 10, 11]
    assert Ledger(path).began_ms == 1_000


def test_quantiles_leave_out_what_is_not_known_or_ahead_of_the_clock() -> None:
    assert quantiles(np.array([np.nan, -3.0, *range(101)])) == {"p50": 50.0, "p95": 95.0}
    assert quantiles(np.array([np.nan, -1.0])) is None and quantiles([]) is None
