"""The page's parts without a server: ages, curves, files that grow, questions that hang."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from page_world import IMG, LONG_TITLE, PLAIN_USER, START_MS, line, replay, write_log

from onerec.dashboard.chain import STAGES, chain
from onerec.dashboard.curves import Curve, TrainingCurves
from onerec.dashboard.names import read_titles
from onerec.dashboard.parts import Part
from onerec.dashboard.scrape import LagView, lags, metrics_url
from onerec.dashboard.server import is_own_host
from onerec.dashboard.state import LETTER_CHARACTERS, StateView
from onerec.dashboard.tail import Tail
from onerec.errors import Failure, UserError

MARKS = {"event": 100_000, "history": 99_000, "session": 95_000, "trained": 90_000, "exported": 88_000, "loaded": 88_000}


def found(marks: dict[str, int | None], answered: list[int | None], clock: int | None = 100_000, factor: float | None = 1.0):
    return chain(marks, answered, clock_ms=clock, live=True, factor=factor, wall_ms=100_000, objective_s=10)


def test_each_stage_has_the_age_of_what_it_knows_and_what_its_hand_off_adds() -> None:
    stages = found(MARKS, [85_000])["stages"]
    assert [stage["name"] for stage in stages] == list(STAGES)
    assert [stage["age_ms"] for stage in stages] == [0, 1_000, 5_000, 10_000, 12_000, 12_000, 15_000]
    assert [stage["added_ms"] for stage in stages] == [None, 1_000, 4_000, 5_000, 2_000, 0, 3_000]


def test_the_headline_is_of_the_replica_that_knows_least() -> None:
    told = found(MARKS, [85_000, 70_000])
    assert told["headline_ms"] == 30_000 and told["within"] is False
    assert found(MARKS, [95_000])["within"] is True


def test_what_is_not_known_has_no_age() -> None:
    told = found({**MARKS, "trained": None}, [])
    ages = {stage["name"]: stage["age_ms"] for stage in told["stages"]}
    assert ages["trained"] is None and ages["answered"] is None and told["headline_ms"] is None and told["within"] is None
    # A replica that has learnt nothing makes the headline unknown, whatever another says.
    assert found(MARKS, [85_000, None])["headline_ms"] is None
    assert all(stage["age_ms"] is None for stage in found(MARKS, [85_000], clock=None)["stages"])


def test_an_age_below_zero_stays_below_zero() -> None:
    told = found({**MARKS, "event": 130_000}, [120_000])
    assert told["stages"][0]["age_ms"] == -30_000 and told["headline_ms"] == -20_000


def test_a_replay_has_an_objective_of_its_pace() -> None:
    assert found(MARKS, [85_000], factor=60.0)["objective_ms"] == 600_000
    # One that has ended, or is slower than time, does not promise more than in live time.
    assert found(MARKS, [85_000], factor=0.0)["objective_ms"] == found(MARKS, [85_000], factor=None)["objective_ms"] == 10_000


def test_cells_grow_in_width_and_keep_their_sums() -> None:
    curve = Curve(10, cells=4)
    for place in range(0, 1_000, 10):
        curve.add(place, {"n": 1.0})
    cells = curve.cells()
    assert len(cells) <= 4 and sum(cell["n"] for _, cell in cells) == 100
    assert all(place % curve.width == 0 for place, _ in cells)


def test_curves_are_means_over_what_was_counted() -> None:
    curves = TrainingCurves()
    assert curves.to_json() is None
    for step in range(1, 31):
        curves.add(line(step, START_MS + 3_600_000 * step, loss=None if step == 7 else 2.0))
    told = curves.to_json()
    assert told is not None
    assert sum(told["hit_rate"]["scored"]) == told["scored"] == 300
    assert min(told["hit_rate"]["scored"]) >= 100
    assert told["hit_rate"]["series"]["onerec"] == pytest.approx([0.2] * len(told["hit_rate"]["ts"]))
    # A step without a finite loss has none: a gap, not a zero.
    assert told["losses"]["series"]["ntp"][6] is None and told["losses"]["series"]["ntp"][5] == 2.0
    assert [value for value in told["losses"]["series"]["preference"] if value is not None] == pytest.approx([0.69] * 10)
    assert told["skipped"] == 1 and told["preference_steps"] == 10


def test_a_tail_gives_whole_lines_once_and_notices_a_file_that_was_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == (False, [])
    path.write_bytes(b"one\ntwo\nthr")
    assert tail.read() == (False, [b"one", b"two"])
    with path.open("ab") as file:
        file.write(b"ee\n")
    assert tail.read() == (False, [b"three"])
    assert tail.read() == (False, [])
    # A resumed trainer cuts back and may then write more than there was.
    path.write_bytes(b"one\nTWO and much more than there was\n")
    assert tail.read() == (True, [b"one", b"TWO and much more than there was"])
    path.unlink()
    assert tail.read() == (True, [])


def test_a_part_that_hangs_holds_nobody_up_and_is_asked_once() -> None:
    release, asked = threading.Event(), []

    def question() -> str:
        asked.append(1)
        release.wait(10)
        return "late"

    part = Part(question, fresh_s=0.0)

    async def look() -> None:
        assert (await part.look(patience_s=0.01)).data is None
        assert (await part.look(patience_s=0.01)).data is None
        assert part.waiting_s is not None
        release.set()
        assert (await part.look(patience_s=5)).data == "late"

    asyncio.run(look())
    assert len(asked) == 1


def test_a_part_that_fails_says_why_and_recovers() -> None:
    answers = iter([UserError("state x: there is none"), ZeroDivisionError("by zero"), None])

    def question() -> int:
        error = next(answers)
        if error is not None:
            raise error
        return 7

    part = Part(question, fresh_s=0.0)

    async def look() -> list[object]:
        return [((told := await part.look(5)).data, told.fault) for _ in range(3)]

    assert asyncio.run(look()) == [(None, "state x: there is none"), (None, "ZeroDivisionError: by zero"), (7, None)]


@pytest.mark.parametrize("header", ["127.0.0.1:8050", "localhost", "LOCALHOST:1", "[::1]:8050", "10.0.0.7:80", "box:8050"])
def test_own_hosts_are_numbers_localhost_and_the_name_we_were_given(header: str) -> None:
    assert is_own_host(header, "box")


@pytest.mark.parametrize("header", ["", "evil.example", "evil.example:8050", "127.0.0.1.evil.example", "localhost.evil.test:1"])
def test_a_strangers_name_is_refused(header: str) -> None:
    assert not is_own_host(header, "127.0.0.1")


def test_lag_is_the_worst_time_and_all_records_of_a_source() -> None:
    text = 'onerec_lag_seconds{source="watch",process="a"} 2.5\nonerec_lag_seconds{source="watch",process="b"} 4\n'
    text += 'onerec_lag_offsets{source="watch",partition="0"} 10\nonerec_lag_offsets{source="watch",partition="1"} 5\n'
    assert lags([text]) == {"sources": [{"source": "watch", "seconds": 4.0, "records": 15.0}]}
    assert lags(["other 1\n"]) is None


def test_lag_of_nobody_is_no_data_and_of_a_dead_address_a_reason(tmp_path: Path) -> None:
    assert LagView(tmp_path, None).look() is None
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "replay.address").write_text("127.0.0.1:1 4242\n")
    with pytest.raises(Failure, match="do not answer"):
        LagView(tmp_path, None).look()


def test_a_metrics_address_is_http() -> None:
    assert metrics_url("127.0.0.1:9100") == "http://127.0.0.1:9100/metrics"
    for wrong in ("file:///etc/passwd", "http://", "http://x:99999"):
        with pytest.raises(UserError, match="--metrics"):
            metrics_url(wrong)


def test_a_state_tells_of_itself_and_of_what_was_refused(tmp_path: Path) -> None:
    files = write_log(tmp_path)
    replay(tmp_path / "state", files)
    view = StateView(tmp_path / "state", read_titles(tmp_path / "names.jsonl"))
    told = view.progress()
    assert told["counters"]["events"] == 12 and told["items"] == 3
    letters = told["dead_letters"]
    assert sum(letters["by_reason"].values()) == told["counters"]["dead_letters"] == 2
    assert letters["newest"][0]["cut"] and len(letters["newest"][0]["line"]) == LETTER_CHARACTERS
    assert view.progress()["dead_letters"] == letters
    user = view.user(PLAIN_USER)
    assert user["known"] and [item["item_id"] for item in user["history"]][-1] == IMG
    assert user["history"][0]["title"] == LONG_TITLE
    assert view.user("nobody") == {"known": False, "length": 0, "history": []}
    assert view.suggestions("pl") == [PLAIN_USER] and PLAIN_USER in view.suggestions("")
    view.close()


def test_a_state_that_is_made_anew_is_read_anew(tmp_path: Path) -> None:
    files = write_log(tmp_path)
    replay(tmp_path / "state", files)
    view = StateView(tmp_path / "state", {})
    assert view.progress()["counters"]["events"] == 12
    (tmp_path / "state").rename(tmp_path / "old")
    with pytest.raises(Failure, match="state"):
        view.progress()
    replay(tmp_path / "state", files[:1])
    assert view.progress()["counters"]["events"] == 0
    assert view.progress()["dead_letters"] == {"by_reason": {}, "newest": []}
    view.close()


def test_names_are_titles_by_item(tmp_path: Path) -> None:
    path = tmp_path / "names.jsonl"
    path.write_text(json.dumps({"item_id": "a", "title": "A"}) + "\nnot json\n" + json.dumps({"item_id": "b"}) + "\n")
    assert read_titles(path) == {"a": "A"}
    path.write_text("{}\n")
    with pytest.raises(UserError, match="no title"):
        read_titles(path)
