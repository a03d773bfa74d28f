"""The hidden truth of the simulated world: who likes what, how that drifts, and what a session is really worth.

Axes: U users, N items, D latent dimensions, n sessions, m items of a session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

from onerec.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DAY_MS = 86_400_000
DIMENSION = 32
EFFECTIVE_MS = 7_000.0
SWT_CAP_MS = 300_000.0
WATCH_SIGMA = 0.7
LONGEST_RATIO = 2.0
"""Nobody loops a video more than this many times its length."""

CATEGORIES = (
    "music", "cooking", "football", "pets", "travel", "comedy", "fashion", "gaming", "science", "cars", "fitness",
    "art", "history", "gardening", "dance", "news", "film", "diy", "nature", "parenting", "chess", "hiking", "coding",
    "magic",
)
TOPICS_PER_CATEGORY = 4


class WorldConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides the world; two equal configurations give the same world, bit for bit."""

    users: int = 1_000
    items: int = 2_000
    days: int = 7
    seed: int = 0
    start_ms: int = 1_704_067_200_000
    """First midnight, epoch milliseconds: 1 January 2024 UTC, so that no event lies in the future."""
    drift: float = 0.08
    """How far a taste moves in a day, as a share of its length."""
    sessions_per_day: float = 1.5
    late_share: float = 0.001
    duplicate_share: float = 0.003
    progress_share: float = 0.02
    """Share of the watches that also send a report half-way."""
    first_items: int | None = None
    """How many of the items exist on the first day; None: half of them."""
    daily_rhythm: bool = True
    """False: sessions start at the same rate at every hour."""

    def __post_init__(self) -> None:
        """Refuse what no world can be made of."""
        for name in ("users", "items", "days"):
            if getattr(self, name) < 1:
                raise UserError(f"simulate: --{name} must be at least 1, not {getattr(self, name)}")
        for name in ("late_share", "duplicate_share", "progress_share"):
            if not 0 <= getattr(self, name) <= 1:
                option = name.replace("_", "-")
                raise UserError(f"simulate: --{option} must lie between 0 and 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"simulate: --seed must be 0 or more, not {self.seed}")
        if not 631_152_000_000 <= self.start_ms <= 253_402_300_799_000:
            raise UserError(f"simulate: --start-ms {self.start_ms} is no epoch time in milliseconds after 1990")


class Reward(NamedTuple):
    """Expected session labels of SEMANTICS.md §6; arrays of shape [n], or scalars for one session."""

    swt: Floats
    vtr: Floats
    wtr: Floats
    ltr: Floats


class Responses(NamedTuple):
    """What a user does with an item shown at a place of a session; arrays of one shape."""

    log_watch: Floats
    """Mean of the logarithm of the watch time in ms; normal, with deviation WATCH_SIGMA, then capped."""
    effective: Floats
    """Probability of an effective watch (SEMANTICS.md §4)."""
    like: Floats
    """Probabilities of interactions, given an effective watch; `dislike` given any watch."""
    follow: Floats
    share: Floats
    collect: Floats
    comment: Floats
    dislike: Floats


def _unit(vectors: Floats) -> Floats:
    """Rows scaled to length one."""
    norms: Floats = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))[..., None]
    return vectors / np.maximum(norms, 1e-12)


