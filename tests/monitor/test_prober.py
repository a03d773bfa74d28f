"""Each replica is asked on its own: one that is down, slow or without a state does not hide the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import msgspec

from onerec.errors import Failure, UserError
from onerec.monitor.prober import ANSWER_SECONDS, DEADLINE_SECONDS, Answer, Prober, Replica, Users


class Told(msgspec.Struct):
    """An answer."""

    model_version: int = 3
    watermark: int | None = 1_000
    history_watermark: int | None = 2_000


class Server:
    """A replica that can be told how to behave; remembers who asked."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.user_fault: Exception | None = None
        self.asked: list[str | None] = []
        self.told = 0
        self.connections = 0
        self.closed = 0

    def connect(self, server: str) -> Server:
        self.connections += 1
        return self

    def recommend(self, user_id: str | None = None, history: Sequence[str] | None = None) -> Told:
        self.asked.append(user_id)
        if self.fault is not None:
            raise self.fault
        if user_id is not None and self.user_fault is not None:
            raise self.user_fault
        assert (user_id is None) == (history == [])
        return Told()

    def tell(self, user_id: str | None = None, history: Sequence[str] | None = None) -> Told:
        self.told += 1
        return self.recommend(user_id, history)

    def close(self) -> None:
        self.closed += 1


def users(*names: str) -> Users:
    found = Users()
    found.fill(list(names))
    return found


def test_stored_users_are_asked_for_in_turn() -> None:
    server = Server()
    replica = Replica("a:1", users("u1", "u2"), server.connect)
    answers = [replica.ask() for _ in range(3)]
    assert server.asked == ["u1", "u2", "u1"]
    assert server.connections == 1
    assert all(answer.up and answer.by_user for answer in answers)
    first = answers[0]
    assert (first.version, first.watermark_ms, first.history_watermark_ms) == (3, 1_000, 2_000)


def test_a_whole_answer_is_asked_for_now_and_then_and_after_each_fault() -> None:
    server, now = Server(), [0.0]
    replica = Replica("a:1", users("u1"), server.connect, monotonic=lambda: now[0])

    def ask(at: float) -> bool:
        now[0], told = at, server.told
        whole = replica.ask().whole
        assert server.told == told + (not whole)
        return whole

    assert [ask(at) for at in (0.0, 1.0, ANSWER_SECONDS - 1, ANSWER_SECONDS, ANSWER_SECONDS + 1)] == [
        True, False, False, True, False,
    ]
    server.fault = Failure("gone")
    assert not replica.ask().up
    server.fault = None
    assert not ask(ANSWER_SECONDS + 2) and ask(2 * ANSWER_SECONDS)
    server.fault = Failure("gone while it searched")
    assert ask(3 * ANSWER_SECONDS) and not replica.ask().up
    server.fault = None
    assert ask(3 * ANSWER_SECONDS + 1) and not ask(3 * ANSWER_SECONDS + 2)


def test_the_time_shown_is_that_of_the_last_whole_answer() -> None:
    server, now = Server(), [0.0]
    replica = Replica("a:1", users("u1"), server.connect, monotonic=lambda: now[0])

    def slowly(user_id: str | None = None, history: Sequence[str] | None = None) -> Told:
        now[0] += 0.25
        return Told()

    server.recommend = slowly  # type: ignore[method-assign]
    assert replica.ask().seconds == 0.25
    server.tell = lambda user_id=None, history=None: Told()  # type: ignore[method-assign]
    assert replica.ask().seconds == 0.25


def test_without_a_known_user_an_empty_history_is_asked_for() -> None:
    server = Server()
    answer = Replica("a:1", Users(), server.connect).ask()
    assert answer.up and not answer.by_user and server.asked == [None]


def test_a_host_without_a_state_still_answers() -> None:
    for fault in (UserError("this server has no state"), Failure("the state cannot be read here")):
        server = Server()
        server.user_fault = fault
        answer = Replica("a:1", users("u1"), server.connect).ask()
        assert answer.up and not answer.by_user
        assert answer.fault == str(fault)


def test_after_a_fault_the_connection_is_made_anew() -> None:
    server = Server()
    replica = Replica("a:1", Users(), server.connect)
    server.fault = Failure("does not answer\nat all")
    answer = replica.ask()
    assert (answer.up, answer.version, answer.fault) == (False, None, "does not answer")
    assert server.closed == 1
    server.fault = RuntimeError()
    assert replica.ask().fault == "RuntimeError"
    server.fault = None
    assert replica.ask().up
    assert server.connections == 3


def test_a_server_that_hangs_gets_no_second_question() -> None:
    server, now = Server(), [0.0]

    def hang(user_id: str | None = None, history: Sequence[str] | None = None) -> Told:
        now[0] += DEADLINE_SECONDS
        raise Failure(f"deadline ({user_id})")

    server.recommend = hang  # type: ignore[method-assign]
    answer = Replica("a:1", users("u1"), server.connect, monotonic=lambda: now[0]).ask()
    assert (answer.up, answer.fault, answer.seconds) == (False, "deadline (u1)", DEADLINE_SECONDS)


def test_a_replica_that_hangs_does_not_delay_the_others() -> None:
    release = threading.Event()

    class Hanging(Server):
        def recommend(self, user_id: str | None = None, history: Sequence[str] | None = None) -> Told:
            release.wait(20)
            raise Failure("deadline")

    hanging, sound = Hanging(), Server()
    answers: list[Answer] = []
    replicas = [Replica("slow:1", Users(), hanging.connect), Replica("good:1", Users(), sound.connect)]
    with Prober(replicas, answers.append, every_s=0.01):
        deadline = time.monotonic() + 20
        while len(answers) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        asked = list(answers)
        release.set()
    assert len(asked) >= 5 and {answer.replica for answer in asked} == {"good:1"}
    assert sound.closed == 1
