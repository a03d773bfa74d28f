"""A part of the page: one question, asked in a thread of its own, its answer kept for about a second.

A part that fails shows its reason; one that hangs shows since when. Neither holds up the page or another part.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from onerec.errors import OneRecError

FRESH_SECONDS = 1.0
PATIENCE_SECONDS = 0.5
"""How long a look waits for an answer that is on its way; then it takes the one before."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a part said last: `data`, or the `fault` why there is none; both None before the first answer.

    `number` grows with every answer that differs from the one before.
    """

    data: Any = None
    fault: str | None = None
    number: int = 0


def reason(error: BaseException) -> str:
    """One line that says why: our own errors in their words, others with their type."""
    text = str(error).partition("\n")[0].strip()
    return text if isinstance(error, OneRecError) else f"{type(error).__name__}: {text}" if text else type(error).__name__


class Part:
    """Asks `question` at most once in `fresh_s`, one at a time. `clock` gives monotonic seconds."""

    def __init__(
        self, question: Callable[[], Any], *, fresh_s: float = FRESH_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._question, self._fresh_s, self._clock = question, fresh_s, clock
        self._lock = threading.Lock()
        self._answer = Answer()
        self._began: float | None = None
        self._ended: float | None = None
        self._coming: Future[None] | None = None

    @property
    def answer(self) -> Answer:
        """The last answer, however old."""
        return self._answer

    @property
    def waiting_s(self) -> float | None:
        """For how many seconds the question now asked has been without an answer; None while none is asked."""
        began = self._began
        return None if began is None else self._clock() - began

    def start(self) -> Future[None]:
        """Ask anew where the answer is no longer fresh; the future ends with the answer."""
        with self._lock:
            now = self._clock()
            if self._coming is not None and (self._began is not None or now - (self._ended or now) < self._fresh_s):
                return self._coming
            self._began, self._coming = now, Future()
            # A daemon: a question that hangs, on a dead network file system say, must not keep the process alive.
            threading.Thread(target=self._ask, args=(self._coming,), daemon=True).start()
            return self._coming

    def _ask(self, coming: Future[None]) -> None:
        data, fault = None, None
        try:
            data = self._question()
        except Exception as error:
            fault = reason(error)
        before = self._answer
        same = before.number > 0 and (data, fault) == (before.data, before.fault)
        self._answer = Answer(data=data, fault=fault, number=before.number if same else before.number + 1)
        with self._lock:
            self._began, self._ended = None, self._clock()
        coming.set_result(None)

    async def look(self, patience_s: float = PATIENCE_SECONDS) -> Answer:
        """The answer, fresh where it comes within `patience_s`."""
        coming = self.start()
        if not coming.done():
            await asyncio.wait([asyncio.wrap_future(coming)], timeout=patience_s)
        return self._answer
