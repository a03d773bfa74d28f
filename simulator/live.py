"""A world at live pace: its days pass `factor` times faster, and its log is written ahead of the wall clock.

An event at `ts` of the world has `ts' = began_ms + (ts - start_ms) // factor` in the file. Whoever reads it (`onerec replay
--live --follow`) lets each line out when the clock gets there. What must fit the faster days is in `scaled_settings`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from onerec.errors import Failure, UserError
from onerec.files import sync_path
from simulator.behaviour import Behaviour, Columns
from simulator.log import block_lines, item_lines, items_path, open_output
from simulator.world import DAY_MS, World, WorldConfig
from streaming.semantics import SessionConfig, StreamConfig

EVENTS_PER_USER_DAY: Final = 21.4
"""Measured on the world's defaults: 10,000 users, 17 slots of three hours."""
USERS_PER_RATE: Final = 10
FACTORS: Final = (10, 2_000)
"""Slower, and a block of three hours is minutes; faster, and the watches of a session fall on the same milliseconds."""
FIRST_ITEMS: Final = 2_000
UPLOAD_SECONDS: Final = 3.0
HOURS: Final = 24.0
AHEAD_MS: Final = 60_000
LOOK_SECONDS: Final = 1.0


class LiveConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What decides every byte of a live world but its beginning: users, days of the world in one of the clock, length, seed.

    `asked`: the rate that was asked for. `upload_seconds`: a new video every so often, by the wall clock.
    """

    users: int
    factor: int
    asked: float = 0.0
    hours: float = HOURS
    first_items: int = FIRST_ITEMS
    upload_seconds: float = UPLOAD_SECONDS
    seed: int = 0

    @property
    def world(self) -> WorldConfig:
        """The world itself; its days are as even as they are short, so that the rate is steady."""
        uploads = int(self.hours * 3600 / self.upload_seconds)
        days = max(1, -(-int(self.hours * 3600 * self.factor) // 86_400))
        return WorldConfig(users=self.users, items=self.first_items + uploads, first_items=self.first_items, days=days,
                           seed=self.seed, daily_rhythm=False)

    @property
    def wanted_rate(self) -> float:
        """What was asked for; `rate` differs from it as `factor` is a whole number."""
        return self.asked or self.rate

    @property
    def rate(self) -> float:
        """Events a second by the wall clock."""
        return self.users * EVENTS_PER_USER_DAY / 86_400 * self.factor


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the file for sure: `world.json` beside it. `began_ms` is the clock at the world's first midnight."""

    config: LiveConfig
    began_ms: int
    blocks: int = 0
    bytes: int = 0


def live_config(rate: float, users: int | None = None, **more: float) -> LiveConfig:
    """The world that gives `rate` events a second; `users` None: ten for each of them.

    Raises UserError where its days would pass too fast or too slowly.
    """
    if not 0 < rate < 1e6:
        raise UserError(f"--rate {rate:g}: give events a second, for example 1000")
    count = max(20, round(USERS_PER_RATE * rate)) if users is None else users
    if count < 1:
        raise UserError(f"--users {count}: give at least 1")
    factor = round(rate * 86_400 / (count * EVENTS_PER_USER_DAY))
    if not FACTORS[0] <= factor <= FACTORS[1]:
        least, most = (round(rate * 86_400 / EVENTS_PER_USER_DAY / limit) for limit in reversed(FACTORS))
        raise UserError(
            f"--users {count} with --rate {rate:g}: the world's days would pass {factor} times faster; "
            f"{FACTORS[0]} to {FACTORS[1]} times works, so give --users {max(1, least + 1)} to {most}"
        )
    return LiveConfig(users=count, factor=factor, asked=rate, **more)  # type: ignore[arg-type]


def scaled_settings(factor: int) -> dict[str, int]:
    """The stream's times in a world whose days pass `factor` times faster: `section.key` → ms.

    Lengths of watches are what they say they are, and stay.
    """
    session, stream = SessionConfig(), StreamConfig()
    return {
        "session.gap_ms": session.gap_ms // factor,
        "session.max_ms": session.max_ms // factor,
        "stream.max_out_of_orderness_ms": stream.max_out_of_orderness_ms // factor,
        "stream.dedup_horizon_ms": stream.dedup_horizon_ms // factor,
    }


