"""Event logs of which no event is late, and what embedded `replay` makes of them: the reference of every run through Kafka.

A log is a function of its shape. It holds sessions of one watch to more than `max_items`, pauses of exactly the gap and one
millisecond more, interactions before, during and after, players that report progress, lines sent twice, a little disorder,
broken lines, reused event ids, and user ids with `%`, `:` and letters beyond ASCII.
"""

from __future__ import annotations

import heapq
import itertools
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

T0 = 1_700_000_000_000
"""Event times count from here, ms."""
GAP_MS = 120_000
OUT_OF_ORDERNESS_MS = 300_000
DISORDER_MS = 60_000
"""No line arrives later than this by event time, so that none is late."""
SETTINGS = (f"session.gap_ms={GAP_MS}", "session.max_ms=1200000", "session.max_items=40", "history.length=64")
"""Semantic values of every run over such a log: short gaps, so that sessions become final all along; every bound is reached."""

INTERACTIONS = ("like", "follow", "share", "collect", "comment", "dislike")
BROKEN = (b"no JSON", b'{"type":"watch","user_id":"","item_id":"i","ts":1}', b'{"type":"wink"}', "{\"ü\":".encode())


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size and seed of a log: about `users` × `minutes` lines; `minutes` of event time."""

    users: int = 2_000
    minutes: int = 30
    items: int = 3_000
    seed: int = 1


def _user_id(number: int) -> str:
    match number % 16:
        case 3:
            return f"50%:{number}"
        case 7:
            return f"usér-{number}-日本"
        case 11:
            return f"a:b:{number}%3A"
        case _:
            return f"u{number}"


class _User:
    """One user's way through the log: whether the next watch goes on with the session, and how long until then."""

    __slots__ = ("left", "pace", "rest", "rng", "user_id")

    def __init__(self, number: int, shape: Shape) -> None:
        self.rng = random.Random(shape.seed * 1_000_003 + number)
        self.user_id = _user_id(number)
        self.pace = 1_000 * self.rng.lognormvariate(2.7, 0.6)
        self.rest = GAP_MS * self.rng.lognormvariate(1.2, 0.8)
        self.left = 0

    def length(self) -> int:
        draw = self.rng.random()
        if draw < 0.25:
            return 1
        if draw < 0.995:
            return 2 + int(self.rng.lognormvariate(1.6, 0.9))
        return self.rng.randrange(60, 150)

    def wait(self) -> int:
        """Milliseconds to the next watch."""
        if self.left > 0:
            self.left -= 1
            draw = self.rng.random()
            if draw < 0.01:
                return GAP_MS
            if draw < 0.03:
                return 0
            return min(GAP_MS, int(self.rng.expovariate(1 / self.pace)))
        self.left = self.length() - 1
        return GAP_MS + 1 if self.rng.random() < 0.02 else GAP_MS + 1 + int(self.rng.expovariate(1 / self.rest))


def lines(shape: Shape) -> Iterator[bytes]:
    """The log in the order of arrival: that of event time but for DISORDER_MS."""
    for _, _, line in _arrivals(shape):
        yield line


def _arrivals(shape: Shape) -> Iterator[tuple[int, int, bytes]]:
    """(arrival by event time, serial, line) in order."""
    end = T0 + shape.minutes * 60_000
    serial = itertools.count()
    waiting: list[tuple[int, int, bytes]] = []
    users: list[tuple[int, int, _User]] = []
    for number in range(shape.users):
        user = _User(number, shape)
        heapq.heappush(users, (T0 + user.rng.randrange(0, 2 * GAP_MS) + user.wait(), number, user))
    while users:
        ts, number, user = users[0]
        while waiting and waiting[0][0] <= ts:
            yield heapq.heappop(waiting)
        if ts >= end:
            heapq.heappop(users)
            continue
        for arrival, line in _watch(user, ts, shape, end):
            heapq.heappush(waiting, (arrival, next(serial), line))
        heapq.heapreplace(users, (ts + user.wait(), number, user))
    while waiting:
        yield heapq.heappop(waiting)


