"""Users that watch while a test runs: a log that grows, by the wall clock."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from onerec.closing import Closing

USERS = 100
ITEMS = 50
USUAL_MS = (2_000, 8_000, 20_000, 40_000)


class World(Closing):
    """Writes a session of `watches` every so many seconds, until it is closed, after `past` sessions at the same pace.

    A user watches neighbouring items, and again what he watched before; every tenth session follows a new item, and has it.
    `watch_ms`: how long users watch; `broken`: a broken line with every session.
    """

    def __init__(self, log: Path, *, every_s: float = 0.1, past: int = 0, watches: int = 3) -> None:
        self.watch_ms: tuple[int, ...] = USUAL_MS
        self.broken = False
        self._log, self._watches, self._every_s = log, watches, every_s
        self._ended = threading.Event()
        self._turns = itertools.count()
        now = self._now()
        self._write(line for back in range(past, 0, -1) for line in self._session(now - int(back * every_s * 1000)))
        self._thread = threading.Thread(target=self._live)
        self._thread.start()

    def _write(self, lines: Iterable[str]) -> None:
        with self._log.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    @staticmethod
    def _now() -> int:
        return time.time_ns() // 1_000_000

    def _session(self, ms: int) -> Iterable[str]:
        turn = next(self._turns)
        if self.broken:
            yield '{"type":"watch"'
        user, visit = turn % USERS, turn // USERS
        items = [f"v{(user + 2 * visit + place) % ITEMS}" for place in range(self._watches)]
        if turn % 10 == 9:
            items[-1] = f"new{turn}"
            yield json.dumps({"type": "item", "item_id": items[-1], "ts": ms - self._watches, "duration_ms": 60_000})
        for place, item_id in enumerate(items):
            yield json.dumps({
                "type": "watch", "user_id": f"u{user}", "item_id": item_id, "ts": ms - self._watches + place,
                "watch_ms": self.watch_ms[turn % len(self.watch_ms)], "duration_ms": 60_000,
            })

    def _live(self) -> None:
        while not self._ended.wait(self._every_s):
            self._write(self._session(self._now()))

    def close(self) -> None:
        """The end of the world."""
        self._ended.set()
        self._thread.join()