class World:
    """Latent tastes and items, and the response of any user to any session.

    Dot products go through `einsum`, never BLAS, whose result depends on the number of threads.
    """

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        rng = np.random.default_rng([config.seed, 1])
        topics = len(CATEGORIES) * TOPICS_PER_CATEGORY
        centres = _unit(rng.standard_normal((len(CATEGORIES), DIMENSION)))
        self.topic_vectors: Floats = _unit(
            np.repeat(centres, TOPICS_PER_CATEGORY, axis=0) + 0.6 * _unit(rng.standard_normal((topics, DIMENSION)))
        )
        authors = max(4, config.items // 12)
        author_topic = rng.integers(0, topics, authors)
        author_offset = _unit(rng.standard_normal((authors, DIMENSION)))

        n = config.items
        self.author: Ints = rng.integers(0, authors, n)
        self.topic: Ints = author_topic[self.author]
        self.item_vectors: Floats = _unit(
            self.topic_vectors[self.topic]
            + 0.4 * author_offset[self.author]
            + 0.4 * _unit(rng.standard_normal((n, DIMENSION)))
        )
        self.quality: Floats = rng.standard_normal(n)
        self.duration_ms: Ints = np.clip(np.exp(rng.normal(np.log(22_000), 0.7, n)), 4_000, 180_000).astype(np.int64)
        self.upload_ms: Ints = self._uploads(rng)
        self.embeddings: Floats = self.item_vectors + 0.06 * rng.standard_normal((n, DIMENSION))

        self.activity: Floats = rng.gamma(2.0, 0.5, config.users)
        self._tastes: dict[int, Floats] = {0: self._first_tastes(rng)}
        self._targets: Ints = rng.integers(0, topics, config.users)

    def _uploads(self, rng: np.random.Generator) -> Ints:
        """Upload times, ascending: half the catalogue in the month before, the rest spread over every day."""
        config = self.config
        old = (config.items + 1) // 2 if config.first_items is None else min(config.first_items, config.items)
        new = config.items - old
        before = rng.integers(config.start_ms - 30 * DAY_MS, config.start_ms, old)
        day = np.arange(new) * config.days // max(new, 1)
        during = config.start_ms + day * DAY_MS + rng.integers(0, DAY_MS, new)
        return np.sort(np.concatenate([before, during]))

    def _first_tastes(self, rng: np.random.Generator) -> Floats:
        """Three interests a user, of falling weight, and something of his own. [U, D]."""
        users = self.config.users
        interests = rng.integers(0, len(self.topic_vectors), (users, 3))
        weights = np.array([0.7, 0.4, 0.3])
        mixed = np.einsum("uid,i->ud", self.topic_vectors[interests], weights)
        return _unit(mixed + 0.25 * _unit(rng.standard_normal((users, DIMENSION))))

    def tastes(self, day: int) -> Floats:
        """Taste vectors of all users on a day (0 is the first), [U, D], unit length.

        Each user is pulled towards one topic, which changes every five days on average. KeyError for a day forgotten.
        """
        while (newest := max(self._tastes)) < day:
            rng = np.random.default_rng([self.config.seed, 2, newest + 1])
            changed = rng.random(self.config.users) < 0.2
            drawn = rng.integers(0, len(self.topic_vectors), self.config.users)
            self._targets = np.where(changed, drawn, self._targets)
            pull = self.topic_vectors[self._targets]
            self._tastes[newest + 1] = _unit(self._tastes[newest] + self.config.drift * pull)
        return self._tastes[day]

    def forget_before(self, day: int) -> None:
        """Drops the tastes of earlier days, which a world that goes on for long cannot all keep."""
        self._tastes = {kept: tastes for kept, tastes in self._tastes.items() if kept >= day}

    def trend(self, day: int) -> Floats:
        """What each topic's popularity is multiplied with on a day, [topics]: slow waves of their own phase."""
        rng = np.random.default_rng([self.config.seed, 3])
        period = rng.uniform(5, 20, len(self.topic_vectors))
        phase = rng.uniform(0, 2 * np.pi, len(self.topic_vectors))
        return np.exp(0.9 * np.sin(2 * np.pi * day / period + phase))

    def fatigue(self, topics: Ints) -> Floats:
        """How tired of a topic a user is at each place: 0.4 for each of the three items before it on the same one.

        `topics` [n, m] in session order; −1 matches nothing.
        """
        tired = np.zeros(topics.shape)
        for back in (1, 2, 3):
            if topics.shape[1] > back:
                tired[:, back:] += 0.4 * (topics[:, back:] == topics[:, :-back])
        return tired

    def responses(self, tastes: Floats, items: Ints, tired: Floats, position: Floats | int) -> Responses:
        """Response to items [...] by users with `tastes` [..., D], shown at a position (0 first)."""
        affinity = np.einsum("...d,...d->...", tastes, self.item_vectors[items])
        score = 2.5 * (affinity - 0.35) + 0.25 * self.quality[items] - tired - 0.01 * np.asarray(position, float)
        duration = self.duration_ms[items].astype(float)
        log_watch = np.log(duration) - 0.7 + 0.9 * score - 0.35 * np.log(duration / 20_000)
        needed = np.log(np.minimum(duration, EFFECTIVE_MS))
        return Responses(
            log_watch=log_watch,
            effective=ndtr((log_watch - needed) / WATCH_SIGMA),
            like=expit(-2.7 + 1.6 * score),
            follow=expit(-4.6 + 1.5 * score),
            share=expit(-4.8 + 1.2 * score),
            collect=expit(-5.2 + 1.2 * score),
            comment=expit(-5.2 + 0.8 * score),
            dislike=expit(-5.5 - 1.5 * score),
        )

    def user_index(self, user_id: str) -> int:
        """Row of a user; KeyError for an id that this world does not have."""
        return _index(user_id, "u", self.config.users)

    def item_index(self, item_id: str) -> int:
        """Row of an item; KeyError for an id that this world does not have."""
        return _index(item_id, "v", self.config.items)

    def true_rewards(self, users: Ints, items: Ints, day: int) -> Reward:
        """Expected labels of sessions `items` [n, m] shown to `users` [n] on a day; arrays [n].

        `vtr`, `wtr`, `ltr` are exact; `swt` is exact for watch times rounded to 0.5 s.
        """
        places = np.arange(items.shape[1], dtype=float)
        tastes = self.tastes(day)[users][:, None, :]
        said = self.responses(tastes, items, self.fatigue(self.topic[items]), places)
        return Reward(
            swt=self._expected_swt(said.log_watch, self.duration_ms[items]),
            vtr=said.effective.mean(axis=1),
            wtr=1 - np.prod(1 - said.effective * said.follow, axis=1),
            ltr=1 - np.prod(1 - said.effective * said.like, axis=1),
        )

    def true_reward(self, user: str, items: Sequence[str], day: int | None = None) -> Reward:
        """Expected labels of one session of item ids for one user id, on the last day unless told; floats."""
        when = self.config.days - 1 if day is None else day
        rows = np.array([[self.item_index(item) for item in items]], dtype=np.int64)
        reward = self.true_rewards(np.array([self.user_index(user)]), rows, when)
        return Reward(*(values[0] for values in reward))

    @staticmethod
    def _expected_swt(log_watch: Floats, duration_ms: Ints, step: float = 500.0) -> Floats:
        """E[min(1, total / cap)]: the distributions of the items' watch times, convolved on a grid. [n, m] → [n]."""
        bins = int(SWT_CAP_MS / step)
        edges = np.log((np.arange(bins) + 0.5) * step)
        total = np.zeros((len(log_watch), bins + 1))
        total[:, 0] = 1
        longest = np.minimum(np.rint(LONGEST_RATIO * duration_ms / step), bins).astype(int)
        for item in range(log_watch.shape[1]):
            below = ndtr((edges - log_watch[:, item, None]) / WATCH_SIGMA)
            below[np.arange(bins) >= longest[:, item, None]] = 1
            mass = np.diff(np.column_stack([np.zeros(len(below)), below, np.ones(len(below))]), axis=1)
            size = 4 * bins
            both = np.fft.irfft(np.fft.rfft(total, size) * np.fft.rfft(mass, size), size)
            total = both[:, : bins + 1]
            total[:, bins] = both[:, bins:].sum(axis=1)
        return np.einsum("nb,b->n", total, np.arange(bins + 1) / bins)


def _index(name: str, letter: str, size: int) -> int:
    """The number in `u12` or `v12`."""
    digits = name[1:]
    if name[:1] != letter or not digits.isdecimal() or int(digits) >= size:
        raise KeyError(f"{name} is not in this world")
    return int(digits)
