"""Sessions of several partitions in one order that is a function of the logs alone: by end, then session id.

Within a partition sessions come in that order (SEMANTICS.md §5). One is released once every other partition has shown what
comes next, or that nothing earlier can: with a watermark W, all that ended before W − gap are written. So whoever learns
the log in its order never sees a day of one partition before the same day of another, and a log made again is the same.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any, Final, NamedTuple

from streaming.kafka.wire import Progress

HEARD: Final = 256
"""So many values of progress a partition are kept while the sessions they speak of are not yet read; then only the newest."""


class Waiting(NamedTuple):
    """A session read and not yet released; `offset` is that of its record, `size` its bytes."""

    end: int
    session_id: str
    partition: int
    sequence: int
    offset: int
    size: int
    message: Any


class _Part:
    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.queue: deque[Waiting] = deque()
        self.heard: Progress | None = None
        self.progress: deque[Progress] = deque()
        self.watermark: int | None = None
        # No session still to be read ends before.
        self.limit: float = -math.inf
        self.last: float = -math.inf
        self.blocking_since: float | None = None

    def settle(self, gap_ms: int) -> None:
        """Lets progress count whose sessions have all been read."""
        while self.progress and self.progress[0].sessions <= self.sequence:
            found = self.progress.popleft()
            limit = -math.inf
            if found.watermark is not None:
                self.watermark = max(found.watermark, self.watermark or found.watermark)
                limit = self.watermark - gap_ms
            limit = math.inf if found.ended else limit
            if limit != self.limit:
                self.limit, self.blocking_since = limit, None

    def blocks(self, end: int, now: float, stall_seconds: float) -> bool:
        """Whether something may come here that belongs before a session of that `end`, and is still waited for."""
        if self.limit > end:
            return False
        if self.blocking_since is None:
            self.blocking_since = now
        return now - self.blocking_since < stall_seconds


class SessionOrder:
    """Merges partitions; a partition that holds up the others for `stall_seconds` is not waited for until it moves again."""

    def __init__(
        self,
        sequences: dict[int, int],
        gap_ms: int,
        stall_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sequences`: partition → sequence of the last session that was released."""
        self._parts = {partition: _Part(sequence) for partition, sequence in sequences.items()}
        self._gap_ms = gap_ms
        self._stall_seconds = stall_seconds
        self._clock = clock
        self._begun = clock()
        self.held_bytes = 0
        """Of sessions read and not yet released."""

    def sequence(self, partition: int) -> int:
        """Sequence of the newest session read."""
        return self._parts[partition].sequence

    def skip_to(self, partition: int, sequence: int) -> None:
        """Goes on as if the sessions up to `sequence` had been read."""
        self._parts[partition].sequence = sequence

    def add(self, waiting: Waiting) -> None:
        """Takes the next session of its partition."""
        part = self._parts[waiting.partition]
        part.queue.append(waiting)
        part.sequence = waiting.sequence
        part.last = waiting.end
        part.blocking_since = None
        self.held_bytes += waiting.size

    def hear(self, progress: Iterable[Progress]) -> None:
        """Takes what partitions have come to; it counts once the sessions it speaks of have been read."""
        for found in progress:
            part = self._parts.get(found.partition)
            if part is None or found is part.heard:
                continue
            part.heard = found
            if len(part.progress) >= HEARD:
                part.progress.pop()
            part.progress.append(found)

    def release(self) -> Iterator[Waiting]:
        """The sessions whose turn has come, in order."""
        now = self._clock()
        heads: list[Waiting] = []
        empty: list[_Part] = []
        for part in self._parts.values():
            part.settle(self._gap_ms)
            if part.queue:
                heads.append(part.queue[0])
            else:
                empty.append(part)
        heapify(heads)
        limit = min((part.limit for part in empty), default=math.inf)
        while heads:
            first = heads[0]
            # A list, so that the clock starts for every partition that blocks.
            if limit <= first.end and any([part.blocks(first.end, now, self._stall_seconds) for part in empty]):
                return
            part = self._parts[first.partition]
            part.queue.popleft()
            self.held_bytes -= first.size
            heappop(heads)
            if part.queue:
                heappush(heads, part.queue[0])
            else:
                empty.append(part)
                limit = min(limit, part.limit)
            yield first

    def watermark(self) -> int | None:
        """Event time in ms to which all sessions have been released; None before any partition has one.

        The least of the partitions; those that never had an event are left out, and those that nothing was heard of for
        `stall_seconds`. To be asked after `release` ran to its end.
        """
        parts = self._parts.values()
        if any(part.heard is None for part in parts) and self._clock() - self._begun < self._stall_seconds:
            return None
        heard = [part.heard.watermark for part in parts if part.heard is not None and part.heard.watermark is not None]
        if not heard:
            return None
        # Nothing that is still to come ends before this; far behind, it is all that is known.
        rest = min(part.queue[0].end if part.queue else max(part.limit, part.last) for part in parts)
        reached = [min(rest, *heard)]
        if all(part.watermark is not None or part.heard is None or part.heard.watermark is None for part in parts):
            known = [part.watermark for part in parts if part.watermark is not None]
            reached.append(min([*known, *(part.queue[0].end + self._gap_ms for part in parts if part.queue)]))
        newest = max(reached)
        return None if math.isinf(newest) else int(newest)

    def waiting(self) -> list[int]:
        """Partitions that have sessions read and not yet released."""
        return [partition for partition, part in self._parts.items() if part.queue]

    def left_out(self) -> list[int]:
        """Partitions that the others have waited for in vain."""
        now = self._clock()
        return [
            partition for partition, part in self._parts.items()
            if part.blocking_since is not None and now - part.blocking_since >= self._stall_seconds
        ]

    def ended(self) -> bool:
        """Whether every partition was ended by an end marker, and all of its sessions are released."""
        return all(
            part.heard is not None and part.heard.ended and part.heard.sessions <= part.sequence and not part.queue
            for part in self._parts.values()
        )