class LiveWorld:
    """Writes the log ahead of the clock; killed at any moment, it goes on with the same bytes.

    `wall_ms`, `sleep` (seconds) and `stopped` are the world outside.
    """

    def __init__(self, events: Path, config: LiveConfig, *, wall_ms: Callable[[], int], sleep: Callable[[float], None],
                 stopped: Callable[[], bool] = lambda: False) -> None:
        self._events, self._sidecar = events, events.with_name("world.json")
        self._config, self._wall_ms, self._sleep, self._stopped = config, wall_ms, sleep, stopped
        self._world = World(config.world)
        self.written = self._begin()

    def _begin(self) -> Written:
        found = read_written(self._events)
        if found is None:
            return Written(config=self._config, began_ms=self._wall_ms())
        if found.config != self._config:
            raise UserError(
                f"{self._sidecar}: the world there was begun with other options ({found.config.rate:,.0f} events/s, "
                f"{found.config.users:,} users, seed {found.config.seed}); give the same ones, or another folder"
            )
        return found

    def clock_ms(self, ts: int) -> int:
        """The wall clock's time, ms, of a time of the world."""
        return self.written.began_ms + (ts - self._world.config.start_ms) // self._config.factor

    def run(self, progress: Callable[[int], None] = lambda events: None) -> int:
        """Writes until the world ends or `stopped()`; how many events the world has had by then."""
        try:
            return self._run(progress)
        except OSError as error:
            raise Failure(f"writing {self._events} failed: {error.strerror}; free some space, and run the same command again "
                          "to go on from there") from None

    def _run(self, progress: Callable[[int], None]) -> int:
        world, done = self._world, self.written.blocks
        lines = item_lines(world, when=self.clock_ms)
        uploads = zip(world.upload_ms.tolist(), lines, strict=True)
        upload = next(uploads, None)
        before = []
        while upload is not None and upload[0] < world.config.start_ms:
            before.append(upload[1])
            upload = next(uploads, None)
        if not done:
            with open_output(items_path(self._events)) as stream:
                stream.writelines(before)
            # Before the first line that somebody may read: the beginning is fixed from here on.
            self._note(0, 0)
        behaviour = Behaviour(world)
        with open(self._events, "r+b" if self._events.exists() else "w+b") as stream:
            # What a killed run wrote past this place is the beginning of what comes now, and may have been read.
            stream.seek(self.written.bytes)
            for number, (end, columns) in enumerate(behaviour.blocks()):
                due = []
                while upload is not None and upload[0] < end:
                    due.append(upload)
                    upload = next(uploads, None)
                world.forget_before((end - world.config.start_ms) // DAY_MS - 1)
                if self._stopped():
                    break
                if number < done:
                    continue
                for chunk in self._lines(columns, due):
                    stream.write(chunk)
                stream.flush()
                os.fsync(stream.fileno())
                self._note(number + 1, stream.tell())
                progress(behaviour.events)
                while not self._stopped() and self.clock_ms(end) > self._wall_ms() + AHEAD_MS:
                    self._sleep(LOOK_SECONDS)
        return behaviour.events

    def _lines(self, columns: Columns, due: list[tuple[int, bytes]]) -> Iterator[bytes]:
        start = self._world.config.start_ms
        ts = self.written.began_ms + (columns["ts"] - start) // self._config.factor
        return block_lines({**columns, "ts": ts}, due)

    def _note(self, blocks: int, size: int) -> None:
        self.written = msgspec.structs.replace(self.written, blocks=blocks, bytes=size)
        staged = self._sidecar.with_name(f".{self._sidecar.name}")
        staged.write_bytes(msgspec.json.encode(self.written))
        sync_path(staged)
        staged.replace(self._sidecar)
        sync_path(self._sidecar.parent)


def read_written(events: Path) -> Written | None:
    """How far the live world of this file has been written; None where there is none.

    Raises UserError for a damaged `world.json`.
    """
    sidecar = events.with_name("world.json")
    try:
        return msgspec.json.decode(sidecar.read_bytes(), type=Written)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"{sidecar} cannot be read ({error}); name another folder, or remove the world in this one") from None
