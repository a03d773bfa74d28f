"""What the users of a world do: sessions, watches and interactions, as columns in the order in which they arrive."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simulator.world import DAY_MS, LONGEST_RATIO, WATCH_SIGMA, Floats, Ints, World

TYPES = ("watch", "like", "follow", "share", "collect", "comment", "dislike")
COLUMNS = ("type", "user", "item", "ts", "watch_ms", "duration_ms", "session", "page", "event", "arrival")
Columns = dict[str, Ints]
"""One event a row, by the names in COLUMNS; `event` −1: no event id; `page` counts the requests of a session."""

SLOTS = 8
SLOT_MS = DAY_MS // SLOTS
SLOT_ACTIVITY = np.array([0.4, 0.2, 0.6, 0.9, 1.2, 1.1, 1.8, 1.8]) / 8.0
"""Share of a day's sessions that start in each three hours: a bump at noon, the peak in the evening."""

LONGEST_SESSION = 60
BREAK_MS = 2_400_000
"""Nobody is in two sessions at once, nor begins one sooner than this after the last: longer than the session gap."""
CANDIDATES = 12
PAGE = 8
REMEMBERED = 40
"""A user is not shown again any of the last so many items that he was shown."""


class Behaviour:
    """Plays a world from its first day to its last."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = np.random.default_rng([world.config.seed, 4])
        self.shown = np.full((world.config.users, REMEMBERED), -1, dtype=np.int32)
        self.shown_count: Ints = np.zeros(world.config.users, dtype=np.int64)
        self.free_from: Ints = np.zeros(world.config.users, dtype=np.int64)
        self.sessions = 0
        self.watches = 0
        self.events = 0

    def blocks(self) -> Iterator[tuple[int, Columns]]:
        """(end of the block in ms, events that arrived until then), arrival order within and between blocks."""
        config = self.world.config
        waiting: Columns = {name: np.empty(0, dtype=np.int64) for name in COLUMNS}
        for slot in range(config.days * SLOTS):
            start = config.start_ms + slot * SLOT_MS
            made = self._slot(slot // SLOTS, slot % SLOTS, start)
            waiting = {name: np.concatenate([waiting[name], *(part[name] for part in made)]) for name in COLUMNS}
            end = start + SLOT_MS
            due = waiting["arrival"] < end if slot + 1 < config.days * SLOTS else np.ones(len(waiting["ts"]), bool)
            ready = {name: column[due] for name, column in waiting.items()}
            waiting = {name: column[~due] for name, column in waiting.items()}
            order = np.argsort(ready["arrival"], kind="stable")
            yield end, {name: column[order] for name, column in ready.items()}

    def _slot(self, day: int, slot: int, start: int) -> list[Columns]:
        """All sessions that start in three hours, in lockstep by position."""
        config = self.world.config
        share = SLOT_ACTIVITY[slot] if config.daily_rhythm else 1 / SLOTS
        chance = np.minimum(self.world.activity * config.sessions_per_day * share, 0.95)
        users = np.flatnonzero(self.rng.random(config.users) < chance)
        self.rng.shuffle(users)
        first = self.sessions
        self.sessions += len(users)
        clock: Ints = np.maximum(start + self.rng.integers(0, SLOT_MS, len(users)), self.free_from[users])
        length = np.clip(np.exp(self.rng.normal(np.log(11), 0.6, len(users))), 1, LONGEST_SESSION).astype(np.int64)
        order = np.argsort(-length, kind="stable")
        users, clock, length = users[order], clock[order], length[order]

        popularity = self._popularity(day, start)
        tastes = self.world.tastes(day)[users]
        mood = tastes
        recent = np.full((len(users), 4), -1, dtype=np.int64)
        made: list[Columns] = []
        for position in range(int(length[0]) if len(length) else 0):
            n = int(np.searchsorted(-length, -position, side="left"))
            rows = users[:n]
            items = self._choose(rows, mood[:n], clock[:n], popularity)
            recent[:n] = np.column_stack([recent[:n, 1:], self.world.topic[items]])
            tired = self.world.fatigue(recent[:n])[:, -1]
            said = self.world.responses(tastes[:n], items, tired, position)

            duration = self.world.duration_ms[items]
            wanted = np.exp(said.log_watch + WATCH_SIGMA * self.rng.standard_normal(n))
            watch = np.minimum(wanted, LONGEST_RATIO * duration).astype(np.int64)
            effective = watch >= np.minimum(duration, 7_000)
            page = np.full(n, position // PAGE)
            session = first + order[:n]
            made += self._reports(rows, items, clock[:n], watch, duration, session, page)
            for kind, name in enumerate(TYPES[1:], start=1):
                done = (self.rng.random(n) < getattr(said, name)) & (effective | (name == "dislike"))
                at = clock[:n] + (self.rng.uniform(0.2, 1, n) * watch).astype(np.int64)
                made += self._event(kind, rows, items, at, at, session, page, done)
            towards = mood[:n] * 0.7 + tastes[:n] * 0.3 + 0.5 * self.world.item_vectors[items]
            mood = np.where(effective[:, None], towards, mood[:n])
            clock[:n] += watch + self.rng.integers(300, 3_000, n)
        self.free_from[users] = clock + BREAK_MS
        return made

    def _popularity(self, day: int, now: int) -> Floats:
        """Running sum of the items' popularity, [N]: quality, age and the trend of their topic."""
        world = self.world
        age_days = np.maximum(now - world.upload_ms, 0) / DAY_MS
        weight = np.exp(0.8 * world.quality) * (0.15 + np.exp(-age_days / 4)) * world.trend(day)[world.topic]
        return np.cumsum(weight)

    def _choose(self, users: Ints, mood: Floats, clock: Ints, popularity: Floats) -> Ints:
        """The next item for each user [n]: of some popular ones that exist by now and are new to him, the one closest
        to his mood, with Gumbel noise. Items are numbered by upload, so that what exists is a prefix."""
        exists = np.searchsorted(self.world.upload_ms, clock, side="right")
        exists = np.maximum(exists, 1)
        drawn = self.rng.random((len(users), CANDIDATES)) * popularity[exists - 1][:, None]
        candidates = np.minimum(np.searchsorted(popularity, drawn, side="right"), exists[:, None] - 1)
        appeal = np.einsum("ncd,nd->nc", self.world.item_vectors[candidates], mood)
        appeal = 6 * appeal + self.rng.gumbel(size=appeal.shape)
        known = (candidates.astype(np.int32)[:, :, None] == self.shown[users][:, None, :]).any(axis=2)
        best = np.argmax(np.where(known, appeal - 1e3, appeal), axis=1)
        items = candidates[np.arange(len(users)), best]
        self.shown[users, self.shown_count[users] % REMEMBERED] = items
        self.shown_count[users] += 1
        return items

    def _event(self, kind: int, users: Ints, items: Ints, ts: Ints, sent: Ints, session: Ints, page: Ints,
               keep: np.ndarray, **more: Ints) -> list[Columns]:
        """The kept rows as events, with the few that arrive late, and the few that arrive twice."""
        config = self.world.config
        n = int(keep.sum())
        if n == 0:
            return []
        blank = np.zeros(n, dtype=np.int64)
        columns: Columns = {
            "type": blank + kind, "user": users[keep], "item": items[keep], "ts": ts[keep],
            "watch_ms": blank, "duration_ms": blank, "session": session[keep], "page": page[keep],
            "event": blank - 1, **{name: values[keep] for name, values in more.items()},
        }
        late = self.rng.random(n) < config.late_share
        delay = np.where(late, self.rng.integers(600_000, 3_600_000, n), self.rng.integers(20, 2_000, n))
        columns["arrival"] = sent[keep] + delay
        self.events += n
        twice = self.rng.random(n) < config.duplicate_share
        if not twice.any():
            return [columns]
        again = {name: values[twice] for name, values in columns.items()}
        again["arrival"] = again["arrival"] + self.rng.integers(100, 60_000, int(twice.sum()))
        self.events += int(twice.sum())
        return [columns, again]

    def _reports(self, users: Ints, items: Ints, ts: Ints, watch: Ints, duration: Ints, session: Ints,
                 page: Ints) -> list[Columns]:
        """Watches, sent when they end; a few report half-way too, under one event id."""
        n = len(users)
        reports = self.rng.random(n) < self.world.config.progress_share
        number = np.where(reports, self.watches + np.arange(n), -1)
        self.watches += n
        everyone = np.ones(n, dtype=bool)
        half = watch // 2
        final = self._event(0, users, items, ts, ts + watch, session, page, everyone,
                            watch_ms=watch, duration_ms=duration, event=number)
        progress = self._event(0, users, items, ts, ts + half, session, page, reports,
                               watch_ms=half, duration_ms=duration, event=number)
        return progress + final
