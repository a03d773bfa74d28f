"""The log's clock in a process that has a state beside it: trainer, sampler, publisher."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from onerec.monitor.ages import log_clock
from onerec.monitor.looks import StateLook
from onerec.monitor.settings import ClockMode

LOOK_SECONDS = 1.0


class StateClock:
    """Looks at the state at most once in LOOK_SECONDS; closes its reader at the end of a `with` block.

    `wall_ms` is the wall clock in epoch ms, `monotonic` seconds that never jump.
    """

    def __init__(
        self, state: Path, mode: ClockMode, *, wall_ms: Callable[[], int] = lambda: int(time.time() * 1000),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._look, self._mode = StateLook(state), mode
        self._wall_ms, self._monotonic = wall_ms, monotonic
        self._due = float("-inf")

    def now_ms(self, seen_ms: int | None = None) -> int | None:
        """The log's clock in epoch ms, None where a replay has no event yet.

        `seen_ms`: an event time that the caller has met; the newest event is at least that.
        """
        if self._monotonic() >= self._due:
            self._look.look()
            self._due = self._monotonic() + LOOK_SECONDS
        known = [ms for ms in (self._look.marks.newest, seen_ms) if ms is not None]
        return log_clock(max(known, default=None), self._wall_ms(), self._mode)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look.close()