def _watch(user: _User, ts: int, shape: Shape, end: int) -> Iterator[tuple[int, bytes]]:
    """One watch and what hangs on it, as (arrival, line)."""
    rng = user.rng
    item = f"i{int(shape.items * rng.random() ** 2)}"
    duration = rng.choice((0, 5_000, 12_000, 30_000))
    watched = rng.randrange(0, 25_000)
    fields: dict[str, object] = {
        "type": "watch", "user_id": user.user_id, "item_id": item, "ts": ts, "watch_ms": watched, "duration_ms": duration,
    }
    if rng.random() < 0.5:
        fields["event_id"] = f"w{ts}-{rng.randrange(1 << 32)}"
    if rng.random() < 0.2:
        fields["request_id"] = f"r:{rng.randrange(1 << 20)}"
    line = orjson.dumps(fields)
    late = rng.randrange(DISORDER_MS) if rng.random() < 0.03 else 0
    yield ts + late, line
    draw = rng.random()
    if draw < 0.03:
        yield ts + rng.randrange(DISORDER_MS), line
    elif draw < 0.08 and "event_id" in fields:
        for step in range(1, rng.randrange(2, 4)):
            report = min(ts + step * rng.randrange(1, 20_000), end)
            yield report, orjson.dumps({**fields, "ts": report, "watch_ms": watched + step * 2_000})
    elif draw < 0.082 and "event_id" in fields and not late:
        yield ts, orjson.dumps({**fields, "item_id": f"{item}x", "ts": ts})
    elif draw > 0.9995:
        yield ts, rng.choice(BROKEN)
    while rng.random() < 0.2:
        at = max(T0, ts + rng.choice((0, -500, 1_000, int(rng.uniform(-30_000, 2 * GAP_MS)))))
        more = {"type": rng.choice(INTERACTIONS), "user_id": user.user_id, "item_id": item, "ts": at}
        if rng.random() < 0.5:
            more["event_id"] = f"x{at}-{rng.randrange(1 << 32)}"
        if rng.random() < 0.3:
            more["request_id"] = fields.get("request_id")
        extra = orjson.dumps(more)
        yield max(at, ts), extra
        if rng.random() < 0.05:
            yield max(at, ts) + rng.randrange(DISORDER_MS), extra


def write(path: Path, found: Iterable[bytes]) -> int:
    """Lines into a file; how many."""
    count = 0
    with path.open("wb", buffering=1 << 20) as file:
        for line in found:
            file.write(line + b"\n")
            count += 1
    return count


@dataclass(frozen=True)
class Reference:
    """What embedded `replay` makes of a log; sessions by id, as bytes of §9."""

    sessions: dict[str, bytes]
    histories: list[bytes]
    counters: dict[str, int]


COUNTED = ("events", "duplicates", "late", "dead_letters", "users", "sessions", "high_quality")


def onerec(*words: str | Path) -> bytes:
    """Standard output of one command. Raises CalledProcessError with its error output."""
    done = subprocess.run([sys.executable, "-m", "onerec.cli", *map(str, words)], capture_output=True, check=False)
    if done.returncode:
        raise AssertionError(f"onerec {' '.join(map(str, words))}: exit {done.returncode}\n{done.stderr.decode()[-4_000:]}")
    return done.stdout


def settings(values: Iterable[str] = SETTINGS) -> list[str]:
    """`--set` options of the semantic values."""
    return [word for value in values for word in ("--set", value)]


def reference(log: Path, state: Path) -> Reference:
    """Replays the log into `state` and reads it back by the commands. Raises AssertionError where an event was late."""
    summary = orjson.loads(onerec("replay", log, "--state", state, "--json", *settings()).splitlines()[-1])
    found = onerec("sessions", "--state", state, "--json").splitlines()
    sessions = {orjson.loads(line)["session_id"]: line for line in found}
    assert len(sessions) == len(found) == summary["sessions"], "session ids of the reference are not unique"
    return Reference(
        sessions, onerec("histories", "--state", state, "--json").splitlines(), {name: summary[name] for name in COUNTED}
    )
