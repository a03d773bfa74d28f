"""Asking every replica what it answers users from: now and then for a whole answer, in between for what it says of itself."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

import msgspec

from onerec.errors import OneRecError

ANSWER_SECONDS = 10.0
"""Between two whole answers of a replica; in between it only tells what it would answer from, which costs no search."""
DEADLINE_SECONDS = 1.0
"""A replica that has not answered by then is down."""


class Told(Protocol):
    """What the prober reads of a replica's answer (`exporter.client.Recommendation` or `Told`)."""

    @property
    def model_version(self) -> int:
        """The version that answered."""
    @property
    def watermark(self) -> int | None:
        """Event time in ms that it has learnt up to."""
    @property
    def history_watermark(self) -> int | None:
        """Time in ms of the newest event in the host's histories."""


class Connection(Protocol):
    """What the prober needs of a client (`exporter.client.Client`)."""

    def recommend(self, user_id: str | None = None, history: Sequence[str] | None = None) -> Told:
        """A session for a stored user or a given history; OneRecError where there is none."""

    def tell(self, user_id: str | None = None, history: Sequence[str] | None = None) -> Told:
        """The same without a session: nothing is searched."""

    def close(self) -> None:
        """Let go of the connection."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of asking one replica; times in ms, `at_ms` by the wall clock when the answer was there.

    `up` false: no answer, `fault` says why. `by_user`: a stored user was asked for, so histories were used. `whole`: with a
    session; else the replica only told what it would answer from, and `seconds` are those of the last whole one.
    """

    replica: str
    at_ms: int
    up: bool
    seconds: float
    by_user: bool = False
    whole: bool = True
    version: int | None = None
    watermark_ms: int | None = None
    history_watermark_ms: int | None = None
    fault: str = ""


def connect(server: str) -> Connection:
    """A connection to a real Triton."""
    from exporter.client import Client

    return Client(server, timeout=DEADLINE_SECONDS)


class Users:
    """The users asked for, in turn; filled by one thread, read by those of the replicas."""

    def __init__(self) -> None:
        self._users: list[str] = []
        self._turn = itertools.count()

    def fill(self, users: list[str]) -> None:
        """The users of the next questions."""
        self._users = users

    def next(self) -> str | None:
        """The next one; None while nobody is known."""
        users = self._users
        return users[next(self._turn) % len(users)] if users else None


class Replica:
    """One server and the connection to it, made anew after each fault."""

    def __init__(
        self, server: str, users: Users, connect: Callable[[str], Connection] = connect,
        wall_ms: Callable[[], int] = lambda: int(time.time() * 1000),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.server = server
        self._users, self._connect = users, connect
        self._wall_ms, self._monotonic = wall_ms, monotonic
        self._connection: Connection | None = None
        self._whole_at = float("-inf")
        self._whole_seconds = 0.0

    def ask(self) -> Answer:
        """One question, for a whole answer every `ANSWER_SECONDS`. Never raises: one that is not answered is told, too."""
        user = self._users.next()
        began = self._monotonic()
        whole = began - self._whole_at >= ANSWER_SECONDS
        by_user, fault = user is not None, ""
        try:
            if self._connection is None:
                self._connection = self._connect(self.server)
            question = self._connection.recommend if whole else self._connection.tell
            try:
                told = question(user) if user is not None else question(history=[])
            except OneRecError as error:
                # A host without a state answers those who bring their history; one that is down gets no second question.
                if user is None or self._monotonic() - began > DEADLINE_SECONDS / 2:
                    raise
                told, by_user, fault = question(history=[]), False, _first_line(error)
        except Exception as error:  # whatever the connection raises: the other replicas are still asked
            self.close()
            return Answer(
                replica=self.server, at_ms=self._wall_ms(), up=False, seconds=self._monotonic() - began, whole=whole,
                fault=_first_line(error),
            )  # fmt: skip
        if whole:
            self._whole_at, self._whole_seconds = began, self._monotonic() - began
        return Answer(
            replica=self.server,
            at_ms=self._wall_ms(),
            up=True,
            seconds=self._whole_seconds,
            whole=whole,
            by_user=by_user,
            version=told.model_version,
            watermark_ms=told.watermark,
            history_watermark_ms=told.history_watermark,
            fault=fault,
        )

    def close(self) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except Exception:  # a broken connection may refuse even that
                return


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


class Prober:
    """Asks every replica each `every_s` seconds, each in a thread of its own, while it is open.

    `report` gets every answer, from those threads.
    """

    def __init__(self, replicas: Sequence[Replica], report: Callable[[Answer], None], *, every_s: float) -> None:
        self._stop = threading.Event()
        self._report, self._every_s = report, every_s
        self._threads = [
            threading.Thread(target=self._run, args=(replica,), name=f"ask {replica.server}", daemon=True)
            for replica in replicas
        ]

    def _run(self, replica: Replica) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            self._report(replica.ask())
            # A late answer delays the next question; it is not followed by a burst.
            due = max(due + self._every_s, time.monotonic())
        replica.close()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(3 * DEADLINE_SECONDS)
