"""The comparison of the fault tests sees every kind of fault; the log it is made on is what it says."""

from __future__ import annotations

from pathlib import Path

import orjson
from comparison import Verdict, judge_sessions
from reference_log import T0, Reference, Shape, lines, reference, write


class Sent:
    """As much of a Kafka message as the comparison looks at."""

    def __init__(self, line: bytes, partition: int, sequence: int) -> None:
        self._value = b'%s,"position":[%d,%d]}' % (line[:-1], partition, sequence)
        self._partition = partition

    def value(self) -> bytes:
        return self._value

    def key(self) -> bytes:
        return orjson.loads(self._value)["user_id"].encode()

    def partition(self) -> int:
        return self._partition


LINES = [orjson.dumps({"session_id": f"u:{number}", "user_id": "u", "items": [], "end": T0 + number}) for number in range(4)]
WANTED = Reference({orjson.loads(line)["session_id"]: line for line in LINES}, [], {})


def judged(sent: list[Sent]) -> Verdict:
    verdict = Verdict()
    judge_sessions(verdict, sent, WANTED)  # type: ignore[arg-type]
    return verdict


def as_it_should_be() -> list[Sent]:
    return [Sent(line, number // 2, number % 2 + 1) for number, line in enumerate(LINES)]


def test_the_reference_itself_has_no_fault() -> None:
    assert judged(as_it_should_be()).summary() == {"sessions": 4, "lost": 0, "double": 0, "different": 0, "faults": []}


def test_a_lost_session_is_seen_though_the_sequence_is_whole() -> None:
    verdict = judged(as_it_should_be()[:-1])
    assert verdict.lost == 1 and "u:3" in verdict.faults[0]


def test_a_session_written_twice_is_seen() -> None:
    verdict = judged([*as_it_should_be(), Sent(LINES[3], 1, 3)])
    assert verdict.double == 1 and "more than once" in verdict.faults[0]


def test_a_changed_byte_is_seen() -> None:
    sent = as_it_should_be()
    sent[1] = Sent(LINES[1].replace(b'"items":[]', b'"items":[1]'), 0, 2)
    assert judged(sent).different == 1


def test_a_hole_and_a_stranger_are_seen() -> None:
    verdict = judged([*as_it_should_be(), Sent(b'{"session_id":"x","user_id":"x"}', 1, 4)])
    assert len(verdict.faults) == 2 and "4 after 2" in verdict.faults[1] and "has not" in verdict.faults[0]


def test_a_log_repeats_by_its_seed_and_reaches_every_bound(tmp_path: Path) -> None:
    shape = Shape(users=800, minutes=25)
    assert list(lines(shape)) == list(lines(shape)) != list(lines(Shape(users=800, minutes=25, seed=2)))
    write(tmp_path / "log.jsonl", lines(shape))
    found = reference(tmp_path / "log.jsonl", tmp_path / "state")
    assert found.counters["late"] == 0
    assert all(found.counters[name] > 0 for name in found.counters if name != "late")
    sessions = [orjson.loads(line) for line in found.sessions.values()]
    lengths = {len(session["items"]) for session in sessions}
    assert {1, 2, 3, 40} <= lengths
    assert any(session["end"] - session["start"] > 600_000 for session in sessions)
    assert any("%25" in one for one in found.sessions) and any("日本" in one for one in found.sessions)
    assert any(session["interactions"] for session in sessions)

