"""The log's clock beside the wall clock, its pace, and jumps of the wall clock."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onerec.monitor.ages import log_clock
from onerec.monitor.settings import ClockMode

JUMP_MS = 1_000
"""The wall clock may stray so far from the monotonic one between two looks before that counts as a jump."""
PACE_SECONDS = 30.0
"""The pace of a replay is that of so many seconds."""
PACE_LEAST_SECONDS = 2.0
KEEP_SAMPLES = 20_000


class Clock:
    """The machine's clocks; tests bring their own."""

    def wall_ms(self) -> int:
        """Epoch milliseconds."""
        return int(time.time() * 1000)

    def monotonic(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()


class _Sample(NamedTuple):
    monotonic: float
    wall_ms: int
    log_ms: int | None
    newest_ms: int | None
    sequence: int


class LogClock:
    """What time it is in the log, now and at earlier looks: so events are aged by when they got somewhere.

    `now_ms` is the log's clock at the last look, None where a replay has no event; `factor` the seconds of log that pass
    in a second, None until that is known; `jumps` counts those of the wall clock.
    """

    def __init__(self, mode: ClockMode, clock: Clock) -> None:
        self._mode: ClockMode = mode
        self._clock = clock
        self._samples: deque[_Sample] = deque(maxlen=KEEP_SAMPLES)
        self.now_ms: int | None = None
        self.live = mode == "live"
        self.factor: float | None = None
        self.jumps = 0

    def look(self, newest_ms: int | None, sequence: int) -> int | None:
        """Take note of the newest event and session; returns the log's clock."""
        wall, monotonic = self._clock.wall_ms(), self._clock.monotonic()
        if self._samples:
            last = self._samples[-1]
            if abs((wall - last.wall_ms) - (monotonic - last.monotonic) * 1000) > JUMP_MS:
                self.jumps += 1
                # Times from before and after a jump cannot be compared.
                self._samples.clear()
            elif sequence < last.sequence:
                self._samples.clear()
        self.now_ms = log_clock(newest_ms, wall, self._mode)
        self.live = self._mode == "live" or (newest_ms is not None and self._mode == "auto" and self.now_ms == wall)
        self._samples.append(_Sample(monotonic, wall, self.now_ms, newest_ms, sequence))
        self.factor = 1.0 if self.live and self.now_ms is not None else self._pace()
        return self.now_ms

    def _pace(self) -> float | None:
        last = self._samples[-1]
        if last.log_ms is None:
            return None
        first = last
        for sample in reversed(self._samples):
            if sample.log_ms is None or last.monotonic - sample.monotonic > PACE_SECONDS:
                break
            first = sample
        seconds = last.monotonic - first.monotonic
        return (last.log_ms - (first.log_ms or 0)) / 1000 / seconds if seconds >= PACE_LEAST_SECONDS else None

    def at(self, wall_ms: int | None) -> int | None:
        """The log's clock at an earlier wall-clock time; None for one before the first look, or in the future."""
        known = [(sample.wall_ms, sample.log_ms) for sample in self._samples if sample.log_ms is not None]
        if wall_ms is None or not known:
            return None
        if self.live:
            return wall_ms
        walls, logs = zip(*known, strict=True)
        if not walls[0] <= wall_ms <= walls[-1]:
            return None
        return int(np.interp(wall_ms, walls, logs))

    def since(self, log_ms: int | None, event_ms: NDArray[np.int64]) -> NDArray[np.float64]:
        """Ages in ms at a time of the log's clock; NaN where that is not known."""
        return np.full(len(event_ms), np.nan) if log_ms is None else (log_ms - event_ms).astype(np.float64)

    def reached(self, event_ms: NDArray[np.int64]) -> NDArray[np.float64]:
        """The log's clock when the stream was first seen to have taken an event of each time; NaN where not known."""
        return self._first([sample.newest_ms or 0 for sample in self._samples], event_ms)

    def committed(self, sequences: NDArray[np.int64]) -> NDArray[np.float64]:
        """The log's clock when each session was first seen to be final; NaN where not known."""
        return self._first([sample.sequence for sample in self._samples], sequences)

    def _first(self, marks: list[int], wanted: NDArray[np.int64]) -> NDArray[np.float64]:
        if not marks:
            return np.full(len(wanted), np.nan)
        logs = np.array([np.nan if sample.log_ms is None else sample.log_ms for sample in self._samples], np.float64)
        places = np.searchsorted(np.maximum.accumulate(np.array(marks, np.int64)), wanted, side="left")
        # What the first look found was there before: nobody saw when it came.
        known = (places > 0) & (places < len(logs))
        found = np.full(len(wanted), np.nan)
        found[known] = logs[places[known]]
        return found
