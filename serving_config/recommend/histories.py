"""Stored histories on the serving host: a RocksDB secondary that follows the stream's writer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from serving_config.recommend.errors import RequestError

if TYPE_CHECKING:
    from streaming.store import Reader

CATCH_UP_SECONDS = 0.1
REOPEN_SECONDS = 5.0


class Histories:
    """H(∞) of a user (SEMANTICS.md §4), at most `CATCH_UP_SECONDS` behind the writer's last commit.

    A state that cannot be opened is tried again every `REOPEN_SECONDS`; meanwhile only requests that bring their own
    history are answered. `state` None = the host has none.
    """

    def __init__(self, state: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._clock = clock
        self._reader: Reader | None = None
        self._newest: int | None = None
        self._lateness = 0
        self._fault = ""
        self._next_open = float("-inf")
        self._next_refresh = float("-inf")
        if state is not None:
            self._open(state)

    def _open(self, state: Path) -> None:
        from streaming.store import Reader

        self._next_open = self._clock() + REOPEN_SECONDS
        try:
            self._reader = Reader(state).__enter__()
            self._lateness = self._reader.semantics().stream.max_out_of_orderness_ms
            self._note()
            self._fault = ""
        except Exception as error:  # rocksdict raises bare Exceptions
            self._fault = str(error)
            self.close()

    def _note(self) -> None:
        """Keep how far the histories reach, once a refresh and not once a request."""
        watermark = self._reader.watermark() if self._reader is not None else None
        self._newest = None if watermark is None else watermark + self._lateness

    def watermark(self) -> int | None:
        """Time in ms of the newest event in the histories of the last `catch_up`; None without a state or an event.

        Events that came later are in none of them; those up to `stream.max_out_of_orderness_ms` before may still come.
        """
        return self._newest

    def catch_up(self) -> None:
        """See what the writer has committed, unless that was done less than `CATCH_UP_SECONDS` ago."""
        now = self._clock()
        if self._state is None:
            return
        if self._reader is None:
            if now >= self._next_open:
                self._open(self._state)
            return
        if now < self._next_refresh:
            return
        self._next_refresh = now + CATCH_UP_SECONDS
        try:
            self._reader.refresh()
            self._note()
        except Exception as error:  # the state was moved or made anew: look again from the start
            self._fault = str(error)
            self.close()
            self._open(self._state)

    def of(self, user_id: str) -> list[str] | None:
        """Item ids oldest first, None for a user never seen; RequestError where there is no state to look in."""
        if self._state is None:
            raise RequestError(
                "this server has no state, so it cannot look up users; send `history`, or start it with --state DIR"
            )
        if self._reader is None:
            raise RequestError(
                f"the state {self._state} cannot be read here ({self._fault}); send `history`, or mend the state",
                client_fault=False,
            )
        try:
            return self._reader.history(user_id)
        except Exception as error:
            raise RequestError(f"the history of {user_id!r} cannot be read: {error}", client_fault=False) from None

    def close(self) -> None:
        """Let go of the state."""
        reader, self._reader = self._reader, None
        self._newest = None
        if reader is not None:
            reader.__exit__(None, None, None)
